"""Runs joyjax on a pseudo-terminal and records its screen."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

import pyte
from invoke import PROGRAM, environment, hearing_interrupts


class Shown:
    """The exit status of a program, and its screen: at the end, and after each piece of output."""

    def __init__(self, status: int, screen: pyte.HistoryScreen, frames: list[list[str]]) -> None:
        self.status, self.frames, self._screen = status, frames, screen

    @property
    def lines(self) -> list[str]:
        """All non-empty lines at the end, with those that scrolled off."""
        history = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in [*history, *self._screen.display] if line.strip()]

    @property
    def cursor_is_shown(self) -> bool:
        return not self._screen.cursor.hidden


def show(*arguments: object, cwd: Path, columns: int = 100, rows: int = 24, interrupt_after: str = "") -> Shown:
    """Run the installed program on a terminal of this size; press Ctrl-C once a line contains `interrupt_after`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {k: v for k, v in environment().items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    program = subprocess.Popen(
        hearing_interrupts(PROGRAM, *arguments, terminal=True),
        cwd=cwd,
        env={**env, "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    screen = pyte.HistoryScreen(columns, rows, history=1000)
    stream, frames, pressed = pyte.ByteStream(screen), [], False
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the program has closed its side
            break
        if not piece:
            break
        stream.feed(piece)
        frames.append(list(screen.display))
        if interrupt_after and not pressed and any(interrupt_after in line for line in screen.display):
            os.write(ours, b"\x03")
            pressed = True
    os.close(ours)
    return Shown(program.wait(60), screen, frames)
