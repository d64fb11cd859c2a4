"""From a picture and a sentence to a picture: `edit`, and `edit_batch` for several at once."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from joyjax.errors import AdviceWarning, JoyJaxError, RequestError
from joyjax.families.family import Inputs
from joyjax.families.request import Request
from joyjax.media.arrays import Picture
from joyjax.media.dropped import dropped
from joyjax.media.framing import paste_back, pasted_region, unpad
from joyjax.media.image import from_pixels, rgb_profile
from joyjax.names import checks_names, refusal
from joyjax.options import EDIT, Fit, VAEMode
from joyjax.runtime.engine import (
    Callback,
    Job,
    check_modes,
    decode,
    denoise,
    device_kind,
    encode_prompt,
    encode_references,
    program,
)
from joyjax.runtime.load import Pipeline
from joyjax.runtime.request import check_request
from joyjax.runtime.result import Result, settings
from joyjax.shapes.advice import advice
from joyjax.sharding.hosts import peer_loss_as_error


@checks_names
def edit(
    pipeline: Pipeline,
    image: Picture | Sequence[Picture] | None,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_until: float = 1.0,
    seed: int = 0,
    noise: np.ndarray | None = None,
    height: int | None = None,
    width: int | None = None,
    exact_size: bool = False,
    base_size: int | None = None,
    fit: Fit = "crop",
    mask: Picture | None = None,
    paste_back: bool = False,
    vae_encode: VAEMode = "exact",
    vae_decode: VAEMode = "exact",
    cache: float | str | None = None,
    callback: Callback | None = None,
) -> Result:
    """Edit a picture as the prompt says; without a picture, make one.

    Args:
        pipeline: what `joyjax.load` returned.
        image: a picture, several of them as references of one edit, or None for text to image. A picture is a
            PIL.Image, or a NumPy array, uint8 `[height, width, 3]`, `[height, width, 4]` or `[height, width]`.
        prompt: what to change. It is text: control tokens in it have no effect.
        negative_prompt: what to steer away from. None: the family's own, which is not "no guidance".
        steps: number of denoising steps. None: the checkpoint's own, else the family's.
        sigmas: noise levels in place of the schedule's, one for each step, falling from at most 1 to above 0. The
            model's shift is applied to them, as in Diffusers.
        guidance_scale: strength of classifier-free guidance. 1 or less: none, in half the time. A list has one number
            for each step. None: the checkpoint's own, else the family's.
        guidance_until: share of the steps, from the first one on, that have guidance; the others make one pass.
        seed: of the noise, together with the references.
        noise: initial noise in place of that of the seed: float32 `[1, height/8, width/8, channels]`.
        height, width: size of the result in pixels, rounded to a size that the model has. None: that of the last
            reference.
        exact_size: take height and width without rounding, and fit references to them.
        base_size: area of the result, as the side of a square. None: the checkpoint's own, else the family's.
        fit: how a reference is fitted to its size: "crop", as in the reference implementation, or "pad", which keeps
            all of it; the padding is removed from the result.
        mask: white where the result may differ from the last reference, black where it must not; of its size. The
            result then has the reference's own size, and its pixels outside of the mask.
        paste_back: put the edited region back into the last reference, at its own resolution.
        vae_encode, vae_decode: how the autoencoder processes a picture: "exact"; approximately in "tiled", which needs
            little memory, or in a "patch" for each device; "auto" chooses between these. See docs/speed.md.
        cache: skip most blocks of the transformer in steps where its first block's output has changed by less than
            this since they ran, such as 0.1. A number alone or "taylor:0.1" extrapolates what they add,
            "first-block:0.1" repeats it. None: every step is computed. See docs/speed.md.
        callback: called after each step with a `StepEvent`; raise `joyjax.Cancelled` in it to stop.

    Warns:
        AdviceWarning: where the model is a demo and the request leaves what it learned, references are too many to be
            passed on whole, or transparency or further frames of a picture are not used.

    Raises:
        RequestError: for an argument that cannot be honoured, before anything runs.
        PictureError: for a picture that cannot be used.
        JoyJaxError: if the numbers overflow on the way, or another process of the run is gone.
    """
    request = check_request(**locals())  # every argument by its name
    [(_, result)] = _run(pipeline, [request], [callback], batch_size=1)
    return result


@checks_names
def edit_batch(
    pipeline: Pipeline, requests: Sequence[Mapping[str, Any]], *, batch_size: int | None = None
) -> list[Result]:
    """Run several edits as one batch; each has the result that `edit` gives it alone.

    Args:
        pipeline: what `joyjax.load` returned.
        requests: for each edit the keyword arguments of `edit`, `image` and `prompt` among them. They need not be
            alike: edits are denoised together where sizes, steps and passes agree, the others by themselves.
        batch_size: how many edits are denoised together at most; None: as many as agree.

    Raises:
        RequestError: for the first request that cannot be honoured, by its number; then nothing runs.
        Cancelled: if a callback raises it. All edits end.
    """
    results = dict(edit_each(pipeline, requests, batch_size=batch_size))
    return [results[number] for number in range(len(results))]


def edit_each(
    pipeline: Pipeline, requests: Sequence[Mapping[str, Any]], *, batch_size: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Give the results of `edit_batch` as they come, each with the number of its request."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise RequestError(f"batch_size is {batch_size!r}; expected a whole number from 1, or None")
    checked = []
    for number, options in enumerate(requests):
        try:
            checked.append(check_options(pipeline, options))
        except JoyJaxError as error:
            raise type(error)(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
    callbacks = [options.get("callback") for options in requests]
    yield from _run(pipeline, checked, callbacks, batch_size or len(checked))


def check_options(pipeline: Pipeline, options: Mapping[str, Any]) -> Request:
    """Check the keyword arguments of `edit`, given as a mapping.

    Raises:
        RequestError: for one that `edit` does not have, a missing `prompt`, or as `edit` does.
    """
    if not isinstance(options, Mapping):
        raise RequestError(
            f"a request is a {type(options).__name__}; expected the keyword arguments of edit, as a dict"
        )
    unknown = [name for name in options if name not in EDIT]
    if unknown:
        raise RequestError(refusal(unknown, "edit", EDIT))
    if "prompt" not in options:
        raise RequestError("prompt is missing")
    return check_request(pipeline, **{"image": None, **options})


def _run(
    pipeline: Pipeline, requests: Sequence[Request], callbacks: Sequence[Callback | None], batch_size: int
) -> Iterator[tuple[int, Result]]:
    """Prepare all requests, so that what cannot be honoured is told first, then run those of one program together."""
    prepared, seconds = [], []
    notes = [_notes(pipeline, request) for request in requests]
    with _on_devices(pipeline):
        for number, request in enumerate(requests):
            started = time.perf_counter()
            inputs = pipeline.family.prepare(request, pipeline.parts)
            check_modes(pipeline, request, inputs)
            _check_return(request, inputs)
            seconds.append(time.perf_counter() - started)
            prepared.append(inputs)
            notes[number] += inputs.advice
    for text in dict.fromkeys(text for each in notes for text in each):
        warnings.warn(text, AdviceWarning, stacklevel=4)  # the line that called edit
    read, encoded = None, None
    for numbers in _together([program(*pair) for pair in zip(requests, prepared, strict=True)], batch_size):
        timings = {"prepare": sum(seconds[number] for number in numbers), "prompt": 0.0, "references": 0.0}
        jobs = []
        with _on_devices(pipeline):
            for number in numbers:
                request, inputs = requests[number], prepared[number]
                seeded = dataclasses.replace(request, seed=0, noise=None)
                if encoded is None or seeded != read:  # several seeds of one request are encoded once
                    read, encoded = seeded, _encode(pipeline, request, inputs, timings)
                condition = pipeline.family.condition(inputs, *encoded)
                jobs.append(Job(request, inputs, condition, callbacks[number]))
            results = _finish(pipeline, jobs, timings)
        for number, result in zip(numbers, results, strict=True):
            yield number, dataclasses.replace(result, notes=tuple(notes[number]))


@contextlib.contextmanager
def _on_devices(pipeline: Pipeline) -> Iterator[None]:
    """Put the pipeline's mesh in force, and tell the user if another process of the run is gone."""
    with peer_loss_as_error(), jax.set_mesh(pipeline.mesh) if pipeline.mesh is not None else contextlib.nullcontext():
        yield


