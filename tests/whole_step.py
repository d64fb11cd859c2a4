"""A whole denoising step as one program, for counting, compiling for GPUs and measuring."""

import functools

import jax
import jax.numpy as jnp

from joyjax.sampling.euler import Euler
from joyjax.sampling.guidance import Guidance
from joyjax.sampling.guided_step import advance, predict
from joyjax.sampling.schedule import ScheduleConfig
from joyjax.sampling.solver import Levels
from joyjax.sampling.step_cache import predict_cached

SOLVER = Euler(ScheduleConfig(shift=1.5, num_train_timesteps=1000))


def level(sigma, sigma_next, time, edits: int) -> Levels:
    """Return a row of levels that all edits share."""
    each = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (edits,)) for x in (sigma, sigma_next, time))
    return Levels(*each, jnp.zeros((edits, 0), jnp.float32))


@functools.partial(jax.jit, donate_argnames="latents", static_argnames="channels")
def denoise_step(transformer, latents, condition, sigma, sigma_next, timestep, guidance_scale, *, channels):
    """Run one step; guidance rescales groups of `channels` values."""
    edits = latents.shape[0]
    row = level(sigma, sigma_next, timestep, edits)
    scale = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), (edits,))
    velocity = predict(transformer, latents, row.time, condition)
    passes = jax.tree.leaves(condition)[0].shape[0] // edits
    options = {"passes": passes, "solver": SOLVER, "guidance": Guidance(channels)}
    return advance(latents, velocity, row, scale, **options)


@functools.partial(jax.jit, donate_argnames=("latents", "cache"), static_argnames="channels")
def cached_step(
    transformer, latents, cache, condition, sigma, sigma_next, timestep, guidance_scale, threshold, force, *, channels
):
    """Run one step as `denoise_step` does, with a step cache."""
    edits = latents.shape[0]
    row = level(sigma, sigma_next, timestep, edits)
    scale = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), (edits,))
    arguments = latents, cache, row.sigma, row.time, condition, threshold, force
    velocity, cache = predict_cached(transformer, *arguments)
    passes = jax.tree.leaves(condition)[0].shape[0] // edits
    options = {"passes": passes, "solver": SOLVER, "guidance": Guidance(channels)}
    return advance(latents, velocity, row, scale, **options), cache
