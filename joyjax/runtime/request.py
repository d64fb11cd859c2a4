"""Checking the arguments of an edit, before anything is compiled.

The table of options checks types, bounds and choices; this module checks what depends on the family, the model, or
several options together.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from joyjax.errors import RequestError
from joyjax.families.family import Family
from joyjax.families.request import Request
from joyjax.media.arrays import Picture, as_picture
from joyjax.media.image import as_rgb, as_rgba
from joyjax.media.mask import check_mask
from joyjax.media.references import Source
from joyjax.names import refusal
from joyjax.option_types import choice
from joyjax.options import EDIT, REQUIRED, Option
from joyjax.runtime.load import Pipeline, check_process

NOT_FIELDS = ("image", "mask", "callback")  # a request has pictures, a checked mask, and no callback
# Values in a request of inherited options that its family does not have.
ABSENT: Mapping[str, Any] = {"negative_prompt": "", "guidance_scale": 1.0, "base_size": 0}


def check_request(
    pipeline: Pipeline, image: Picture | Sequence[Picture] | None, prompt: str, **options: Any
) -> Request:
    """Fill in the defaults, the checkpoint's or else the family's, and check every value.

    The arguments are those of `joyjax.edit`. An option that would have no effect is refused.

    Raises:
        RequestError: naming the argument, its value and what is accepted.
        PictureError: for a picture that cannot be used.
    """
    if not isinstance(pipeline, Pipeline):
        raise RequestError(f"pipeline is a {type(pipeline).__name__}; expected what joyjax.load returns")
    check_process()
    if unknown := [name for name in options if name not in EDIT]:
        raise RequestError(refusal(unknown, "edit", EDIT))
    family, given = pipeline.family, {"image": image, "prompt": prompt, **options}
    table = {**EDIT, "base_size": _base_sizes(pipeline)}
    values = {name: option.check(given.get(name, option.default)) for name, option in table.items()}
    for option in EDIT.values():
        _check_has(family, option, values[option.name])
    _check_sizes(values)
    _fill_in(values, pipeline)
    _check_steps(values)
    _check_cache(given.get("cache"), pipeline)
    originals = _pictures(image, family)
    sources = tuple(map(Source.of, originals))  # before pixels are read: see media/references.py
    values["noise"] = _noise(values["noise"])
    mask = None if values["mask"] is None else as_picture(values["mask"], "mask")
    fields = {option.name: values[option.name] for option in EDIT.values() if option.every_family}
    request = Request(
        pictures=tuple(as_rgb(one) if family.picture_mode == "RGB" else as_rgba(one) for one in originals),
        originals=tuple(originals),
        sources=sources,
        mask=mask,
        own={name: values[name] for name, option in EDIT.items() if not option.every_family and family.has(option)},
        **{name: value for name, value in fields.items() if name not in NOT_FIELDS},
    )
    _check_guidance(request, steered=request.negative_prompt != family.defaults.get("negative_prompt", ""))
    _check_pictures_are_there(request)
    return request if mask is None else _with_checked_mask(request, mask)


def _base_sizes(pipeline: Pipeline) -> Option:
    """Return the option with the checkpoint's default added to its choices."""
    sizes = sorted({*pipeline.family.base_sizes, pipeline.base_size} - {0})
    return dataclasses.replace(EDIT["base_size"], type=choice(*sizes))


def _check_has(family: Family, option: Option, value: Any) -> None:
    """Raise RequestError if a family does not have the option, and the value is not its neutral default."""
    plain = isinstance(value, bool | int | float | str)
    neutral = value == option.default if plain else value is option.default
    if family.has(option) or neutral or option.default is REQUIRED:
        return
    shown = f"is {value!r:.200}" if plain else "is given"
    hint = family.hints.get(option.name, "leave it out")
    raise RequestError(f"{option.name} {shown}, but {family.name} has no such option; {hint}")


