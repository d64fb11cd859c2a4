"""The demo model: its configurations, and its checkpoint in Diffusers format.

A JoyImage-Edit of six million parameters that edits pictures of coloured shapes, 128 × 128.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from joyjax.convert import joyimage_original
from joyjax.convert.component import Component
from joyjax.convert.generation_defaults import FILE, GenerationDefaults
from joyjax.families.family import Parts
from joyjax.families.joyimage import EDIT
from joyjax.families.joyimage_prompt import SYSTEM
from joyjax.layers.weights import Weights, leaves
from joyjax.reading import write_json
from joyjax.shapes.edits import KINDS, pairs
from joyjax.shapes.scene import SIDE
from joyjax.shapes.wording import sentence
from joyjax.training.optimizer import Parameters
from joyjax.training.tokenizer import save_tokenizer, train_tokenizer

VOCABULARY = 640
TRANSFORMER = {
    "_class_name": "JoyImageEditTransformer3DModel",
    "hidden_size": 160,
    "num_attention_heads": 5,
    "num_layers": 6,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 128,
    "mlp_width_ratio": 4.0,
    "rope_dim_list": [8, 12, 12],
    "rope_type": "rope",
    "theta": 100,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
TEXT = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 320,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "use_cache": True,
}
VISION = {
    "model_type": "qwen3_vl",
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "initializer_range": 0.02,
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    # The real processor enlarges pictures below 65,536 pixels; 128 × 128 must not be resized.
    "size": {"shortest_edge": SIDE * SIDE // 16, "longest_edge": 16777216},
}
VERSION = {"_diffusers_version": "0.42.1"}
SCHEDULER = {**joyimage_original.SCHEDULER, **VERSION}
INDEX = {**joyimage_original.INDEX, **VERSION}
SETTINGS = GenerationDefaults(
    base_size=SIDE, steps=4, guidance_scale=1.0, domain="shapes"
)  # chosen by the score: docs/demo.md


def vae_config(latents_mean: list[float], latents_std: list[float]) -> dict[str, Any]:
    """Return the autoencoder's config.json."""
    return {**VAE, "latents_mean": latents_mean, "latents_std": latents_std}


def sample_texts(seed: int, count: int) -> list[str]:
    """Return the tokenizer's training texts: the template, and instructions of every kind."""
    rng = np.random.default_rng(seed)
    head, _, tail = SYSTEM.partition("nDescribe")
    texts = [head, "Describe" + tail, "user\n", "assistant\n"] * count
    for kind in KINDS:
        drawn = pairs(rng, kind, held=False)
        for _ in range(count):
            pair = next(drawn)
            texts += [sentence(rng, pair) for _ in range(3)]
    return texts


def write_skeleton(folder: Path, latents_mean: list[float], latents_std: list[float]) -> Parts:
    """Write everything of the checkpoint but its weights, and read it as inference does."""
    tokenizer = train_tokenizer(sample_texts(0, 500), VOCABULARY)
    for name in ("tokenizer", "processor"):
        save_tokenizer(tokenizer, folder / name)
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "endoftext")}
    encoder = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": ids["endoftext"]},
        "vision_config": VISION,
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "tie_word_embeddings": True,
    }
    write_json(folder / "text_encoder" / "config.json", encoder)
    write_json(folder / "transformer" / "config.json", TRANSFORMER)
    write_json(folder / "vae" / "config.json", vae_config(latents_mean, latents_std))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "processor" / "preprocessor_config.json", PROCESSOR)
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / FILE, SETTINGS.plain())
    return read_files(folder)


def read_files(folder: Path) -> Parts:
    """Read everything of a checkpoint but its weights."""
    return EDIT.read(folder, {part.folder: part.read_config(folder) for part in EDIT.components})


def fresh_parameters(component: Component, config: Any, seed: int) -> Parameters:
    """Return random initial parameters, in float32.

    The transformer starts with a zero output, and word embeddings start small.
    """
    scale = {"out.kernel": 0.0, "time_out.kernel": 0.0, "language.embed.table": 0.3, "visual.position.table": 0.1}

    @jax.jit
    def draw(key: Array) -> Parameters:
        weights = Weights.of(component.build(config, dtype=np.float32, rngs=nnx.Rngs(key)))
        return {path: leaf[...] * scale.get(path, 1.0) for path, leaf in leaves(weights.state).items()}

    return draw(jax.random.key(seed))
