"""What an edit does on the devices: encode prompt and references, denoise, decode; for one edit or a batch of them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from joyjax.errors import JoyJaxError
from joyjax.families.family import Inputs
from joyjax.families.request import Request
from joyjax.layers.patch import patchify
from joyjax.media.image import Size, from_pixels
from joyjax.models.autoencoder.buckets import Placement, bucket_placement, crop_from_bucket, pad_to_bucket
from joyjax.models.autoencoder.tiling import TILE, Mode, choose
from joyjax.runtime.load import Pipeline
from joyjax.sampling import guided_step as stages
from joyjax.sampling.euler import sigmas, timesteps
from joyjax.sampling.step_cache import cached_step, empty_cache
from joyjax.sharding.devices import devices
from joyjax.sharding.place import devices_along, replicate


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """What a callback is told after each step: `step` of `steps` is done and took `seconds`."""

    step: int
    steps: int
    seconds: float
    latents: Float[np.ndarray, "1 T P"] = dataclasses.field(repr=False)
    """The target's latent tokens after the step."""
    preview: Callable[[], Image.Image] = dataclasses.field(repr=False)
    """Decodes the picture that the latents point at now; costs a decoding only when it is called."""


Callback = Callable[[StepEvent], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """An edit whose prompt and references are encoded."""

    request: Request
    inputs: Inputs
    condition: Any
    callback: Callback | None = None


def program(request: Request, inputs: Inputs) -> Hashable:
    """Return what edits must have in common to be denoised together: target size, levels, and steps with guidance."""
    guided = tuple(scale > 1 for scale in request.guidance)
    return inputs.target_tokens, guided, request.steps, request.sigmas, request.cache


def encode_prompt(pipeline: Pipeline, inputs: Inputs) -> Float[Array, "B J C"]:
    """Return the hidden states of both prompts, or of the one that an edit without guidance has."""
    encoder = pipeline.weights["text_encoder"]
    text, vision, first = replicate((inputs.text, inputs.vision, inputs.first), pipeline.mesh)
    return stages.encode_prompt(encoder, text, vision, first, length=inputs.prompt_size)


def encode_references(pipeline: Pipeline, inputs: Inputs, mode: Mode = "exact") -> Float[Array, "b R P"]:
    """Return the latent tokens of all references, one behind the other, and padding."""
    config, vae = pipeline.parts.configs["transformer"], pipeline.weights["vae"]
    if not inputs.pictures:
        return replicate(np.zeros((1, 0, config.in_channels * config.patch_area), np.float32), pipeline.mesh)
    tokens = []
    for picture in inputs.pictures:
        place = None
        if found := _place(pipeline, inputs, picture.shape[1:3], mode):
            canvas, place = found
            picture = pad_to_bucket(picture, canvas)
        tokens.append(
            stages.encode_images(vae, *replicate((picture, place), pipeline.mesh), patch=config.patch, mode=mode)
        )
    if inputs.reference_tokens == tokens[0].shape[1]:
        return tokens[0]
    return stages.join_tokens(tokens, inputs.reference_lengths, size=inputs.reference_tokens)


def _place(pipeline: Pipeline, inputs: Inputs, size: tuple[int, ...], mode: Mode) -> tuple[Size, Placement] | None:
    """Return the canvas on which the autoencoder takes a picture, and where; None: it takes the picture alone."""
    if inputs.base_size is None or mode != "exact":
        return None
    patch, factor = pipeline.parts.configs["transformer"].patch, pipeline.parts.configs["vae"].spatial_factor
    return bucket_placement(size[0], size[1], inputs.base_size, patch, factor)


def denoise(pipeline: Pipeline, jobs: Sequence[Job]) -> tuple[Float[np.ndarray, "e T P"], list[int]]:
    """Run all steps of edits that have one `program`; callbacks are called between them.

    Returns the latent tokens, and how many steps of each edit ran the whole transformer.

    Raises:
        JoyJaxError: if the numbers overflow on the way.
    """
    request = jobs[0].request
    schedule, config = pipeline.parts.schedule, pipeline.parts.configs["transformer"]
    levels = sigmas(request.steps, schedule, request.sigmas)
    times = timesteps(levels, schedule)
    scales = np.array([job.request.guidance for job in jobs], np.float32).T
    transformer, rule = pipeline.weights["transformer"], request.cache
    noise = np.concatenate([noise_tokens(pipeline, job.inputs) for job in jobs])
    latents, found = replicate(noise, pipeline.mesh), noise
    condition = jobs[0].condition if len(jobs) == 1 else stages.batch([job.condition for job in jobs])
    conditions = {request.guided: replicate(condition, pipeline.mesh)}  # by whether a step has guidance
    watched = any(job.callback for job in jobs)  # only then do latents come to the host after each step
    cache, computed = None, [np.zeros(len(jobs), int)]  # one count for each run of steps with the same passes
    for n in range(request.steps):
        started = time.perf_counter()
        guided = bool(scales[n, 0] > 1)
        if guided not in conditions:
            conditions[guided] = replicate(stages.conditional_only(conditions[True]), pipeline.mesh)
        if n and guided != (scales[n - 1, 0] > 1):
            cache = None  # what it holds is of other passes
        numbers = levels[n], levels[n + 1], times[n], scales[n]
        if rule is None:
            latents = stages.denoise_step(
                transformer, latents, conditions[guided], *numbers, channels=config.in_channels
            )
            computed[-1] += 1
        else:
            if cache is None:
                cache = empty_cache(transformer, latents, conditions[guided], kind=rule.kind)
                if pipeline.mesh is None:  # made of shapes alone, it is bound to no device yet, as a step's is
                    cache = replicate(cache, None)
                computed.append(np.zeros(len(jobs), int))
            limit, force = np.float32(rule.threshold), np.bool_(n in (0, request.steps - 1))
            latents, cache = cached_step(
                transformer, latents, cache, conditions[guided], *numbers, limit, force, channels=config.in_channels
            )
            computed[-1] = np.asarray(cache.steps)[: len(jobs)]
        latents.block_until_ready()
        seconds = time.perf_counter() - started
        if watched:
            before, found = found, np.asarray(latents)
        for row, job in enumerate(jobs):
            if job.callback is not None:
                old, new = (tokens[row : row + 1, : job.inputs.target_length] for tokens in (before, found))
                preview = functools.partial(_preview, pipeline, job, old, new, levels[n : n + 2])
                job.callback(StepEvent(n + 1, request.steps, seconds, new, preview))
    found = np.asarray(latents)
    for job, row in zip(jobs, found, strict=True):
        if not np.isfinite(row[: job.inputs.target_length]).all():
            raise not_finite(pipeline, f"the latents after {request.steps} steps")
    return found, [int(count) for count in np.sum(computed, axis=0)]


def noise_tokens(pipeline: Pipeline, inputs: Inputs) -> Float[np.ndarray, "1 T P"]:
    """Return the noise as tokens, and padding."""
    tokens = patchify(inputs.noise, pipeline.parts.configs["transformer"].patch)
    return np.pad(tokens, ((0, 0), (0, inputs.target_tokens - tokens.shape[1]), (0, 0)))


def _preview(
    pipeline: Pipeline,
    job: Job,
    before: Float[np.ndarray, "1 T P"],
    after: Float[np.ndarray, "1 T P"],
    levels: np.ndarray,
) -> Image.Image:
    """Draw what lies at level 0 on the straight line through the latents of two levels."""
    clean = before + (after - before) * (levels[0] / (levels[0] - levels[1]))
    return from_pixels(decode(pipeline, job.inputs, clean, job.request.vae_decode))


def decode(
    pipeline: Pipeline, inputs: Inputs, latents: Float[np.ndarray, "1 T P"], mode: Mode = "exact"
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels, `[h, w, 3]` uint8, of the target's latent tokens.

    Raises:
        JoyJaxError: if its numbers are not finite.
    """
    config = pipeline.parts.configs["transformer"]
    vae, size = pipeline.weights["vae"], (inputs.height, inputs.width)
    latents = np.asarray(latents)[:, : inputs.target_length]
    if found := _place(pipeline, inputs, size, mode):
        canvas, place = found
        room = inputs.target_tokens - inputs.target_length
        arrays = replicate((np.pad(latents, ((0, 0), (0, room), (0, 0))), place), pipeline.mesh)
        pixels, finite = stages.decode_latents(vae, *arrays, patch=config.patch, mode=mode, canvas=canvas)
        pixels = crop_from_bucket(np.asarray(pixels), size)
    else:
        columns = inputs.noise.shape[2] // config.patch[1]
        latents = replicate(latents, pipeline.mesh)
        pixels, finite = stages.decode_latents(vae, latents, patch=config.patch, width=columns, mode=mode)
    if not np.asarray(finite).all():
        raise not_finite(pipeline, "the decoded pixels")
    return np.asarray(pixels)[0]


def check_modes(pipeline: Pipeline, request: Request, inputs: Inputs) -> None:
    """Raise MeshError now, not after the last step, if a picture cannot be cut as the request says."""
    devices, factor = devices_along("tile"), pipeline.parts.configs["vae"].spatial_factor
    sides = TILE // factor, TILE
    choose(request.vae_decode, (inputs.height // factor, inputs.width // factor), sides, devices)
    for picture in inputs.pictures:
        choose(request.vae_encode, picture.shape[1:3], sides[::-1], devices)


def not_finite(pipeline: Pipeline, what: str) -> JoyJaxError:
    """Return the error for numbers that are none."""
    return JoyJaxError(
        f"{what} are not finite in {pipeline.dtype}: the weights are damaged or do not belong to this model; "
        "check them with `joyjax info`, or try --dtype float32"
    )


def device_kind(pipeline: Pipeline) -> str:
    """Return the kind of device that a pipeline runs on, as JAX calls it."""
    device = devices()[0] if pipeline.mesh is None else pipeline.mesh.devices.flat[0]
    return device.device_kind
