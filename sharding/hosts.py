"""Several processes that run one program together, on one host or many.

Every process runs the same command and holds its own devices; a mesh spans them all. Every process reads the inputs,
such as pixels and prompts; the first one writes the results.
"""

import contextlib
import os
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from joyjax.errors import JoyJaxError, MeshError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
START_SECONDS = 300  # to wait for all processes; JAX's default
LOST = re.compile(
    "gloo|nccl|peer|socket|connection|heartbeat|another task|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE
)
HEARTBEAT_SECONDS = 30  # without a heartbeat, after which a process counts as dead; JAX's default is 100


def join_hosts() -> None:
    """Join the processes that the environment describes. To be called before anything asks JAX for devices.

    Under Slurm and Open MPI, JAX detects them. Elsewhere the three variables of `NAMES` describe them: the address of
    the first process with a free port, the number of processes, and the index of this one, from 0.

    Raises:
        MeshError: if a variable is missing or wrong, or the other processes do not connect in time.
    """
    address, *numbers = (os.environ.get(name) for name in NAMES)
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    if any(number is not None for number in numbers) and len(given) < len(NAMES):
        missing = ", ".join(name for name in NAMES if name not in given)
        raise MeshError(f"{', '.join(given)} without {missing}; a process needs all three")
    if not all(number is None or number.isdecimal() for number in numbers):
        raise MeshError(f"{given}: {NAMES[1]} and {NAMES[2]} are whole numbers")
    count, rank = (None if number is None else int(number) for number in numbers)
    if count is not None and rank is not None and not rank < count:
        raise MeshError(f"{NAMES[2]} is {rank} of {NAMES[1]} {count}; the first process is 0")
    try:
        jax.distributed.initialize(
            address,
            count,
            rank,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise MeshError(
            f"the processes of this run did not find each other: {error}; outside Slurm and Open MPI set "
            f"{', '.join(NAMES)} for each of them, with a port that is free and can be reached"
        ) from None


def is_first() -> bool:
    """Return whether this process writes results and messages to the user."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """Broadcast the first process's number, 0 … 2³² - 1, to every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))


def broadcast(text: str) -> str:
    """Broadcast the first process's text to every process."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = agree(data.size)
    sent = np.zeros(size, np.uint8)
    if is_first():
        sent[:] = data
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).decode()


@contextlib.contextmanager
def peer_loss_as_error() -> Iterator[None]:
    """Convert JAX's distributed-runtime errors to one JoyJaxError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not LOST.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise JoyJaxError(
            f"process {jax.process_index()} of {jax.process_count()} cannot continue: another process has ended or "
            f"cannot be reached ({reason:.200}); see that one's message, then start all processes again"
        ) from error
