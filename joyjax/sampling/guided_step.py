"""A denoising step as two compiled programs: `predict` runs the network, `advance` guidance and the solver.

The number of the network's programs is then independent of solvers and forms of guidance. Both are pure functions of
weights and arrays, compiled once for each shape. They compose: inside one `jax.jit` they are one program.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joyjax.layers.weights import Weights
from joyjax.programs.stage import stage
from joyjax.sampling.guidance import Guidance, guide
from joyjax.sampling.rows import expand_for_cfg
from joyjax.sampling.solver import Levels, Solver, State
from joyjax.sharding.place import constrain


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts a velocity. Rows are the passes of all edits; `condition` is the network's own pytree."""

    def __call__(
        self, latents: Float[Array, "B T P"], time: Float[Array, " B"], condition: Any
    ) -> Float[Array, "B T P"]:
        """Return the velocity of the target's tokens, in float32."""


@stage()
def predict(
    transformer: Weights, latents: Float[Array, "b T P"], time: Float[Array, " b"], condition: Any
) -> Float[Array, "B T P"]:
    """Return the velocity of all passes.

    `condition` has as many rows as the latents, or twice as many for guidance: all unconditional rows, then all
    conditional ones. The result includes the rows of `pad_batch`.
    """
    passes, rows, condition = expand_for_cfg(latents, condition)
    return transformer.module()(rows, times_of_rows(time, rows.shape[0], passes), condition)


def times_of_rows(time: Float[Array, " b"], rows: int, passes: int) -> Float[Array, " B"]:
    """Return the time of each row's edit; padding rows repeat the last edit's."""
    edits = jnp.minimum(jnp.arange(rows // passes), time.shape[0] - 1)
    return jnp.tile(time[edits], passes)


@stage(donate=["state"], static=["passes", "solver", "guidance"])
def advance(
    state: State,
    velocity: Float[Array, "B T P"],
    level: Levels,
    scale: Float[Array, " b"],
    *,
    passes: int,
    solver: Solver,
    guidance: Guidance,
) -> State:
    """Return the state at the next level from the velocity of all passes. The old state is donated.

    Every edit has its own `level` and guidance `scale`.
    """
    edits = solver.latents(state).shape[0]
    velocity = velocity.reshape(passes, -1, *velocity.shape[1:])[:, :edits]
    with jax.named_scope("guidance"):
        velocity = guide(velocity, scale, guidance) if passes == 2 else velocity[0]
    with jax.named_scope("solver"):
        return constrain_all(solver.step(state, velocity, level))


def constrain_all(state: State) -> State:
    """Replicate every array over the mesh."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), state)
