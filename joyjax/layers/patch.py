"""Between pixels, latent pixels and transformer tokens. A token is a patch, flattened rows first and channels last."""

from typing import Any

from einops import rearrange
from jaxtyping import Array, Float, Shaped, UInt8

from joyjax.dtypes import FLOAT32


def pixels_to_unit(pixels: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Map 0 … 255 to -1 … 1, the autoencoder's range."""
    return pixels.astype(FLOAT32) / 127.5 - 1


def patchify(x: Shaped[Any, "b y x c"], size: tuple[int, int]) -> Shaped[Any, "b L P"]:
    """Cut `[b, h·q, w·r, c]` into `[b, (h w), (q r c)]`, on the host or on devices."""
    return rearrange(x, "b (h q) (w r) c -> b (h w) (q r c)", q=size[0], r=size[1])


def unpatchify(tokens: Shaped[Array, "b L P"], size: tuple[int, int], width: int) -> Shaped[Array, "b y x c"]:
    """Undo `patchify` for pictures that are `width` patches wide."""
    return rearrange(tokens, "b (h w) (q r c) -> b (h q) (w r) c", w=width, q=size[0], r=size[1])
