"""Runs joyjax's commands: in this process, where programs stay compiled, or in one of their own, as a user does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import typer
from click.testing import CliRunner, Result

PROGRAM = Path(sys.executable).with_name("joyjax")


def invoke(command: str, *arguments: object, input: bytes | None = None) -> Result:
    """Run a command here, with this on standard input. What `main` makes status 1 of is in `exception`."""
    from joyjax.cli import app

    return CliRunner().invoke(
        typer.main.get_command(app).commands[command], [str(each) for each in arguments], input=input
    )


def succeed(command: str, *arguments: object) -> Result:
    """Run a command that must end well."""
    done = invoke(command, *arguments)
    if done.exit_code:
        raise AssertionError(f"{done.stderr}\n{done.exception!r}") from done.exception
    return done


def environment() -> dict[str, str]:
    """Return what a user has: not what conftest.py sets for this process."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKENIZERS_"))}


def hear_interrupts() -> None:
    """In a new process: let Ctrl-C reach it, also where these tests run as a shell's job in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen:
    """Start the installed program."""
    command = [str(PROGRAM), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, **pipes, text=True, env=environment(), preexec_fn=hear_interrupts)
