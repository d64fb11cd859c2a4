"""Handling of standard input, output and error that are closed, full or broken.

The command runs nevertheless. Output that cannot be written is dropped, and does not change the exit status.
"""

import codecs
import contextlib
import io
import os
import sys
from typing import Any

ANYTHING = "joyjax.anything"  # the name of an error handler of codecs


def repair_streams() -> None:
    """Open standard streams that are closed, and make output and errors ignore a reader that has ended.

    Call it before any file is opened: the next file would get a closed descriptor, and then receive the messages. A
    closed descriptor is opened read-only, so that writing a picture to standard output still fails.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number, os.O_RDONLY)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, "r", closefd=False))
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _open_null(number: int, mode: int) -> None:
    """Open the null device as a descriptor."""
    opened = os.open(os.devnull, mode)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)


class _Lasting(io.FileIO):
    """A descriptor whose writes succeed after an error: from then on the bytes are dropped."""

    def write(self, data: Any) -> int:
        """Write bytes; at the first error the descriptor is redirected to the null device."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError:
            with contextlib.suppress(OSError):
                _open_null(self.fileno(), os.O_WRONLY)
            return len(data)


def _stream(number: int, before: Any) -> io.TextIOWrapper:
    codecs.register_error(ANYTHING, _encode_anything)
    encoding = getattr(before, "encoding", None) or "utf-8"
    raw = _Lasting(number, "w", closefd=False)
    lines = number == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=ANYTHING, line_buffering=lines)


def _encode_anything(error: UnicodeError) -> tuple[bytes, int]:
    """Encode what an encoding lacks: undecodable bytes of file names as they are, other characters escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    encoded = (
        character.encode("ascii", "surrogateescape" if "\udc80" <= character <= "\udcff" else "backslashreplace")
        for character in characters
    )
    return b"".join(encoded), error.end
