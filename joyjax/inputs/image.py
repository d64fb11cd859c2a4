"""Pictures: reading them, fitting them to a bucket, and the way to arrays and back.

Sizes are (height, width) here and everywhere else; only Pillow's own calls have the width first.
"""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from joyjax.errors import PictureError, RequestError

Size = tuple[int, int]

MAX_PIXELS = 178_956_970  # where Pillow's own guard against decompression bombs refuses
# Not EPS, which is a program: Pillow would have Ghostscript run it.
FORMATS = frozenset("AVIF BMP DIB GIF HEIF ICO JPEG JPEG2000 MPO PNG PPM QOI TGA TIFF WEBP".split())


@dataclasses.dataclass(frozen=True)
class Crop:
    """What a fit kept of a picture.

    `source` is its size and `scale` the enlargement; `box` is (left, top, right, bottom) of what is left, in pixels of
    the source and not always whole; `lost` is the share of the area that is gone, from 0 to 1.
    """

    source: Size
    scale: float
    box: tuple[float, float, float, float]
    lost: float


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Read a picture file: upright, in the mode that it was stored in; of several frames the first.

    Raises:
        PictureError: if there is no such file, it is no picture, broken, or of more than `MAX_PIXELS` pixels.
    """
    if not os.path.isfile(path):
        raise PictureError(f"{path} is not a file" if os.path.exists(path) else f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} is too large; at most {MAX_PIXELS:,} pixels are read") from error
    except Exception as error:  # each of Pillow's readers fails in its own way
        raise PictureError(f"{path} cannot be read as a picture: {error}") from error
    with image:
        if image.format not in FORMATS:
            raise PictureError(f"{path} is in format {image.format}; save it as PNG or JPEG")
        return _upright(image, str(path))


def as_rgb(image: object) -> Image.Image:
    """Return any Pillow picture upright and in RGB.

    Pillow converts what RGB can hold, palette, CMYK or 1 bit; grey of 16 bits is scaled to 8. Transparency is dropped
    and the colours beneath it show.

    Raises:
        PictureError: if it is no Pillow picture, broken, empty or too large, or its values have no known range.
    """
    if not isinstance(image, Image.Image):
        raise PictureError(f"a picture is a {type(image).__name__}; expected a PIL.Image")
    image = _upright(image, getattr(image, "filename", "") or "the picture")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_of_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise PictureError("the picture holds floating-point numbers, whose range is not known; save it with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"a picture in mode {image.mode} has no RGB form: {error}") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Decode the picture and apply its EXIF rotation."""
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(f"{name} has {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read")
    if not image.width * image.height:
        raise PictureError(f"{name} is empty: {image.width} × {image.height} pixels")
    try:
        image.load()
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise PictureError(f"{name} is broken or cut off: {error}") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that nobody can read rotates nothing; the pixels are good
        return image.copy()


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Return 0 … 65535 as 0 … 255, rounded to nearest. Pillow itself would clip."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise PictureError(f"the picture's grey runs from {low} to {high}; expected 16 bits, 0 to 65535")
    return Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))


@functools.cache
def buckets(base_size: int) -> tuple[Size, ...]:
    """Return the sizes that a picture is fitted to, in the reference's order: up to `base_size`² pixels, up to 4:1.

    They are the published table, which is for 1024, times `base_size`/1024. At 256, 512 and 768 that gives multiples
    of 16 by itself; elsewhere sides are rounded to them, and what is then double or beyond those bounds is left out.
    Source: BUCKETS in Diffusers' image_processor.py.

    Raises:
        RequestError: unless `base_size` is a multiple of 16 and at least 32.
    """
    if base_size < 32 or base_size % 16:
        raise RequestError(
            f"base_size is {base_size}; expected 256, 512, 768 or 1024, or another multiple of 16 from 32"
        )

    def scaled(side: int) -> int:
        return 16 * round(side * base_size / 256 / 16)

    sizes = dict.fromkeys((scaled(height), scaled(width)) for height, width in sorted(_staircase()))
    return tuple((height, width) for height, width in sizes if _in_bounds(height, width, base_size))


def _staircase() -> Iterator[Size]:
    """Walk below the curve h·w = 256² from tall to wide, in steps of 16: the published table at a quarter."""
    height, width = 4096, 16
    while height:
        if _in_bounds(height, width, 256):
            yield height, width
        if height * (width + 16) <= 256**2:
            width += 16
        else:
            height -= 16


def _in_bounds(height: int, width: int, base_size: int) -> bool:
    return height * width <= base_size**2 and max(height, width) <= 4 * min(height, width)


def nearest_bucket(height: int, width: int, base_size: int) -> Size:
    """Return the bucket whose h/w is nearest to the picture's by plain difference; of equals the first in the table."""
    return min(buckets(base_size), key=lambda size: abs(size[0] / size[1] - height / width))


def cover_crop(image: Image.Image, size: Size) -> tuple[Image.Image, Crop]:
    """Scale a picture in RGB or grey until it covers `size`, bilinearly, and cut off what sticks out, centred.

    Source: resize_center_crop in Diffusers' image_processor.py.

    Raises:
        PictureError: if the picture is so thin that scaling it would take more than `MAX_PIXELS` pixels.
    """
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"cannot scale mode {image.mode} faithfully; expected RGB or L")
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled_height, scaled_width = math.ceil(image.height * scale), math.ceil(image.width * scale)
    if scaled_height * scaled_width > MAX_PIXELS:
        raise PictureError(
            f"a picture of {image.width} × {image.height} pixels is too thin to fill {width} × {height}; crop it first"
        )
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    scaled = image.resize((scaled_width, scaled_height), Image.Resampling.BILINEAR)
    per_row, per_column = image.height / scaled_height, image.width / scaled_width
    crop = Crop(
        source=(image.height, image.width),
        scale=scale,
        box=(left * per_column, top * per_row, (left + width) * per_column, (top + height) * per_row),
        lost=1 - (height * width) / (scaled_height * scaled_width),
    )
    return scaled.crop((left, top, left + width, top + height)), crop


def to_pixels(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return the numbers of an RGB picture."""
    if image.mode != "RGB":
        raise ValueError(f"the picture is in mode {image.mode}; expected RGB, see as_rgb")
    return np.asarray(image)


def from_pixels(pixels: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """Return an RGB picture of these numbers."""
    return Image.fromarray(pixels)


def save_png(image: Image.Image, path: Path, texts: PngInfo | None = None) -> None:
    """Write a PNG file, with text chunks; it appears under its name only when it is whole.

    Raises:
        PictureError: if it cannot be written there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(beside, format="PNG", pnginfo=texts)
        os.replace(beside, path)
    except OSError as error:
        raise PictureError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)
