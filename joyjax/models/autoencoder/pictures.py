"""Encoding and decoding pictures of many sizes: padded to a bucket where a family has a table of sizes.

Pictures in and out are host arrays, so nothing is on a device before a stage runs.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from joyjax.layers.weights import Weights
from joyjax.media.image import Size
from joyjax.models.autoencoder.buckets import Placement, bucket_placement, crop_from_bucket, pad_to_bucket
from joyjax.models.autoencoder.stages import decode_latents, encode_images
from joyjax.models.autoencoder.tiling import TILE, Mode, choose
from joyjax.sharding.place import devices_along, replicate


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How pixels become tokens: a latent pixel is `factor` pixels high and wide, a token `patch` latent pixels.

    `table` are the sizes that share padded buckets; None: pictures are not padded.
    """

    patch: tuple[int, int]
    factor: int
    table: tuple[Size, ...] | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a token in pixels."""
        return self.factor * self.patch[0], self.factor * self.patch[1]

    def tokens(self, size: Size) -> int:
        """Return the number of tokens of a picture."""
        return (size[0] // self.sides[0]) * (size[1] // self.sides[1])

    @property
    def most_tokens(self) -> int | None:
        """The largest number of tokens of a picture of the table."""
        return None if self.table is None else max(map(self.tokens, self.table))

    def placement(self, size: Size, mode: Mode) -> tuple[Size, Placement] | None:
        """Return the padded bucket of a picture and its placement there; None: the picture is not padded."""
        if self.table is None or mode != "exact":
            return None
        return bucket_placement(size[0], size[1], self.table, self.patch, self.factor)


def encode_picture(
    vae: Weights, pixels: UInt8[np.ndarray, "1 h w c"], geometry: Geometry, mode: Mode, mesh: Mesh | None
) -> Float[Array, "1 L P"]:
    """Return the latent tokens of a picture; zeros follow them where it was padded to a bucket."""
    placement = None
    if found := geometry.placement(pixels.shape[1:3], mode):
        bucket, placement = found
        pixels = pad_to_bucket(pixels, bucket)
    return encode_images(vae, *replicate((pixels, placement), mesh), patch=geometry.patch, mode=mode)


def decode_picture(
    vae: Weights,
    latents: Float[np.ndarray, "1 T P"],
    size: Size,
    geometry: Geometry,
    mode: Mode,
    mesh: Mesh | None,
) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """Return the pixels of a picture's latent tokens, which may have padding, and whether all are finite."""
    count, patch = geometry.tokens(size), geometry.patch
    latents = np.asarray(latents)[:, :count]
    if found := geometry.placement(size, mode):
        bucket, placement = found
        padding = (geometry.most_tokens or count) - count
        arrays = replicate((np.pad(latents, ((0, 0), (0, padding), (0, 0))), placement), mesh)
        pixels, finite = decode_latents(vae, *arrays, patch=patch, mode=mode, bucket=bucket)
        pixels = crop_from_bucket(np.asarray(pixels), size)
    else:
        width = size[1] // geometry.sides[1]
        pixels, finite = decode_latents(vae, replicate(latents, mesh), patch=patch, width=width, mode=mode)
    return np.asarray(pixels)[0], bool(np.asarray(finite)[0])


def check_mode(mode: Mode, size: Size, geometry: Geometry, *, decode: bool) -> None:
    """Check that the mesh in force can split a picture of this size in pixels as the mode requires.

    Raises:
        MeshError: if it cannot be split evenly.
    """
    tile = TILE // geometry.factor, TILE
    if decode:
        choose(mode, (size[0] // geometry.factor, size[1] // geometry.factor), tile, devices_along("tile"))
    else:
        choose(mode, size, tile[::-1], devices_along("tile"))
