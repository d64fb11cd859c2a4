"""Checking the arguments of an edit, all in one place and before anything is compiled."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from joyjax.errors import RequestError
from joyjax.families.family import Family
from joyjax.families.request import Request
from joyjax.media.arrays import Picture, as_picture
from joyjax.media.framing import FITS, Fit
from joyjax.media.image import as_rgb
from joyjax.media.mask import check_mask
from joyjax.media.references import Source
from joyjax.models.autoencoder.tiling import MODES, Mode
from joyjax.runtime.load import Pipeline, check_process
from joyjax.sampling.step_cache import KINDS, MOST_CHANGE, CacheRule

SIDES = 16, 8192
BASE_SIZES = (256, 512, 768, 1024)
MOST_STEPS = 1000
MOST_GUIDANCE = 1000.0


def check_request(
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
    fit: str = "crop",
    mask: Picture | None = None,
    paste_back: bool = False,
    noise: np.ndarray | None = None,
    vae_encode: str = "exact",
    vae_decode: str = "exact",
    guidance_until: float = 1.0,
    cache: float | str | None = None,
    callback: Callable | None = None,
) -> Request:
    """Fill in the defaults, the checkpoint's own or else the family's, and check every value.

    The arguments are those of `joyjax.edit`. What would be without effect is refused, too.

    Raises:
        RequestError: naming the argument, its value and what is accepted.
        PictureError: for a picture that cannot be used.
    """
    if not isinstance(pipeline, Pipeline):
        raise RequestError(f"pipeline is a {type(pipeline).__name__}; expected what joyjax.load returns")
    check_process()
    family, defaults = pipeline.family, pipeline.generation_defaults
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str) and not (name == "negative_prompt" and text is None):
            raise RequestError(f"{name} is a {type(text).__name__}; expected a str")
    levels = _sigmas(sigmas)
    if steps is None:
        steps = len(levels) if levels is not None else defaults.steps or family.defaults["steps"]
    steps = _integer("steps", steps, 1, MOST_STEPS)
    if levels is not None and len(levels) != steps:
        raise RequestError(f"steps is {steps}, but there are {len(levels)} sigmas; leave steps out")
    if guidance_scale is None:
        guidance_scale = defaults.guidance_scale
        guidance_scale = family.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    if (height is None) != (width is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        raise RequestError(f"{given} is given without {missing}; give both, or neither to take the picture's bucket")
    if height is not None and width is not None:
        height, width = _integer("height", height, *SIDES), _integer("width", width, *SIDES)
    allowed = sorted({*BASE_SIZES, pipeline.base_size})
    base_size = pipeline.base_size if base_size is None else base_size
    if isinstance(base_size, bool) or not isinstance(base_size, int | np.integer) or base_size not in allowed:
        raise RequestError(f"base_size is {base_size!r}; choose one of {', '.join(map(str, allowed))}")
    for name, mode, modes in (
        ("vae_encode", vae_encode, MODES),
        ("vae_decode", vae_decode, MODES),
        ("fit", fit, FITS),
    ):
        if not isinstance(mode, str) or mode not in modes:
            raise RequestError(f"{name} is {mode!r}; choose one of: {', '.join(modes)}")
    if callback is not None and not callable(callback):
        raise RequestError(f"callback is {callback!r}; expected a function of one event, or None")
    originals = _pictures(image, family)
    sources = tuple(map(Source.of, originals))  # before pixels are read: see Source
    if mask is not None:
        mask = as_picture(mask, "mask")
    request = Request(
        prompt=prompt,
        negative_prompt=family.defaults["negative_prompt"] if negative_prompt is None else negative_prompt,
        pictures=tuple(as_rgb(one) for one in originals),
        steps=steps,
        guidance_scale=_guidance(guidance_scale, steps),
        seed=_seed(seed),
        height=height,
        width=width,
        exact_size=_switch("exact_size", exact_size),
        base_size=int(base_size),
        noise=_noise(noise),
        sigmas=levels,
        fit=cast(Fit, fit),
        mask=mask,
        paste_back=_switch("paste_back", paste_back),
        originals=tuple(originals),
        sources=sources,
        vae_encode=cast(Mode, vae_encode),
        vae_decode=cast(Mode, vae_decode),
        guidance_until=_number("guidance_until", guidance_until),
        cache=_cache(cache, pipeline),
    )
    return _with_effect(request, request.negative_prompt != family.defaults["negative_prompt"])


OPTIONS = tuple(inspect.signature(check_request).parameters)[1:]


def _with_effect(request: Request, steered: bool) -> Request:
    """Return the request with its mask read, if nothing in it would be without effect; `steered`: away from a text."""
    if not 0 < request.guidance_until <= 1:
        raise RequestError(
            f"guidance_until is {request.guidance_until:g}; expected a share of the steps, above 0 and up to 1; "
            "for no guidance at all give guidance_scale=1"
        )
    unguided = f"but guidance_scale is {request.guidance_scale}: there is no guidance; give a scale above 1"
    if request.guidance_until < 1 and not request.guided:
        raise RequestError(f"guidance_until is {request.guidance_until}, {unguided}")
    if steered and not request.guided:
        raise RequestError(f"negative_prompt is given, {unguided}, or leave it out")
    if request.exact_size and (request.height is None or request.width is None):
        raise RequestError("exact_size needs both height and width")
    for name, given in (("mask", request.mask is not None), ("paste_back", request.paste_back)):
        if given and not request.originals:
            raise RequestError(f"{name} is given without a picture; it needs one to put the result into")
    if request.fit == "pad" and not request.originals:
        raise RequestError("fit is 'pad', but there is no picture to fit")
    if request.mask is None:
        return request
    source = Source.of(request.mask) if isinstance(request.mask, Image.Image) else None
    mask = check_mask(request.mask, request.originals[-1])
    return dataclasses.replace(request, mask=mask, mask_source=source)


def _sigmas(sigmas: Any) -> tuple[float, ...] | None:
    if sigmas is None:
        return None
    levels = _numbers("sigmas", sigmas)
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not falling or not 0 < levels[-1] <= levels[0] <= 1 or len(levels) > MOST_STEPS:
        raise RequestError(
            f"sigmas are {sigmas!r:.200}; expected 1 to {MOST_STEPS} falling levels from at most 1 to above 0"
        )
    return levels


def _guidance(scale: Any, steps: int) -> float | tuple[float, ...]:
    several = isinstance(scale, list | tuple | np.ndarray)
    scales = _numbers("guidance_scale", scale) if several else (_number("guidance_scale", scale),)
    for one in scales:
        if not abs(one) <= MOST_GUIDANCE:  # not so for NaN either
            raise RequestError(
                f"guidance_scale is {one}; expected a number up to {MOST_GUIDANCE:g}, 1 or less for no guidance"
            )
    if several and len(scales) != steps:
        raise RequestError(f"guidance_scale has {len(scales)} numbers; expected one, or one for each of {steps} steps")
    return scales if several else scales[0]


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple | np.ndarray):
        raise RequestError(f"{name} is {values!r:.200}; expected a list of numbers")
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise RequestError(f"{name} is {value!r:.200}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise RequestError(f"{name} is {value!r:.40}…; expected a number that fits into 64 bits") from None


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} is {value!r:.200}; expected True or False")
    return bool(value)


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
    if "cache" in pipeline.family.without:
        raise RequestError(f"cache is {cache!r:.200}, but {pipeline.family.name} has no step cache; leave it out")
    layers = pipeline.parts.configs[pipeline.family.denoiser].num_layers
    if layers < 2:
        raise RequestError(f"cache is {cache!r:.200}, but the transformer has {layers} block: there is none to skip")
    return CacheRule(threshold, kind or KINDS[0])


def _seed(seed: Any) -> int:
    """Read a seed. Generators and keys of other libraries are refused: joyjax draws the noise itself."""
    module, kind = type(seed).__module__.partition(".")[0], type(seed).__name__
    if module != "builtins" and not isinstance(seed, np.integer):
        known = ", such as the one that the generator was seeded with" if "Generator" in kind else ""
        raise RequestError(
            f"seed is a {module} {kind}; expected a whole number{known}: joyjax draws its own noise from it, and noise "
            "of your own is given as noise"
        )
    return _integer("seed", seed, 0, 2**64 - 1)


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        shown = " ".join(repr(value).split())  # an array's has several lines
        raise RequestError(f"{name} is {shown[:200]}; expected a whole number")
    if not lowest <= value <= highest:
        raise RequestError(f"{name} is {value}; expected a number from {lowest} to {highest}")
    return int(value)


def _pictures(image: Any, family: Family) -> list[Image.Image]:
    if image is None:
        return []
    several = isinstance(image, list | tuple)
    if several and not image:
        raise RequestError("image is an empty list; give a picture, or for text to image leave it out (Python: None)")
    images = (
        [as_picture(one, f"image[{n}]") for n, one in enumerate(image)] if several else [as_picture(image, "image")]
    )
    fewest, most = family.references
    if most is not None and len(images) > most:
        other = f"; {hint}" if (hint := family.hints.get("image")) else ""
        raise RequestError(f"{len(images)} reference pictures were given and {family.name} takes {most} at most{other}")
    if len(images) < fewest:
        raise RequestError(f"{len(images)} reference pictures were given and {family.name} needs {fewest}")
    return images


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
