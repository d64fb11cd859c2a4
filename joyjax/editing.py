"""One edit, from a picture and a sentence to a picture."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from joyjax.errors import AdviceWarning, JoyJaxError
from joyjax.families.family import Inputs, Request
from joyjax.inputs.framing import Crop
from joyjax.inputs.image import from_pixels
from joyjax.layers.patch import patchify
from joyjax.pipeline import Pipeline
from joyjax.request import check_request
from joyjax.sampling import steps as stages
from joyjax.sampling.cache import cached_step, empty_cache
from joyjax.sampling.noise import NOISE_RULE
from joyjax.sampling.schedule import sigmas, timesteps
from joyjax.sampling.tiles import TILE, Mode, choose
from joyjax.shapes.advice import advice
from joyjax.sharding.hosts import losing_none
from joyjax.sharding.place import devices_along, replicate


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """What a callback is told after each step: `step` of `steps` is done and took `seconds`."""

    step: int
    steps: int
    seconds: float
    latents: Float[Array, "b T P"]
    """The target's latent tokens after the step."""
    preview: Callable[[], Image.Image]
    """Decodes the picture that the latents point at now; costs a decoding only when it is called."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished edit.

    `crop` says what was kept of the picture that decided the size (the last reference; None without references),
    `settings` is every value that the picture depends on, `timings` the seconds of each stage, and `computed_steps` how
    many steps ran the whole transformer: all of them without a step cache.
    """

    image: Image.Image
    crop: Crop | None
    seed: int
    settings: Mapping[str, Any]
    timings: Mapping[str, float]
    computed_steps: int


def edit(
    pipeline: Pipeline,
    image: Image.Image | Sequence[Image.Image] | None,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    exact_size: bool = False,
    base_size: int | None = None,
    noise: np.ndarray | None = None,
    vae_encode: Mode = "exact",
    vae_decode: Mode = "exact",
    guidance_until: float = 1.0,
    cache: float | str | None = None,
    callback: Callable[[StepEvent], None] | None = None,
) -> Result:
    """Edit a picture as the prompt says; without a picture, make one.

    Args:
        pipeline: what `joyjax.load` returned.
        image: a picture, several of them as references of one edit, or None for text to image.
        prompt: the instruction. It is text: control tokens written in it have no power.
        negative_prompt: what to steer away from; None takes the family's own, which is not "no guidance".
        steps: denoising steps; None takes the checkpoint's own, else the family's: 40, Edit-Plus 30.
        guidance_scale: strength of classifier-free guidance; 1 or less makes one pass and needs half the time. None
            takes the checkpoint's own, else the family's: 4.
        seed: fixes the noise, together with the references.
        height, width: of the result, in pixels, snapped to the nearest bucket; None takes the last reference's bucket.
        exact_size: use height and width as they are, and fit references to them; multiples of 16.
        base_size: side of the square whose area the buckets have; None takes the checkpoint's own.
        noise: start from this instead of `seed`: `[1, height/8, width/8, channels]`, float32.
        vae_encode, vae_decode: how the autoencoder goes over a picture: "exact"; approximately in "tiled", which needs
            little memory, or in a "patch" for each device; "auto" chooses between these (joyjax/sampling/tiles.py).
        guidance_until: the share of the steps, the first ones, that have guidance; those after it make one pass.
        cache: leave out most blocks of the transformer in steps where its first block's part has changed by less than
            this since they ran, such as 0.1. A number alone or "taylor:0.1" extrapolates what they add,
            "first-block:0.1" repeats it. None: every step is computed. docs/speed.md has what each costs and saves.
        callback: called after each step; raise `joyjax.Cancelled` in it to stop.

    Warns:
        AdviceWarning: where the model is a demo and the request leaves what it learned.

    Raises:
        RequestError: for an argument that cannot be honoured, before anything runs.
        PictureError: for a picture that cannot be used.
        JoyJaxError: if the numbers overflow on the way, or another process of the run is gone.
    """
    request = check_request(
        pipeline,
        image,
        prompt,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        height=height,
        width=width,
        exact_size=exact_size,
        base_size=base_size,
        noise=noise,
        vae_encode=vae_encode,
        vae_decode=vae_decode,
        guidance_until=guidance_until,
        cache=cache,
        callback=callback,
    )
    if pipeline.native.learned == "shapes":
        for text in advice(prompt, request.pictures):
            warnings.warn(text, AdviceWarning, stacklevel=2)
    timings: dict[str, float] = {}
    with losing_none(), jax.set_mesh(pipeline.mesh) if pipeline.mesh is not None else contextlib.nullcontext():
        with _timed(timings, "prepare"):
            inputs = pipeline.family.prepare(request, pipeline.files)
            _check_modes(pipeline, request, inputs)
        with _timed(timings, "prompt"):
            txt = jax.block_until_ready(encode_prompt(pipeline, inputs))
        with _timed(timings, "references"):
            references = jax.block_until_ready(encode_references(pipeline, inputs, request.vae_encode))
        with _timed(timings, "denoise"):
            condition = pipeline.family.condition(inputs, txt, references)
            latents, computed = _denoise(pipeline, request, inputs, condition, callback)
        with _timed(timings, "decode"):
            pixels = np.asarray(decode(pipeline, inputs, latents, request.vae_decode))
    timings["total"] = sum(timings.values())
    return Result(
        image=from_pixels(pixels[0]),
        crop=inputs.crops[-1] if inputs.crops else None,
        seed=request.seed,
        settings=_settings(pipeline, request, inputs),
        timings=timings,
        computed_steps=computed,
    )


