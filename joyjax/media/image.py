"""Pictures: reading files, conversion to upright RGB, and conversion to arrays and back.

Sizes are (height, width) here and everywhere else; only Pillow's own calls have the width first.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from joyjax.errors import PictureError
from joyjax.media.frames import frames_note
from joyjax.media.not_pictures import describe, describe_raw, is_heif, read_head

Size = tuple[int, int]

MAX_PIXELS = 178_956_970  # the limit of Pillow's own check for decompression bombs
TURNS = {  # EXIF orientation → transposition to upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Not EPS, which is a program: Pillow would have Ghostscript run it.
FORMATS = frozenset("AVIF BMP DIB GIF HEIF ICO JPEG JPEG2000 MPO PNG PPM QOI TGA TIFF WEBP".split())


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Read a picture file: upright, in the mode that it is stored in; of several frames the first.

    Only regular files are read; `load_image` in load.py reads pipes and URLs.

    Raises:
        PictureError: if the file does not exist, is not a picture, is broken, or has more than `MAX_PIXELS` pixels.
    """
    if not os.path.isfile(path):
        raise PictureError(f"{path} is not a file" if os.path.exists(path) else f"{path} does not exist")
    picture = decode_picture(path, str(path))
    # As from `Image.open`, but absolute: a recipe names the file, and the current folder may change until then.
    picture.filename = os.path.abspath(path)  # type: ignore[attr-defined]
    return picture


def decode_picture(file: str | os.PathLike | BytesIO, name: str) -> Image.Image:
    """Return the picture in a file as `open_picture` does, with a note on its frames; `name` is for messages.

    Raises:
        PictureError: as `open_picture` does.
    """
    try:
        head = read_head(file)
        if is_heif(head):
            _register_heif()
        with _silence():
            image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} is too large; at most {MAX_PIXELS:,} pixels are read") from error
    except UnidentifiedImageError as error:
        unknown = "cannot be read as a picture: it is broken, or of another format; save it as PNG or JPEG"
        raise PictureError(f"{name} {describe(head, Image.OPEN) or unknown}") from error
    except Exception as error:  # Pillow's readers raise many types
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{name} cannot be read as a picture: {reason}") from error
    with image:
        if image.format not in FORMATS:
            known = describe(head, Image.OPEN) or f"is in format {image.format}; save it as PNG or JPEG"
            raise PictureError(f"{name} {known}")
        if image.format == "TIFF" and (raw := describe_raw(head, image.tag_v2.get)):  # type: ignore[attr-defined]
            raise PictureError(f"{name} {raw}")
        picture = upright(image, name)
        picture.frames_note = frames_note(image)  # type: ignore[attr-defined]
        return picture


def _register_heif() -> None:
    """Register the HEIC reader with Pillow if the extra is installed."""
    if "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()


def as_rgb(image: object) -> Image.Image:
    """Return any Pillow picture upright and in RGB.

    Pillow converts palettes, CMYK and 1 bit; grey of 16 bits is scaled to 8. Transparency is dropped, and the colours
    beneath it show.

    Raises:
        PictureError: if it is not a Pillow picture, broken, empty or too large, or its values have no known range.
    """
    if not isinstance(image, Image.Image):
        raise PictureError(f"a picture is a {type(image).__name__}; expected a PIL.Image")
    image = upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_of_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise PictureError("the picture holds floating-point numbers, whose range is not known; save it with 8 bits")
    try:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without Pillow's warning
        return image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"a picture in mode {image.mode} has no RGB form: {error}") from error


def as_rgba(image: Image.Image) -> Image.Image:
    """Return any Pillow picture upright and in RGBA: the colours of `as_rgb`, opaque where it has no transparency."""
    rgb, alpha = as_rgb(image), alpha_channel(upright(image))
    rgb.putalpha(255 if alpha is None else alpha)
    return rgb


def upright(image: Image.Image, name: str = "") -> Image.Image:
    """Decode a picture and rotate it by the orientation in EXIF or XMP, which is then removed.

    The result is a copy in the same mode. Messages use `name`, or else the file name.

    Raises:
        PictureError: if it is broken, empty, too large, or a TIFF whose grey Pillow misreads.
    """
    name = name or getattr(image, "filename", "") or "the picture"
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(f"{name} has {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read")
    if not image.width * image.height:
        raise PictureError(f"{name} is empty: {image.width} × {image.height} pixels")
    try:
        with _silence():
            image.load()
    except Exception as error:  # Pillow's decoders raise many types
        raise PictureError(f"{name} is broken or cut off: {error}") from error
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 bits per sample, 262 photometric interpretation
    if image.mode.startswith("I;16") and (tags.get(258, (16,))[0] != 16 or tags.get(262, 1) == 0):
        raise PictureError(f"{name} is grey of other than 16 bits, or with white as 0; save it with 8 bits, or as PNG")
    try:
        with _silence():
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF data is ignored; the pixels are valid
        turn = None
    rotated = image.copy() if turn is None else image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        rotated.info.pop(key, None)
    return rotated


def alpha_channel(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of a picture as grey, 255 where it is opaque; None if there is none.

    The picture comes from `upright` and has any mode that `as_rgb` accepts.
    """
    if not image.has_transparency_data:
        return None
    clear = image.info.get("transparency")  # the transparent value, or the table of a palette
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))
    if (
        image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255
    ):  # of a file with 16 bits per channel, of which Pillow keeps the high 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA").getchannel("A")


def rgb_profile(image: Image.Image) -> bytes | None:
    """Return a picture's ICC profile if it is one for RGB data.

    Profiles of CMYK or grey do not apply to a picture that `as_rgb` has converted.
    """
    profile = image.info.get("icc_profile")
    known = isinstance(profile, bytes) and profile[16:20] == b"RGB " and profile[36:40] == b"acsp"
    return profile if known else None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress Pillow's warnings: sizes are checked here, and broken metadata is harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Scale 0 … 65535 to 0 … 255, rounded to nearest. Pillow itself would clip."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise PictureError(f"the picture's grey runs from {low} to {high}; expected 16 bits, 0 to 65535")
    return Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))


def to_pixels(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of an RGB picture."""
    if image.mode != "RGB":
        raise ValueError(f"the picture is in mode {image.mode}; expected RGB, see as_rgb")
    return np.asarray(image)


def from_pixels(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Return an RGB or RGBA picture with these pixels."""
    return Image.fromarray(pixels)