def _notes(pipeline: Pipeline, request: Request) -> list[str]:
    """Return what to say of a request that will run: what of its pictures is not used, and the demo's advice."""
    shapes = advice(request.prompt, request.pictures) if pipeline.generation_defaults.domain == "shapes" else []
    return dropped(request.originals, last_keeps_alpha=request.returned) + shapes


def _finish(pipeline: Pipeline, jobs: Sequence[Job], timings: dict[str, float]) -> list[Result]:
    """Denoise edits together, and draw each."""
    with _timed(timings, "denoise"):
        latents, computed = denoise(pipeline, jobs)
    with _timed(timings, "decode"):
        images = [
            _picture(decode(pipeline, job.inputs, row[None], job.request.vae_decode), job)
            for job, row in zip(jobs, latents, strict=True)
        ]
    timings["total"] = sum(timings.values())
    return [
        Result(
            image=image,
            crop=job.inputs.crops[-1] if job.inputs.crops else None,
            seed=job.request.seed,
            settings=settings(pipeline, job.request, job.inputs),
            timings=timings,
            computed_steps=steps,
            device=device_kind(pipeline),
            crops=job.inputs.crops,
            references=job.request.sources,
            mask=job.request.mask_source,
        )
        for job, image, steps in zip(jobs, images, computed, strict=True)
    ]


