"""Measurement of a kernel against the plain form of its operation: results first, then times.

A kernel is chosen if its result agrees with the plain form in float32, and it is at least `WORTH` times as fast as
XLA's program of the plain form. Whatever fails is a reason against it, never an error.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from joyjax.dtypes import FLOAT32
from joyjax.kernels.cases import Case, draw

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-5}  # largest difference over the largest value
WORTH = 1.02
ROUNDS, CALLS, WARM = 10, 5, 2
NO_MEMORY = "RESOURCE_EXHAUSTED"
Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a measurement: random arguments, both forms, and the error of the kernel's result."""

    draw: Program
    kernel: Program
    reference: Program
    error: Program


@dataclasses.dataclass(frozen=True)
class Measured:
    """A kernel's measurement: median microseconds of both forms, and whether it is chosen; None: not timed.

    `reason` is why it is not chosen; empty if it is.
    """

    operation: str
    kernel: str
    chosen: bool
    reason: str = ""
    xla_us: float | None = None
    kernel_us: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast the kernel is as XLA's form."""
        return self.xla_us / self.kernel_us if self.xla_us and self.kernel_us else None


def measure(case: Case, kernel: str) -> Measured:
    """Check a kernel's result at the shapes of a case, and time it if it is right."""
    try:
        programs = programs_of(case, kernel)  # compiled once for both
        dtype, error = case_dtype(case), error_of(case, kernel, programs)
        if not error < TOLERANCE[dtype]:  # NaN is no agreement
            reason = f"its result is off by {error:.2g} of the largest value, above {TOLERANCE[dtype]:g}"
            return Measured(case.operation, kernel, False, reason)
        seconds = seconds_of(case, kernel, programs)
        xla, own = (1e6 * statistics.median(seconds[name]) for name in ("reference", kernel))
        slow = "" if xla >= WORTH * own else f"{xla / own:.2f} × XLA's speed, below {WORTH:g}"
        return Measured(case.operation, kernel, not slow, slow, round(xla, 1), round(own, 1))
    except Exception as error:
        return Measured(case.operation, kernel, False, failure(error))


def failure(error: Exception) -> str:
    """Describe an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__


def refusal(case: Case, kernel: str) -> str:
    """Return why a kernel does not take the shapes of a case on this device; empty if it does. Nothing is run."""
    try:
        jax.eval_shape(functools.partial(case.function, implementation=kernel), *case.arguments)
    except Exception as error:
        return failure(error)
    return ""


def case_dtype(case: Case) -> str:
    """Return the dtype of a case's tokens."""
    return str(jax.tree.leaves(case.arguments)[0].dtype)


def programs_of(case: Case, kernel: str) -> Programs:
    """Compile what a measurement runs, side by side: on a GPU a program takes up to a second."""
    longest = case.arguments[0].shape[1]
    run, plain = (functools.partial(case.function, implementation=name) for name in (kernel, "reference"))
    wanted: dict[str, tuple[Program, Sequence[Any]]] = {
        "draw": (lambda: draw(case.arguments, longest=longest), ()),
        "kernel": (run, case.arguments),
        "reference": (plain, case.arguments),
        "error": (functools.partial(_error, case), (jax.eval_shape(run, *case.arguments), case.arguments)),
    }
    device = getattr(jax.config, "jax_default_device", None)  # of this thread alone

    def compiled(function: Program, arguments: Sequence[Any]) -> Program:
        with jax.default_device(device):
            return jax.jit(function).lower(*arguments).compile()

    with ThreadPoolExecutor(len(wanted)) as pool:
        futures = {name: pool.submit(compiled, *each) for name, each in wanted.items()}
        return Programs(**{name: future.result() for name, future in futures.items()})


def error_of(case: Case, kernel: str, programs: Programs | None = None) -> float:
    """Return the largest difference to the plain form in float32, over its largest value, where results are defined."""
    programs = programs or programs_of(case, kernel)
    arguments = programs.draw()
    return float(programs.error(programs.kernel(*arguments), arguments))  # NaN if one is


def _error(case: Case, ours: Any, arguments: Any) -> jax.Array:
    wide = jax.tree.map(lambda x: x.astype(FLOAT32) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)
    exact = jax.tree.leaves(case.function(*wide, implementation="reference"))
    defined = _defined(case, arguments)
    return jnp.max(jnp.stack([_largest(*each, defined) for each in zip(jax.tree.leaves(ours), exact, strict=True)]))


def _largest(one: jax.Array, other: jax.Array, defined: jax.Array) -> jax.Array:
    defined = defined.reshape(*defined.shape, *(1,) * (one.ndim - 2))
    off, size = (jnp.where(defined, jnp.abs(x), 0).max() for x in (one.astype(FLOAT32) - other, other))
    return off / size


def _defined(case: Case, arguments: Any) -> jax.Array:
    """Return which tokens of each row are defined: behind the text of a joint sequence there is padding."""
    rows, tokens = arguments[0].shape[:2]
    if case.operation != "qk_norm_rope":
        return jnp.ones((rows, tokens), bool)
    texts, lengths = arguments[1].shape[1], arguments[-1]
    return jnp.arange(tokens + texts) < (lengths + texts)[:, None]


def seconds_of(
    case: Case,
    kernel: str,
    programs: Programs | None = None,
    *,
    rounds: int = ROUNDS,
    calls: int = CALLS,
) -> dict[str, list[float]]:
    """Return the seconds of a call in each round, of the kernel and of "reference", which take turns."""
    programs = programs or programs_of(case, kernel)
    arguments, run = programs.draw(), {kernel: programs.kernel, "reference": programs.reference}
    names = tuple(run)
    for name in names:
        for _ in range(WARM):
            jax.block_until_ready(run[name](*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            for _ in range(calls):
                result = run[name](*arguments)
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - started) / calls)
    return seconds
