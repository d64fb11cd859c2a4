"""Times the whole edit and its stages against Diffusers, in one process on one checkpoint: `python benchmarks/edit.py`.

Without MODEL a random checkpoint of `--family` is made: six transformer layers of 512, language model and vision tower
to match, the real VAE's shape at a third of its width. Sides alternate (A B B A …), after warm-up calls that are not
timed; compiling has its own line. The figure to quote is the ratio of medians. Inputs, noise, steps, threads and dtype
are the same, and the pictures are compared before anything is timed. `--compile` adds Diffusers under torch.compile as
a third side.
`--memory` runs each side again in its own process and prints its peak memory. Needs the extra `joyjax[test]`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from peers import PEERS, PROMPT, STAGES, inputs

IDLE = 0.3  # seconds; the threads of torch and of JAX wait for more work without yielding their core for a while
Call = Callable[[], object]


def timed(function: Call) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternate(sides: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Time all sides alternately, forwards and backwards, each on idle cores; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(rounds):
        for name in list(sides) if n % 2 == 0 else list(reversed(sides)):
            time.sleep(IDLE)
            seconds[name].append(timed(sides[name]))
    return seconds


def report(stage: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Print one line and return it as data; ratios are a side's median over joyjax's."""
    ours, *others = (np.median(values) for values in seconds.values())
    spreads = [
        f"{min(values) * 1e3:8.1f} {np.median(values) * 1e3:8.1f} {max(values) * 1e3:8.1f}"
        for values in seconds.values()
    ]
    print(f"{stage:12} {'   '.join(spreads)}   {' '.join(f'{other / ours:6.2f}×' for other in others)}", flush=True)
    return {"stage": stage, **seconds, "ratios": [float(other / ours) for other in others]}


class Ours:
    """The same calls as those of a peer, in joyjax."""

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        import joyjax

        self.pipeline = joyjax.load(folder, dtype=arguments.dtype)
        self.image, noise = inputs(arguments.size)
        size = {"steps": arguments.steps, "height": arguments.size, "width": arguments.size}
        self.options = {**size, **PEERS[arguments.family].options(arguments.size), "noise": noise}

    def edit(self) -> np.ndarray:
        import joyjax

        return np.asarray(joyjax.edit(self.pipeline, self.image, PROMPT, **self.options).image)

    def stages(self) -> dict[str, Call]:
        """Return the separate stages, on the inputs that the edit gives them."""
        import jax
        from stagewise import Stages
        from whole_step import denoise_step

        from joyjax.families.encoding import encode_references, encode_text
        from joyjax.runtime.request import check_request

        check = {"negative_prompt": None, "guidance_scale": 4.0, "seed": 0, "base_size": None, **self.options}
        run = Stages(self.pipeline, check_request(self.pipeline, self.image, PROMPT, **check))
        condition, start = run.condition, np.asarray(run.noise)
        config = self.pipeline.parts.configs["transformer"]
        scalars = [np.float32(value) for value in (1.0, 0.9, 1000.0, 4.0)]

        def step() -> None:
            denoise_step(
                self.pipeline.weights["transformer"],
                jax.numpy.asarray(start),
                condition,
                *scalars,
                channels=config.in_channels,
            ).block_until_ready()

        calls: tuple[Call, ...] = (
            lambda: encode_text(run.networks, run.arrays).block_until_ready(),
            lambda: encode_references(run.networks, run.arrays).block_until_ready(),
            step,
            lambda: run.decode(start),
            self.edit,
        )
        return dict(zip(STAGES, calls, strict=True))


def peaks(folder: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory, in bytes, of one edit by each side in its own process."""
    found = {}
    for side in ("joyjax", "diffusers"):
        command = [sys.executable, __file__, str(folder), "--only", side, "--family", arguments.family]
        command += ["--size", str(arguments.size), "--steps", str(arguments.steps), "--dtype", arguments.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = int(done.stdout.split()[-1])
        print(f"peak of the process, {side}: {found[side] / 2**30:.2f} GiB")
    return found


def plot(file: Path, rows: list[dict[str, Any]], sides: list[str]) -> None:
    """Plot the medians of each stage, relative to joyjax's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, side in enumerate(sides):
        ratios = [np.median(row[side]) / np.median(row["joyjax"]) for row in rows]
        axes.bar(np.arange(len(rows)) + 0.25 * number, ratios, 0.25, label=side)
    axes.set_xticks(np.arange(len(rows)) + 0.125 * (len(sides) - 1), [row["stage"] for row in rows])
    axes.set_ylabel("time, joyjax = 1")
    axes.legend()
    figure.savefig(file, dpi=120)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    import jax
    import torch

    diffusers = PEERS[arguments.family]
    ours, theirs = Ours(folder, arguments), diffusers(folder, arguments, compiled=False)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    size = f"{arguments.size}×{arguments.size}"
    print(f"{versions}, {arguments.threads} threads, {size}, {arguments.steps} steps, {arguments.dtype}, guidance 4")
    compiling = {"joyjax": timed(ours.edit)}
    print(f"first edit, with compiling: joyjax {compiling['joyjax']:.1f} s", flush=True)
    sides: dict[str, Any] = {"joyjax": ours, "diffusers": theirs}
    if arguments.compile:
        started = time.perf_counter()
        sides["compiled"] = diffusers(folder, arguments, compiled=True)
        sides["compiled"].edit()
        compiling["compiled"] = time.perf_counter() - started
        print(f"loading and first edit under torch.compile: {compiling['compiled']:.1f} s", flush=True)
    expected = theirs.edit().astype(int)
    for name, side in sides.items():
        off = np.abs(side.edit().astype(int) - expected)
        if name != "diffusers":
            print(f"{name} and Diffusers differ by {off.max()} of 255 at most, in {np.mean(off > 0):.2%} of the values")
        if arguments.dtype == "float32" and off.max() > 2:
            sys.exit("the pictures differ: nothing is timed")

    head = "   ".join(f"{name + ' (min, median, max)':>26}" for name in sides)
    print(f"\n{'ms':12} {head}   ratios")
    stages = {name: side.stages() for name, side in sides.items()}
    rows = []
    for stage in STAGES:
        calls = {name: stages[name][stage] for name in sides}
        alternate(calls, 2)
        rows.append(report(stage, alternate(calls, arguments.pairs)))
    figures = {
        "versions": versions,
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "compiling": compiling,
        "rows": rows,
        "peaks": peaks(folder, arguments) if arguments.memory else None,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    if arguments.plot:
        plot(arguments.plot, rows, list(sides))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="Diffusers folder (default: a random one)")
    parser.add_argument("--family", choices=PEERS, default="joyimage")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="time Diffusers under torch.compile too")
    parser.add_argument("--memory", action="store_true", help="print the peak memory of each side in its own process")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="plot the figures here, as PNG or SVG")
    parser.add_argument("--only", choices=("joyjax", "diffusers"), help="run one side once and print its peak in bytes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.only:
        from joyjax.bench import peak_bytes

        side = Ours(arguments.model, arguments) if arguments.only == "joyjax" else None
        (side or PEERS[arguments.family](arguments.model, arguments, compiled=False)).edit()
        print(peak_bytes())
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model
        if folder is None:
            folder = PEERS[arguments.family].save(Path(scratch) / "model")
        measure(folder, arguments)


if __name__ == "__main__":
    main()