def _together(programs: Sequence[Hashable], batch_size: int) -> Iterator[list[int]]:
    """Give the numbers of edits that are denoised together: of one program, and no more than `batch_size`."""
    groups: dict[Hashable, list[int]] = {}
    for number, one in enumerate(programs):
        groups.setdefault(one, []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def _encode(pipeline: Pipeline, request: Request, inputs: Inputs, timings: dict[str, float]) -> tuple[Any, Any]:
    """Return prompt and references as the transformer sees them."""
    with _timed(timings, "prompt"):
        txt = jax.block_until_ready(encode_prompt(pipeline, inputs))
    with _timed(timings, "references"):
        return txt, jax.block_until_ready(encode_references(pipeline, inputs, request.vae_encode))


def _check_return(request: Request, inputs: Inputs) -> None:
    """Raise an error now, not after the last step, if the result cannot be put back into the original."""
    if not request.returned:
        return
    crop = inputs.crops[-1]
    if crop.size != (inputs.height, inputs.width):
        name = "mask" if request.mask is not None else "paste_back"
        raise RequestError(
            f"{name} needs a result of the last reference's own size, {crop.size[1]} × {crop.size[0]}, and it is to be "
            f"{inputs.width} × {inputs.height}; leave out height and width"
        )
    pasted_region(crop, request.mask)


def _picture(pixels: UInt8[np.ndarray, "h w 3"], job: Job) -> Image.Image:
    """Return the result as the user wants it: without padding, or put back into the original."""
    drawn, request = from_pixels(pixels), job.request
    if not job.inputs.crops:
        return drawn
    crop = job.inputs.crops[-1]
    if request.returned:
        return paste_back(drawn, request.originals[-1], crop, request.mask)
    shown = unpad(drawn, crop) if crop.size == (job.inputs.height, job.inputs.width) else drawn
    profile = rgb_profile(request.originals[-1])
    if profile is not None:
        shown.info["icc_profile"] = profile
    return shown


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
