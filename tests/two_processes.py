"""Runs a program as two processes of JAX that find each other at a port of this machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_two(program: Path, arguments: Callable[[int], list[str]], *, seconds: float = 180) -> list[Any]:
    """Run `program RANK PORT ARGUMENTS` for both ranks; return the JSON that each prints in its last line."""
    port = str(free_port())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), port, *arguments(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said[0][1] + said[1][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]
