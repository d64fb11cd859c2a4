"""From a picture and a sentence to a picture: `edit`, and `edit_batch` for several at once."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from joyjax.errors import AdviceWarning, JoyJaxError, RequestError
from joyjax.families.request import Request
from joyjax.media.arrays import Picture
from joyjax.media.framing import Fit
from joyjax.models.autoencoder.tiling import Mode
from joyjax.names import checks_names, refusal
from joyjax.runtime.engine import Engine
from joyjax.runtime.job import Callback
from joyjax.runtime.load import Pipeline
from joyjax.runtime.request import OPTIONS, check_request
from joyjax.runtime.result import Result


@checks_names
def edit(
    pipeline: Pipeline,
    image: Picture | Sequence[Picture] | None,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    exact_size: bool = False,
    base_size: int | None = None,
    sigmas: Sequence[float] | None = None,
    fit: Fit = "crop",
    mask: Picture | None = None,
    paste_back: bool = False,
    noise: np.ndarray | None = None,
    vae_encode: Mode = "exact",
    vae_decode: Mode = "exact",
    guidance_until: float = 1.0,
    cache: float | str | None = None,
    callback: Callback | None = None,
) -> Result:
    """Edit a picture as the prompt says; without a picture, make one.

    Args:
        pipeline: what `joyjax.load` returned.
        image: a picture, several of them as references of one edit, or None for text to image. A picture is a
            PIL.Image, or a NumPy array, uint8 `[height, width, 3]`, `[height, width, 4]` or `[height, width]`.
        prompt: the instruction. It is text: control tokens written in it have no power.
        negative_prompt: what to steer away from; None takes the family's own, which is not "no guidance".
        steps: denoising steps; None takes the checkpoint's own, else the family's: 40, Edit-Plus 30.
        guidance_scale: strength of classifier-free guidance; 1 or less makes one pass and needs half the time. A list
            has one number for each step. None takes the checkpoint's own, else the family's: 4.
        seed: fixes the noise, together with the references.
        height, width: of the result, in pixels, snapped to the nearest bucket; None takes the last reference's bucket.
        exact_size: use height and width as they are, and fit references to them; multiples of 16.
        base_size: side of the square whose area the buckets have; None takes the checkpoint's own.
        sigmas: noise levels to use in place of the schedule's, falling, from 1 to above 0; the model's shift applies to
            them, as in Diffusers. Their number is that of the steps.
        fit: how a reference comes to its size: "crop", as the reference implementation does, or "pad", which loses
            nothing; the padding is removed from the result.
        mask: white where the result may differ from the last reference, black where it must not; of its size. The
            result then has the reference's own size, and its pixels outside of the mask.
        paste_back: put the edited region back into the last reference, at its own resolution.
        noise: start from this instead of `seed`: `[1, height/8, width/8, channels]`, float32.
        vae_encode, vae_decode: how the autoencoder goes over a picture: "exact"; approximately in "tiled", which needs
            little memory, or in a "patch" for each device; "auto" chooses between these: see docs/speed.md.
        guidance_until: the share of the steps, the first ones, that have guidance; those after it make one pass.
        cache: leave out most blocks of the transformer in steps where its first block's part has changed by less than
            this since they ran, such as 0.1. A number alone or "taylor:0.1" extrapolates what they add,
            "first-block:0.1" repeats it. None: every step is computed. docs/speed.md has what each costs and saves.
        callback: called after each step; raise `joyjax.Cancelled` in it to stop.

    Warns:
        AdviceWarning: where the model is a demo and the request leaves what it learned, references are too many to be
            passed on whole, or transparency or further frames of a picture are not used.

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
        sigmas=sigmas,
        fit=fit,
        mask=mask,
        paste_back=paste_back,
        noise=noise,
        vae_encode=vae_encode,
        vae_decode=vae_decode,
        guidance_until=guidance_until,
        cache=cache,
        callback=callback,
    )
    engine = Engine(pipeline)
    engine.submit(request, callback)
    [result] = [result for _, result in _results(engine)]
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
    engine = Engine(pipeline, batch_size=batch_size)
    for request, options in zip(checked, requests, strict=True):
        engine.submit(request, options.get("callback"))
    yield from _results(engine)


def check_options(pipeline: Pipeline, options: Mapping[str, Any]) -> Request:
    """Check the keyword arguments of `edit`, given as a mapping.

    Raises:
        RequestError: for one that `edit` does not have, a missing `prompt`, or as `edit` does.
    """
    if not isinstance(options, Mapping):
        raise RequestError(
            f"a request is a {type(options).__name__}; expected the keyword arguments of edit, as a dict"
        )
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise RequestError(refusal(unknown, "edit", OPTIONS))
    if "prompt" not in options:
        raise RequestError("prompt is missing")
    return check_request(pipeline, **{"image": None, **options})


def _results(engine: Engine) -> Iterator[tuple[int, Result]]:
    """Run an engine's jobs and give their results; notes of all requests are warned of first, each once."""
    for note in dict.fromkeys(note for job in engine.waiting for note in job.notes):
        warnings.warn(note, AdviceWarning, stacklevel=4)  # the line that called edit
    for job in engine.run():
        if job.result is None:
            raise job.error or RuntimeError(f"job {job.number} has neither result nor error")
        yield job.number, job.result
