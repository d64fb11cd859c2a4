"""The terminal of a command: notes and bars on standard error, results on standard output, never one over another."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from joyjax.reading import printable

PATIENCE = 1.0  # seconds in which a bar is taken off the terminal


class Terminal:
    """Standard error with the bar that is shown there, and standard output beside it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None

    @property
    def shows_bars(self) -> bool:
        """Whether standard error is a terminal that can move its cursor; otherwise progress is lines."""
        return sys.stderr.isatty() and not self.console.is_dumb_terminal

    def note(self, text: str) -> None:
        """Print something that is not a result; above the bar, where there is one."""
        self.console.print(printable(text), soft_wrap=True)

    def result(self, text: str) -> None:
        """Print a line on standard output. The bar makes room, since both may be one terminal."""
        bar = self._bar
        if bar is not None:
            bar.stop()
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        if bar is not None:
            bar.start()

    @contextlib.contextmanager
    def bar(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """Show a bar, which is gone at the end."""
        with Progress(*columns, console=self.console, transient=True, redirect_stdout=False) as bar:
            self._bar = bar
            try:
                yield bar
            finally:
                self._bar = None

    def clear(self) -> None:
        """Take the bar off the terminal, from any thread."""
        if self._bar is not None:
            thread = threading.Thread(target=self._bar.stop, daemon=True)
            thread.start()
            thread.join(PATIENCE)


@functools.cache
def terminal() -> Terminal:
    """Return the terminal of this process."""
    return Terminal()


def note(text: str) -> None:
    """Print something on standard error that is not a result; it may quote a file."""
    terminal().note(text)


def result(text: object) -> None:
    """Print a result on standard output: a path, or what was asked for."""
    terminal().result(str(text))


def clear() -> None:
    """Take a bar off the terminal."""
    terminal().clear()
