"""The demo's tokenizer: Qwen's pre-tokenizer and control tokens, with its own small vocabulary."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from joyjax.processors.tokenizer import qwen_tokenizer
from joyjax.reading import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    "<|video_pad|>",
)


def train_tokenizer(texts: Iterable[str], size: int) -> "Tokenizer":
    """Return a byte-level BPE tokenizer of about `size` tokens, which encodes any text without unknown tokens."""
    from tokenizers import AddedToken, models, pre_tokenizers, trainers

    made = qwen_tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = size - len(CONTROL) - 1
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(name, normalized=False) for name in (END, *CONTROL)])
    return made


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write a tokenizer's folder, as Transformers reads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": None,
        "backend": "tokenizers",
        "bos_token": None,
        "eos_token": END,
        "extra_special_tokens": list(CONTROL),
        "model_max_length": 10**30,
        "pad_token": END,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": END,
    }
    write_json(folder / "tokenizer_config.json", config)
