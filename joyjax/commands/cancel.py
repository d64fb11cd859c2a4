"""Ctrl-C: one behaviour, one status and one line, from the first instruction of a command to its end.

The signal wakes a thread, which ends the process. Nothing is asked of the main thread: it may be in XLA or in a read
for minutes, and an exception raised there can be swallowed by what calls back into Python. So no stack is unwound. That
is safe because files appear under their names only when they are whole, and conversions and batches go on from where
they were stopped, however that was.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

STATUS = 1
GOES_ON = "the same command goes on from here"

_last_words: list[Callable[[], str]] = []  # of the command that is running


def end_on_interrupt() -> None:
    """Have Ctrl-C end this process. If the caller ignores SIGINT, as a shell does for background jobs, it stays so."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_wait, args=(receiver,), daemon=True).start()

    def wake(*_: object) -> None:
        with contextlib.suppress(OSError):
            sender.send(b"\0")

    # A signal is written to the descriptor at once; the handler itself waits until the main thread runs Python again.
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, wake)


def finish() -> None:
    """Ignore Ctrl-C from here on: the command is done, and its status stands."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


@contextlib.contextmanager
def last_words(say: Callable[[], str]) -> Iterator[None]:
    """While this is entered, Ctrl-C also says what `say` returns."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def _wait(receiver: socket.socket) -> None:
    while receiver.recv(1) not in (b"\0", bytes([signal.SIGINT])):
        pass
    # Only modules that are there: the main thread may be in the middle of an import.
    files, console = (sys.modules.get(f"joyjax.{name}") for name in ("files", "commands.console"))
    try:
        if clear := getattr(console, "clear", None):
            clear()
        if discard := getattr(files, "discard_unfinished", None):
            discard()
        lines = [*(say() for say in _last_words), "joyjax: cancelled"]
        os.write(2, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
    finally:
        os._exit(STATUS)
