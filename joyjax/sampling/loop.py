"""The loop over denoising steps of edits that share a program."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from joyjax.sampling.guidance import Guidance
from joyjax.sampling.guided_step import advance
from joyjax.sampling.predictor import Predictor
from joyjax.sampling.rows import conditional_only
from joyjax.sampling.solver import Levels, Solver


@dataclasses.dataclass(frozen=True)
class Step:
    """The event after a step: `number` of `steps` is done and took `seconds`.

    `before` and `after` are the latents before and after the step, on the host; `level` is its row of levels.
    """

    number: int
    steps: int
    seconds: float
    before: Float[np.ndarray, "b T P"]
    after: Float[np.ndarray, "b T P"]
    level: Levels


def denoise(
    predictor: Predictor,
    solver: Solver,
    guidance: Guidance,
    levels: Levels,
    scales: Float[np.ndarray, "S b"],
    noise: Float[np.ndarray, "b T P"],
    condition: Any,
    *,
    place: Callable[[Any], Any],
    watch: Callable[[Step], None] | None = None,
) -> Float[np.ndarray, "b T P"]:
    """Run all steps from noise to latents; return the latents on the host.

    Every edit has its own levels and its own guidance scale in each step; whether a step has guidance is the same for
    all. `condition` has the rows of both passes if any step has guidance. `place` puts arrays on the devices. `watch`
    is called after each step and stops the loop by raising; without it no intermediate latents are copied to the host.
    """
    steps = len(levels.sigma)
    state = solver.init(place(noise))
    passes = 2 if (scales[:, 0] > 1).any() else 1
    conditions = {passes: place(condition)}
    after = noise
    for number in range(steps):
        started = time.perf_counter()
        level, passes = levels.step(number), 2 if scales[number, 0] > 1 else 1
        if passes not in conditions:
            conditions[passes] = place(conditional_only(conditions[2]))
        velocity = predictor(solver.latents(state), level, conditions[passes], last=number == steps - 1)
        state = advance(state, velocity, level, scales[number], passes=passes, solver=solver, guidance=guidance)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        if watch is not None:
            before, after = after, np.asarray(solver.latents(state))
            watch(Step(number + 1, steps, seconds, before, after, level))
    return np.asarray(solver.latents(state))
