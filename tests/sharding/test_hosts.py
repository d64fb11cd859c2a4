"""An edit by two processes with two simulated devices each, over the loopback address."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from two_processes import free_port

pytestmark = pytest.mark.jax

ROOT = Path(__file__).parents[2]
EDIT = ["edit", "make the red circle blue", "--image", str(ROOT / "examples" / "shapes.png"), "--dtype", "float32"]


def start(arguments: list[str], folder: Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **variables}
    folder.mkdir(exist_ok=True)
    program = Path(sys.executable).with_name("joyjax")
    return subprocess.Popen(
        [program, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_both(folder: Path, arguments: list[str], **variables: str) -> list[subprocess.Popen]:
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            [*EDIT, "--distributed", *arguments],
            folder / str(rank),
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(rank),
            **variables,
        )
        for rank in range(2)
    ]


def without_gloo(out: str) -> list[str]:
    """Leave out what Gloo, through which CPUs talk, says on standard output; its threads cut up each other's lines."""
    return [line for line in out.splitlines() if line and "[Gloo]" not in line and "peer ranks" not in line]


def test_two_processes_make_one_picture(tmp_path):
    alone = start(EDIT, tmp_path / "alone")
    running = [alone, *start_both(tmp_path, ["--mesh", "ring=4"])]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert [without_gloo(out) for out, _ in said[1:]] == [["edit.png"], []]
    assert not (tmp_path / "1" / "edit.png").exists()
    one, two = (np.asarray(Image.open(tmp_path / name / "edit.png"), np.int32) for name in ("alone", "0"))
    assert np.abs(one - two).max() <= 1
    source = np.asarray(Image.open(ROOT / "examples" / "shapes.png").resize((128, 128)), np.int32)[..., :3]
    assert np.abs(one - source).max() > 100


def test_a_process_that_dies_ends_the_other(tmp_path):
    both = start_both(tmp_path, ["--mesh", "ring=4", "--steps", "1000"], JAX_LOG_COMPILES="1")
    try:
        for line in both[0].stderr:
            if "Finished XLA compilation of jit(predict)" in line:
                break
        time.sleep(1)  # it is among its steps
        assert [process.poll() for process in both] == [None, None]
        both[1].kill()
        _, error = both[0].communicate(timeout=120)
        # Where a transfer fails, joyjax says so; where one waits, JAX misses the heartbeats and ends the process.
        if both[0].returncode == 1:
            assert "joyjax: process 0 of 2 cannot continue: another process has ended" in error
        else:
            assert both[0].returncode == -signal.SIGABRT
            assert "another task died" in error
        assert not (tmp_path / "0" / "edit.png").exists()
    finally:
        for process in both:
            process.kill()


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({}, ["--mesh", "ring=4"], "did not find each other"),
        ({"JAX_PROCESS_ID": "0"}, ["--mesh", "ring=4"], "JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS"),
        ({}, [], "--distributed needs --mesh"),
    ],
)
def test_too_little_is_said(tmp_path, variables, arguments, message):
    process = start([*EDIT, "--distributed", *arguments], tmp_path, **variables)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in error
    assert "Traceback" not in error
