"""The parts of families of pictures that they share: sizes, noise, the lengths of a condition's rows, decoding, cost.

Such a family's own plan has a `geometry` (models/autoencoder/pictures.py).
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from joyjax.errors import RequestError
from joyjax.families.family import Configs, Events, Lengths, Media, Networks, Plan, StageCost
from joyjax.families.request import Request
from joyjax.layers.patch import patchify
from joyjax.media.image import Size
from joyjax.models.autoencoder.pictures import Geometry, decode_picture
from joyjax.sampling.noise import initial_noise


def area_size(picture: Size, side: int, multiple: int) -> Size:
    """Return the size of about `side`² pixels for a picture of this shape, in multiples of `multiple`, down to 0."""
    ratio = picture[1] / picture[0]
    width = math.sqrt(side**2 * ratio)
    return round(width / ratio / multiple) * multiple, round(width / multiple) * multiple


def noise_shape(size: Size, geometry: Geometry, channels: int) -> tuple[int, int, int, int]:
    """Return the shape of the noise, `[1, height, width, channels]`, for a result of this size in pixels."""
    return 1, size[0] // geometry.factor, size[1] // geometry.factor, channels


def check_noise(request: Request, size: Size, geometry: Geometry, channels: int) -> None:
    """Raise RequestError if given noise does not have the shape for a result of this size."""
    shape = noise_shape(size, geometry, channels)
    if request.noise is not None and request.noise.shape != shape:
        raise RequestError(
            f"noise has shape {request.noise.shape}; a {size[0]}×{size[1]} result needs {shape}: "
            "batch, height, width, channels"
        )


def noise_tokens(plan: Plan, channels: int, references: Sequence[np.ndarray] = ()) -> Float[np.ndarray, "1 T P"]:
    """Return the noise of a request as padded tokens: the given noise, or that of its seed and references."""
    request, geometry = plan.request, plan.own.geometry
    noise = request.noise
    if noise is None:
        noise = initial_noise(request.seed, references, noise_shape(plan.size[1:], geometry, channels))
    tokens = patchify(noise, geometry.patch)
    return np.pad(tokens, ((0, 0), (0, plan.lengths.target[1] - tokens.shape[1]), (0, 0)))


def of_rows(value: int | Sequence[int], rows: int) -> Int[Array, " B"]:
    """Return one number for each row of a condition: the same for all, or each its own."""
    return jax.device_put(np.broadcast_to(np.array(value, np.int32), rows))


def finish(networks: Networks, latents: Float[np.ndarray, "1 T P"], plan: Plan, events: Events) -> Media:
    """Decode the picture.

    Raises:
        FloatingPointError: if its values are not finite.
    """
    size, geometry = plan.size[1:], plan.own.geometry
    with networks.use("vae") as vae:
        pixels, finite = decode_picture(vae, latents, size, geometry, plan.request.vae_decode, networks.mesh)
    if not finite:
        raise FloatingPointError("the decoded pixels")
    return Media(pixels[None])


def cost(
    configs: Configs, lengths: Lengths, *, step_bytes: int, step_tokens: int, references: bool = True
) -> tuple[StageCost, ...]:
    """Return the cost of each stage, that of references only where the family has some.

    Working memory is proportional to the image tokens of all passes: `step_bytes` for a step with guidance and
    `step_tokens` in each of its two passes.
    """
    tokens = (lengths.target[1] + lengths.references[1]) * lengths.passes
    working = step_bytes * tokens // (2 * step_tokens)
    stages = (("prompt", "text_encoder"), ("references", "vae"), ("denoise", "transformer"), ("decode", "vae"))
    return tuple(StageCost(name, (part,), working) for name, part in stages if references or name != "references")
