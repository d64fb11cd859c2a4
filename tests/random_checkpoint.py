"""Writes a JoyImage-Edit checkpoint of any size in Diffusers format, with random weights that make mistakes visible.

    python tests/random_checkpoint.py FOLDER [--size tiny|small|wide] [--seed N] [--plus] [--dtype float32|bfloat16]

With default initialisation most mistakes change the picture too little to be seen. Here matrices are drawn from
N(0, 1.5/√fan_in), embeddings from N(0, 1), norms and biases get noise, and the modulation tables, which are zero at
initialisation, are drawn from N(0, 0.5).
"""

import argparse
import copy
import json
import os
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
SAMPLE = (
    "system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background: user\n assistant\n make the sky red, remove the small dog and add a "
    "blue tree."
)

SIZES = {
    "tiny": {
        "transformer": {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 3, "rope_dim_list": [4, 6, 6]},
        "text": {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2},
        "text_more": {"head_dim": 16, "intermediate_size": 96, "mrope_section": [4, 2, 2]},
        "vision": {"depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
        "vision_more": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
        "vae": {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    },
    "small": {
        "transformer": {"hidden_size": 512, "num_attention_heads": 8, "num_layers": 6, "rope_dim_list": [16, 24, 24]},
        "text": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4},
        "text_more": {"head_dim": 64, "intermediate_size": 1536, "mrope_section": [12, 10, 10]},
        "vision": {"depth": 6, "hidden_size": 256, "num_heads": 4, "intermediate_size": 1024},
        "vision_more": {"num_position_embeddings": 2304, "deepstack_visual_indexes": [1, 2, 3]},
        "vae": {"base_dim": 32, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    },
}


def make_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer of about 500 tokens with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([SAMPLE] * 4, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    made = Qwen2Tokenizer(vocab=state["vocab"], merges=merges, pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": [token for token in SPECIAL if token != "<|endoftext|>"]})
    return made


def make_processor(tokenizer: Qwen2Tokenizer, shortest_edge: int = 1024) -> Qwen3VLProcessor:
    """Return the reference's processor without its video processor, which needs torchvision."""
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": shortest_edge, "longest_edge": 16777216},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )

    class WithoutVideo(Qwen3VLProcessor):
        attributes = ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, name, value):
            return type(value)

    return WithoutVideo(image_processor=images, tokenizer=tokenizer, video_processor=object())


def strong_(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraw every parameter so that each one affects the result."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("modulate_table"):
            p.data = 0.5 * noise
        elif "embed_tokens" in name or "pos_embed" in name:
            p.data = noise
        elif name.endswith("bias"):
            p.data = 0.1 * noise
        elif p.ndim == 1 or name.endswith("gamma"):
            p.data = 1 + 0.1 * noise
        else:
            p.data = 1.5 / (p[0].numel() ** 0.5) * noise


def make_pipeline(
    size: str = "tiny",
    *,
    seed: int = 0,
    plus: bool = False,
    rope_type: str = "rope",
    tokenizer: str | os.PathLike | None = None,
    shortest_edge: int = 1024,
) -> JoyImageEditPipeline | JoyImageEditPlusPipeline:
    """Return the reference's pipeline, float32, with strong random weights; by default with a tiny tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES[size]
    words = Qwen2Tokenizer.from_pretrained(tokenizer) if tokenizer else make_tokenizer()
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    hidden = sizes["text"]["hidden_size"]
    more = dict(sizes["text_more"])
    mrope = {"rope_type": "default", "mrope_section": more.pop("mrope_section"), "mrope_interleaved": True}
    text = {"vocab_size": max(len(words), 512), **sizes["text"], **more, "rope_scaling": mrope, "rope_theta": 5e6}
    vision = {**sizes["vision"], **sizes["vision_more"], "out_hidden_size": hidden, "patch_size": 16}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    transformer_class = JoyImageEditPlusTransformer3DModel if plus else JoyImageEditTransformer3DModel
    parts = {
        "text_encoder": Qwen3VLForConditionalGeneration(config),
        "transformer": transformer_class(
            **sizes["transformer"], text_dim=hidden, theta=10000, rope_type=rope_type, out_channels=16
        ),
        "vae": AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **sizes["vae"]),
    }
    for part in parts.values():
        strong_(part.eval(), generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    pipeline_class = JoyImageEditPlusPipeline if plus else JoyImageEditPipeline
    pipeline = pipeline_class(
        scheduler=scheduler, tokenizer=words, processor=make_processor(words, shortest_edge), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(
    pipeline: JoyImageEditPipeline | JoyImageEditPlusPipeline,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "10GB",
) -> Path:
    """Write the pipeline as Diffusers does. Part by part, since its processor cannot be saved without torchvision."""
    folder = Path(folder)
    for name in ("transformer", "text_encoder", "vae"):
        part = getattr(pipeline, name)
        if (
            dtype != torch.float32
        ):  # a copy, since the conversion rounds the RoPE frequencies too, which are not parameters
            part = copy.deepcopy(part).to(dtype)
        part.save_pretrained(folder / name, max_shard_size=shard_size)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.tokenizer.save_pretrained(folder / "processor")
    pipeline.processor.image_processor.save_pretrained(folder / "processor")
    index = {
        "_class_name": type(pipeline).__name__,
        "_diffusers_version": "0.42.1",
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "text_token_max_length": 2048,
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", type(pipeline.transformer).__name__],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def load(folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> JoyImageEditPipeline:
    """Read an Edit checkpoint into Diffusers, part by part, since its processor cannot be read without torchvision."""
    folder = Path(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    processor = make_processor(tokenizer)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    pipeline = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype),
        tokenizer=tokenizer,
        transformer=JoyImageEditTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
        processor=processor,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Write a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plus", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shortest-edge", type=int, default=1024)
    arguments = parser.parse_args()
    pipeline = make_pipeline(
        arguments.size, seed=arguments.seed, plus=arguments.plus, shortest_edge=arguments.shortest_edge
    )
    print(save(pipeline, arguments.folder, dtype=getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
