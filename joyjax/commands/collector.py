"""Python's garbage collector in a command: it runs rarely during imports, and not at exit.

An import of JAX makes half a million objects that live to the end. By default the collector visits them again and again
while they are made, and once more at exit: a fifth of the time of a short edit. Only the program does this; the library
leaves the collector of its user alone.
"""

import gc

QUIET = (20_000, 10, 10)  # thresholds during imports
_usual = gc.get_threshold()


def quiet() -> None:
    """Make the collector run rarely, until `settle`."""
    gc.set_threshold(*QUIET)


def settle() -> None:
    """Exempt all objects so far from collection, and restore the thresholds; nothing happens without `quiet`."""
    if gc.get_threshold() == QUIET:
        gc.freeze()
        gc.set_threshold(*_usual)


def leave() -> None:
    """Exempt all objects from the collection at exit. Handlers of atexit run, and streams are flushed, as always."""
    gc.freeze()
