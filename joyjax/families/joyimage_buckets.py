"""The bucket table of JoyImage: the sizes of pictures."""

import functools
from collections.abc import Iterator

from joyjax.errors import RequestError
from joyjax.media.image import Size


@functools.cache
def buckets(base_size: int) -> tuple[Size, ...]:
    """Return the bucket sizes in the reference's order: up to `base_size`² pixels, up to 4:1.

    They are the published table, which is for 1024, times `base_size`/1024. At 256, 512 and 768 these are multiples of
    16; elsewhere sides are rounded to multiples of 16, without duplicates and sizes beyond the bounds.
    Source: BUCKETS in Diffusers' image_processor.py.

    Raises:
        RequestError: unless `base_size` is a multiple of 16 and at least 32.
    """
    if base_size < 32 or base_size % 16:
        raise RequestError(
            f"base_size is {base_size}; expected 256, 512, 768 or 1024, or another multiple of 16 from 32"
        )

    def scaled(side: int) -> int:
        return 16 * round(side * base_size / 256 / 16)

    sizes = dict.fromkeys((scaled(height), scaled(width)) for height, width in sorted(_staircase()))
    return tuple((height, width) for height, width in sizes if _in_bounds(height, width, base_size))


def _staircase() -> Iterator[Size]:
    """Yield sizes below the curve h·w = 256² from tall to wide, in steps of 16: a quarter of the published table."""
    height, width = 4096, 16
    while height:
        if _in_bounds(height, width, 256):
            yield height, width
        if height * (width + 16) <= 256**2:
            width += 16
        else:
            height -= 16


def _in_bounds(height: int, width: int, base_size: int) -> bool:
    return height * width <= base_size**2 and max(height, width) <= 4 * min(height, width)


def nearest_bucket(height: int, width: int, base_size: int) -> Size:
    """Return the bucket with the smallest |h/w - height/width|; of ties the first in the table."""
    return min(buckets(base_size), key=lambda size: abs(size[0] / size[1] - height / width))
