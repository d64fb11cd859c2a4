"""Every script of benchmarks/ runs, at its smallest."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_compile
import pytest
from parts import Part, json_lines, no_rows, page, python, run_part, run_parts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("--width", "128", "--tokens", "16", "--rounds", "1")
# What each is given; OUT is a place for a file or a folder that is not there yet.
QUICK = {
    "gpu.py": ("first", "--rehearse", "--out", "OUT", "--only", "machine", "kernels"),
    "kernels.py": ("--shapes", "joyimage, tensor=8", "--kernels", "triton"),
    "parallel.py": ("--predict", "tensor=8"),
    "random_model.py": ("OUT", "--size-gb", "0.1", "--width", "512", "--no-embedding"),
    "products.py": ("--rows", "64", "--divide", "64", "--calls", "1", "--maps", "out"),
    "step.py": ("--layers", "2", *TINY, "--pallas", "triton", "--profile", "--json", "OUT"),
}
SLOW = {
    "whole_edit.py": (str(BENCHMARKS.parent / "joyjax" / "demo"), "--steps", "1"),
}
NIGHTLY = {
    "checkpoints.py": ("--size-gb", "0.1", "--width", "512", "--no-embedding", "--no-diffusers"),
    "edit.py": ("--size", "64", "--steps", "1", "--pairs", "1"),
    "edit.py --family": ("qwen-image-edit", "--size", "256", "--steps", "1", "--pairs", "1", "--memory"),
    "same_edit.py": (),
    "scan.py": ("--layers", "3", *TINY),
    "step_diffusers.py": ("--layers", "2", *TINY, "--device", "cpu", "--forms", "eager"),
    "score_diffusers.py": ("--count", "8"),
    "float8.py": ("--count", "8", "--steps", "1"),
    "start.py": ("--rounds", "1", "--steps", "1"),
    "vae_modes.py": (),
}
COMPILING = {"guidance.py": ("--layers", "2"), "scan.py": ("--compile", "--layers", "3")}
ELSEWHERE = {
    "compare.py",
    "peers.py",
    "record.py",
    "whole_edit.py",
}  # edit.py, gpu.py second --rehearse, tests/parity/test_stages.py, tests/kernels/test_record.py


def run(script: str, arguments: tuple[str, ...], out: Path) -> str:
    """Run a script as a user does, and return what it printed."""
    given = [str(out) if argument == "OUT" else argument for argument in arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(BENCHMARKS.parent), "PYTHONSAFEPATH": ""}
    script, *more = script.split()
    command = [sys.executable, str(BENCHMARKS / script), *more, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.nightly if name == "step.py" else ()) for name in QUICK]
)
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
    if script == "gpu.py":
        report = json.loads((tmp_path / "out" / "first.json").read_text())
        assert {name: part["status"] for name, part in report["parts"].items()} == {"machine": "ok", "kernels": "ok"}
        assert [row["agrees"] for row in report["parts"]["kernels"]["rows"]] == [True]
        text = run(script, ("page", str(tmp_path / "out" / "first.json")), tmp_path)
        assert "## Kernels against XLA's forms" in text
        assert "`python benchmarks/kernels.py --shapes 'joyimage, tensor=8' --kernels triton`" in text
        assert str(tmp_path) not in text
        assert str(BENCHMARKS.parent) not in text


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SLOW, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)])
def test_runs_for_long(script, tmp_path):
    if script in ("edit.py", "score_diffusers.py", "step_diffusers.py"):
        pytest.importorskip("diffusers")
    printed = run(script, (SLOW | NIGHTLY)[script], tmp_path / "out")
    assert printed
    if script == "whole_edit.py":
        rows = [json.loads(line) for line in printed.splitlines()]
        assert [row["what"] for row in rows] == ["load", "first edit", "second edit"]
        assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
        assert rows[2]["kernels"] == "xla"
    if script == "same_edit.py":
        assert [json.loads(line)["most"] for line in printed.splitlines()] == [0, 0]
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
    here = {name.split()[0] for name in (*QUICK, *SLOW, *NIGHTLY, *COMPILING, "tradeoffs.py")}
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


def part(name, code, limit=20.0, read=json_lines, **more):
    return Part(name, f"About {name}", python("-u", "-c", code), limit, read, **more)


def test_a_part_that_is_stopped_or_fails_keeps_its_output(tmp_path):
    """A device is lent for minutes: what a part printed before its end must be in the report."""
    slow = part("slow", "import time; print('{\"ms\": 1.5}'); time.sleep(60)", limit=3)
    found = run_part(slow, tmp_path, tmp_path, 3)
    assert (found["status"], found["rows"]) == ("stopped at its limit", [{"ms": 1.5}])
    assert found["seconds"] < 20
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert run_part(part("child", child), tmp_path, tmp_path, 2)["seconds"] < 20  # with its own processes
    failing = run_part(part("failing", "print('{\"ms\": 2}'); raise SystemExit(3)"), tmp_path, tmp_path, 20)
    assert (failing["status"], failing["rows"], failing["output"]) == ("status 3", [{"ms": 2}], ['{"ms": 2}'])
    unreadable = run_part(part("odd", "print('{]}')"), tmp_path, tmp_path, 20)
    assert unreadable["status"].startswith("ok; its output cannot be read: JSONDecodeError")
    missing = run_part(Part("missing", "", ("/no/such/program",), 1, no_rows), tmp_path, tmp_path, 20)
    assert missing["status"].startswith("not started: ")


def test_parts_share_a_time_limit(tmp_path):
    """What does not fit is left out, and says so; a part that needs another waits for it."""
    file = tmp_path / "made"
    parts = [
        part("make", f"import time; time.sleep(2); open({str(file)!r}, 'w')", behind=True),
        part("beside", f"import os; print('{{\"there\": %d}}' % os.path.exists({str(file)!r}))"),
        part("after", f"import os; print('{{\"there\": %d}}' % os.path.exists({str(file)!r}))", needs="make"),
        part("long", "import time; time.sleep(60)", limit=60),
        part("never", "print('{}')"),
    ]
    report = run_parts(parts, tmp_path, tmp_path, 11, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    found = report["parts"]
    assert [found[name]["rows"] for name in ("beside", "after")] == [[{"there": 0}], [{"there": 1}]]
    assert [found[name]["status"] for name in ("make", "long")] == ["ok", "stopped at its limit"]
    assert found["never"]["status"] == "no time was left"
    text = page("Measured", [report], parts)
    assert "## About after" in text
    assert "| there |\n|---|\n| 1 |" in text
    assert "no time was left." in text


def test_what_gpu_py_reads_from_its_parts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    printed = ["joyimage: 8 layers", "exact: compiled in 12.2 s; 131.6 ms", "one-pass: compiled in 5.0 s; 70.0 ms"]
    assert gpu.step_forms(printed, tmp_path, "none.json") == [  # it was stopped before the end
        {"form": "exact", "compile_s": 12.2, "median_ms": 131.6},
        {"form": "one-pass", "compile_s": 5.0, "median_ms": 70.0},
    ]
    counted = gpu.counts_of_tests(["....F", "FAILED a.py::test_x - boom", "1 failed, 6 passed in 2 s"], tmp_path)
    assert [row["test"] for row in counted] == ["a.py::test_x", "all"]
    assert sum(gpu.SECONDS.values()) <= 14 * 60
    assert max(gpu.SECONDS.values()) < 8 * 60
    for parts in (gpu.first(False), gpu.second(False, None)):
        assert len({one.name for one in parts}) == len(parts)
        assert {one.needs for one in parts} - {""} <= {one.name for one in parts if one.behind}
