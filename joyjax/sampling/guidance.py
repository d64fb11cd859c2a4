"""Classifier-free guidance (Ho and Salimans, 2022), with the norm of the conditional prediction restored."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How the two predictions are combined; static under `jax.jit`.

    `norm`: the size of the groups of a token's values, such as one latent pixel's channels or the whole token, that are
    rescaled to their norm in the conditional prediction. None: no rescaling.
    """

    norm: int | None


def guide(velocity: Float[Array, "2 b T P"], scale: Float[Array, " b"], guidance: Guidance) -> Float[Array, "b T P"]:
    """Return v = u + s·(c - u), then rescaled to |c|, for velocities u, c (unconditional, conditional).

    `scale` holds s for each edit. Both velocities enter only through one weighted sum, so that with u and c on two
    devices one all-reduce is enough.
    Source: the denoising loops of the pipelines in Diffusers that rescale what guidance gives.
    """
    # Not stacked: on a mesh, each device computes its own pass's factor.
    base, slope = (jnp.array(pair, scale.dtype)[:, None] for pair in ((1, 0), (-1, 1)))
    both = (base + slope * scale)[:, :, None, None]
    if guidance.norm is None:
        return jnp.sum(velocity * both, axis=0)
    groups = velocity.reshape(*velocity.shape[:3], -1, guidance.norm)
    squares = jnp.sum(groups**2, axis=-1, keepdims=True)
    of_groups = jnp.broadcast_to(both, (2, scale.size, 1, guidance.norm))
    conditional = jnp.broadcast_to(jnp.array([0, 1], squares.dtype)[:, None, None, None], (2, scale.size, 1, 1))
    weights = jnp.concatenate([of_groups, conditional], axis=-1)[:, :, None]
    total = jnp.sum(jnp.concatenate([groups, squares], axis=-1) * weights, axis=0)
    combined, wanted = total[..., :-1], jnp.sqrt(total[..., -1:])
    norm = jnp.linalg.norm(combined, axis=-1, keepdims=True)
    return (combined * (wanted / jnp.maximum(norm, 1e-6))).reshape(velocity.shape[1:])
