"""Ctrl-C at any moment: status 1, one line, and nothing half-written; or the command was done already."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invoke import PROGRAM, environment, start
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the handler is waited for in /proc")
EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
EDIT = ["edit", "make the red circle blue", "--image", str(EXAMPLE), "--num-images", "50", "--preview-dir", "steps"]
MOMENTS = 24  # from the first instruction to some seconds of editing


def begin(arguments: list[str], cwd: Path) -> subprocess.Popen:
    """Start a program, and return when its first instruction has run."""
    process = start(*arguments, cwd=cwd)
    while len(list(Path(f"/proc/{process.pid}/task").iterdir())) < 2 and process.poll() is None:
        time.sleep(0.002)  # the thread that waits for Ctrl-C is not there yet
    time.sleep(0.01)
    return process


def check(process: subprocess.Popen, folder: Path) -> list[str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.splitlines()[-1] == "joyjax: cancelled"
    assert err.count("cancelled") == 1
    assert "Traceback" not in err
    for name in out.splitlines():
        assert (folder / name).exists()
    for path in folder.rglob("*"):  # previews among them
        assert path.is_dir() or path.suffix == ".png", path
        if path.is_file():
            with Image.open(path) as image:
                image.load()
    return out.splitlines()


@pytest.mark.parametrize(
    "moment", [m if m in (0, 4, 10, 18) else pytest.param(m, marks=pytest.mark.nightly) for m in range(MOMENTS)]
)
def test_an_edit_at_any_moment(tmp_path, moment):
    process = begin(EDIT, tmp_path)
    time.sleep(moment * 0.3)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    check(process, tmp_path)
    assert time.monotonic() - pressed < 30  # at once, not after what is running; the machine may be busy


def test_results_that_are_finished_stay(tmp_path):
    process = begin(EDIT, tmp_path)
    first = [process.stdout.readline().strip() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    check(process, tmp_path)
    assert first == ["edit.png", "edit-2.png"]
    assert all((tmp_path / name).exists() for name in first)


def test_twice_is_like_once(tmp_path):
    process = begin(EDIT, tmp_path)
    process.stdout.readline()
    for _ in range(20):
        process.send_signal(signal.SIGINT)
    check(process, tmp_path)


def test_a_batch_says_how_far_it_came_and_goes_on(tmp_path):
    rows = [f'{{"image": "{EXAMPLE}", "prompt": "make the red circle blue", "seed": {n}}}\n' for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(rows[:200]))
    process = begin(["batch", "rows.jsonl", "--output", "out"], tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    said = err.splitlines()[-2:]
    assert said[1] == "joyjax: cancelled"
    assert said[0].endswith("done, 0 there already, 0 failed; the same command goes on from here")
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".joyjax-batch.lock"]


def test_where_the_caller_ignores_it(tmp_path):
    """As a shell does for a job in the background: Ctrl-C is for what is in front."""
    process = subprocess.Popen(
        [str(PROGRAM), *EDIT[:4], "--steps", "1"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.communicate()[0] == "edit.png\n"
    assert process.returncode == 0
