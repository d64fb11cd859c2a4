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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if "--compile" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from joyjax.kernels.cases import SHAPES, Case, Shape, cases
from joyjax.kernels.dispatch import PALLAS, interpreted, target
from joyjax.kernels.measure import TOLERANCE, case_dtype, error_of, seconds_of

ROUNDS, CALLS = 20, 10


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
    """Return the error of a kernel against the plain form in float32."""
    error = error_of(case, implementation)
    return {"error": float(f"{error:.2g}"), "agrees": error < TOLERANCE[case_dtype(case)]}


def timed(case: Case, implementation: str) -> dict[str, Any]:
    """Time kernel and XLA alternately."""
    seconds = seconds_of(case, implementation, rounds=ROUNDS, calls=CALLS)
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
