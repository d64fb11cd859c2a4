"""Identification, by its first bytes, of a file that Pillow does not read, and the format to save it in instead."""

import os
import re
from collections.abc import Callable, Container
from io import BytesIO
from typing import Any

import PIL

HEAD = 4096  # bytes; enough to identify every kind below
ONE_FRAME = "save one frame of it as PNG"
AS_PNG = "export the picture as PNG"
AS_PHOTO = "develop it, that is, save it as JPEG, PNG or TIFF from your RAW converter"

# Offset, bytes, description of the file, and remedy.
SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"8BPS", "a Photoshop document", AS_PNG),
    (0, b"gimp xcf", "a GIMP document", AS_PNG),
    (0, b"%!PS", "an EPS or PostScript document, which is a program", "save it as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS document, which is a program", "save it as PNG"),
    (8, b"CR\2\0", "a RAW photo (Canon CR2)", AS_PHOTO),
    (0, b"FUJIFILMCCD-RAW", "a RAW photo (Fujifilm RAF)", AS_PHOTO),
    (0, b"IIRO", "a RAW photo (Olympus ORF)", AS_PHOTO),
    (0, b"IIRS", "a RAW photo (Olympus ORF)", AS_PHOTO),
    (0, b"IIU\0", "a RAW photo (Panasonic RW2)", AS_PHOTO),
    (0, b"FOVb", "a RAW photo (Sigma X3F)", AS_PHOTO),
    (0, b"\0MRM", "a RAW photo (Minolta MRW)", AS_PHOTO),
    (0, b"\xff\x0a", "a JPEG XL picture", "save it as PNG or JPEG"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture", "save it as PNG or JPEG"),
    (0, b"v/1\x01", "an OpenEXR picture, whose range is not known", "save it as PNG"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM)", ONE_FRAME),
    (8, b"AVI ", "a video (AVI)", ONE_FRAME),
    (0, b"FLV\x01", "a video (Flash)", ONE_FRAME),
    (0, b"OggS", "a video or sound (Ogg)", ONE_FRAME),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (Windows Media)", ONE_FRAME),
    (0, b"\0\0\1\xba", "a video (MPEG)", ONE_FRAME),
    (0, b"\0\0\1\xb3", "a video (MPEG)", ONE_FRAME),
    (4, b"moov", "a video (QuickTime)", ONE_FRAME),
    (4, b"mdat", "a video (QuickTime)", ONE_FRAME),
    (4, b"wide", "a video (QuickTime)", ONE_FRAME),
    (0, b"\0\5\x16\7", "a file of macOS metadata, not the picture itself", "name the file without ._ before it"),
    (0, b"PK\3\4", "a ZIP archive, as several painting programs write", AS_PNG),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it first"),
    (0, b"version https://git-lfs", "a Git LFS pointer in place of the file", "fetch the file with `git lfs pull`"),
)
AVIF = ("avif", "avis")  # brands of ISO media files
HEIF = ("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1")
RAW_TAGS = {"DNG": 50706, "photometric": 262, "kind": 254}  # of a TIFF's first directory
CFA, LINEAR_RAW = 32803, 34892  # photometric interpretations of a sensor's values


def read_head(file: str | os.PathLike | BytesIO) -> bytes:
    """Return the first bytes of a file."""
    if isinstance(file, BytesIO):
        return file.getvalue()[:HEAD]
    with open(file, "rb") as opened:
        return opened.read(HEAD)


def describe(head: bytes, readers: Container[str]) -> str | None:
    """Describe a file by its first bytes, with a remedy, as the end of a sentence; None if they are unknown.

    `readers` are the formats that the installed Pillow reads.
    """
    if not head:
        return "is empty"
    if brand := iso_brand(head):
        return _of_brand(brand, readers)
    for start, signature, kind, remedy in SIGNATURES:
        if head.startswith(signature, start):
            return f"is {kind}; {remedy}"
    if b"%PDF-" in head[:1024]:
        return "is a PDF document; save the page as PNG"
    text = re.sub(rb"\s+|<!--.*?-->|<\?xml.*?\?>", b" ", head.removeprefix(b"\xef\xbb\xbf"), flags=re.DOTALL)
    text = text.strip().lower()
    if text.startswith((b"<svg", b"<!doctype svg")):
        return "is an SVG drawing; export it as PNG at the size that you need"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is an HTML page, not a picture; open it in a browser and save the picture itself"
    return None


def iso_brand(head: bytes) -> str:
    """Return the major brand of an ISO media file (HEIC, AVIF, MP4 and others); empty for another file.

    If the major brand of a HEIF does not name the codec, a compatible brand that does.
    """
    if head[4:8] != b"ftyp":
        return ""
    size = min(int.from_bytes(head[:4]), len(head))
    brands = [head[start : start + 4].decode("latin-1") for start in (8, *range(16, size - 3, 4))]
    if brands[0] in ("mif1", "msf1"):
        brands = [brand for brand in brands if brand in AVIF] or brands
    return brands[0]


def is_heif(head: bytes) -> bool:
    """Return whether a file is a HEIC or HEIF picture, but not AVIF."""
    return iso_brand(head) in HEIF


def _of_brand(brand: str, readers: Container[str]) -> str | None:
    if brand in AVIF:
        if "AVIF" in readers:  # then the file is broken
            return None
        return (
            f"is an AVIF picture, which Pillow {PIL.__version__} cannot read here; install one that can with "
            "`pip install --upgrade 'pillow>=11.3'`, or save the picture as PNG or JPEG"
        )
    if brand in HEIF:
        if "HEIF" in readers:
            return None
        return (
            "is a HEIC picture, which needs a package that is not installed: `pip install 'joyjax[heic]'`, or save the "
            "picture as JPEG or PNG"
        )
    if brand == "crx ":
        return f"is a RAW photo (Canon CR3); {AS_PHOTO}"
    return f"is a video (MP4 or QuickTime); {ONE_FRAME}"


def describe_raw(head: bytes, tag: Callable[[int, Any], Any]) -> str | None:
    """Describe a TIFF that is a RAW photo, whose first picture is a small preview; None for other TIFFs.

    `tag` returns the value of a tag of the first directory, or the given default. Sources: the DNG specification and
    TIFF 6.0 (NewSubfileType).
    """
    if head[8:12] == b"CR\2\0":
        return f"is a RAW photo (Canon CR2); {AS_PHOTO}"
    if tag(RAW_TAGS["DNG"], None) is not None:
        return f"is a RAW photo (DNG); {AS_PHOTO}"
    if tag(RAW_TAGS["photometric"], 0) in (CFA, LINEAR_RAW):
        return f"is a RAW photo; {AS_PHOTO}"
    kind = tag(RAW_TAGS["kind"], 0)
    if isinstance(kind, int) and kind & 1:
        return (
            "begins with a small preview of its picture, as RAW photos do (NEF, ARW); develop it: save it as JPEG, PNG "
            "or a plain TIFF"
        )
    return None
