"""Returning freed memory to the system while weights are read. Has no effect with a C library other than glibc."""

import contextlib
import ctypes
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of mallopt's parameters in malloc.h
LARGE = 2**20  # bytes; larger blocks are returned to the system when they are freed
# bytes; glibc raises its own threshold up to this value as it frees larger blocks
MOST = 2**25


@contextlib.contextmanager
def freeing() -> Iterator[None]:
    """Return memory to the system as soon as it is freed within the context, so that the peak stays low.

    glibc otherwise keeps freed blocks below 32 MiB, fragmented by small live ones: 0.3 GB after a real model.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            library.mallopt(MMAP_THRESHOLD, MOST)
            library.mallopt(TRIM_THRESHOLD, 2 * MOST)
            library.malloc_trim(0)


def give_back() -> None:
    """Return freed memory to the system. After reading with Orbax, glibc otherwise keeps a third of a gigabyte."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
