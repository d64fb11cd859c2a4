"""Progress of a command on standard error: bars on a terminal, else a line at the start and every 10 seconds."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from joyjax.commands.console import note, terminal
from joyjax.errors import AdviceWarning

if TYPE_CHECKING:
    from joyjax.runtime.job import StepEvent

EVERY = 10.0  # seconds between lines
NARROW = 64  # columns of a terminal, below which the bar is left out


class Update(Protocol):
    """Updates the progress of a stage. None leaves a value unchanged."""

    def __call__(self, *, done: int | None = None, total: int | None = None, detail: str | None = None) -> None:
        """Update the values."""


@contextlib.contextmanager
def stage(title: str, total: int | None = None, *, unit: str = "", detail: str = "") -> Iterator[Update]:
    """Show a stage; yields the function that updates it. `unit` is "bytes", or empty for a count."""
    shown = _bar if terminal().shows_bars else _lines
    with shown(title, total, unit, detail) as update:
        yield update


@contextlib.contextmanager
def loading(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a stage that reads or writes bytes; yields a function of the bytes done and the total."""
    with stage(title, unit="bytes") as update:
        yield lambda done, total: update(done=done, total=total)


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a stage of several items; yields a function to call after each."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        update(done=done)

    with stage(title, total) as update:
        yield advance


@contextlib.contextmanager
def stepping() -> Iterator[Callable[["StepEvent"], None]]:
    """Show the steps of an edit; yields the callback for `edit`."""
    with stage("editing", detail="compiling: the first run of a size takes longer") as update:
        yield lambda event: update(done=event.step, total=event.steps, detail=f"{event.seconds:.2f} s a step")


@contextlib.contextmanager
def working(total: int) -> Iterator[tuple[Callable[["StepEvent"], None], Callable[[], None]]]:
    """Show a stage of several edits; yields the callback of each edit, and a function to call after each."""
    done = 0

    def step(event: "StepEvent") -> None:
        update(detail=f"step {event.step} of {event.steps}, {event.seconds:.2f} s a step")

    def advance() -> None:
        nonlocal done
        done += 1
        update(done=done)

    with stage("editing", total) as update:
        yield step, advance


@contextlib.contextmanager
def advising() -> Iterator[None]:
    """Print AdviceWarnings as notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdviceWarning)
        show = warnings.showwarning

        def print_note(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
            if issubclass(category, AdviceWarning):
                note(str(message))
            else:
                show(message, category, *rest, **more)  # type: ignore[arg-type]

        warnings.showwarning = print_note
        yield


@contextlib.contextmanager
def _bar(title: str, total: int | None, unit: str, detail: str) -> Iterator[Update]:
    narrow = terminal().console.width < NARROW
    columns: list[ProgressColumn] = [TextColumn("{task.description}")]
    if not narrow:
        columns.append(BarColumn(20))
    columns.append(DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn())
    if not narrow:
        columns.append(TransferSpeedColumn() if unit == "bytes" else TextColumn("{task.fields[detail]}"))
    with terminal().bar(*columns, TimeRemainingColumn(compact=True)) as bar:
        task = bar.add_task(title, total=total, detail=detail)

        def update(*, done: int | None = None, total: int | None = None, detail: str | None = None) -> None:
            fields = {} if detail is None else {"detail": detail}
            bar.update(task, completed=done, total=total, **fields)  # type: ignore[arg-type]

        yield update


@contextlib.contextmanager
def _lines(title: str, total: int | None, unit: str, detail: str) -> Iterator[Update]:
    state: dict[str, Any] = {"done": None, "total": total, "detail": detail}
    started, ended = time.monotonic(), threading.Event()
    size: Callable[[int], str] = gibibytes if unit == "bytes" else str

    def update(**changed: Any) -> None:
        state.update({name: value for name, value in changed.items() if value is not None})

    def report() -> None:
        while not ended.wait(EVERY):
            done, total = state["done"], state["total"]
            parts = [f"{title}, {time.monotonic() - started:.0f} s"]
            if done is not None and total is not None:
                parts.append(f"{size(done)} of {size(total)}")
            note(", ".join([*parts, *([str(state["detail"])] if state["detail"] else [])]))

    note(title)
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()


def peak() -> str | None:
    """Return the peak memory as text; None if the device does not report it."""
    from joyjax.runtime.peak_memory import peak_bytes

    size = peak_bytes()
    return None if size is None else f"peak memory: {gibibytes(size)}"


def gibibytes(size: int) -> str:
    """Format a number of bytes in GiB, or in MiB if it is below 1 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
