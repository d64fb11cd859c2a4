"""Ways to run the network in the loop over steps, behind one protocol."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from joyjax.layers.weights import Weights
from joyjax.options import CacheRule
from joyjax.sampling.guided_step import predict
from joyjax.sampling.solver import Levels
from joyjax.sampling.step_cache import StepCache, empty_cache, predict_cached


@runtime_checkable
class Predictor(Protocol):
    """Predicts the velocity of one batch of edits, step after step."""

    def __call__(
        self, latents: Float[Array, "b T P"], level: Levels, condition: Any, *, last: bool
    ) -> Float[Array, "B T P"]:
        """Return the velocity of all passes. `level` is a row of `Levels`; `last` marks the last step."""

    def computed(self) -> Int[np.ndarray, " b"]:
        """Return how many steps of each edit ran the whole network."""


@dataclasses.dataclass
class Whole:
    """Runs all blocks in every step."""

    transformer: Weights
    edits: int
    steps: int = 0

    def __call__(
        self, latents: Float[Array, "b T P"], level: Levels, condition: Any, *, last: bool
    ) -> Float[Array, "B T P"]:
        """See `Predictor`."""
        self.steps += 1
        return predict(self.transformer, latents, level.time, condition)

    def computed(self) -> Int[np.ndarray, " b"]:
        """See `Predictor`."""
        return np.full(self.edits, self.steps)


@dataclasses.dataclass
class Cached:
    """Skips most blocks in steps where their residual changes little: joyjax/sampling/step_cache.py.

    `place` gives arrays the sharding of a step's results. The cache has a row per pass, so it is emptied when the
    number of passes changes.
    """

    transformer: Weights
    edits: int
    rule: CacheRule
    place: Callable[[StepCache], StepCache]
    cache: StepCache | None = None
    passes: int = 0
    before: Int[np.ndarray, " b"] | int = 0

    def __call__(
        self, latents: Float[Array, "b T P"], level: Levels, condition: Any, *, last: bool
    ) -> Float[Array, "B T P"]:
        """See `Predictor`. The first and the last step run all blocks."""
        first = self.cache is None and self.passes == 0
        passes = jax.tree.leaves(condition)[0].shape[0] // latents.shape[0]
        if passes != self.passes:
            self.before, self.passes = self.computed(), passes
            self.cache = self.place(empty_cache(self.transformer, latents, condition, kind=self.rule.kind))
        force, threshold = np.bool_(first or last), np.float32(self.rule.threshold)
        arguments = latents, self.cache, level.sigma, level.time, condition, threshold, force
        velocity, self.cache = predict_cached(self.transformer, *arguments)
        return velocity

    def computed(self) -> Int[np.ndarray, " b"]:
        """See `Predictor`."""
        now = 0 if self.cache is None else np.asarray(self.cache.steps)[: self.edits]
        return np.broadcast_to(self.before + now, (self.edits,))
