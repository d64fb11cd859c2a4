"""Everything that is to be measured on a GPU, in two commands of at most seven and a half minutes; then a page of docs.

    python benchmarks/gpu.py first --out OUT                     # kernels: results, times, the step in every form
    python benchmarks/gpu.py second --out OUT --wheels WHEELS    # loading, a whole edit, Diffusers, products
    python benchmarks/gpu.py page OUT/first.json OUT/second.json > docs/gpu.md
    python benchmarks/gpu.py first --out OUT --rehearse          # small, anywhere

Correctness comes first. Every part is a process with a time limit; its output is printed as it comes, and kept when the
part fails or is stopped. The report is written after every part. `--only` names parts. WHEELS is a folder with wheels
of Diffusers and of its dependencies, for a machine that has none and no network:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d WHEELS diffusers==0.42.1 importlib_metadata
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parts import Part, json_lines, no_rows, page, python, run_parts

ROOT = Path(__file__).parents[1]
SECONDS = {"first": 440.0, "second": 390.0}  # of each command, at most
STEPS, SIZE_GB = 40, 36.0  # of the whole edit; all layers of the transformer, four of the language model
HERE = ROOT / "benchmarks"
# Compiling takes a third of the time without these searches; the products are cuBLASLt's either way.
QUICK_COMPILE = {"XLA_FLAGS": "--xla_gpu_experimental_enable_fusion_autotuner=false --xla_gpu_enable_triton_gemm=false"}
TEST_FILES = ("test_modulate.py", "test_qk_norm_rope.py", "test_attention.py")

MACHINE = """
import importlib.metadata, json, platform, jax
device = jax.devices()[0]
row = {"device": device.device_kind, "devices": len(jax.devices()), "python": platform.python_version()}
for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
    try:
        row[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        row[name] = None
from joyjax.runtime.kernel_cache import driver
print(json.dumps(row | {"driver": driver(device)}))
"""


def counts_of_tests(lines: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return how many tests passed and failed, and the first lines of the failures."""
    failed = [
        {"test": line.split(" - ")[0].removeprefix("FAILED "), "result": line} for line in lines if "FAILED" in line
    ]
    return [*failed, *({"test": "all", "result": line} for line in lines if re.search(r"\d+ (passed|failed)", line))]


def starts(lines: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the table of benchmarks/start.py."""
    names = ("process", "cpu_s", "cpu_ratio", "wall_s", "wall_ratio")
    split = [re.match(r"(\w+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)$", line) for line in lines]
    return [dict(zip(names, found.groups(), strict=True)) for found in split if found]


def step_forms(lines: Sequence[str], folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of benchmarks/step.py, from its file, else from what it printed before it was stopped."""
    file = folder / name
    if not file.exists():
        compiled = [re.match(r"([\w-]+): compiled in ([\d.]+) s; ([\d.]+) ms", line) for line in lines]
        return [{"form": m[1], "compile_s": float(m[2]), "median_ms": float(m[3])} for m in compiled if m]
    held, rows = json.loads(file.read_text()), []
    for form, found in held["forms"].items():
        low, median, high = (1e3 * pick(found["seconds"]) for pick in (min, statistics.median, max))
        rows.append(
            {
                "form": form,
                "layers": held["config"]["num_layers"],
                **{"median_ms": median, "least_ms": low, "most_ms": high},
                **{"ratio": found["ratio"], "difference": found.get("difference"), "compile_s": found["compile_s"]},
                "peak_gib": None if held["peak_bytes"] is None else held["peak_bytes"] / 2**30,
            }
        )
    return rows


STEP_COLUMNS = {
    **{"form": "form", "layers": "layers", "median, ms": "median_ms", "least": "least_ms", "most": "most_ms"},
    **{"× exact": "ratio", "difference": "difference", "compiled, s": "compile_s", "peak, GiB": "peak_gib"},
}


def first(small: bool) -> list[Part]:
    """Return the parts of the first command."""
    tests = [f"tests/kernels/{name}" for name in TEST_FILES]
    picked = [
        "-k",
        "test_kernels and triton and float32"
        if small
        else "test_kernels or costs_a_kernel or gradients_are_those or test_attention",
    ]
    tiny = ("--width", "128", "--tokens", "16", "--rounds", "1", "--pallas", "triton") if small else ()
    forms = ("exact", "kernels", "float8", "one-pass", "skipped")

    def step(layers: int, name: str, *forms: str) -> tuple[str, ...]:
        command = str(HERE / "step.py"), "--layers", str(layers), *tiny, "--json", f"{{out}}/{name}"
        return python(*command, "--forms", *forms)

    shapes = ("--shapes", "joyimage, tensor=8", "--kernels", "triton") if small else ("--kernels", "mosaic")
    return [
        Part("machine", "Machine", python("-c", MACHINE), 60, json_lines),
        Part(
            "tests",
            "Results of the kernels, against float64",
            python("-m", "pytest", "-o", "addopts=--import-mode=importlib", "-q", "--tb=short", *tests, *picked),
            110,
            counts_of_tests,
            {"test": "test", "result": "result"},
            # Float32 products of the plain forms, which the tests compare with, in float32 and not in TF32.
            {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONSAFEPATH": "1"}
            | ({} if small else {"JAX_PLATFORMS": "cuda,cpu"}),
        ),
        Part(
            "kernels",
            "Kernels against XLA's forms: microseconds, least, median and most",
            python(str(HERE / "kernels.py"), *shapes),
            80,
            json_lines,
            {
                **{"operation": "operation", "shape": "shape", "kernel": "implementation", "error": "error"},
                **{"XLA": "reference_us", "kernel, µs": "mosaic_us", "ratio": "ratio"},
            },
        ),
        Part(
            "step8",
            "A step with guidance, 8 of 40 layers",
            step(2 if small else 8, "step8.json", *forms),
            140,
            lambda lines, folder: step_forms(lines, folder, "step8.json"),
            STEP_COLUMNS,
            QUICK_COMPILE if not small else {},
        ),
        Part(
            "same",
            "The demo's edit beside the same on a CPU: difference of pixels, of 255",
            python(str(HERE / "same_edit.py")),
            90,
            json_lines,
            {
                **{"dtype": "dtype", "kernels": "kernels", "largest": "most", "share that differs": "differing"},
                "seconds": "seconds",
            },
        ),
        Part(
            "step40",
            "A step with guidance, whole",
            step(3 if small else 40, "step40.json", "exact", "kernels"),
            120,
            lambda lines, folder: step_forms(lines, folder, "step40.json"),
            STEP_COLUMNS,
            QUICK_COMPILE if not small else {},
        ),
    ]


def second(small: bool, packages: Path | None) -> list[Part]:
    """Return the parts of the second command; `packages` is a folder with Diffusers."""
    model = ("--size-gb", "0.1", "--width", "512", "--no-embedding") if small else ("--size-gb", str(SIZE_GB))
    sizes = ("--rows", "64", "--divide", "64", "--calls", "1", "--maps", "out") if small else ()
    maps = () if small else ("--maps", "mlp up", "mlp down", "qkv", "out")
    tiny = ("--layers", "2", "--width", "128", "--tokens", "16", "--rounds", "1", "--device", "cpu", "--forms", "eager")
    edit = ("--steps", "1", "--base-size", "256") if small else ("--steps", str(STEPS))
    path = os.pathsep.join(filter(None, [str(packages or ""), os.environ.get("PYTHONPATH", "")]))
    return [
        Part("machine", "Machine", python("-c", MACHINE), 60, json_lines),
        Part(
            "model",
            "Random weights of the real sizes, written beside the next part",
            python(str(HERE / "random_model.py"), "{work}/model", *model),
            200,
            no_rows,
            behind=True,
        ),
        Part(
            "diffusers",
            "A step with guidance in Diffusers, whole",
            python(str(HERE / "step_diffusers.py"), *(tiny if small else ())),
            110,
            json_lines,
            {
                **{"form": "form", "layers": "layers", "median, ms": "median_ms", "first calls, s": "first_s"},
                **{"peak, bytes": "peak_bytes", "torch": "torch", "device": "device"},
            },
            {"PYTHONPATH": path},
        ),
        Part(
            "edit",
            "Loading and two whole edits at the real size: seconds",
            python(str(HERE / "whole_edit.py"), "{work}/model", *edit),
            200,
            json_lines,
            {
                **{"": "what", "all": "seconds", "GB": "gbyte", "GB/s": "gbyte_s", "prompts": "prompt"},
                **{"references": "references", "denoising": "denoise", "a step, ms": "step_ms", "decoding": "decode"},
                **{"kernels": "kernels", "peak, bytes": "peak_bytes"},
            },
            QUICK_COMPILE if not small else {},
            needs="model",
        ),
        Part(
            "choice",
            "What was measured of kernels at the edit's own shapes",
            python("-m", "joyjax", "info", "--kernels", "--json"),
            30,
            choices,
        ),
        Part(
            "start",
            "A process with an edit by the demo: seconds, cold and warm",
            python(str(HERE / "start.py"), "--rounds", "1"),
            100,
            starts,
            {
                **{"process": "process", "CPU, s": "cpu_s", "× floor": "cpu_ratio"},
                **{"wall, s": "wall_s", "× floor, wall": "wall_ratio"},
            },
        ),
        Part("products", "Products by format", python(str(HERE / "products.py"), *sizes, *maps), 150, json_lines),
    ]


def choices(lines: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `joyjax info --kernels --json`."""
    return [{"shape": str(held["shape"]), **row} for held in json.loads("\n".join(lines)) for row in held["rows"]]


def install(wheels: Path, folder: Path) -> Path:
    """Install wheels into a folder, without network and dependencies."""
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(folder), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{len(files)} wheels of {wheels}: {'installed' if not done.returncode else done.stderr}", flush=True)
    return folder


def main() -> None:
    """Run one of the commands, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=[*SECONDS, "page"])
    parser.add_argument("reports", nargs="*", type=Path, help="of `page`: the reports")
    parser.add_argument("--out", type=Path, help="folder for the report")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels of Diffusers")
    parser.add_argument("--rehearse", action="store_true", help="the same parts at a small size, on any device")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    arguments = parser.parse_args()
    if arguments.command == "page":
        reports = [json.loads(file.read_text()) for file in arguments.reports]
        print(page("Measured on a GPU", reports, [*first(False), *second(False, None)]))
        return
    if arguments.out is None:
        parser.error(f"{arguments.command} needs --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["PYTHONUNBUFFERED"] = "1"
    out = arguments.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # measurements of kernels, and programs, of this run only
        packages = None if arguments.wheels is None else install(arguments.wheels, work / "packages")
        small = arguments.rehearse
        parts = first(small) if arguments.command == "first" else second(small, packages)
        wanted = [part for part in parts if arguments.only is None or part.name in arguments.only]
        run_parts(wanted, out, work, SECONDS[arguments.command], out / f"{arguments.command}.json")


if __name__ == "__main__":
    main()
