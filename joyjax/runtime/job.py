"""A request in the engine, and the event that its callback receives."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from joyjax.families.family import Plan
from joyjax.runtime.result import Result


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """The argument of a callback after each step: `step` of `steps` is done and took `seconds`."""

    step: int
    steps: int
    seconds: float
    latents: Float[np.ndarray, "1 T P"] = dataclasses.field(repr=False)
    """The target's latent tokens after the step."""
    preview: Callable[[], Image.Image] = dataclasses.field(repr=False)
    """Decodes the current estimate of the final picture; each call takes one decoding."""


Callback = Callable[[StepEvent], None]


class Clock:
    """Accumulates the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; the times of one name add up."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclasses.dataclass(eq=False)
class Job:
    """A planned request, with its `result` or `error` once it has run. `seconds` is the time of planning."""

    number: int
    plan: Plan
    seconds: float
    notes: tuple[str, ...]
    callback: Callback | None = None
    result: Result | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it has a result or an error."""
        return self.result is not None or self.error is not None

    def cancel(self, error: Exception) -> None:
        """End it with an error before its next step; other edits of its batch go on."""
        if not self.done:
            self.error = error

    def finished(self, result: Result) -> Any:
        """Keep the result unless it was cancelled."""
        if self.error is None:
            self.result = result
