"""Reading the safetensors files of one component: headers first, then any part of any tensor.

A checkpoint is untrusted. A header is checked against the file before memory is allocated, and later reads must be
from the same, unchanged file. Files are read, not mapped: truncating a mapped file kills the process.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert.blocks import Source, aligned
from joyjax.convert.rules import Shape
from joyjax.convert.source.headers import read_raw_header, unreadable
from joyjax.convert.source.tensor_names import quantisation
from joyjax.convert.source.weights import INDEX, NOT_QUANTISED, WEIGHTS, weights_problem
from joyjax.dtypes import STORED
from joyjax.errors import CheckpointError
from joyjax.reading import Stamp, read_json

LONGEST_NAME = 200  # of a tensor; the real ones have 68

# The format's names and NumPy's. Parameters have one of dtypes.STORED; ignored tensors may have any of these.
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor: its shape, its dtype under NumPy's name, its file and the offset of its bytes there."""

    shape: Shape
    dtype: str
    file: Path
    start: int
    stamp: Stamp

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def seen(self, view: Shape) -> Source:
        """Return where the tensor's values are, reshaped to `view`."""
        return Source(self.file, self.start, np.dtype(self.dtype), tuple(view), self.stamp)

    def read(self, view: Shape | None = None, part: Sequence[slice] | None = None) -> np.ndarray:
        """Return the tensor reshaped to `view`, or the part of that view which slices of step 1 select.

        Raises:
            OSError: if the file is missing, has changed since its header was read, or is truncated.
        """
        view = self.shape if view is None else view
        ranges = [range(size)[each] for size, each in zip(view, part or [slice(None)] * len(view), strict=True)]
        target = aligned([len(each) for each in ranges], np.dtype(self.dtype))
        self.seen(view).fill(target, ranges, check=False)
        return target


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one component by name, not read yet; `where` names them in messages."""

    where: str
    headers: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: Path) -> "Tensors":
        """Read the headers of a component's folder: one safetensors file, or shards with an index.

        Raises:
            CheckpointError: if the folder or its weights are missing, unreadable or pickled, or if index and shards
                disagree.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is missing; it should hold {WEIGHTS[0]} or {WEIGHTS[1]}")
        found = [name for stem in WEIGHTS for name in (stem, stem + INDEX) if (folder / name).exists()]
        if not found:
            wrong = weights_problem(folder)
            raise CheckpointError(wrong[1] if wrong else f"{folder} holds no weights; expected {' or '.join(WEIGHTS)}")
        if len(found) > 1:
            raise CheckpointError(f"{folder} holds {' and '.join(found)}; which are its weights? Keep one of them")
        file = folder / found[0]
        return cls(str(folder), _read_shards(file) if file.name.endswith(INDEX) else read_header(file))

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor by name."""
        return {name: tensor.shape for name, tensor in self.headers.items()}

    def read(self, name: str, view: Shape | None = None, part: Sequence[slice] | None = None) -> np.ndarray:
        """Return one tensor, or a part of it: see `Tensor.read`.

        Raises:
            CheckpointError: if the file is missing or has changed since its header was read.
        """
        with self._errors_of(name):
            return self.headers[name].read(view, part)

    def fill(self, name: str, view: Shape, ranges: Sequence[range], target: np.ndarray, **options: Any) -> bool:
        """Write a part of one tensor's `view` to `target`: see `blocks.Source.fill`, which has the options.

        Raises:
            CheckpointError: if the file is missing or has changed since its header was read.
        """
        with self._errors_of(name):
            return self.headers[name].seen(view).fill(target, ranges, **options)

    @contextlib.contextmanager
    def _errors_of(self, name: str) -> Iterator[None]:
        """Raise an OSError of reading a tensor as a CheckpointError that names it."""
        try:
            yield
        except OSError as error:
            file = self.headers[name].file
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error.strerror or error}") from None


def read_header(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors header, and check them against the file.

    Raises:
        CheckpointError: naming the file, and the tensor where there is one.
    """
    header = read_raw_header(file)
    if method := quantisation(header.entries, header.metadata):
        raise CheckpointError(f"{file} holds quantised weights ({method}); {NOT_QUANTISED}")
    begin, size, tensors, spans = header.begin, header.seen[2], {}, []
    for name, entry in header.entries.items():
        check_name(file, name)
        dtype, shape, (first, last) = _checked(file, name, entry)
        tensors[name] = Tensor(shape, dtype, file, begin + first, header.seen)
        if last - first != tensors[name].nbytes:
            raise unreadable(
                file, f"tensor {name} {list(shape)} of {dtype} takes {tensors[name].nbytes} bytes, not {last - first}"
            )
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise unreadable(file, f"tensor {name} begins at byte {first} of the data; expected {end}")
        end = last
    if end != size - begin:
        raise unreadable(file, f"its tensors take {end} bytes; it holds {size - begin}: is the download complete?")
    return tensors


def check_name(file: Path, name: object) -> None:
    """Raise CheckpointError unless the name of a tensor is short and printable, since messages show it."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        shown = ascii(name[:100]) if isinstance(name, str) else f"of type {type(name).__name__}"
        raise CheckpointError(f"{file}: a tensor has the name {shown}; expected up to {LONGEST_NAME} printable letters")


def _checked(file: Path, name: str, entry: Any) -> tuple[str, Shape, tuple[int, int]]:
    """Return the checked dtype, shape and byte range of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise unreadable(file, f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        shown = dtype if isinstance(dtype, str) and dtype.isprintable() else ascii(dtype)
        raise CheckpointError(f"{file}: tensor {name} is stored as {shown[:100]}; expected {', '.join(STORED)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise unreadable(file, f"tensor {name} has the {what} {numbers!r:.100}")
    if len(shape) > 32 or len(offsets) != 2:
        raise unreadable(file, f"tensor {name} has {len(shape)} dimensions and {len(offsets)} offsets")
    return DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the headers of all files in an index; each tensor must be in the indexed file only."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index}: weight_map should map each tensor to its file")
    tensors: dict[str, Tensor] = {}
    for name in where:
        check_name(index, name)
    for file in sorted(set(where.values())):
        if Path(file).name != file or not file.isprintable() or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file[:200]!r} is not the name of a safetensors file beside it")
        for name, tensor in read_header(index.parent / file).items():
            if name in tensors:
                raise CheckpointError(f"{index.parent}: tensor {name} is in both {tensors[name].file.name} and {file}")
            tensors[name] = tensor
    for name in sorted(where.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor {name} should be in {where[name]}, which does not hold it")
        if where.get(name) != tensors[name].file.name:
            indexed = f"in {where[name]}" if name in where else "nowhere"
            raise CheckpointError(f"{index}: tensor {name} is in {tensors[name].file.name}; the index has it {indexed}")
    return tensors
