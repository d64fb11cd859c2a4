"""The formats of result files, by suffix, and the encoding of a picture in one."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, features

from joyjax.errors import PictureError, RequestError
from joyjax.media.metadata import Texts, save_options

LOSSLESS = "lossless"
BEST = 100
MOST_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_500}

Quality = int | str | None


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format: Pillow's name, the suffixes, the default quality, and whether it can be lossless or lossy.

    `alpha`: it holds transparency.
    """

    name: str
    suffixes: tuple[str, ...]
    quality: int | str
    lossless: bool
    lossy: bool
    alpha: bool = True


FORMATS = (
    Format("PNG", (".png",), LOSSLESS, lossless=True, lossy=False),
    Format("JPEG", (".jpg", ".jpeg"), 95, lossless=False, lossy=True, alpha=False),
    Format("WEBP", (".webp",), LOSSLESS, lossless=True, lossy=True),
    Format("AVIF", (".avif",), 90, lossless=False, lossy=True),
    Format("TIFF", (".tif", ".tiff"), LOSSLESS, lossless=True, lossy=False),
)
PNG = FORMATS[0]
SUFFIXES = {suffix: each for each in FORMATS for suffix in each.suffixes}


def format_of(path: str | os.PathLike) -> Format:
    """Return the format of a result by the suffix of its name.

    Raises:
        RequestError: for a missing or unknown suffix, or a format that the installed Pillow cannot write.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        named = f"ends in {suffix}" if suffix else "has no suffix"
        raise RequestError(f"{path} {named}; name a file that ends in {', '.join(SUFFIXES)}")
    found = SUFFIXES[suffix]
    if found.name in ("AVIF", "WEBP") and not features.check(found.name.lower()):
        raise RequestError(f"{path}: this Pillow was built without {found.name}; install a newer one, or name a .png")
    return found


def check_quality(quality: Any, form: Format) -> int | str:
    """Return the quality of a file: from 1 to 100, or "lossless"; None is the format's own.

    Raises:
        RequestError: for another value, or one that the format does not have.
    """
    if quality is None:
        return form.quality
    suffix = form.suffixes[0]
    whole = isinstance(quality, int) and not isinstance(quality, bool) and 1 <= quality <= BEST
    if not whole and quality != LOSSLESS:
        raise RequestError(f"quality is {quality!r}; expected a whole number from 1 to {BEST}, or {LOSSLESS!r}")
    if whole and not form.lossy:
        raise RequestError(
            f"quality is {quality}, but {suffix} files are lossless; leave it out, or name a .jpg, .webp or .avif"
        )
    if quality == LOSSLESS and not form.lossless:
        raise RequestError(f"quality is {LOSSLESS!r}, but {suffix} files lose detail; name a .png, .webp or .tiff")
    return quality


def encode(image: Image.Image, form: Format, *, texts: Texts | None = None, quality: Quality = None) -> bytes:
    """Return a picture as the bytes of a file, with its colour profile and optional texts.

    Lossy files keep colours at full resolution (4:4:4).

    Raises:
        RequestError: for a quality or texts that the format does not support.
        PictureError: for a picture that the format does not support.
    """
    chosen = check_quality(quality, form)
    most = MOST_SIDE.get(form.name)
    if most is not None and max(image.size) > most:
        raise PictureError(
            f"the picture has {image.width} × {image.height} pixels and a {form.suffixes[0]} file at most {most} a "
            "side; name a .png"
        )
    options: dict[str, Any] = {} if texts is None else save_options(texts, form.name)
    if chosen != LOSSLESS:
        options |= {"quality": chosen, **({} if form.name == "WEBP" else {"subsampling": "4:4:4"})}
    elif form.name == "WEBP":
        options |= {"lossless": True, "exact": True}
    elif form.name == "TIFF":
        options["compression"] = "tiff_deflate"
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    written = io.BytesIO()
    try:
        image.save(written, form.name, **options)
    except (OSError, ValueError, RuntimeError) as error:  # from the codec libraries
        raise PictureError(f"the picture cannot be written as {form.suffixes[0]}: {error}; name a .png") from error
    return written.getvalue()


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Convert errors of the operating system while a picture is written to a PictureError."""
    try:
        yield
    except OSError as error:
        raise PictureError(f"{path} cannot be written: {error.strerror or error}") from error
