"""Standard input, output and error of a command, when they are closed, full or broken.

One rule: the work is done all the same. What cannot be shown is dropped, and the exit status is that of the work.
"""

import codecs
import contextlib
import io
import os
import sys
from typing import Any

ANYTHING = "joyjax.anything"  # the name of a way to encode


def repair_streams() -> None:
    """Open standard streams that are closed, and let output and errors outlive what reads them.

    It comes before any file is opened: a closed descriptor would go to the next file, and messages into that file. It
    becomes one that nothing can be written to, so that a picture for standard output still finds it closed.
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
    """A descriptor whose writes succeed when what is behind it has gone: from then on they are dropped."""

    def write(self, data: Any) -> int:
        """Write bytes; at the first error the descriptor is given to the null device."""
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
    """Encode what an encoding lacks: bytes of a file's name as they are, other characters by their numbers."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    spelled = (
        character.encode("ascii", "surrogateescape" if "\udc80" <= character <= "\udcff" else "backslashreplace")
        for character in characters
    )
    return b"".join(spelled), error.end
