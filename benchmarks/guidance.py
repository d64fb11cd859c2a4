"""Guidance as one batch of two rows against two passes of one row, compiled for an H100 without running.

    python benchmarks/guidance.py               # the whole step, 40 layers; a few minutes
    python benchmarks/guidance.py --layers 2

One JSON line for each: working memory, arithmetic, and compile time. Two passes run the program of one row twice: the
memory of one, the arithmetic of two. tests/gpu_compile.py lists the packages.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
from contents import flops
from full_size import JOYIMAGE, PASSES, stage
from gpu_compile import compile_for_gpu, gpu_mesh


def measure(rows: int, layers: int) -> dict[str, Any]:
    """Return the cost of a step with this many rows: 2 is guidance in one batch, 1 is one of its passes."""
    step, (weights, latents, condition, levels) = stage("denoise_step", gpu_mesh(), layers=layers)
    cut = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding) for x in condition]
    started = time.perf_counter()
    program = compile_for_gpu(step, weights, latents, cut, levels)
    seconds, memory = time.perf_counter() - started, program.memory_analysis()
    return {
        "rows": rows,
        "layers": layers,
        "jax": jax.__version__,
        "tflop of both passes": round(PASSES / rows * flops(program.as_text()) / 1e12, 3),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "working_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "compile_s": round(seconds, 1),
    }


def main() -> None:
    """Print one JSON line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=JOYIMAGE.num_layers)
    arguments = parser.parse_args()
    for rows in (PASSES, 1):
        print(json.dumps(measure(rows, arguments.layers)), flush=True)


if __name__ == "__main__":
    main()
