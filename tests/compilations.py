"""Counts JAX's compilations."""

import collections
import contextlib
import logging
from collections.abc import Iterator


class Compilations(logging.Handler):
    """Counts the compilations in JAX's log by the name of the function."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Finished XLA compilation of jit("):
            self.counts[message.split("jit(")[1].split(")")[0]] += 1


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter]:
    """Yield the counts, which grow within the block."""
    handler, logger = Compilations(), logging.getLogger("jax._src.dispatch")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.counts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
