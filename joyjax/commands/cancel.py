"""Ctrl-C: ends a command at any time, with one line and status 1.

The signal wakes a thread, which ends the process. The main thread is not involved: it may be in XLA or in a read for
minutes, and native code that calls back into Python can swallow an exception. So the stack is not unwound. This is safe
because files appear under their names only when they are complete, and conversions and batches can be resumed.
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

_messages: list[Callable[[], str]] = []  # of the running command


def end_on_interrupt() -> None:
    """Make Ctrl-C end this process, unless SIGINT is ignored, as a shell does for background jobs."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_wait, args=(receiver,), daemon=True).start()

    def wake(*_: object) -> None:
        with contextlib.suppress(OSError):
            sender.send(b"\0")

    # The descriptor is written at once; the handler runs only when the main thread executes Python again.
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, wake)


def finish() -> None:
    """Ignore Ctrl-C from now on: the command is done, and its status must not change."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


@contextlib.contextmanager
def message_on_interrupt(message: Callable[[], str]) -> Iterator[None]:
    """Within this context, Ctrl-C also prints the text that `message` returns."""
    _messages.append(message)
    try:
        yield
    finally:
        _messages.remove(message)


def _wait(receiver: socket.socket) -> None:
    while receiver.recv(1) not in (b"\0", bytes([signal.SIGINT])):
        pass
    # Only modules that are loaded: the main thread may be in the middle of an import.
    files, console = (sys.modules.get(f"joyjax.{name}") for name in ("files", "commands.console"))
    try:
        if clear := getattr(console, "clear", None):
            clear()
        if discard := getattr(files, "discard_unfinished", None):
            discard()
        lines = [*(message() for message in _messages), "joyjax: cancelled"]
        os.write(2, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
    finally:
        os._exit(STATUS)