def encode_prompt(pipeline: Pipeline, inputs: Inputs) -> Float[Array, "B J C"]:
    """Return the hidden states of both prompts, or of the one that an edit without guidance has."""
    encoder = pipeline.weights["text_encoder"]
    text, vision, first = replicate((inputs.text, inputs.vision, inputs.first), pipeline.mesh)
    return stages.encode_prompt(encoder, text, vision, first, length=inputs.prompt_size)


def encode_references(pipeline: Pipeline, inputs: Inputs, mode: Mode = "exact") -> Float[Array, "b R P"]:
    """Return the latent tokens of all references, one behind the other."""
    config, vae = pipeline.files.configs["transformer"], pipeline.weights["vae"]
    pictures, empty = replicate(
        (inputs.pictures, np.zeros((1, 0, config.in_channels * config.patch_area), np.float32)), pipeline.mesh
    )
    tokens = [stages.encode_images(vae, picture, patch=config.patch, mode=mode) for picture in pictures]
    return jnp.concatenate([empty, *tokens], axis=1)


def _denoise(
    pipeline: Pipeline,
    request: Request,
    inputs: Inputs,
    condition: Any,
    callback: Callable[[StepEvent], None] | None,
) -> tuple[Float[Array, "b T P"], int]:
    """Run all steps; the callback is called between them. Returns how many ran the whole transformer, too."""
    schedule, config = pipeline.files.schedule, pipeline.files.configs["transformer"]
    levels = sigmas(request.steps, schedule)
    times = timesteps(levels, schedule)
    transformer, rule = pipeline.weights["transformer"], request.cache
    latents = replicate(patchify(jnp.asarray(inputs.noise), config.patch), pipeline.mesh)
    condition = replicate(condition, pipeline.mesh)
    cache, computed = None, [0]  # one count for each run of steps with the same passes
    for n in range(request.steps):
        started = time.perf_counter()
        before = jnp.copy(latents) if callback is not None else latents  # the step takes `latents` away
        if n and n == request.guided_steps:  # from here on the conditional pass alone, with a cache of its own
            condition = replicate(jax.tree.map(lambda rows: rows[rows.shape[0] // 2 :], condition), pipeline.mesh)
            cache = None
        numbers = levels[n], levels[n + 1], times[n], np.float32(request.guidance_scale)
        if rule is None:
            latents = stages.denoise_step(transformer, latents, condition, *numbers, channels=config.in_channels)
            computed[-1] += 1
        else:
            if cache is None:
                cache = empty_cache(transformer, latents, condition, kind=rule.kind)
                if pipeline.mesh is None:  # made of shapes alone, it is bound to no device yet, as a step's is
                    cache = replicate(cache, None)
                computed.append(0)
            limit, force = np.float32(rule.threshold), np.bool_(n in (0, request.steps - 1))
            latents, cache = cached_step(
                transformer, latents, cache, condition, *numbers, limit, force, channels=config.in_channels
            )
            computed[-1] = cache.steps
        latents.block_until_ready()
        if callback is not None:
            # a straight line through the last two levels, followed to level 0
            clean = before + (latents - before) * (levels[n] / (levels[n] - levels[n + 1]))
            preview = functools.partial(_draw, pipeline, inputs, clean, request.vae_decode)
            seconds = time.perf_counter() - started
            callback(StepEvent(n + 1, request.steps, seconds, jnp.copy(latents), preview))
    if not np.isfinite(np.asarray(latents)).all():
        raise _not_finite(pipeline, f"the latents after {request.steps} steps")
    return latents, sum(int(np.asarray(steps).max()) for steps in computed)


def decode(
    pipeline: Pipeline, inputs: Inputs, latents: Float[Array, "b T P"], mode: Mode = "exact"
) -> UInt8[Array, "b h w 3"]:
    """Return the picture of the target's latent tokens; JoyJaxError if its numbers are not finite."""
    config = pipeline.files.configs["transformer"]
    columns = inputs.noise.shape[2] // config.patch[1]
    vae = pipeline.weights["vae"]
    pixels, finite = stages.decode_latents(vae, latents, patch=config.patch, width=columns, mode=mode)
    if not np.asarray(finite).all():
        raise _not_finite(pipeline, "the decoded pixels")
    return pixels


def _draw(pipeline: Pipeline, inputs: Inputs, latents: Float[Array, "b T P"], mode: Mode) -> Image.Image:
    return from_pixels(np.asarray(decode(pipeline, inputs, latents, mode))[0])


def _check_modes(pipeline: Pipeline, request: Request, inputs: Inputs) -> None:
    """Raise MeshError now, not after the last step, if a picture cannot be cut as the request says."""
    devices, factor = devices_along("tile"), pipeline.files.configs["vae"].spatial_factor
    sides = TILE // factor, TILE
    choose(request.vae_decode, (inputs.height // factor, inputs.width // factor), sides, devices)
    for picture in inputs.pictures:
        choose(request.vae_encode, picture.shape[1:3], sides[::-1], devices)


def _not_finite(pipeline: Pipeline, what: str) -> JoyJaxError:
    return JoyJaxError(
        f"{what} are not finite in {pipeline.dtype}: the weights are damaged or do not belong to this model; "
        "check them with `joyjax info`, or try --dtype float32"
    )


def _settings(pipeline: Pipeline, request: Request, inputs: Inputs) -> dict[str, Any]:
    return {
        "model": pipeline.source,
        "family": pipeline.family.name,
        "dtype": pipeline.dtype,
        "linear": pipeline.linear,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
        "height": inputs.height,
        "width": inputs.width,
        "exact_size": request.exact_size,
        "base_size": request.base_size,
        "noise": f"rule {NOISE_RULE}" if request.noise is None else "given",
        "vae_encode": request.vae_encode,
        "vae_decode": request.vae_decode,
        "guidance_until": request.guidance_until,
        "cache": None if request.cache is None else str(request.cache),
    }


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
