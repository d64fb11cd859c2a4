"""The stages of a command on standard error: bars on a terminal; elsewhere a line at each start and each 10 seconds."""

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
NARROW = 64  # columns of a terminal, below which a bar is left out of its line


class Update(Protocol):
    """Says how far a stage is. What is left out stays as it was."""

    def __call__(self, *, done: int | None = None, total: int | None = None, detail: str | None = None) -> None:
        """Change what is shown."""


@contextlib.contextmanager
def stage(title: str, total: int | None = None, *, unit: str = "", detail: str = "") -> Iterator[Update]:
    """Show a stage of the work; yields what to call as it goes on. `unit` is "bytes", or nothing for a count."""
    shown = _bar if terminal().shows_bars else _lines
    with shown(title, total, unit, detail) as update:
        yield update


@contextlib.contextmanager
def loading(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a stage that reads or writes bytes; yields what to call with the bytes done and in all."""
    with stage(title, unit="bytes") as update:
        yield lambda done, total: update(done=done, total=total)


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a stage of things to do one by one; yields what to call after each."""
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
    """Show edits that are done one by one; yields the callback for each edit, and what to call after each."""
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
    """Print advice as notes, when it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdviceWarning)
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
            if issubclass(category, AdviceWarning):
                note(str(message))
            else:
                show(message, category, *rest, **more)  # type: ignore[arg-type]

        warnings.showwarning = say
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

    def tell() -> None:
        while not ended.wait(EVERY):
            done, total = state["done"], state["total"]
            parts = [f"{title}, {time.monotonic() - started:.0f} s"]
            if done is not None and total is not None:
                parts.append(f"{size(done)} of {size(total)}")
            note(", ".join([*parts, *([str(state["detail"])] if state["detail"] else [])]))

    note(title)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()


def peak() -> str | None:
    """Return the most memory that was held, as text; None where the device does not report it."""
    from joyjax.runtime.peak_memory import peak_bytes

    size = peak_bytes()
    return None if size is None else f"peak of memory: {gibibytes(size)}"


def gibibytes(size: int) -> str:
    """Return a number of bytes to read: in GiB, or in MiB where that is little."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
