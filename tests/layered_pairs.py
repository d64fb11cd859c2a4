"""Layers of one picture by Diffusers' QwenImageLayeredPipeline and by joyjax, from the same noise."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layered_checkpoint import BASE_SIZE
from pairs import photo
from PIL import Image
from qwen_pairs import NEGATIVE, PATCH, channel_first, channel_last

import joyjax
from joyjax.families.qwen_image_layered_stages import natural_size
from joyjax.layers.patch import patchify

STEPS = 3
PROMPT = "a small blue house beside a tree"


def cutout(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with alpha: opaque, half transparent and fully transparent parts, each with colours."""
    picture = photo(height, width, seed).convert("RGBA")
    alpha = np.full((height, width), 255, np.uint8)
    alpha[: height // 3] = 0
    alpha[height // 3 : height // 2, width // 2 :] = 120
    picture.putalpha(Image.fromarray(alpha))
    return picture


def draw(picture: Image.Image, layers: int, base_size: int = BASE_SIZE, seed: int = 0) -> np.ndarray:
    height, width = natural_size((picture.height, picture.width), base_size)
    shape = 1, layers + 1, height // 8, width // 8, 16
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def their_layers(
    pipeline: Any,
    monkeypatch: pytest.MonkeyPatch,
    picture: Image.Image,
    noise: np.ndarray,
    *,
    base_size: int = BASE_SIZE,
    prompt: str = PROMPT,
    negative: str | None = NEGATIVE,
    scale: float = 4.0,
    steps: int = STEPS,
    cfg_normalize: bool = False,
    callback: Callable[..., Any] | None = None,
) -> list[np.ndarray]:
    """Return the layers. The reference takes two resolutions; its function of an area is given a smaller one."""
    import torch
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as module

    right = module.calculate_dimensions
    tokens = channel_first(patchify(noise[0], PATCH).reshape(1, -1, 64))
    with monkeypatch.context() as patch:
        patch.setattr(module, "calculate_dimensions", lambda _, ratio: right(base_size**2, ratio))
        result = pipeline(
            image=picture,
            prompt=prompt,
            negative_prompt=negative,
            true_cfg_scale=scale,
            layers=noise.shape[1] - 1,
            num_inference_steps=steps,
            cfg_normalize=cfg_normalize,
            latents=torch.from_numpy(tokens).to(pipeline.transformer.dtype),
            callback_on_step_end=callback,
        )
    return [np.asarray(layer) for layer in result.images[0]]


def our_layers(
    pipeline: joyjax.Pipeline,
    picture: Image.Image,
    noise: np.ndarray,
    *,
    base_size: int = BASE_SIZE,
    prompt: str = PROMPT,
    steps: int = STEPS,
    **options: Any,
) -> list[np.ndarray]:
    defaults = dataclasses.replace(pipeline.generation_defaults, base_size=base_size)
    pipeline = dataclasses.replace(pipeline, generation_defaults=defaults)
    layers = noise.shape[1] - 1
    result = joyjax.edit(pipeline, picture, prompt, layers=layers, noise=noise, steps=steps, **options)
    assert [layer.mode for layer in result.layers] == ["RGBA"] * layers
    assert result.image.mode == "RGBA"
    return [np.asarray(layer) for layer in result.layers]


def their_stages(pipeline: Any, *given: Any, **options: Any) -> dict[str, np.ndarray]:
    """Return what the reference passes on from stage to stage, with the layers."""
    stages: dict[str, np.ndarray] = {}

    def transformer_hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        tokens = channel_last(kwargs["hidden_states"].numpy())
        frame = tokens.shape[1] // len(kwargs["img_shapes"][0])
        stages.setdefault("condition", tokens[:, -frame:])
        stages.setdefault("first velocity", channel_last(output[0].numpy())[:, :-frame])

    def step_hook(pipe: Any, n: int, t: Any, values: dict) -> dict:
        stages[f"latents after step {n + 1}"] = channel_last(values["latents"].numpy())
        return values

    hook = pipeline.transformer.register_forward_hook(transformer_hook, with_kwargs=True)
    try:
        stages["layers"] = np.stack(their_layers(pipeline, *given, callback=step_hook, **options))
    finally:
        hook.remove()
    return stages
