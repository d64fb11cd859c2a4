"""Standard streams that are closed, full or broken: the work is done, and the status is that of the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import PROGRAM, environment
from PIL import Image

from joyjax.convert.source.model import DEMO

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
EDIT = f'"{PROGRAM}" edit "make the red circle blue" -i "{EXAMPLE}" --steps 1'


def shell(command: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def test_an_edit_without_any_stream(tmp_path):
    """All three closed: files that are opened must not get their numbers, or messages end up in them."""
    done = shell(f"{EDIT} -o a.png <&- >&- 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_edit_whose_output_is_full(tmp_path):
    done = shell(f"{EDIT} -o a.png >/dev/full", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">/dev/full", "2>/dev/full", "| true", "<&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize(("command", "status"), [(f'info "{DEMO}"', 0), ("info nothing-there", 1), ("edit", 2)])
def test_the_status_is_that_of_the_work(tmp_path, redirect, command, status):
    pipe = redirect.startswith("|")
    done = shell(f'"{PROGRAM}" {command} {redirect}' + ("; exit ${PIPESTATUS[0]}" if pipe else ""), tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_result_to_standard_output(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"{EDIT} -o - > out.png"], cwd=tmp_path, env=environment(), capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as image:
        image.load()
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    done = shell(f"{EDIT} -o - >/dev/full", tmp_path)  # here the picture is what was asked for
    assert done.returncode == 1
    assert "the picture cannot be written to standard output: No space left" in done.stderr
    done = shell(f"{EDIT} -o - >&-", tmp_path)
    assert done.returncode == 1
    assert "the picture cannot be written to standard output: it is closed" in done.stderr
    assert "takes one result, and --num-images is 2" in shell(f"{EDIT} -o - --num-images 2", tmp_path).stderr


def test_a_name_that_is_no_text_comes_out_as_it_is(tmp_path):
    name = b"caf\xe9.png"  # Latin-1
    done = subprocess.run(
        [PROGRAM, "edit", "make the red circle blue", "-i", EXAMPLE, "--steps", "1", "-o", os.fsdecode(name)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, name + b"\n"), done.stderr
    assert os.listdir(os.fsencode(tmp_path)) == [name]


def test_as_a_module(tmp_path):
    command = [sys.executable, "-P", "-m", "joyjax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n"), done.stderr
