"""Every script of benchmarks/ runs, at its smallest."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_compile
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("--width", "128", "--tokens", "16", "--rounds", "1")
# What each is given; OUT is a place for a file or a folder that is not there yet.
QUICK = {
    "kernels.py": ("--shapes", "joyimage, tensor=8", "--kernels", "triton"),
    "parallel.py": ("--predict", "tensor=8"),
    "random_model.py": ("OUT", "--size-gb", "0.1", "--width", "512", "--no-embedding"),
    "products.py": ("--rows", "64", "--divide", "64", "--calls", "1", "--maps", "out"),
    "start.py": ("--rounds", "1", "--steps", "1"),
    "step.py": ("--layers", "2", *TINY, "--pallas", "triton", "--profile", "--json", "OUT"),
}
SLOW = {
    "checkpoints.py": ("--size-gb", "0.1", "--width", "512", "--no-embedding", "--no-diffusers"),
}
NIGHTLY = {
    "edit.py": ("--size", "64", "--steps", "1", "--pairs", "1"),
    "scan.py": ("--layers", "3", *TINY),
    "score_diffusers.py": ("--count", "8"),
    "float8.py": ("--count", "8", "--steps", "1"),
    "vae_modes.py": (),
}
COMPILING = {"guidance.py": ("--layers", "2"), "scan.py": ("--compile", "--layers", "3")}
ELSEWHERE = {"compare.py", "record.py"}  # tests/parity/test_stages.py, tests/kernels/test_record.py


def run(script: str, arguments: tuple[str, ...], out: Path) -> str:
    """Run a script as a user does, and return what it printed."""
    given = [str(out) if argument == "OUT" else argument for argument in arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(BENCHMARKS.parent), "PYTHONSAFEPATH": ""}
    command = [sys.executable, str(BENCHMARKS / script), *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", QUICK)
def test_runs(script, tmp_path):
    printed = run(script, QUICK[script], tmp_path / "out")
    assert printed or script == "random_model.py"
    if "OUT" in QUICK[script]:
        assert (tmp_path / "out").exists()
    if script == "step.py":
        forms = json.loads((tmp_path / "out").read_text())["forms"]
        assert [*forms] == ["exact", "norms", "rotation", "kernels", "one-pass", "skipped", "float8"]
    if script == "kernels.py":
        assert all(json.loads(line)["agrees"] for line in printed.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SLOW, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)])
def test_runs_for_long(script, tmp_path):
    if script in ("edit.py", "score_diffusers.py"):
        pytest.importorskip("diffusers")
    printed = run(script, (SLOW | NIGHTLY)[script], tmp_path / "out")
    assert printed
    if script == "scan.py":
        assert [json.loads(line)["form"] for line in printed.splitlines()] == ["unrolled", "scanned"]


@pytest.mark.nightly
@pytest.mark.skipif(gpu_compile.missing_packages() is not None, reason=str(gpu_compile.missing_packages()))
@pytest.mark.parametrize("script", COMPILING)
def test_compiles_for_a_gpu(script, tmp_path):
    one, two = map(json.loads, run(script, COMPILING[script], tmp_path / "out").splitlines())
    name = "tflop of both passes" if script == "guidance.py" else "tflop"
    assert one[name] == pytest.approx(two[name], rel=1e-3)  # neither form has more to compute
    assert two["working_gib"] <= one["working_gib"]  # at so few layers a scan may save nothing


def test_every_script_is_run_by_a_test():
    here = {*QUICK, *SLOW, *NIGHTLY, *COMPILING, "tradeoffs.py"}
    assert {path.name for path in BENCHMARKS.glob("*.py")} == here | ELSEWHERE


def test_rows_are_called_what_they_ask_for(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tradeoffs = importlib.import_module("tradeoffs")
    for rows in tradeoffs.BLOCKS.values():
        for name, options, linear in rows:
            parts = [f"guidance until {options['guidance_until']:g}"] if "guidance_until" in options else []
            parts += ["float8"] if linear == "float8" else []
            parts += [f"cache {options['cache']}"] if "cache" in options else []
            assert name == (", ".join(parts) or "exact")
            assert ":" in options.get("cache", ":")  # the kind is named: what a number alone means may change


TWO_ROWS = """
import tradeoffs, joyjax
rows = [("exact", {}, "exact"), ("cache first-block:0.4", {"cache": "first-block:0.4"}, "exact")]
tradeoffs.BLOCKS = {"4 steps": rows}
tradeoffs.measure({"exact": joyjax.load(dtype="float32")}, 8)
"""


@pytest.mark.nightly
def test_tradeoffs_of_two_rows():
    """Two of the rows, which in all take minutes."""
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"}
    done = subprocess.run([sys.executable, "-c", TWO_ROWS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    exact, cached = (json.loads(line) for line in done.stderr.splitlines() if line.startswith("{"))
    assert (exact["psnr"], exact["computed"], exact["flops_left_out"]) == (60, 4, 0)
    assert cached["psnr"] < 60
    assert cached["computed"] < 4
    assert 0 < cached["flops_left_out"] < 1


def test_a_table_of_tradeoffs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tradeoffs = importlib.import_module("tradeoffs")
    row = {
        "block": "4 steps",
        "name": "float8",
        "psnr": 51.84,
        "pixel": 0.5,
        "strict": 1.0,
        "computed": 4.0,
        "steps": 4,
    }
    line = "| float8 | 51.8 dB | 50.0% | 100.0% | 4.0 of 4 | 21% |"
    assert line in tradeoffs.table([row | {"flops_left_out": 0.21}]).splitlines()
