"""Fitting a picture to the size of the networks, by cropping, padding or stretching, and pasting their result back.

Sizes are (height, width); boxes are (left, top, right, bottom), right and bottom exclusive.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from joyjax.errors import PictureError
from joyjax.media.image import MAX_PIXELS, Size, alpha_channel, as_rgb, rgb_profile, upright
from joyjax.options import Fit

Fitted = Fit | Literal["stretch"]  # the last is no option: models that are trained so have no other
MUCH = 0.1  # a larger cropped share of a picture brings the advice to use --fit pad


@dataclasses.dataclass(frozen=True)
class Crop:
    """How a picture was fitted; `str` describes it in one line.

    `source` is the size of the picture, `scale` the enlargement, and `box` the part that is kept, in possibly
    fractional pixels of the source. `lost` is the share of the area that is cropped, from 0 to 1. `size` is the fitted
    size. `inner` is the box of it that shows the picture: all but the padding of the fit "pad". With "stretch" rows and
    columns are scaled differently, and `scale` is the square root of the area's.
    """

    source: Size
    scale: float
    box: tuple[float, float, float, float]
    lost: float
    size: Size
    fit: Fitted
    inner: tuple[int, int, int, int]

    def __str__(self) -> str:
        """Return one line for the user."""
        source, size = (f"{width} × {height}" for height, width in (self.source, self.size))
        if self.source == self.size:
            return f"picture {source}, taken as it is"
        facts = [_cropped(self)]
        if self.lost > MUCH:
            facts.append("--fit pad keeps all of it")
        if padding := _padding(self):
            facts.append(padding)
        if stretched := _stretched(self):
            facts.append(stretched)
        return f"picture {source} → {size}{_scaled(self.scale)}; " + "; ".join(facts)


def _scaled(scale: float) -> str:
    if scale == 1:
        return ""
    factor, word = (scale, "enlarged") if scale > 1 else (1 / scale, "reduced")
    return f", {word} slightly" if factor < 1.005 else f", {word} {factor:.3g} times"


def _cropped(crop: Crop) -> str:
    if not crop.lost:
        return "nothing cropped"
    share = "less than 0.1 %" if crop.lost < 0.0005 else f"{100 * crop.lost:.1f} %"
    left, top, right, bottom = (round(side) for side in crop.box)
    return f"{share} cropped: columns {left} to {right} and rows {top} to {bottom} are left"


def _padding(crop: Crop) -> str:
    (height, width), (left, top, right, bottom) = crop.size, crop.inner
    above, below, before, behind = top, height - bottom, left, width - right
    if above + below:
        return f"{above} rows of padding above and {below} below are removed again"
    if before + behind:
        return f"{before} columns of padding on the left and {behind} on the right are removed again"
    return ""


def _stretched(crop: Crop) -> str:
    wider = crop.size[1] / crop.source[1] * crop.source[0] / crop.size[0]
    if crop.fit != "stretch" or abs(wider - 1) < 0.0005:
        return ""
    share, word = (wider - 1, "wider") if wider > 1 else (1 / wider - 1, "taller")
    return f"made {100 * share:.1f} % {word}"


def plan_fit(source: Size, size: Size, fit: Fit) -> Crop:
    """Return the crop of `fit_picture` for a picture of the size `source`.

    Raises:
        PictureError: if the picture is too thin.
    """
    return _cover(source, size) if fit == "crop" else _contain(source, size)


def fit_picture(image: Image.Image, size: Size, fit: Fit) -> tuple[Image.Image, Crop]:
    """Scale a picture in RGB or grey to `size`: "crop" covers it and cuts off the rest, "pad" keeps the whole picture.

    Raises:
        PictureError: if the picture is too thin.
    """
    return cover_crop(image, size) if fit == "crop" else contain_pad(image, size)


def cover_crop(image: Image.Image, size: Size) -> tuple[Image.Image, Crop]:
    """Scale a picture in RGB or grey bilinearly until it covers `size`, and crop it about the centre.

    Source: resize_center_crop in Diffusers' image_processor.py.

    Raises:
        PictureError: if the picture is so thin that scaling it would take more than `MAX_PIXELS` pixels.
    """
    _check_mode(image, "RGB", "L")
    source, (height, width) = (image.height, image.width), size
    crop = _cover(source, size)
    rows, columns = _covering(source, size)
    left, top = (columns - width) // 2, (rows - height) // 2
    scaled = image.resize((columns, rows), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + width, top + height)), crop


def contain_pad(image: Image.Image, size: Size) -> tuple[Image.Image, Crop]:
    """Scale a picture in RGB or grey bilinearly until it fits inside `size`, centre it, and pad by edge replication.

    Raises:
        PictureError: if the picture is so thin that less than a pixel of it would be left.
    """
    _check_mode(image, "RGB", "L")
    crop = _contain((image.height, image.width), size)
    left, top, right, bottom = crop.inner
    scaled = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    around = ((top, size[0] - bottom), (left, size[1] - right), (0, 0))
    return Image.fromarray(np.pad(scaled, around[: scaled.ndim], mode="edge")), crop


def plan_stretch(source: Size, size: Size) -> Crop:
    """Return the crop of `stretch` for a picture of the size `source`."""
    return Crop(
        source=source,
        scale=math.sqrt(size[0] * size[1] / (source[0] * source[1])),
        box=(0.0, 0.0, float(source[1]), float(source[0])),
        lost=0.0,
        size=size,
        fit="stretch",
        inner=(0, 0, size[1], size[0]),
    )


def stretch(image: Image.Image, size: Size) -> Image.Image:
    """Scale a picture to `size` by Lanczos, without keeping its shape: nothing is cropped or padded.

    It is in RGB, grey or RGBA; Pillow premultiplies colours with alpha while it scales.
    """
    _check_mode(image, "RGB", "L", "RGBA")
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def _covering(source: Size, size: Size) -> Size:
    """Return the size of the scaled picture, which covers `size`."""
    scale = max(size[0] / source[0], size[1] / source[1])
    return math.ceil(source[0] * scale), math.ceil(source[1] * scale)


def _cover(source: Size, size: Size) -> Crop:
    (height, width), (rows, columns) = size, _covering(source, size)
    if rows * columns > MAX_PIXELS:
        raise PictureError(
            f"a picture of {source[1]} × {source[0]} pixels is too thin to fill {width} × {height}; crop it first"
        )
    left, top = (columns - width) // 2, (rows - height) // 2
    per_row, per_column = source[0] / rows, source[1] / columns
    return Crop(
        source=source,
        scale=max(height / source[0], width / source[1]),
        box=(left * per_column, top * per_row, (left + width) * per_column, (top + height) * per_row),
        lost=1 - (height * width) / (rows * columns),
        size=size,
        fit="crop",
        inner=(0, 0, width, height),
    )


def _contain(source: Size, size: Size) -> Crop:
    height, width = size
    scale = min(height / source[0], width / source[1])
    if min(source) * scale < 1:
        raise PictureError(
            f"a picture of {source[1]} × {source[0]} pixels is too thin to be seen in {width} × {height}; crop it first"
        )
    rows, columns = round(source[0] * scale), round(source[1] * scale)
    top, left = (height - rows) // 2, (width - columns) // 2
    return Crop(
        source=source,
        scale=scale,
        box=(0.0, 0.0, float(source[1]), float(source[0])),
        lost=0.0,
        size=size,
        fit="pad",
        inner=(left, top, left + columns, top + rows),
    )


def _check_mode(image: Image.Image, *modes: str) -> None:
    if image.mode not in modes:
        raise ValueError(f"cannot scale mode {image.mode} faithfully; expected {' or '.join(modes)}")


def unpad(image: Image.Image, crop: Crop) -> Image.Image:
    """Remove the padding of `contain_pad` from a picture of the fitted size."""
    if (image.height, image.width) != crop.size:
        raise ValueError(f"the picture is {image.height} × {image.width} (height × width); expected {crop.size}")
    return image.crop(crop.inner)


def pasted_region(crop: Crop, mask: Image.Image | None = None) -> tuple[int, int, int, int]:
    """Return the box of the source's pixels that a result can replace: those entirely inside `crop.box`.

    Raises:
        PictureError: if there are none, or the mask (see `check_mask`) is black in all of them.
    """
    left, top, right, bottom = crop.box
    # Sides are products of fractions, so an integer may be off by a rounding error.
    region = math.ceil(left - 1e-6), math.ceil(top - 1e-6), math.floor(right + 1e-6), math.floor(bottom + 1e-6)
    height, width = crop.source
    if region[0] >= region[2] or region[1] >= region[3]:
        raise PictureError(
            f"the crop leaves no whole pixel of a picture of {width} × {height} to paste back; --fit pad keeps all"
        )
    if mask is not None and mask.crop(region).getbbox() is None:
        raise PictureError(
            "the mask is white only where the crop cuts the picture off: rows {1} to {3} and columns {0} to {2} are "
            "left; --fit pad keeps all".format(*region)
        )
    return region


def paste_back(edited: Image.Image, original: Image.Image, crop: Crop, mask: Image.Image | None = None) -> Image.Image:
    """Return the original, at its own size, with the edited region pasted in.

    `edited` is the network's result at the fitted size, with padding. `mask`, as `check_mask` returns it, is 255 where
    the picture may change and 0 where it must not; values between blend. All other pixels, including the cropped ones,
    equal `as_rgb(original)` bit by bit. The edited pixels are resampled by Lanczos, or not at all if the scale is 1.
    Transparency (the result is then RGBA) and an ICC profile of RGB data are taken from the original.

    Raises:
        PictureError: if no pixel can change; see `pasted_region`.
    """
    original = upright(original)
    if (original.height, original.width) != crop.source:
        raise ValueError(f"the original is {original.height} × {original.width}; the crop is of {crop.source}")
    if mask is not None and (mask.mode, mask.size) != ("L", original.size):
        raise ValueError(f"the mask is {mask.mode} {mask.size}; expected L {original.size}, see check_mask")
    region = pasted_region(crop, mask)
    result = as_rgb(original)
    patch = _shown_in(region, edited, crop)
    result.paste(patch, region, None if mask is None else mask.crop(region))
    profile, alpha = rgb_profile(original), alpha_channel(original)
    result.info = {} if profile is None else {"icc_profile": profile}
    if alpha is not None:
        result.putalpha(alpha)
    return result


def _shown_in(region: tuple[int, int, int, int], edited: Image.Image, crop: Crop) -> Image.Image:
    """Return the result in a region of the source, at the source's resolution."""
    shown = unpad(edited, crop)
    left, top, right, bottom = crop.box
    per_column, per_row = shown.width / (right - left), shown.height / (bottom - top)
    box = (
        max(0.0, (region[0] - left) * per_column),
        max(0.0, (region[1] - top) * per_row),
        min(float(shown.width), (region[2] - left) * per_column),
        min(float(shown.height), (region[3] - top) * per_row),
    )
    # At scale 1, Lanczos weighs a pixel by 1 and its neighbours by 0: it changes nothing.
    return shown.resize((region[2] - region[0], region[3] - region[1]), Image.Resampling.LANCZOS, box=box)
