"""One picture by Diffusers' pipelines of Qwen-Image and by joyjax, from the same noise, and its stages by both."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from stagewise import Stages

import joyjax
from joyjax.layers.patch import patchify
from joyjax.runtime.job import StepEvent
from joyjax.runtime.request import check_request
from joyjax.sampling.guided_step import predict

PATCH = (2, 2)
STEPS = 4
NEGATIVE = " "  # the family's own; without one, the reference makes one pass


def channel_first(tokens: np.ndarray) -> np.ndarray:
    """Return our tokens, whose channels are the last axis of a patch, as the reference packs them."""
    tokens = np.asarray(tokens)
    return tokens.reshape(*tokens.shape[:2], 4, -1).swapaxes(2, 3).reshape(tokens.shape)


def channel_last(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    return tokens.reshape(*tokens.shape[:2], -1, 4).swapaxes(2, 3).reshape(tokens.shape)


def small_areas(monkeypatch: Any) -> None:
    """Let the reference's edits have pictures of about 256² pixels, as ours with a base size of 256."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        right = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, right=right: right(area // 16, ratio))


def load_reference(folder: Path, dtype: str) -> Any:
    """Return Diffusers' pipeline of a folder, its networks in a dtype."""
    import diffusers
    import qwen_checkpoint
    import torch
    import transformers

    number = getattr(torch, dtype)
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    words = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=number
    )
    pictures = {}
    if (folder / "processor").exists():
        pictures["processor"] = qwen_checkpoint.make_processor(words)
        qwen_checkpoint.pass_image_tokens(text_encoder)
    pipeline = getattr(diffusers, kind)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        tokenizer=words,
        text_encoder=text_encoder,
        transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=number),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=number),
        **pictures,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_picture(
    pipeline: Any,
    prompt: str,
    noise: np.ndarray,
    *,
    steps: int = STEPS,
    negative: str | None = NEGATIVE,
    scale: float = 4.0,
    **options: Any,
) -> np.ndarray:
    import torch

    tokens = torch.from_numpy(channel_first(patchify(noise, PATCH)))
    height, width = (8 * side for side in noise.shape[1:3])
    result = pipeline(
        prompt=prompt,
        negative_prompt=negative,
        true_cfg_scale=scale,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=tokens.to(pipeline.transformer.dtype),
        **options,
    )
    return np.asarray(result.images[0])


def our_picture(
    pipeline: joyjax.Pipeline,
    prompt: str,
    noise: np.ndarray,
    *,
    image: Any = None,
    steps: int | None = STEPS,
    **options: Any,
) -> np.ndarray:
    height, width = (8 * side for side in noise.shape[1:3])
    result = joyjax.edit(pipeline, image, prompt, height=height, width=width, noise=noise, steps=steps, **options)
    assert result.image.size == (width, height)
    return np.asarray(result.image)


def their_stages(pipeline: Any, prompt: str, noise: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """Return what the reference passes on from stage to stage, with the picture."""
    stages: dict[str, np.ndarray] = {}
    count = noise.shape[1] * noise.shape[2] // 4
    names = ("prompt", "negative")  # the order in which the reference encodes and predicts

    def keep(kind: str, value: Any) -> None:
        for name in names:
            if f"{kind}, {name}" not in stages:
                stages[f"{kind}, {name}"] = value
                return

    def text_hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        keep("token ids", kwargs["input_ids"].numpy())

    def transformer_hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        keep("hidden states", kwargs["encoder_hidden_states"].float().numpy())
        keep("first velocity", channel_last(output[0].float().numpy())[:, :count])
        if kwargs["hidden_states"].shape[1] > count:
            stages["reference latents"] = channel_last(kwargs["hidden_states"].float().numpy())[:, count:]

    def step_hook(pipe: Any, n: int, t: Any, values: dict) -> dict:
        stages[f"latents after step {n + 1}"] = channel_last(values["latents"].float().numpy())
        return values

    hooks = [
        pipeline.text_encoder.register_forward_hook(text_hook, with_kwargs=True),
        pipeline.transformer.register_forward_hook(transformer_hook, with_kwargs=True),
    ]
    try:
        stages["picture"] = their_picture(pipeline, prompt, noise, callback_on_step_end=step_hook, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def our_stages(
    pipeline: joyjax.Pipeline, prompt: str, noise: np.ndarray, *, image: Any = None, steps: int = STEPS, **options: Any
) -> dict[str, np.ndarray]:
    """Return the same of joyjax."""
    height, width = (8 * side for side in noise.shape[1:3])
    given = {"height": height, "width": width, "noise": noise, "steps": steps, **options}
    request = check_request(pipeline, image, prompt, **given)
    run = Stages(pipeline, request)
    names, text = ("negative", "prompt") if request.guided else ("prompt",), run.plan.own.text
    velocity = predict(pipeline.weights["transformer"], run.noise, jnp.ones(1), run.condition)
    stages: dict[str, np.ndarray] = {}
    for row, name in enumerate(names):
        stages[f"token ids, {name}"] = run.arrays.own.text.ids[row : row + 1, : len(text.rows[row])]
        stages[f"hidden states, {name}"] = np.asarray(run.txt, np.float32)[row : row + 1, : text.lengths[row]]
        stages[f"first velocity, {name}"] = np.asarray(velocity)[row : row + 1, : run.plan.lengths.target[0]]

    if image is not None:
        stages["reference latents"] = np.asarray(run.references)[:, : run.plan.lengths.references[0]]

    def keep(event: StepEvent) -> None:
        stages[f"latents after step {event.step}"] = np.asarray(event.latents)

    stages["picture"] = np.asarray(joyjax.edit(pipeline, image, prompt, callback=keep, **given).image)
    return stages
