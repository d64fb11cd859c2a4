"""Writes a tiny Qwen-Image checkpoint in Diffusers format, with random weights that make every mistake visible.

    python tests/qwen_checkpoint.py FOLDER [--kind edit|edit-plus] [--seed N] [--dtype float32|bfloat16] [--distilled]

Weights are drawn as in random_checkpoint.py; modulations are linear maps here, drawn like all others. `--distilled`
writes the schedule of checkpoints for few steps.
"""

import argparse
import copy
import json
import math
import os
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from random_checkpoint import SPECIAL, strong_
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SYSTEM = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:"
)
SAMPLE = f"{SYSTEM}\nuser\n\nassistant\n a red fox in the snow, a small blue house beside a tree, oil painting. "
EDIT_SYSTEM = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate."
)
EDIT_SAMPLE = (
    f"{EDIT_SYSTEM}\nuser\nPicture 1: Picture 2: Picture 3: \nassistant\n make the sky red, put a small blue house "
    "beside the tree and remove the dog. "
)
EDITS = {"edit": QwenImageEditPipeline, "edit-plus": QwenImageEditPlusPipeline}
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
DISTILLED = SCHEDULER | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
# Text and image widths differ, and the head width is not a power of two.
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 20,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (4, 6, 10),
}
TEXT = {
    "vocab_size": 640,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 3]},
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "fullatt_block_indexes": [1]}
# Windowed and full layers by turns, and a window before the first full layer.
EDIT_VISION = {"depth": 4, "hidden_size": 48, "intermediate_size": 44, "num_heads": 3, "fullatt_block_indexes": [1, 3]}
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
TINY = {"transformer": TRANSFORMER, "text": TEXT, "vision": EDIT_VISION, "vae": VAE}
# Large enough for times; the head widths are the real ones.
SMALL = {
    "transformer": {
        **TRANSFORMER,
        **{"num_layers": 6, "attention_head_dim": 128, "joint_attention_dim": 512, "axes_dims_rope": (16, 56, 56)},
    },
    "text": {
        **TEXT,
        **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision": {
        **{"depth": 6, "hidden_size": 320, "intermediate_size": 848, "num_heads": 4},
        "fullatt_block_indexes": [2, 5],
    },
    "vae": {"base_dim": 32, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
}


def make_tokenizer(sample: str = SAMPLE) -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer with Qwen's special tokens and one token for each word of the template.

    The template then has as many tokens as with the real one: 34 before the prompt, or 64 with pictures.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([sample] * 4, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    made = Qwen2Tokenizer(vocab=state["vocab"], merges=merges, pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": [token for token in SPECIAL if token != "<|endoftext|>"]})
    return made


def make_processor(words: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Return the reference's processor without its video processor, which needs torchvision."""
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 12845056}, patch_size=14, temporal_patch_size=2, merge_size=2
    )

    class WithoutVideo(Qwen2VLProcessor):
        attributes = ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, name, value):
            return type(value)

    return WithoutVideo(image_processor=images, tokenizer=words, video_processor=object())


def make_text_encoder(
    words: Qwen2Tokenizer, vision: dict = VISION, text: dict = TEXT
) -> Qwen2_5_VLForConditionalGeneration:
    """Return the text encoder, as its class initialises it."""
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=copy.deepcopy(text),
            vision_config={**vision, "out_hidden_size": text["hidden_size"]},
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        )
    )


def make_pipeline(*, seed: int = 0, distilled: bool = False) -> QwenImagePipeline:
    """Return the reference's pipeline, float32, with strong random weights."""
    generator = torch.Generator().manual_seed(seed)
    words = make_tokenizer()
    parts = {
        "text_encoder": make_text_encoder(words),
        "transformer": QwenImageTransformer2DModel(**TRANSFORMER),
        "vae": AutoencoderKLQwenImage(**VAE),
    }
    for part in parts.values():
        strong_(part.eval(), generator)
    scheduler = FlowMatchEulerDiscreteScheduler(**(DISTILLED if distilled else SCHEDULER))
    pipeline = QwenImagePipeline(scheduler=scheduler, tokenizer=words, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_edit_pipeline(
    kind: str = "edit", *, seed: int = 0, sizes: dict = TINY, **transformer: object
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """Return the reference's pipeline of a kind of edits, float32; `transformer` are further keys of its config."""
    generator = torch.Generator().manual_seed(seed)
    words = make_tokenizer(EDIT_SAMPLE)
    parts = {
        "text_encoder": make_text_encoder(words, sizes["vision"], sizes["text"]),
        "transformer": QwenImageTransformer2DModel(**sizes["transformer"], **transformer),
        "vae": AutoencoderKLQwenImage(**sizes["vae"]),
    }
    for part in parts.values():
        strong_(part.eval(), generator)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipeline = EDITS[kind](scheduler=scheduler, tokenizer=words, processor=make_processor(words), **parts)
    pipeline.set_progress_bar_config(disable=True)
    pass_image_tokens(pipeline.text_encoder)
    return pipeline


def pass_image_tokens(text_encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    """Tell the text encoder which tokens are pictures', so that it gives them positions of three axes.

    Diffusers 0.42.1 does not pass this on, and Transformers 5 then counts all tokens in one row.
    """

    def pass_on(module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kinds = (kwargs["input_ids"] == text_encoder.config.image_token_id).int()
        return args, {"mm_token_type_ids": kinds, **kwargs}

    text_encoder.register_forward_pre_hook(pass_on, with_kwargs=True)


def save(
    pipeline: QwenImagePipeline,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    resaved: bool = False,
    shard_size: str = "10GB",
) -> Path:
    """Write the pipeline as Diffusers does.

    `resaved`: the text encoder's tensors have the names of Transformers 5 in memory, in place of the published ones.
    """
    folder = Path(folder)
    for name in ("transformer", "text_encoder", "vae"):
        part = getattr(pipeline, name)
        if (
            dtype != torch.float32
        ):  # a copy, since the conversion rounds the RoPE frequencies too, which are not parameters
            part = copy.deepcopy(part).to(dtype)
        part.save_pretrained(folder / name, max_shard_size=shard_size)
        if resaved and name == "text_encoder":
            save_file({key: value.contiguous() for key, value in part.state_dict().items()}, file_of(folder))
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": type(pipeline).__name__,
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    if getattr(pipeline, "processor", None) is not None:
        pipeline.tokenizer.save_pretrained(folder / "processor")
        pipeline.processor.image_processor.save_pretrained(folder / "processor")
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def file_of(folder: Path) -> Path:
    """Return the file of the text encoder's weights."""
    return folder / "text_encoder" / "model.safetensors"


def text_encoder_names(folder: Path) -> set[str]:
    """Return the names of the text encoder's tensors in a checkpoint."""
    return set(load_file(file_of(folder)))


def main() -> None:
    """Write a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=EDITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--distilled", action="store_true")
    arguments = parser.parse_args()
    if arguments.kind is None:
        pipeline = make_pipeline(seed=arguments.seed, distilled=arguments.distilled)
    else:
        pipeline = make_edit_pipeline(arguments.kind, seed=arguments.seed)
    print(save(pipeline, arguments.folder, dtype=getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
