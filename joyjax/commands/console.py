"""Terminal output of a command: notes and progress bars on standard error, results on standard output."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from joyjax.reading import printable

PATIENCE = 1.0  # timeout in seconds for removing a bar


class Terminal:
    """Standard error, with the progress bar on it, and standard output."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None

    @property
    def shows_bars(self) -> bool:
        """Whether standard error is a terminal with a movable cursor; otherwise progress is printed as lines."""
        return sys.stderr.isatty() and not self.console.is_dumb_terminal

    def note(self, text: str) -> None:
        """Print a note on standard error, above the bar if there is one."""
        self.console.print(printable(text), soft_wrap=True)

    def result(self, text: str) -> None:
        """Print a line on standard output. The bar is removed meanwhile, since both may be the same terminal."""
        bar = self._bar
        if bar is not None:
            bar.stop()
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        if bar is not None:
            bar.start()

    @contextlib.contextmanager
    def bar(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """Show a bar, which is removed at the end."""
        with Progress(*columns, console=self.console, transient=True, redirect_stdout=False) as bar:
            self._bar = bar
            try:
                yield bar
            finally:
                self._bar = None

    def clear(self) -> None:
        """Remove the bar, from any thread."""
        if self._bar is not None:
            thread = threading.Thread(target=self._bar.stop, daemon=True)
            thread.start()
            thread.join(PATIENCE)


@functools.cache
def terminal() -> Terminal:
    """Return the terminal of this process."""
    return Terminal()


def note(text: str) -> None:
    """Print a note on standard error; text from files in it is escaped."""
    terminal().note(text)


def result(text: object) -> None:
    """Print a result on standard output."""
    terminal().result(str(text))


def clear() -> None:
    """Remove the bar from the terminal."""
    terminal().clear()
