"""Step cache: a denoising step skips most blocks where their residual changes little from step to step.

The first block always runs. Where its residual on the target's tokens has changed by less than a threshold since the
last step that ran all blocks, the others are skipped. Their residual is reused from that step ("first-block"), or
extrapolated linearly from the last two such steps ("taylor"). An approximation, off by default.

The decision is one for each edit, for both of its passes: guidance subtracts them, so an error in one pass would be
amplified. Each edit of a batch decides by itself, so none depends on its neighbours; the blocks are skipped where no
edit needs them.

Sources: predicting the change of the output from a cheap signal, TeaCache (Liu et al., 2024, "Timestep Embedding Tells:
It's Time to Cache for Video Diffusion Model"); the first block's residual as that signal, first-block cache of
ParaAttention (chengzeyi, 2024); extrapolation, TaylorSeer (Liu et al., 2025, "From Reusing to Forecasting").
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joyjax.dtypes import FLOAT32
from joyjax.layers.weights import Weights
from joyjax.programs.stage import stage
from joyjax.sampling.guided_step import times_of_rows
from joyjax.sampling.rows import expand_for_cfg
from joyjax.sharding.place import constrain

TOKENS = ("batch", "sequence", "embed")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["first", "rest", "slope", "sigma", "steps"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class StepCache:
    """The residuals of the last step that ran all blocks, for each edit its own step.

    Rows are those of the network. `first` is the residual of the first block on the target's tokens, `rest` that of the
    others, `slope` the derivative of `rest` by sigma ("taylor" only); `sigma` is the level of that step and `steps` the
    number of steps so far that ran all blocks.
    """

    first: Float[Array, "B U D"]
    rest: Float[Array, "B U D"]
    slope: Float[Array, "B U D"] | None
    sigma: Float[Array, " e"]
    steps: Int[Array, " e"]


@runtime_checkable
class FirstBlock(Protocol):
    """The state of a network after its first block; tokens are padded for a mesh."""

    def target(self) -> Float[Array, "B U D"]:
        """Return the target's tokens after the first block."""

    def target_before(self) -> Float[Array, "B U D"]:
        """Return the target's tokens before the first block."""


@runtime_checkable
class StepCacheable(Protocol):
    """A network that runs in three parts, of which the middle one may be skipped."""

    def first_block(self, latents: Float[Array, "B T P"], time: Float[Array, " B"], condition: Any) -> FirstBlock:
        """Embed everything and run the first block."""

    def remaining_blocks(self, first: FirstBlock) -> Float[Array, "B U D"]:
        """Run all other blocks; return the target's tokens."""

    def head(self, tokens: Float[Array, "B U D"], first: FirstBlock) -> Float[Array, "B U P"]:
        """Return the velocity, in float32."""


@stage(static=["kind"])
def empty_cache(transformer: Weights, latents: Float[Array, "b T P"], condition: Any, *, kind: str) -> StepCache:
    """Return an empty cache, for the first step."""
    passes, rows, condition = expand_for_cfg(latents, condition)
    first_output = transformer.module().first_block(rows, jnp.zeros(rows.shape[:1], FLOAT32), condition)
    zeros = constrain(jnp.zeros_like(first_output.target()), *TOKENS)
    edits = rows.shape[0] // passes
    return StepCache(
        first=zeros,
        rest=zeros,
        slope=zeros if kind == "taylor" else None,
        sigma=constrain(jnp.zeros((edits,), FLOAT32), None),
        steps=constrain(jnp.zeros((edits,), jnp.int32), None),
    )


@stage(donate=["cache"])
def predict_cached(
    transformer: Weights,
    latents: Float[Array, "b T P"],
    cache: StepCache,
    sigma: Float[Array, " b"],
    time: Float[Array, " b"],
    condition: Any,
    threshold: Float[Array, ""],
    force: Bool[Array, ""],
) -> tuple[Float[Array, "B T P"], StepCache]:
    """Return the velocity of all passes as `predict` does, or an approximation. The cache is donated.

    All blocks run with `force`, where the cache is empty, and where the relative change of the first block's residual
    is `threshold` or more.
    """
    passes, rows, condition = expand_for_cfg(latents, condition)
    network = transformer.module()
    first_output = network.first_block(rows, times_of_rows(time, rows.shape[0], passes), condition)
    tokens = first_output.target()
    first = tokens - first_output.target_before()
    change = relative_change(first, cache.first, _valid(first, latents.shape[1], condition), passes)
    need = constrain(force | (cache.steps == 0) | ~(change < threshold), None)  # NaN needs all blocks
    sigma = times_of_rows(sigma, cache.sigma.shape[0], 1)

    def of_rows(x: Array) -> Array:
        return jnp.tile(x, passes)[:, None, None]

    rest = cache.rest
    if cache.slope is not None:
        rest = rest + (of_rows(sigma - cache.sigma) * cache.slope.astype(FLOAT32)).astype(rest.dtype)
    reused = tokens + rest
    found = jax.lax.cond(jnp.any(need), lambda: network.remaining_blocks(first_output), lambda: reused)
    update = of_rows(need)
    hidden = jnp.where(update, found, reused)
    velocity = network.head(hidden, first_output)[:, : latents.shape[1]]

    added = found - tokens
    slope = None
    if cache.slope is not None:
        since = sigma - cache.sigma
        rise = (added - cache.rest).astype(FLOAT32) / of_rows(jnp.where(since == 0, jnp.ones_like(since), since))
        rise = jnp.where(of_rows(cache.steps > 0), rise, jnp.zeros_like(rise)).astype(added.dtype)
        slope = constrain(jnp.where(update, rise, cache.slope), *TOKENS)
    kept = StepCache(
        first=constrain(jnp.where(update, first, cache.first), *TOKENS),
        rest=constrain(jnp.where(update, added, cache.rest), *TOKENS),
        slope=slope,
        sigma=constrain(jnp.where(need, sigma, cache.sigma), None),
        steps=constrain(cache.steps + need.astype(jnp.int32), None),
    )
    return velocity, kept


def relative_change(
    new: Float[Array, "B U D"], old: Float[Array, "B U D"], valid: Bool[Array, "B U"], passes: int
) -> Float[Array, " e"]:
    """Return mean |new - old| over mean |old| for each edit, over the valid tokens of all its passes, in float32.

    Rows are all first passes, then all second ones. 0/0 is NaN.
    """

    def total(x: Array) -> Array:
        size = jnp.sum(jnp.abs(x), axis=2) * valid.astype(FLOAT32)
        return jnp.sum(size.reshape(passes, -1, size.shape[1]), axis=(0, 2))

    new, old = new.astype(FLOAT32), old.astype(FLOAT32)
    return constrain(total(new - old) / total(old), None)


def _valid(x: Float[Array, "B U D"], count: int, condition: Any) -> Bool[Array, "B U"]:
    """Return which of the target's tokens are valid."""
    lengths = condition.target_lengths
    longest = jnp.full(x.shape[:1], count, jnp.int32) if lengths is None else lengths
    return jnp.arange(x.shape[1], dtype=jnp.int32) < longest[:, None]
