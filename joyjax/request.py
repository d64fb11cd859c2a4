"""Checking the arguments of an edit, all in one place and before anything is compiled."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from joyjax.errors import RequestError
from joyjax.families.family import Request
from joyjax.inputs.image import as_rgb
from joyjax.pipeline import Pipeline
from joyjax.sampling.cache import KINDS, MOST_CHANGE, CacheRule
from joyjax.sampling.tiles import MODES, Mode

SIDES = 16, 8192
BASE_SIZES = (256, 512, 768, 1024)
MOST_STEPS = 1000
MOST_GUIDANCE = 1000.0
OPEN = "open files with PIL.Image.open"


def check_request(
    pipeline: Pipeline,
    image: Image.Image | Sequence[Image.Image] | None,
    prompt: str,
    *,
    negative_prompt: str | None,
    steps: int | None,
    guidance_scale: float | None,
    seed: int,
    height: int | None,
    width: int | None,
    exact_size: bool,
    base_size: int | None,
    noise: np.ndarray | None,
    vae_encode: str = "exact",
    vae_decode: str = "exact",
    guidance_until: float = 1.0,
    cache: float | str | None = None,
    callback: Callable | None = None,
) -> Request:
    """Fill in the defaults, the checkpoint's own or else the family's, and check every value.

    The arguments are those of `joyjax.edit`.

    Raises:
        RequestError: naming the argument, its value and what is accepted.
        PictureError: for a picture that cannot be used.
    """
    if not isinstance(pipeline, Pipeline):
        raise RequestError(f"pipeline is a {type(pipeline).__name__}; expected what joyjax.load returns")
    family = pipeline.family
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str) and not (name == "negative_prompt" and text is None):
            raise RequestError(f"{name} is a {type(text).__name__}; expected a str")
    native = pipeline.native
    steps = _integer("steps", (native.steps or family.steps) if steps is None else steps, 1, MOST_STEPS)
    if guidance_scale is None:
        guidance_scale = family.guidance_scale if native.guidance_scale is None else native.guidance_scale
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float | np.floating | np.integer):
        raise RequestError(f"guidance_scale is {guidance_scale!r}; expected a number")
    if not abs(guidance_scale) <= MOST_GUIDANCE:  # not so for NaN either
        raise RequestError(
            f"guidance_scale is {guidance_scale}; expected a number up to {MOST_GUIDANCE:g}, 1 or less for no guidance"
        )
    if isinstance(guidance_until, bool) or not isinstance(guidance_until, int | float | np.floating | np.integer):
        raise RequestError(f"guidance_until is {guidance_until!r}; expected a number above 0 and up to 1")
    if not 0 < guidance_until <= 1:
        raise RequestError(
            f"guidance_until is {guidance_until}; expected a share of the steps, above 0 and up to 1; "
            "for no guidance at all give guidance_scale=1"
        )
    if (height is None) != (width is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        raise RequestError(f"{given} is given without {missing}; give both, or neither to take the picture's bucket")
    if height is not None and width is not None:
        height, width = _integer("height", height, *SIDES), _integer("width", width, *SIDES)
    if not isinstance(exact_size, bool | np.bool_):
        raise RequestError(f"exact_size is {exact_size!r}; expected True or False")
    allowed = sorted({*BASE_SIZES, pipeline.base_size})
    base_size = pipeline.base_size if base_size is None else base_size
    if isinstance(base_size, bool) or not isinstance(base_size, int | np.integer) or base_size not in allowed:
        raise RequestError(f"base_size is {base_size!r}; choose one of {', '.join(map(str, allowed))}")
    for name, mode in (("vae_encode", vae_encode), ("vae_decode", vae_decode)):
        if not isinstance(mode, str) or mode not in MODES:
            raise RequestError(f"{name} is {mode!r}; choose one of: {', '.join(MODES)}")
    if callback is not None and not callable(callback):
        raise RequestError(f"callback is {callback!r}; expected a function of one event, or None")
    return Request(
        prompt=prompt,
        negative_prompt=family.negative_prompt if negative_prompt is None else negative_prompt,
        pictures=_pictures(image, family.references, family.name),
        steps=steps,
        guidance_scale=float(guidance_scale),
        seed=_integer("seed", seed, 0, 2**64 - 1),
        height=height,
        width=width,
        exact_size=bool(exact_size),
        base_size=int(base_size),
        noise=_noise(noise),
        vae_encode=cast(Mode, vae_encode),
        vae_decode=cast(Mode, vae_decode),
        guidance_until=float(guidance_until),
        cache=_cache(cache, pipeline),
    )


def _cache(cache: Any, pipeline: Pipeline) -> CacheRule | None:
    """Read `0.1`, `"0.1"` or `"taylor:0.1"`, for a transformer that has the two parts a cache needs."""
    if cache is None:
        return None
    expected = f"expected a threshold from 0 to {MOST_CHANGE:g}, such as 0.1, or a kind with one: " + ", ".join(
        f"{kind}:0.1" for kind in KINDS
    )
    kind, colon, number = cache.rpartition(":") if isinstance(cache, str) else ("", "", cache)
    try:
        threshold = float("nan") if isinstance(number, bool) else float(number)
    except (TypeError, ValueError):
        threshold = float("nan")
    if (colon and kind not in KINDS) or not 0 <= threshold <= MOST_CHANGE:
        raise RequestError(f"cache is {cache!r:.200}; {expected}")
    if not pipeline.family.step_cache:
        raise RequestError(f"cache is {cache!r:.200}, but {pipeline.family.name} has no step cache; leave it out")
    layers = pipeline.files.configs["transformer"].num_layers
    if layers < 2:
        raise RequestError(f"cache is {cache!r:.200}, but the transformer has {layers} block: there is none to skip")
    return CacheRule(threshold, kind or KINDS[0])


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{name} is {value!r}; expected a whole number")
    if not lowest <= value <= highest:
        raise RequestError(f"{name} is {value}; expected a number from {lowest} to {highest}")
    return int(value)


def _pictures(image: Any, most: int, family: str) -> tuple[Image.Image, ...]:
    images = [] if image is None else [image] if isinstance(image, Image.Image) else image
    if not isinstance(images, list | tuple):
        raise RequestError(f"image is a {type(image).__name__}; expected a PIL.Image, a list of them, or None: {OPEN}")
    for one in images:
        if not isinstance(one, Image.Image):
            raise RequestError(f"image holds a {type(one).__name__}; expected PIL.Image: {OPEN}")
    if len(images) > most:
        several = "" if most > 1 else "; Edit-Plus weights take several"
        raise RequestError(f"{len(images)} reference pictures were given and {family} takes {most} at most{several}")
    return tuple(as_rgb(one) for one in images)


def _noise(noise: Any) -> np.ndarray | None:
    if noise is None:
        return None
    try:
        array = np.asarray(noise)
    except (TypeError, ValueError) as error:
        raise RequestError(f"noise is no array ({error}); expected float32 [1, height/8, width/8, channels]") from None
    if array.ndim != 4 or not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
        raise RequestError(
            f"noise has shape {array.shape} and dtype {array.dtype}; expected float32 [1, height/8, width/8, channels]"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError("noise holds NaN or Inf; expected finite numbers, drawn from a standard normal distribution")
    return array
