"""Each kernel against XLA's own fusion of the same function, at the models' shapes, in one process.

    python benchmarks/kernels.py                   # on a GPU: results and times; elsewhere: results, interpreted
    python benchmarks/kernels.py --compile         # compiled for an H100, not run: registers, spills, memory

Times are interleaved: every round calls each implementation `CALLS` times, in alternating order; the line has the ratio
of medians, XLA over kernel, and the spread. Below 1.02 a kernel is not worth using and XLA stays the default. One JSON
line for each case and implementation. tests/gpu_compile.py lists the packages that `--compile` needs.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if "--compile" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from joyjax.kernels.cases import SHAPES, Case, Shape, cases, draw
from joyjax.kernels.dispatch import PALLAS, interpreted, target

ROUNDS, CALLS, WARM = 20, 10, 3
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-5}


def compiled(case: Case, implementation: str) -> dict[str, Any]:
    """Return the resources of an implementation compiled for an H100."""
    import gpu_compile

    program, used = gpu_compile.kernel_resources(
        functools.partial(case.function, implementation=implementation), *case.arguments
    )
    memory = program.memory_analysis()
    calls = gpu_compile.custom_calls(program)
    return {
        "kernels": sum(calls.values()) + sum(gpu_compile.fusions(program).values()),
        "calls": dict(calls),
        "fusions": dict(gpu_compile.fusions(program)),
        "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 1),
        "outputs_mib": round(memory.output_size_in_bytes / 2**20, 1),
        "temporaries_bytes": memory.temp_size_in_bytes,
        **(used or {}),
    }


def checked(case: Case, implementation: str) -> dict[str, Any]:
    """Return the largest difference to XLA's result over its largest value, where results are defined."""
    arguments = draw(case.arguments, longest=1)
    ours, expected = (
        jax.tree.leaves(jax.jit(functools.partial(case.function, implementation=name))(*arguments))
        for name in (implementation, "reference")
    )
    error = 0.0
    for one, other in zip(ours, expected, strict=True):
        # Lengths are 1 here: the text tokens follow the first image token, then padding.
        valid = slice(None, 1 + case.arguments[1].shape[1]) if case.operation == "qk_norm_rope" else slice(None)
        one, other = (x[:, valid].astype(jnp.float32) for x in (one, other))
        error = max(error, float(jnp.abs(one - other).max() / jnp.abs(other).max()))
    dtype = str(jax.tree.leaves(case.arguments)[0].dtype)
    return {"error": float(f"{error:.2g}"), "agrees": error < TOLERANCE[dtype]}


def timed(case: Case, implementation: str) -> dict[str, Any]:
    """Time kernel and XLA alternately."""
    arguments = draw(case.arguments, longest=case.arguments[0].shape[1])
    programs = {
        name: jax.jit(functools.partial(case.function, implementation=name)).lower(*arguments).compile()
        for name in (implementation, "reference")
    }
    for program in programs.values():
        for _ in range(WARM):
            jax.block_until_ready(program(*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS):
        for name in sorted(programs, reverse=bool(turn % 2)):
            started = time.perf_counter()
            for _ in range(CALLS):
                result = programs[name](*arguments)
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - started) / CALLS)
    row: dict[str, Any] = {}
    for name, measured in seconds.items():
        low, *_, high = sorted(measured)
        row[f"{name}_us"] = [round(1e6 * x, 1) for x in (low, statistics.median(measured), high)]
    row["ratio"] = round(statistics.median(seconds["reference"]) / statistics.median(seconds[implementation]), 3)
    return row


def main() -> None:
    """Print one JSON line for each case and implementation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile for an H100, which need not be present")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kernels", nargs="*", default=list(PALLAS), choices=list(PALLAS))
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    arguments = parser.parse_args()
    for name in arguments.shapes:
        shape = SHAPES[name]
        if interpreted() and not arguments.compile:
            shape = Shape(shape.rows, 5, 3, shape.heads, shape.width, shape.channels)
        for case in cases(name, shape, arguments.dtype):
            for implementation in (*(["reference"] if arguments.compile else []), *arguments.kernels):
                row = {
                    "operation": case.operation,
                    "shape": name,
                    "dtype": arguments.dtype,
                    "implementation": implementation,
                    "jax": jax.__version__,
                    "device": "H100, compiled only" if arguments.compile else target().kind,
                }
                if arguments.compile:
                    row |= compiled(case, implementation)
                else:
                    row |= checked(case, implementation)
                    row |= {} if interpreted() else timed(case, implementation)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
