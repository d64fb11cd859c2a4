"""Converts the toy model in child processes that are killed; children are forked, so that JAX is imported once.

    python killed.py < jobs > answers      # one line of json each

Each child is forked before JAX has a backend. A job is what to convert, and the write or the number of seconds after
which the child gets a signal; the answer is how it ended.
"""

import ctypes
import dataclasses
import json
import os
import re
import resource
import select
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import jax
import toy

from joyjax.convert import manifest
from joyjax.convert.conversion import convert_checkpoint

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


@dataclasses.dataclass
class Job:
    """The job of a child."""

    source: str
    target: str
    options: dict[str, Any]
    part_bytes: int
    at: list | None = None  # the kind of a write, and its index among those of this kind
    after: float | None = None  # seconds
    signal: int = signal.SIGKILL
    longest_file: int | None = None  # bytes
    mere_user: bool = False  # root without the capability to bypass file permissions


@dataclasses.dataclass
class Answer:
    """How a child ended: its signal or 0, its error, and the kinds of all its writes in order."""

    pid: int
    signal: int
    seconds: float
    error: str = ""
    writes: list[str] = dataclasses.field(default_factory=list)


def kind(event: str, args: tuple) -> str | None:
    """Return the kind of write of an audit event; None for other events."""
    if event == "open":
        path, _, flags = args
        if not isinstance(path, str | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
    elif event in WRITES:
        path = args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0]
    else:
        return None
    name = re.sub(r"part-[0-9]+", "part", Path(os.fsdecode(path)).name)
    return f"{event.removeprefix('os.')} {re.sub('[0-9a-f]{16,}', 'data', name)}"


def convert(job: Job, pipe: int) -> None:
    """Run a job in the child; write its start and its result to the pipe."""
    if job.longest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.longest_file, job.longest_file))
    if job.mere_user:
        give_up_root()
    manifest.PART_BYTES = job.part_bytes
    seen: list[str] = []

    def watch(event: str, args: tuple) -> None:
        if (found := kind(event, args)) is None:
            return
        if job.at and job.at == [found, seen.count(found)]:
            os.kill(os.getpid(), job.signal)
        seen.append(found)

    jax.devices()
    sys.addaudithook(watch)
    os.write(pipe, b"\n")
    error = ""
    try:
        options = {name: value and Path(value) if name == "share" else value for name, value in job.options.items()}
        convert_checkpoint(Path(job.source), Path(job.target), (toy.TOY, toy.OTHER), **options)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    with os.fdopen(pipe, "w") as opened:
        json.dump([error, seen], opened)


def give_up_root() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)  # of linux/capability.h
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("6I", data.raw))
    words[:3] = [word & ~0b1110 for word in words[:3]]  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    if libc.capset(header, struct.pack("6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")


def run(job: Job, stopped: list[int]) -> Answer:
    """Run a job in a child, after the stopped children of earlier jobs have ended."""
    while stopped:
        os.waitpid(stopped.pop(), 0)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(read)
            convert(job, write)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    os.read(read, 1)  # it begins
    begin = time.monotonic()
    if job.after is not None and not select.select([read], [], [], job.after)[0]:
        os.kill(pid, job.signal)
    stops = job.signal == signal.SIGSTOP
    output = b""
    while not stops and (more := os.read(read, 2**16)):
        output += more
    os.close(read)
    _, status = os.waitpid(pid, os.WUNTRACED if stops else 0)
    stopped += [pid] if stops else []
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WSTOPSIG(status) if os.WIFSTOPPED(status) else 0
    return Answer(pid, ended, time.monotonic() - begin, *([] if ended else json.loads(output)))


if __name__ == "__main__":
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # only answers go to standard output
    stopped: list[int] = []
    for line in jobs:
        answers.write(json.dumps(dataclasses.asdict(run(Job(**json.loads(line)), stopped))) + "\n")
        answers.flush()
