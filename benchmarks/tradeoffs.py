"""The quality and savings of each approximation, on the demo model's held-out edits.

    python benchmarks/tradeoffs.py tradeoffs.json --count 64 > tradeoffs.md

For each row: PSNR of the pictures against the exact ones with the same steps and guidance, the score (docs/demo.md),
the number of steps that ran all blocks, and the share of FLOPs that was saved, counted by XLA on the compiled programs.
With `--time` it also times the reduced random model of benchmarks/random_model.py, each row against the exact one in
one process, alternately.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from random_model import write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from stagewise import Stages
from whole_step import denoise_step

import joyjax
from joyjax.runtime.request import check_request
from joyjax.sampling.rows import expand_for_cfg
from joyjax.score import Rate, tasks
from joyjax.shapes.draw import render
from joyjax.shapes.judge import judge

GUIDED = {"guidance_scale": 2.0}
FIRST_BLOCK = {x: {"cache": f"first-block:{x:g}"} for x in (0.1, 0.4)}
# name, options of `edit`, how linear maps are stored; the first of each block is the exact one
BLOCKS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "20 steps, no guidance": [
        ("exact", {}, "exact"),
        *(
            (f"cache {kind}:{x:g}", {"cache": f"{kind}:{x:g}"}, "exact")
            for kind in ("first-block", "taylor")
            for x in (0.05, 0.1, 0.2, 0.4)
        ),
        ("float8", {}, "float8"),
        ("float8, cache first-block:0.1", FIRST_BLOCK[0.1], "float8"),
    ],
    "20 steps, guidance 2": [
        ("exact", GUIDED, "exact"),
        *((f"guidance until {x:g}", {**GUIDED, "guidance_until": x}, "exact") for x in (0.75, 0.5, 0.25)),
        ("cache first-block:0.1", GUIDED | FIRST_BLOCK[0.1], "exact"),
        ("guidance until 0.5, cache first-block:0.1", {**GUIDED, "guidance_until": 0.5, **FIRST_BLOCK[0.1]}, "exact"),
    ],
    "4 steps, no guidance (the demo's own)": [
        ("exact", {}, "exact"),
        ("cache first-block:0.1", FIRST_BLOCK[0.1], "exact"),
        ("cache first-block:0.4", FIRST_BLOCK[0.4], "exact"),
        ("float8", {}, "float8"),
    ],
}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB; 60 stands for more."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 60.0 if error == 0 else min(60.0, 10 * float(np.log10(255**2 / error)))


def flops(pipeline: joyjax.Pipeline, guidance_scale: float) -> tuple[float, float]:
    """Return the FLOPs of an exact step, and of one that skips all blocks but the first."""
    image = Image.fromarray(render(next(tasks(1))[1].pair.source))
    arguments: dict[str, Any] = dict.fromkeys(("negative_prompt", "steps", "height", "width", "base_size", "noise"))
    request = check_request(
        pipeline, image, "move it", guidance_scale=guidance_scale, seed=0, exact_size=False, **arguments
    )
    run = Stages(pipeline, request)
    condition, latents, config = run.condition, run.noise, pipeline.parts.configs["transformer"]

    @jax.jit
    def short(transformer: Any, latents: Any, condition: Any) -> Any:
        _, rows, condition = expand_for_cfg(latents, condition)
        network = transformer.module()
        first_output = network.first_block(rows, jax.numpy.ones(rows.shape[:1]), condition)
        return network.head(first_output.target(), first_output)

    numbers = [np.float32(1)] * 4
    transformer = pipeline.weights["transformer"]
    whole = denoise_step.lower(transformer, latents, condition, *numbers, channels=config.in_channels).compile()
    cheap = short.lower(transformer, latents, condition).compile()
    return tuple(float(program.cost_analysis()["flops"]) for program in (whole, cheap))  # type: ignore[return-value]


def measure(pipelines: dict[str, joyjax.Pipeline], count: int) -> list[dict[str, Any]]:
    """Run every row on the same edits."""
    one, two = (flops(pipelines["exact"], scale) for scale in (1.0, 2.0))
    rows = []
    for block, variants in BLOCKS.items():
        steps, exact = int(block.split()[0]), []
        for name, options, linear in variants:
            verdicts, quality, computed, spent, whole = [], [], [], 0.0, 0.0
            for number, (_, task) in enumerate(tasks(count)):
                source = Image.fromarray(render(task.pair.source))
                result = joyjax.edit(
                    pipelines[linear],
                    source,
                    task.prompt,
                    seed=task.seed,
                    **{"steps": steps, "guidance_scale": 1.0, **options},
                )
                picture = np.asarray(result.image)
                exact += [picture] if name == "exact" else []
                verdicts.append(judge(task.pair, picture))
                quality.append(psnr(picture, exact[number]))
                computed.append(result.computed_steps)
                guided = options.get("guidance_scale", 1.0) > 1
                until = options.get("guidance_until", 1.0)
                share = (
                    until if guided else 0.0
                )  # share of steps with two passes, among computed and skipped ones alike
                left = steps - result.computed_steps
                spent += sum(
                    part * (result.computed_steps * full + left * cheap)
                    for part, (full, cheap) in ((share, two), (1 - share, one))
                )
                whole += steps * (two if guided else one)[0]
            row: dict[str, Any] = {"block": block, "name": name, "edits": count, "psnr": float(np.mean(quality))}
            for test in ("pixel", "strict"):
                rate = Rate(sum(getattr(verdict, test) for verdict in verdicts), count)
                row[test], row[f"{test}_interval"] = rate.share, rate.interval
            row |= {"computed": float(np.mean(computed)), "steps": steps, "flops_left_out": 1 - spent / whole}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def time_reduced(pairs: int) -> list[dict[str, Any]]:
    """Time whole edits of a random model, each variant alternately with the exact one; ratios of medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, 0.12e9, 512, embedding=False)
        pipelines = {linear: joyjax.load(folder, dtype="float32", linear=linear) for linear in ("exact", "float8")}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
    common = {"steps": 8, "height": 256, "width": 256, "exact_size": True, "guidance_scale": 4.0}
    variants: list[tuple[str, dict[str, Any], str]] = [
        ("cache taylor:1e6, half of the steps", {"cache": "taylor:1e6"}, "exact"),
        ("guidance until 0.5", {"guidance_until": 0.5}, "exact"),
        ("float8", {}, "float8"),
    ]

    def run(linear: str, **options: Any) -> tuple[float, int]:
        started = time.perf_counter()
        result = joyjax.edit(pipelines[linear], picture, "a tree", **{**common, **options})
        return time.perf_counter() - started, result.computed_steps

    rows = []
    for name, options, linear in variants:
        run("exact"), run(linear, **options)  # compiled; does not count
        taken = [(run("exact")[0], run(linear, **options)) for _ in range(pairs)]
        exact, other = statistics.median(a for a, _ in taken), statistics.median(b for _, (b, _) in taken)
        rows.append(
            {"name": name, "seconds": other, "exact": exact, "ratio": exact / other, "computed": taken[0][1][1]}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as tables in Markdown."""
    lines = []
    for block in dict.fromkeys(row["block"] for row in rows):
        lines += [f"| {block} | PSNR to exact | pixel | strict | steps computed | FLOPs saved |", "|---" * 6 + "|"]
        for row in (row for row in rows if row["block"] == block):
            quality = "–" if row["name"] == "exact" else f"{row['psnr']:.1f} dB"
            left = f"{row['flops_left_out']:.0%}"
            lines.append(
                f"| {row['name']} | {quality} | {row['pixel']:.1%} | {row['strict']:.1%} "
                f"| {row['computed']:.1f} of {row['steps']} | {left} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the figures as JSON and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="file for the figures")
    parser.add_argument("--count", type=int, default=64, help="held-out edits; a multiple of 8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time", type=int, default=0, metavar="PAIRS", help="also time pairs of the reduced model")
    arguments = parser.parse_args()
    pipelines = {linear: joyjax.load(dtype=arguments.dtype, linear=linear) for linear in ("exact", "float8")}
    figures: dict[str, Any] = {"jax": jax.__version__, "dtype": arguments.dtype}
    figures["demo"] = measure(pipelines, arguments.count)
    if arguments.time:
        figures["reduced model"] = time_reduced(arguments.time)
    arguments.json.write_text(json.dumps(figures, indent=2))
    print(table(figures["demo"]))
    for row in figures.get("reduced model", []):
        print(f"| {row['name']} | {row['seconds']:.2f} s | {row['exact']:.2f} s | {row['ratio']:.2f}× |")


if __name__ == "__main__":
    main()
