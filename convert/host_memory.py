"""Giving the system back what is freed while weights are read. Elsewhere than with glibc, this does nothing."""

import contextlib
import ctypes
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of mallopt's parameters in malloc.h
LARGE = 2**20  # bytes from which a block goes back to the system when it is freed
# The largest that glibc itself moves its thresholds to, as it does after blocks of that size were freed.
MOST = 2**25


@contextlib.contextmanager
def freeing() -> Iterator[None]:
    """Have what is freed in the block go back to the system at once, so that leaves do not add up to a peak.

    glibc keeps blocks below 32 MiB, between which small ones come to lie that stay: after a real model, 0.3 GB.
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
    """Give the system the memory that was freed. The C library would keep a third of a gigabyte after Orbax."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
