"""Euler's method for flow matching: x' = x + (sigma' - sigma)·v."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Array, Float

from joyjax.sampling.schedule import ScheduleConfig, even_levels, sigmas, timesteps
from joyjax.sampling.solver import Levels


@dataclasses.dataclass(frozen=True)
class Euler:
    """The solver of FlowMatchEulerDiscreteScheduler in Diffusers. Its state is the latents.

    `time` is the network's input: "timestep", the level times 1000, or "sigma", the level. `even`: the levels before
    the shift are 1, …, 1/steps, as some pipelines pass them; otherwise they are the scheduler's own.
    """

    schedule: ScheduleConfig
    time: Literal["timestep", "sigma"] = "timestep"
    even: bool = False

    def shift(self, tokens: int) -> float | None:
        """See `Solver.shift`."""
        return self.schedule.mu(tokens)

    def levels(self, steps: int, given: Sequence[float] | None, shift: float | None) -> Levels:
        """See `Solver.levels`."""
        levels = even_levels(steps) if given is None and self.even else given
        sigma = sigmas(steps, self.schedule, levels, mu=shift)[:, None]
        time = timesteps(sigma, self.schedule)[:-1] if self.time == "timestep" else sigma[:-1]
        return Levels(sigma[:-1], sigma[1:], time, np.zeros((steps, 1, 0), np.float32))

    def init(self, latents: Float[Array, "b T P"]) -> Float[Array, "b T P"]:
        """See `Solver.init`."""
        return latents

    def latents(self, state: Float[Array, "b T P"]) -> Float[Array, "b T P"]:
        """See `Solver.latents`."""
        return state

    def step(
        self, state: Float[Array, "b T P"], velocity: Float[Array, "b T P"], level: Levels
    ) -> Float[Array, "b T P"]:
        """See `Solver.step`."""
        return euler_step(state, velocity, level.sigma[:, None, None], level.sigma_next[:, None, None])

    def clean(
        self, before: Float[np.ndarray, "1 T P"], after: Float[np.ndarray, "1 T P"], sigma: float, sigma_next: float
    ) -> Float[np.ndarray, "1 T P"]:
        """Extrapolate the line through the latents of two levels to level 0."""
        return before + (after - before) * (sigma / (sigma - sigma_next))


def euler_step(
    latents: Float[Array, "b T P"],
    velocity: Float[Array, "b T P"],
    sigma: Float[Array, "..."],
    sigma_next: Float[Array, "..."],
) -> Float[Array, "b T P"]:
    """Return x + (sigma_next - sigma)·v, in float32."""
    return latents + (sigma_next - sigma) * velocity
