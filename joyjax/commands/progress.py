"""Progress on standard error: bars where there is a terminal, nothing where there is none."""

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from joyjax.errors import AdviceWarning, Cancelled
from joyjax.inputs.files import printable

if TYPE_CHECKING:
    from joyjax.running import StepEvent


def console() -> Console:
    """Return the console of standard error, as it is now."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Say something to the user that is not a result; it may quote a file."""
    console().print(printable(text), markup=False)


def _bars(*columns: ProgressColumn) -> Progress:
    shown = console()
    # Rich writes what is printed meanwhile above the bar, on standard error; results that go elsewhere must get there.
    return Progress(*columns, console=shown, disable=not shown.is_terminal, redirect_stdout=sys.stdout.isatty())


@contextlib.contextmanager
def advising() -> Iterator[None]:
    """Say advice as notes, when it is given."""
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
def loading(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes; yields what to call with the bytes done and in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _bars(*columns) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of things done; yields what to call after each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bars(*columns) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def stepping() -> Iterator[Callable[["StepEvent"], None]]:
    """Show a bar of steps with the time each takes; yields the callback for `edit`.

    Ctrl-C ends the edit after the step that is running: JAX does not always survive being interrupted within one. A
    second Ctrl-C does not wait.
    """
    with stopping() as check, _step_bars() as progress:
        task = progress.add_task("compiling", total=None, speed="the first run of a size takes longer")

        def advance(event: "StepEvent") -> None:
            check()
            speed = f"{event.seconds:.2f} s/step"
            progress.update(task, description="editing", completed=event.step, total=event.steps, speed=speed)

        yield advance


@contextlib.contextmanager
def working(total: int) -> Iterator[tuple[Callable[["StepEvent"], None], Callable[[], None]]]:
    """Show a bar of edits done; yields the callback for each edit, and what to call after each.

    Ctrl-C is as in `stepping`.
    """
    with stopping() as check, _step_bars() as progress:
        task = progress.add_task("editing", total=total, speed="")

        def step(event: "StepEvent") -> None:
            check()
            progress.update(task, speed=f"step {event.step} of {event.steps}, {event.seconds:.2f} s/step")

        yield step, lambda: progress.advance(task)


def _step_bars() -> Progress:
    return _bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """Have Ctrl-C ask to stop; yields what to call between steps, which raises Cancelled once it was pressed."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def ask_to_stop(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        note("stopping after this step; Ctrl-C again stops at once")

    def check() -> None:
        if stop.is_set():
            raise Cancelled

    signal.signal(signal.SIGINT, ask_to_stop)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def peak() -> str | None:
    """Say the most memory that was held; None where the device does not tell."""
    from joyjax.memory import peak_bytes

    size = peak_bytes()
    return None if size is None else f"peak of memory: {gibibytes(size)}"


def gibibytes(size: int) -> str:
    """Return a number of bytes to read: in GiB, or in MiB where that is little."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