def _fill_in(values: dict[str, Any], pipeline: Pipeline) -> None:
    """Replace None by defaults: the checkpoint's, or else the family's."""
    if values["steps"] is None and values["sigmas"] is not None:
        values["steps"] = len(values["sigmas"])
    for name, option in EDIT.items():
        if option.inherited and values[name] is None:
            own = getattr(pipeline.generation_defaults, name, None)
            value = pipeline.family.defaults.get(name, ABSENT.get(name)) if own is None else own
            values[name] = value if name == "base_size" else option.check(value)


def _check_sizes(values: Mapping[str, Any]) -> None:
    height, width = values["height"], values["width"]
    if (height is None) != (width is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        raise RequestError(f"{given} is given without {missing}; give both, or neither to take the picture's size")
    if values["exact_size"] and height is None:
        raise RequestError("exact_size needs both height and width")


def _check_steps(values: Mapping[str, Any]) -> None:
    steps, sigmas, scale = values["steps"], values["sigmas"], values["guidance_scale"]
    if sigmas is not None and len(sigmas) != steps:
        raise RequestError(f"steps is {steps}, but there are {len(sigmas)} sigmas; leave steps out")
    if isinstance(scale, tuple) and len(scale) != steps:
        raise RequestError(f"guidance_scale has {len(scale)} values; expected one, or one for each of {steps} steps")


def _check_guidance(request: Request, steered: bool) -> None:
    """Refuse options without effect if guidance is off; `steered`: the negative prompt is not the family's default."""
    unguided = f"but guidance_scale is {request.guidance_scale}: there is no guidance; give a scale above 1"
    if request.guidance_until < 1 and not request.guided:
        raise RequestError(f"guidance_until is {request.guidance_until}, {unguided}")
    if steered and not request.guided:
        raise RequestError(f"negative_prompt is given, {unguided}, or leave it out")


def _check_pictures_are_there(request: Request) -> None:
    """Refuse options that have no effect without a picture."""
    if request.originals:
        return
    for name, given in (("mask", request.mask is not None), ("paste_back", request.paste_back)):
        if given:
            raise RequestError(f"{name} is given without a picture; it needs one to put the result into")
    if request.fit == "pad":
        raise RequestError("fit is 'pad', but there is no picture to fit")


def _check_cache(cache: object, pipeline: Pipeline) -> None:
    """Refuse a step cache if the transformer has no blocks to skip."""
    if cache is None:
        return
    layers = pipeline.parts.configs[pipeline.family.denoiser].num_layers
    if layers < 2:
        raise RequestError(f"cache is {cache!r:.200}, but the transformer has {layers} block: there is none to skip")


def _with_checked_mask(request: Request, mask: Image.Image) -> Request:
    checked = check_mask(mask, request.originals[-1])
    return dataclasses.replace(request, mask=checked, mask_source=Source.of(mask))


def _pictures(image: Any, family: Family) -> list[Image.Image]:
    several = isinstance(image, list | tuple)
    if several and not image:
        raise RequestError("image is an empty list; give a picture, or for text to image leave it out (Python: None)")
    if several:
        images = [as_picture(one, f"image[{n}]") for n, one in enumerate(image)]
    else:
        images = [] if image is None else [as_picture(image, "image")]
    fewest, most = family.references
    other = f"; {hint}" if (hint := family.hints.get("image")) else ""
    if most is not None and len(images) > most:
        raise RequestError(f"{len(images)} reference pictures were given and {family.name} takes {most} at most{other}")
    if len(images) < fewest:
        raise RequestError(f"{len(images)} reference pictures were given and {family.name} needs {fewest}{other}")
    return images


def _noise(noise: Any) -> np.ndarray | None:
    if noise is None:
        return None
    try:
        array = np.asarray(noise)
    except (TypeError, ValueError) as error:
        raise RequestError(f"noise is no array ({error}); expected float32 [1, height/8, width/8, channels]") from None
    if array.ndim not in (4, 5) or not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
        raise RequestError(
            f"noise has shape {array.shape} and dtype {array.dtype}; expected float32 [1, height/8, width/8, channels]"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError("noise holds NaN or Inf; expected finite values, drawn from a standard normal distribution")
    return array
