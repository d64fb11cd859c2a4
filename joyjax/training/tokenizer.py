"""The demo's tokenizer: Qwen's pre-tokenizer and control tokens, with its own small vocabulary."""

import json
from collections.abc import Iterable
from typing import Any

CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Return a byte-level BPE tokenizer of about `size` tokens, which encodes any text without unknown tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import Qwen2Tokenizer

    cut = json.loads(Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]).backend_tokenizer.to_str())["pre_tokenizer"]
    blank = Tokenizer(models.BPE())
    blank.normalizer = normalizers.NFC()
    blank.decoder = decoders.ByteLevel()
    state = json.loads(blank.to_str()) | {"pre_tokenizer": cut}
    trained = Tokenizer.from_str(json.dumps(state))
    alphabet = _byte_letters()
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size - len(CONTROL), initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    made = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": [name for name in CONTROL if name != "<|endoftext|>"]})
    return made


def _byte_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
