"""Reading a picture from a file, a URL, a pipe, or `-` for standard input."""

import os
import stat
import sys
from io import BufferedIOBase, BytesIO
from pathlib import Path

from PIL import Image

from joyjax.errors import PictureError
from joyjax.media.fetch import MOST_BYTES, fetch, is_url
from joyjax.media.image import decode_picture, open_picture

STDIN = "-"


def load_image(
    location: str, *, folder: Path = Path(), pipes: bool = True, allow_private_urls: bool = False
) -> Image.Image:
    """Read the picture at a location, as `open_picture` does.

    File names are relative to `folder`. Without `pipes`, standard input and pipes are refused, as for a row of a batch.
    A picture that is not from a file has a `location`, which messages show, and no `filename`.

    Raises:
        PictureError: if it does not exist, cannot be read, or is too large.
    """
    if not location:
        raise PictureError("the name of a picture is empty; expected a file, a URL, or - for standard input")
    if is_url(location):
        data, name = fetch(location, allow_private=allow_private_urls)
        return _decoded(data, name)
    if location == STDIN:
        if not pipes:
            raise PictureError("- is standard input, which a row cannot read; name a file (./- if it is called that)")
        return _decoded(_read_stdin(), "standard input")
    path = folder / location
    if not pipes or not _is_stream(path):
        return open_picture(path)
    try:
        with open(path, "rb") as file:
            return _decoded(_read(file, location), location)
    except OSError as error:
        raise PictureError(f"{location} cannot be read: {error.strerror or error}") from None


def _decoded(data: bytes, name: str) -> Image.Image:
    picture = decode_picture(BytesIO(data), name)
    picture.location = name  # type: ignore[attr-defined]
    return picture


def _is_stream(path: Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise PictureError("standard input is closed; pipe a picture into it, or name a file")
    try:
        return _read(sys.stdin.buffer, "standard input")  # type: ignore[arg-type]
    except OSError as error:
        raise PictureError(f"standard input cannot be read: {error.strerror or error}") from None


def _read(file: BufferedIOBase, name: str) -> bytes:
    if file.isatty():
        raise PictureError(f"{name} is a terminal; pipe a picture into it, as in `joyjax edit … --image - < photo.jpg`")
    data = file.read(MOST_BYTES + 1) or b""
    if len(data) > MOST_BYTES:
        raise PictureError(
            f"{name} has more than {MOST_BYTES:,} bytes, the most that is read from a pipe; save it as a file"
        )
    return data
