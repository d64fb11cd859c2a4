"""The protocol of a solver, and the noise levels of its steps.

A solver is frozen and hashable, static under `jax.jit`, and holds no noise level. Levels are host arrays, so the number
of steps and the schedule change no program.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float

State = Any  # a pytree; that of Euler's method is the latents alone


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sigma", "sigma_next", "time", "coefficients"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Levels:
    """The noise levels of several edits, float32 on the host: axis 0 is the step, axis 1 the edit.

    `time` is the network's input. `coefficients` are a solver's own, computed on the host: they encode order, corrector
    and last step of a multistep method, so that every step runs one program. A row of levels has no axis 0.
    """

    sigma: Float[Any, "*S e"]
    sigma_next: Float[Any, "*S e"]
    time: Float[Any, "*S e"]
    coefficients: Float[Any, "*S e c"]

    def step(self, number: int) -> "Levels":
        """Return the row of one step."""
        return jax.tree.map(lambda x: x[number], self)

    @classmethod
    def together(cls, levels: Sequence["Levels"]) -> "Levels":
        """Concatenate the levels of several edits with the same number of steps."""
        return jax.tree.map(lambda *each: np.concatenate(each, axis=1), *levels)


@runtime_checkable
class Solver(Protocol):
    """A method for the ordinary differential equation of flow matching."""

    def shift(self, tokens: int) -> float | None:
        """Return mu of a dynamic schedule for a number of target tokens; None: the schedule has one shift for all."""

    def levels(self, steps: int, sigmas: Sequence[float] | None, shift: float | None) -> Levels:
        """Return the levels of one edit; `sigmas` replace the schedule's, `shift` is mu of a dynamic schedule."""

    def init(self, latents: Float[Array, "b T P"]) -> State:
        """Return the state before the first step."""

    def latents(self, state: State) -> Float[Array, "b T P"]:
        """Return the latents at the state's level."""

    def step(self, state: State, velocity: Float[Array, "b T P"], level: Levels) -> State:
        """Return the state at the next level; `level` is a row of `Levels`."""

    def clean(
        self, before: Float[np.ndarray, "1 T P"], after: Float[np.ndarray, "1 T P"], sigma: float, sigma_next: float
    ) -> Float[np.ndarray, "1 T P"]:
        """Return an estimate of the clean latents (level 0) from a step's `before` and `after`, for previews."""
