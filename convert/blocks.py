"""Reading a part of an array in a file into host memory, in blocks that stay in a processor's cache.

A block is read, checked, cast and written in the order of its destination while it is in cache, so that a kernel which
is transposed costs little more than one that is not. Several threads read: NumPy and the system calls release the
interpreter's lock.
"""

import contextlib
import dataclasses
import itertools
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert.finite import all_finite
from joyjax.reading import Stamp, stamp

ALIGNMENT = 64  # bytes: JAX's CPU client takes an aligned, contiguous array as it is, without a copy
HUGE_BYTES = 2**22  # from this size memory is taken in huge pages, whose page faults take a fifth of the time
BLOCK_BYTES = 2**20
TASK_BYTES = 2**24  # that a thread reads at a time
SHORT_RUN = 2**9  # bytes of a contiguous run, below which what lies between runs is read too
PAD_BYTES = 64  # behind each row of a block: rows at distances of a power of two share few lines of a cache
LONG_ROW = 2**10  # bytes of the rows that are padded
VECTORS = 1024  # buffers of one system call
MOST_THREADS = 4

Allocate = Callable[[Sequence[int], np.dtype], np.ndarray]  # a contiguous, aligned array without values


@contextlib.contextmanager
def reading_threads() -> Iterator[Executor]:
    """Yield the threads that read; they end with the context."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(MOST_THREADS, count), "joyjax-read") as pool:
        yield pool


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an array without values that starts at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    if size >= HUGE_BYTES and hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
    else:
        raw = np.empty(size + ALIGNMENT, np.uint8)
        raw = raw[-raw.ctypes.data % ALIGNMENT :][:size]
    return raw.view(dtype).reshape(shape)


class ReusedMemory:
    """Memory of arrays that are done with, for others of as many bytes: new memory takes as long as reading into it.

    At most `most` bytes are kept. Any thread may take and give.
    """

    def __init__(self, most: int):
        self._most = most
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Return an array as `aligned` does."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            for n, raw in enumerate(self._kept):
                if raw.nbytes == size:
                    return self._kept.pop(n).view(dtype).reshape(shape)
        return aligned(shape, dtype)

    def give(self, array: np.ndarray) -> None:
        """Keep the memory of an array that nobody reads any more. That of JAX is read-only, and is not kept."""
        flags = array.flags
        if flags.writeable and flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
            with self._lock:
                self._kept.append(array.reshape(-1).view(np.uint8))
                while sum(raw.nbytes for raw in self._kept) > self._most:
                    self._kept.pop(0)


def aligned_in_order(
    shape: Sequence[int], order: Sequence[int], dtype: np.dtype, take: Allocate = aligned
) -> tuple[np.ndarray, np.ndarray]:
    """Return an aligned array whose axes are those of `shape` in `order`, and its view with the axes of `shape`."""
    value = take([shape[axis] for axis in order], dtype)
    return value, value.transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class Source:
    """An array of `shape` and `dtype` in C order, from byte `start` of a file on."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    stamp: Stamp  # of the file whose header was read

    @property
    def nbytes(self) -> int:
        """The bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fill(
        self, target: np.ndarray, ranges: Sequence[range], *, pool: Executor | None = None, check: bool = True
    ) -> bool:
        """Write the part that `ranges` select, one of step 1 for each axis, to `target`, with a cast to its dtype.

        `target` has the part's shape and any strides. Returns whether the part has neither NaN nor infinity; without
        `check`, True.

        Raises:
            OSError: if the file is missing, has changed since its header was read, or is truncated.
        """
        whole = self._read_whole(ranges)
        blocks = self._blocks([len(each) for each in ranges], whole)
        size = target.size * self.dtype.itemsize
        if pool is None or size <= 2 * BLOCK_BYTES or len(blocks) == 1:
            return self._read(blocks, target, ranges, whole, check)
        each = max(1, len(blocks) * TASK_BYTES // size)
        tasks = [
            pool.submit(self._read, blocks[n : n + each], target, ranges, whole, check)
            for n in range(0, len(blocks), each)
        ]
        try:
            return all([task.result() for task in tasks])
        finally:
            for task in tasks:
                task.cancel()

    def _read_whole(self, ranges: Sequence[range]) -> int:
        """Return the first axis of those that are read whole, since the part of them is scattered over short runs."""
        axis, run = len(ranges), self.dtype.itemsize
        for n in reversed(range(len(ranges))):
            if len(ranges[n]) < self.shape[n] and run * len(ranges[n]) < SHORT_RUN:
                axis = n
            run *= self.shape[n]
        return axis

    def _blocks(self, lengths: Sequence[int], whole: int) -> list[tuple[slice, ...]]:
        """Return indices of blocks in a part: some entries of one axis, one of each before, and all of those after.

        The axes from `whole` on are not divided.
        """
        axis, row = len(lengths), self.dtype.itemsize
        while axis and (axis > whole or row * lengths[axis - 1] <= BLOCK_BYTES):
            axis -= 1
            row *= lengths[axis] if axis < whole else self.shape[axis]
        rest = tuple(slice(0, length) for length in lengths[axis:])
        if axis == 0:
            return [rest] if all(lengths) else []
        step = max(1, BLOCK_BYTES // row)
        slabs = [slice(n, min(n + step, lengths[axis - 1])) for n in range(0, lengths[axis - 1], step)]
        before = itertools.product(*([slice(n, n + 1) for n in range(length)] for length in lengths[: axis - 1]))
        return [(*index, slab, *rest) for index in before for slab in slabs]

    def _read(
        self, blocks: Sequence[tuple[slice, ...]], target: np.ndarray, ranges: Sequence[range], whole: int, check: bool
    ) -> bool:
        if stamp(self.file) != self.stamp:
            raise OSError("the file changed since it was opened")
        finite = True
        with self.file.open("rb", buffering=0) as opened:
            scratch = _Scratch(self.dtype)
            for index in blocks:
                goal = _at(target, index)
                spans = [each[at] for each, at in zip(ranges, index, strict=True)]
                spans[whole:] = map(range, self.shape[whole:])
                shape = tuple(map(len, spans))
                direct = goal.dtype == self.dtype and goal.flags.c_contiguous and goal.shape == shape
                block, pieces = (goal, _pieces(goal)) if direct else scratch.like(shape)
                self._read_block(opened, block, pieces, spans)
                finite = finite and (not check or all_finite(block))
                if not direct:
                    chosen = (slice(None),) * whole + tuple(slice(each.start, each.stop) for each in ranges[whole:])
                    part = _at(block, chosen)
                    goal[...] = part if goal.dtype == self.dtype else part.astype(goal.dtype)
            if stamp(opened.fileno()) != self.stamp:
                raise OSError("the file changed while it was read")
        return finite

    def _read_block(
        self, file: FileIO, block: np.ndarray, pieces: Sequence[memoryview], spans: Sequence[range]
    ) -> None:
        """Read one block, a contiguous run of the file at a time; `pieces` are the block's."""
        strides = [self.dtype.itemsize * math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        # The last axis that is not read whole; all after it are contiguous.
        last = max((axis for axis, span in enumerate(spans) if len(span) < self.shape[axis]), default=0)
        for chosen in np.ndindex(*block.shape[:last]):
            firsts = [span[n] for span, n in zip(spans, chosen, strict=False)]
            if last < len(spans):
                firsts.append(spans[last].start)
            offset = self.start + sum(first * stride for first, stride in zip(firsts, strides, strict=False))
            _read_run(file, offset, _pieces(_at(block, chosen)) if chosen else pieces)


def _at(array: np.ndarray, index: tuple[Any, ...]) -> np.ndarray:
    """Return a view, also of an array without axes."""
    found: np.ndarray = array[(*index, ...)]
    return found


class _Scratch:
    """Memory for one block at a time, taken anew only for another shape."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.block = np.empty(0, dtype)
        self.pieces: list[memoryview] = []

    def like(self, shape: tuple[int, ...]) -> tuple[np.ndarray, list[memoryview]]:
        """Return a block of this shape, and its contiguous pieces; long rows are padded."""
        if self.block.shape != shape:
            row = shape[-1] * self.dtype.itemsize if shape else 0
            pad = PAD_BYTES // self.dtype.itemsize if row >= LONG_ROW else 0
            padded = (*shape[:-1], shape[-1] + pad) if pad else shape
            self.block = np.empty(padded, self.dtype)[tuple(map(slice, shape))] if pad else np.empty(padded, self.dtype)
            self.pieces = _pieces(self.block)
        return self.block, self.pieces


def _pieces(block: np.ndarray) -> list[memoryview]:
    """Return the contiguous pieces of an array in order, as bytes."""
    if block.flags.c_contiguous:
        return [block.reshape(-1).view(np.uint8).data]
    return [piece for part in block for piece in _pieces(part)]


def _read_run(file: FileIO, offset: int, pieces: Sequence[memoryview]) -> None:
    """Fill the pieces with the bytes of a file from `offset` on."""
    file.seek(offset)
    rest = list(pieces)
    while rest:
        # Many pieces in one system call, where the system has it.
        count = os.readv(file.fileno(), rest[:VECTORS]) if hasattr(os, "readv") else file.readinto(rest[0])
        if not count:
            raise OSError("the file ends too early")
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = rest[0][count:]
