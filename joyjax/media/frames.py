"""Counting the frames or pages of a picture file, of which joyjax uses one."""

import os
from io import BytesIO

from PIL import Image

MOST_PAGES = 1000  # larger counts are reported as "several"
LARGEST_GIF = 2**24  # bytes: Pillow reads all of a GIF to count its frames
NOUNS = {"TIFF": "page", "MPO": "picture", "HEIF": "picture"}


def frames_note(image: Image.Image) -> str:
    """Return which frame of its file a picture is, as in "frame 1 of 3 is used"; empty if there is only one.

    The picture comes from `Image.open`, and is not modified, or from `open_picture`, which has stored the note.
    """
    known = getattr(image, "frames_note", None)
    if known is not None:
        return known
    kind = getattr(image, "format", None) or ""
    try:
        count = _count(image, kind)
        if count == 1:
            return ""
        if kind == "MPO" and b"hdrgm:" in image.info.get("xmp", b""):
            return "its HDR gain map is not used"
        current = image.tell() + 1
    except Exception:  # a failed count is harmless: the frame in use has been read
        return ""
    return f"{NOUNS.get(kind, 'frame')} {current} of {count or 'several'} is used"


def _count(image: Image.Image, kind: str) -> int | None:
    """Return the number of frames; None: several."""
    if kind not in ("GIF", "TIFF"):
        return int(getattr(image, "n_frames", 1))
    if kind == "TIFF" and not image.is_animated:  # type: ignore[attr-defined] # of its reader
        return 1
    # Counting seeks in these two formats, which would discard changes to the picture: use a second reader.
    with Image.open(_source(image)) as again:
        return _count_pages(again) if kind == "TIFF" else _count_gif(again)


def _source(image: Image.Image) -> str | BytesIO:
    name = getattr(image, "filename", "")
    if name:
        return name
    file = image.fp or image._fp  # type: ignore[attr-defined] # of its reader; `_fp` remains after decoding
    before = file.tell()
    try:
        file.seek(0)
        return BytesIO(file.read())
    finally:
        file.seek(before)


def _count_gif(image: Image.Image) -> int | None:
    size = image.fp.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
    if size <= LARGEST_GIF:
        return image.n_frames  # type: ignore[attr-defined]
    return None if image.is_animated else 1  # type: ignore[attr-defined]


def _count_pages(image: Image.Image) -> int | None:
    for page in range(1, MOST_PAGES + 1):
        try:
            image.seek(page)
        except EOFError:
            return page
    return None
