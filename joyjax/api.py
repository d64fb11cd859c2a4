"""The public functions that edit pictures: `edit`, and `edit_batch` for several at once."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.errors import AdviceWarning, JoyJaxError, RequestError
from joyjax.families.request import Request
from joyjax.media.arrays import Picture
from joyjax.names import checks_names, refusal
from joyjax.options import EDIT, Fit, VAEMode
from joyjax.runtime.engine import Engine
from joyjax.runtime.job import Callback
from joyjax.runtime.load import Pipeline
from joyjax.runtime.request import check_request
from joyjax.runtime.result import Result


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
    cfg_normalize: bool | None = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    height: int | None = None,
    width: int | None = None,
    exact_size: bool = False,
    base_size: int | None = None,
    layers: int | None = None,
    fit: Fit = "crop",
    mask: Picture | None = None,
    paste_back: bool = False,
    vae_encode: VAEMode = "exact",
    vae_decode: VAEMode = "exact",
    cache: float | str | None = None,
    callback: Callback | None = None,
) -> Result:
    """Edit a picture by a prompt; without a picture, generate one.

    Args:
        pipeline: what `joyjax.load` returned.
        image: a picture, several of them as references of one edit, or None for text to image. A picture is a
            PIL.Image, or a NumPy array, uint8 `[height, width, 3]`, `[height, width, 4]` or `[height, width]`.
        prompt: what to change. Control tokens in it are read as plain text.
        negative_prompt: what to steer away from. None: the family's default; guidance stays on.
        steps: number of denoising steps. None: the checkpoint's default, else the family's.
        sigmas: noise levels in place of the schedule's, one per step, decreasing, in (0, 1]. The model's shift is
            applied to them, as in Diffusers.
        guidance_scale: scale of classifier-free guidance. 1 or less turns it off and halves the time. A list has one
            value per step. None: the checkpoint's default, else the family's.
        guidance_until: fraction of the steps, from the first, with guidance; the others run the conditional pass alone.
        cfg_normalize: restore the norm of the conditional prediction after guidance. Only for models that leave it
            open; None: the family's default.
        seed: seed of the initial noise, which also depends on the references.
        noise: initial noise in place of the seed's: float32 `[1, height/8, width/8, channels]`, for layers
            `[1, layers + 1, height/8, width/8, channels]`.
        height, width: size of the result in pixels, rounded to a size of the model. None: that of the last reference.
        exact_size: take height and width without rounding, and fit references to them.
        base_size: area of the result, as the side of a square. None: the checkpoint's default, else the family's.
        layers: number of layers that the picture is taken apart into. Only for models that do that; None: the family's
            default.
        fit: how a reference is fitted to its size: "crop", as in the reference implementation, or "pad", which keeps
            all of it; the padding is removed from the result.
        mask: white where the result may differ from the last reference, black where it must not; of its size. The
            result then has the reference's size, and its pixels outside of the mask.
        paste_back: paste the edited region back into the last reference, at its own resolution.
        vae_encode, vae_decode: how the autoencoder processes a picture: "exact"; "tiled", an approximation in little
            memory; "patch", an approximation with one patch per device; "auto", which chooses. See docs/parallel.md.
        cache: threshold of the step cache, such as 0.1. A step skips all blocks but the first if the first block's
            residual has changed relatively by less than this since the last full step. A number or "taylor:0.1"
            extrapolates the residual of the skipped blocks, "first-block:0.1" repeats it. None: no cache. See
            docs/speed.md.
        callback: called after each step with a `StepEvent`; raise `joyjax.Cancelled` in it to stop.

    Warns:
        AdviceWarning: if the request is outside the domain of a demo model, several references exceed the token limit,
            or transparency or further frames of a picture are not used.

    Raises:
        RequestError: for an argument that is invalid or unsupported, before anything runs.
        PictureError: for a picture that cannot be used.
        JoyJaxError: if values become NaN or infinite, or another process of the run has ended.
    """
    request = check_request(**locals())  # every argument by its name
    engine = Engine(pipeline)
    engine.submit(request, callback)
    [result] = [result for _, result in _results(engine)]
    return result


@checks_names
def edit_batch(
    pipeline: Pipeline, requests: Sequence[Mapping[str, Any]], *, batch_size: int | None = None
) -> list[Result]:
    """Run several edits as one batch. Each result equals that of `edit` up to rounding.

    Args:
        pipeline: what `joyjax.load` returned.
        requests: for each edit the keyword arguments of `edit`, `image` and `prompt` among them. Edits whose sizes,
            steps and passes agree are denoised together.
        batch_size: the most edits that are denoised together; None: no limit.

    Raises:
        RequestError: for the first invalid request, with its index; then nothing runs.
        Cancelled: if a callback raises it. All edits end.
    """
    results = dict(edit_each(pipeline, requests, batch_size=batch_size))
    return [results[number] for number in range(len(results))]


def edit_each(
    pipeline: Pipeline,
    requests: Sequence[Mapping[str, Any]],
    *,
    batch_size: int | None = None,
    profile: Path | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield each result of `edit_batch` when it is done, with the index of its request.

    `profile`: a folder for a profile of the denoising, of edits that run as one batch.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise RequestError(f"batch_size is {batch_size!r}; expected a whole number from 1, or None")
    checked = []
    for number, options in enumerate(requests):
        try:
            checked.append(check_options(pipeline, options))
        except JoyJaxError as error:
            raise type(error)(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
    engine = Engine(pipeline, batch_size=batch_size, profile=profile)
    for request, options in zip(checked, requests, strict=True):
        engine.submit(request, options.get("callback"))
    yield from _results(engine)


def check_options(pipeline: Pipeline, options: Mapping[str, Any]) -> Request:
    """Check the keyword arguments of `edit`, given as a mapping.

    Raises:
        RequestError: for an unknown argument, a missing `prompt`, or as `edit` does.
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


def _results(engine: Engine) -> Iterator[tuple[int, Result]]:
    """Run an engine's jobs and yield their results. The notes of all jobs are issued first, as one warning each."""
    planned = dict.fromkeys(note for job in engine.waiting for note in job.notes)
    for note in planned:
        warnings.warn(note, AdviceWarning, stacklevel=4)  # the line that called edit
    for job in engine.run():
        if job.result is None:
            raise job.error or RuntimeError(f"job {job.number} has neither result nor error")
        for note in job.result.notes:
            if note not in planned:  # of the run, such as a measurement of kernels
                warnings.warn(note, AdviceWarning, stacklevel=4)
        result, job.result = job.result, None  # the caller's from here on: a long run keeps no pictures
        yield job.number, result
