"""The denoising step with unrolled layers against one that scans stacked layers with `jax.lax.scan`.

    python benchmarks/scan.py                       # timed here, in pairs, at a small size
    python benchmarks/scan.py --compile             # compiled for an H100 at the real size, not run; a few minutes
    python benchmarks/scan.py --compile --layers 8

The loop excludes the first block, after which the step cache decides, and the last, which computes only the target. Its
weights are arguments, stacked beforehand. One JSON line for each; timed ones have the ratio of medians, unrolled over
scanned, after a comparison of the results. docs/speed.md has the decision. tests/gpu_compile.py lists the packages that
`--compile` needs.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if "--compile" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from contents import bytes_of, flops, kernels, loop_slices
from flax import nnx
from full_size import JOYIMAGE, PASSES, stage
from gpu_compile import compile_for_gpu, gpu_mesh
from step import NUMBERS, WARM_UP, condition_of, network, random_weights
from whole_step import SOLVER, denoise_step, level

from joyjax.layers.condition import Condition
from joyjax.layers.weights import Weights
from joyjax.models.joyimage import modulations
from joyjax.sampling.guidance import Guidance
from joyjax.sampling.guided_step import advance
from joyjax.sampling.rows import expand_for_cfg

ENDS = 2  # the first layer and the last


def scanned_step(
    ends: Weights, middle: Any, latents: jax.Array, condition: Condition, *numbers: Any, channels: int
) -> jax.Array:
    """Run `denoise_step`; `ends` is a network of the two outer layers, `middle` the stacked state of the inner ones."""
    sigma, sigma_next, timestep, guidance = numbers
    passes, rows, condition = expand_for_cfg(latents, condition)
    network = ends.module()
    first_output = network.first_block(rows, jnp.broadcast_to(timestep, rows.shape[:1]), condition)
    graph, _ = nnx.split(network.blocks[0])

    def body(streams: tuple[jax.Array, jax.Array], state: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        block = nnx.merge(graph, state)
        return block(*streams, *modulations(block, first_output.temb), first_output.layout), None

    (img, txt), _ = jax.lax.scan(body, (first_output.img, first_output.txt), middle)
    hidden = network.remaining_blocks(dataclasses.replace(first_output, img=img, txt=txt))
    velocity = network.head(hidden, first_output)[:, : latents.shape[1]]
    row, scale = level(sigma, sigma_next, timestep, len(latents)), jnp.broadcast_to(guidance, len(latents))
    return advance(latents, velocity, row, scale, passes=passes, solver=SOLVER, guidance=Guidance(channels))


def block_state(network: Any, n: int) -> Any:
    """Return the parameters of one layer."""
    return nnx.split(network.blocks[n])[1]


def compiled(layers: int) -> list[dict[str, Any]]:
    """Return the resources of both programs compiled for an H100."""
    mesh = gpu_mesh()
    step, (weights, latents, condition, levels) = stage("denoise_step", mesh, layers=layers)
    ends = stage("denoise_step", mesh, layers=ENDS)[1][0]
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((layers - ENDS, *x.shape), x.dtype, sharding=latents.sharding),
        block_state(ends.module(), 0),
    )

    def scanned(ends: Weights, middle: Any, latents: jax.Array, condition: list[Any], levels: list[Any]) -> jax.Array:
        return scanned_step(ends, middle, latents, Condition(*condition), *levels, channels=JOYIMAGE.in_channels)

    rows = []
    for name, function, arguments in (("unrolled", step, (weights,)), ("scanned", scanned, (ends, stacked))):
        started = time.perf_counter()
        program = compile_for_gpu(function, *arguments, latents, condition, levels)
        seconds, memory, text = time.perf_counter() - started, program.memory_analysis(), program.as_text()
        slices = loop_slices(text)
        rows.append(
            {
                "form": name,
                "layers": layers,
                "jax": jax.__version__,
                "compile_s": round(seconds, 1),
                "program_mb": round(len(program.runtime_executable().serialize()) / 1e6, 2),
                "kernels_in_program": sum(kernels(text).values()),
                "tflop": round(flops(text) / 1e12, 3),
                "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
                "working_gib": round(memory.temp_size_in_bytes / 2**30, 3),
                "copied_in_loops_gib": round(sum(n * bytes_of(array) for array, n in slices) / 2**30, 3),
            }
        )
    return rows


def timed(layers: int, width: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Time both here, alternately."""
    whole = network("joyimage", layers, width, tokens)
    config = whole.config

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    weights, condition = wide(random_weights(whole)), wide(condition_of(whole, PASSES))
    unrolled = weights.module()
    ends = wide(random_weights(network("joyimage", ENDS, width, tokens))).module()
    ends = Weights.of(_with_blocks(unrolled, [unrolled.blocks[0], unrolled.blocks[-1]], ends))
    middle = jax.tree.map(lambda *x: jnp.stack(x), *(block_state(unrolled, n) for n in range(1, layers - 1)))
    latents = jax.random.normal(jax.random.key(1), (1, tokens, config.in_channels * config.patch_area))
    rest = (latents, condition, *NUMBERS)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "unrolled": (denoise_step.__wrapped__, (weights, *rest)),
        "scanned": (scanned_step, (ends, middle, *rest)),
    }
    rows, programs, results = {}, {}, {}
    for name, (function, arguments) in calls.items():
        started = time.perf_counter()
        programs[name] = jax.jit(function, static_argnames="channels").lower(*arguments, channels=config.in_channels)
        programs[name] = programs[name].compile()
        rows[name] = {"form": name, "layers": layers, "width": width, "tokens": tokens, "jax": jax.__version__}
        rows[name] |= {"compile_s": round(time.perf_counter() - started, 2)}
        for _ in range(WARM_UP):
            results[name] = jax.block_until_ready(programs[name](*arguments))
    error = float(np.abs(results["unrolled"] - results["scanned"]).max() / np.abs(results["unrolled"]).max())
    if not error < 1e-4:
        sys.exit(f"the results differ by {error:.2g}: nothing is timed")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in sorted(calls, reverse=bool(turn % 2)):
            started = time.perf_counter()
            jax.block_until_ready(programs[name](*calls[name][1]))
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        rows[name]["ms"] = [round(1e3 * x, 2) for x in (min(values), statistics.median(values), max(values))]
    ratio = statistics.median(seconds["unrolled"]) / statistics.median(seconds["scanned"])
    rows["scanned"] |= {"error": float(f"{error:.2g}"), "ratio": round(ratio, 3)}
    return list(rows.values())


def _with_blocks(network: Any, blocks: list[Any], shell: Any) -> Any:
    """Return the two-layer network `shell` with another network's parameters and these blocks."""
    for name in ("img_in", "time_in", "time_hidden", "time_out", "txt_in", "txt_hidden", "out"):
        setattr(shell, name, getattr(network, name))
    shell.blocks = nnx.List(blocks)
    return shell


def main() -> None:
    """Print one JSON line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile for an H100, which need not be present")
    parser.add_argument("--layers", type=int, help="[default: 8; with --compile, all 40]")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128, the head width; not with --compile")
    parser.add_argument("--tokens", type=int, default=256, help="target tokens; not with --compile")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers <= ENDS:
        parser.error(f"--layers is {arguments.layers}; there must be more than {ENDS}")
    if arguments.compile:
        rows = compiled(arguments.layers or JOYIMAGE.num_layers)
    else:
        rows = timed(arguments.layers or 8, arguments.width, arguments.tokens, arguments.rounds)
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
