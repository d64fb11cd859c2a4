"""Descriptions of an edit's input pictures, by which a recipe finds and recognises them."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from joyjax.errors import PictureError, RequestError
from joyjax.files import file_key
from joyjax.media.image import Size, alpha_channel, as_rgb, open_picture, upright


def digest(picture: Image.Image) -> str:
    """Return the SHA-256 of a picture's size and RGB pixels, and of its alpha channel unless it is opaque.

    It does not depend on the file format: lossless copies of a picture have equal digests.

    Raises:
        PictureError: if joyjax does not accept the picture.
    """
    rgb = as_rgb(picture)
    found = hashlib.sha256(f"{rgb.height} × {rgb.width} RGB".encode())
    found.update(rgb.tobytes())
    alpha = alpha_channel(upright(picture))
    if alpha is not None and alpha.getextrema() != (255, 255):  # an opaque alpha channel counts as none
        found.update(alpha.tobytes())
    return f"sha256:{found.hexdigest()}"


@dataclasses.dataclass(frozen=True)
class Source:
    """An input picture of an edit: the absolute path of its file, or its URL, its digest and its size."""

    file: Path | None
    digest: str
    size: Size
    url: str | None = None

    @classmethod
    def of(cls, picture: Image.Image, file: str | os.PathLike | None = None) -> "Source":
        """Describe a picture; `file` is its path, by default the picture's `filename`."""
        found = _absolute(picture, file or getattr(picture, "filename", None))
        rgb = as_rgb(picture)
        location = getattr(picture, "location", None)  # see media/load.py
        url = location if isinstance(location, str) and location.startswith(("http://", "https://")) else None
        return cls(found, digest(picture), (rgb.height, rgb.width), url)

    def plain(self, folder: Path) -> dict[str, Any]:
        """Return it as a JSON object, with the file name relative to `folder`."""
        file = None if self.file is None else _relative(self.file, folder)
        url = {} if self.url is None else {"url": self.url}
        return {"file": file, **url, "digest": self.digest, "size": list(self.size)}


def find_references(recipe: Mapping[str, Any], folder: Path) -> list[Path]:
    """Return the files of a recipe's references, for a picture file in `folder`.

    Each is searched at its path relative to the result, and then in the result's folder.

    Raises:
        RequestError: naming the first reference that is missing, has changed, or did not come from a file.
    """
    several = len(recipe["references"]) > 1
    return [
        _find(source, folder, f"reference {number}" if several else "the reference", "--image")
        for number, source in enumerate(recipe["references"], 1)
    ]


def find_mask(recipe: Mapping[str, Any], folder: Path) -> Path | None:
    """Return the file of a recipe's mask, or None if it has none; see `find_references`."""
    return None if recipe["mask"] is None else _find(recipe["mask"], folder, "the mask", "--mask")


def _absolute(picture: Image.Image, name: str | os.PathLike | None) -> Path | None:
    """Return the absolute path of a picture's file; None where the name no longer leads to that file.

    `Image.open` keeps the name that it was given. If it is relative and the current folder has changed since, it may
    lead to another file or none. This is detected while Pillow holds the file open, which is until the pixels are read.
    """
    if not name:
        return None
    path = Path(os.path.abspath(os.fsdecode(name)))
    opened, found = getattr(picture, "fp", None), file_key(path)
    try:
        held = os.fstat(opened.fileno()) if opened is not None else None
    except (AttributeError, OSError, ValueError):  # a file that is closed, or in memory
        held = None
    if found is None or (held is not None and found != (held.st_dev, held.st_ino)):
        return None
    return path


def _relative(file: Path, folder: Path) -> str:
    real = os.path.join(os.path.realpath(file.parent), file.name)
    try:
        return Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()
    except ValueError:  # on another drive
        return file.name


def _find(source: Mapping[str, Any], folder: Path, what: str, option: str) -> Path:
    file = source["file"]
    if file is None:
        origin = f"the URL {source['url']}" if source.get("url") else "no file"
        raise RequestError(f"{what} came from {origin}; name it with {option}")
    there = [path for path in (folder / file, folder / PurePosixPath(file).name) if path.is_file()]
    faults = []
    for path in there:
        try:
            seen = digest(open_picture(path))
        except PictureError as error:
            faults.append(f"{what} can no longer be read ({error})")
            continue
        if seen == source["digest"]:
            return path
        faults.append(f"{what}, {path}, has changed: its digest is {seen[:15]}… and was {source['digest'][:15]}…")
    missing = f"{what}, {file}, is missing: there is no such file relative to {folder.absolute()}, nor in that folder"
    raise RequestError(f"{faults[0] if faults else missing}; name the picture to use with {option}")
