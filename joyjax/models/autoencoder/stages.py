"""The autoencoder's compiled stages: pictures to latent tokens, and latent tokens to pictures."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from joyjax.kernels.joint import join
from joyjax.layers.patch import patchify, pixels_to_unit, unpatchify
from joyjax.layers.valid_region import ValidRegion
from joyjax.layers.weights import Weights
from joyjax.models.autoencoder.buckets import Placement, gather_tokens, scatter_tokens, transpose_kernels
from joyjax.models.autoencoder.tiling import Mode
from joyjax.programs.stage import stage
from joyjax.sharding.place import constrain


@stage(static=["patch", "mode"])
def encode_images(
    vae: Weights,
    pixels: UInt8[Array, "b h w c"],
    placement: Placement | None = None,
    *,
    patch: tuple[int, int],
    mode: Mode = "exact",
) -> Float[Array, "b L P"]:
    """Return the latent tokens of pictures of one size: the mode of the posterior, normalised, float32.

    With a placement, the pictures are padded to a bucket (`pad_to_bucket`), and zeros follow their tokens.
    """
    if placement is None:
        tokens = patchify(vae.module().encode(pixels_to_unit(pixels), mode), patch)
    else:
        network = transpose_kernels(vae, placement.flip).module()
        tokens = gather_tokens(network.encode(pixels_to_unit(pixels), mode, placement.size), placement, patch)
    return constrain(tokens, None, None, None)


@stage(static=["size"])
def join_tokens(
    tokens: Sequence[Float[Array, "b _ P"]], lengths: Sequence[Int[Array, ""]], *, size: int
) -> Float[Array, "b size P"]:
    """Concatenate the valid tokens of several pictures, padded to `size` in all."""
    joined, end = tokens[0], jnp.asarray(lengths[0])
    for more, length in zip(tokens[1:], lengths[1:], strict=True):
        joined, end = join(joined, more, jnp.broadcast_to(end, joined.shape[:1])), end + length
    padding = size - joined.shape[1]
    return jnp.pad(joined, ((0, 0), (0, padding), (0, 0))) if padding > 0 else joined[:, :size]


@stage(static=["patch", "width", "mode", "bucket"])
def decode_latents(
    vae: Weights,
    latents: Float[Array, "b T P"],
    placement: Placement | None = None,
    *,
    patch: tuple[int, int],
    width: int | None = None,
    mode: Mode = "exact",
    bucket: tuple[int, int] | None = None,
) -> tuple[UInt8[Array, "b h w c"], Bool[Array, " b"]]:
    """Return the pictures of latent tokens, `width` patches wide, and which of them are finite.

    With a placement, padding follows a picture's tokens, and the pictures are padded to a `bucket` of rows and columns
    of pixels (`crop_from_bucket`). Values are rounded half to even. NaN would become black.
    """
    if placement is None and width is not None and bucket is None:
        pixels = vae.module().decode(unpatchify(latents, patch, width), mode)
    elif placement is not None and width is None and bucket is not None:
        network = transpose_kernels(vae, placement.flip).module()
        factor = network.config.spatial_factor
        padded = scatter_tokens(latents, placement, patch, bucket[1] // (patch[1] * factor))
        pixels = network.decode(padded, mode, placement.size // factor)
        pixels = ValidRegion(placement.size, bucket).mask_padding(pixels)
    else:
        raise ValueError("pictures have a `placement` and its `bucket`, or else a `width`")
    finite = constrain(jnp.all(jnp.isfinite(pixels), axis=(1, 2, 3)), None)
    rounded = jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return constrain(rounded, None, None, None, None), finite
