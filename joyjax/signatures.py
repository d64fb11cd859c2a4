"""File formats by their first bytes: those that users have or get in place of weights."""

import dataclasses
import re
from pathlib import Path

HEAD = 2**16  # bytes that are inspected

MAGIC: tuple[tuple[int, bytes, str, str], ...] = (  # offset, bytes, kind, name of the format
    (0, b"version https://git-lfs.github.com/spec/", "git-lfs", "Git LFS"),
    (0, b"GGUF", "gguf", "GGUF"),
    (0, b"\x89PNG\r\n\x1a\n", "picture", "PNG"),
    (0, b"\xff\xd8\xff", "picture", "JPEG"),
    (0, b"GIF8", "picture", "GIF"),
    (8, b"WEBP", "picture", "WebP"),
    (0, b"II*\0", "picture", "TIFF"),
    (0, b"MM\0*", "picture", "TIFF"),
    (4, b"ftypavif", "picture", "AVIF"),
    (4, b"ftyphei", "picture", "HEIC"),
    (4, b"ftypmif1", "picture", "HEIF"),
    (4, b"ftyp", "video", "MP4"),
    (0, b"PK\3\4", "archive", "zip"),
    (0, b"PK\5\6", "archive", "zip"),
    (257, b"ustar", "archive", "tar"),
    (0, b"7z\xbc\xaf\x27\x1c", "archive", "7z"),
    (0, b"Rar!\x1a\x07", "archive", "rar"),
    (0, b"\x1f\x8b", "archive", "gzip"),
    (0, b"BZh", "archive", "bzip2"),
    (0, b"\xfd7zXZ\0", "archive", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "archive", "zstd"),
    (0, b"\x89HDF\r\n\x1a\n", "hdf5", "HDF5"),
    (0, b"\x93NUMPY", "numpy", "NumPy"),
)
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|\?xml|head|body)", re.IGNORECASE)
JSON = re.compile(rb"\s*[{\[]")
# ir_version, then the name of the program that wrote it: the first two fields of ONNX's ModelProto
ONNX = re.compile(rb"\x08[\x01-\x20]\x12[\x01-\x40][ -~]{3}")


@dataclasses.dataclass(frozen=True)
class Signature:
    """A kind of file, as in `identify`, and the name of its format."""

    kind: str
    format: str


def signature(head: bytes) -> Signature | None:
    """Return the format of a file by its first bytes; None if it is unknown."""
    for offset, magic, kind, name in MAGIC:
        if head.startswith(magic, offset):
            return _zip(head) if name == "zip" else Signature(kind, name)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return Signature("pickle", "pickle")
    if PAGE.match(head):
        return Signature("web-page", "HTML")
    if ONNX.match(head):
        return Signature("onnx", "ONNX")
    if JSON.match(head):
        return Signature("json", "JSON")
    return None


def _zip(head: bytes) -> Signature:
    """Distinguish torch's and NumPy's zip files from others by the name of the first member."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith((b"/data.pkl", b"/byteorder", b"/version")) or b"/data/" in first:
        return Signature("pickle", "PyTorch")
    return Signature("numpy", "NumPy") if first.endswith(b".npy") else Signature("archive", "zip")


def stand_in(file: Path) -> str | None:
    """Describe a regular file that replaces the expected one, a Git LFS pointer or a web page; None for others."""
    try:
        with file.open("rb") as opened:
            found = signature(opened.read(512))
    except OSError:
        return None
    if found is not None and found.kind in STAND_INS:
        what, advice = STAND_INS[found.kind]
        return f"{what}: {advice}"
    return None


STAND_INS = {
    "git-lfs": (
        "a Git LFS pointer, a few lines in place of the file itself",
        "run `git lfs pull` in its folder, or download it with `hf download`",
    ),
    "web-page": (
        "an HTML or XML page, such as a login or error page saved in place of a download",
        "download it again, with `hf download` (for a closed model after `hf auth login`)",
    ),
}
