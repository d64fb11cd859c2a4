"""Runs joyjax's commands: in this process, where programs stay compiled, or in a subprocess, as a user does."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import typer
from click.testing import CliRunner, Result

PROGRAM = Path(sys.executable).with_name("joyjax")


def invoke(command: str, *arguments: object, input: bytes | None = None) -> Result:
    """Run a command in this process with this standard input. The error behind a status 1 is in `exception`."""
    from joyjax.cli import app

    return CliRunner().invoke(
        typer.main.get_command(app).commands[command], [str(each) for each in arguments], input=input
    )


def succeed(command: str, *arguments: object) -> Result:
    """Run a command that must succeed."""
    done = invoke(command, *arguments)
    if done.exit_code:
        raise AssertionError(f"{done.stderr}\n{done.exception!r}") from done.exception
    return done


def environment() -> dict[str, str]:
    """Return a user's environment, without the settings of conftest.py."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKENIZERS_"))}


def hearing_interrupts(*command: object, terminal: bool = False) -> list[str]:
    """Return a command whose process receives Ctrl-C, also where these tests run as a background job of a shell.

    `terminal`: standard input becomes the controlling terminal. A small Python program sets this up and then executes
    the command, since JAX's threads do not survive a fork that runs Python.
    """
    first = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); " if terminal else ""
    reset = "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    code = f"import os, signal, sys; {first}{reset}"
    return [sys.executable, "-c", code, *map(str, command)]


def start(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start the installed program in a user's environment with `env` added."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = hearing_interrupts(PROGRAM, *arguments)
    return subprocess.Popen(command, cwd=cwd, **pipes, text=True, env={**environment(), **(env or {})})
