"""A tiny Qwen-Image-Layered checkpoint: that of qwen_checkpoint.py with the transformer and autoencoder of layers."""

import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageLayeredPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from qwen_checkpoint import TRANSFORMER, VAE, save
from random_checkpoint import strong_

BASE_SIZE = 96  # the checkpoint's own


def make_pipeline(plain: QwenImagePipeline, *, seed: int = 7) -> QwenImageLayeredPipeline:
    """Return the reference's pipeline, float32, with the text encoder of a text-to-image pipeline."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "transformer": QwenImageTransformer2DModel(**TRANSFORMER, use_additional_t_cond=True, use_layer3d_rope=True),
        "vae": AutoencoderKLQwenImage(**VAE, input_channels=4),
    }
    for part in parts.values():
        strong_(part.eval(), generator)
    parts["transformer"].time_text_embed.addition_t_embedding.weight.data.normal_(generator=generator)
    pipeline = QwenImageLayeredPipeline(
        scheduler=plain.scheduler,
        tokenizer=plain.tokenizer,
        text_encoder=plain.text_encoder,
        processor=None,  # for captions only
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_layered(pipeline: QwenImageLayeredPipeline, folder: str | os.PathLike, **options: object) -> Path:
    """Write the pipeline as Diffusers does, with a base size of its own; `options` are those of `save`."""
    folder = save(pipeline, folder, **options)
    (folder / "joyjax.json").write_text(json.dumps({"base_size": BASE_SIZE}))
    return folder
