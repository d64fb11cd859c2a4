"""The converted folder: each component as a few Orbax checkpoints, and a manifest that says what is where.

    joyjax.json                 the manifest, written after the parts: without it the folder is not a checkpoint
    model_index.json            as in the Diffusers folder; so are scheduler/, tokenizer/, processor/
    transformer/config.json     as in the Diffusers folder
    transformer/part-00000/     an Orbax checkpoint of a flat dict {path: array}

A part is small, so that writing and reading hold little in memory, and stands alone: any program opens one with
`orbax.checkpoint.StandardCheckpointer().restore(part)`. Shapes and dtypes alone decide which part a parameter is in. A
parameter larger than a part lies in several, cut along its first axis; the manifest says which rows are where.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from joyjax.convert import native
from joyjax.convert.component import Component
from joyjax.convert.native import Native
from joyjax.convert.rules import Shape, raise_faults
from joyjax.convert.stream import Progress
from joyjax.dtypes import STORED
from joyjax.errors import CheckpointError
from joyjax.inputs.files import read_json
from joyjax.layers.weights import Weights, leaves
from joyjax.sharding.build import build
from joyjax.sharding.place import parameter_sharding

MANIFEST = native.FILE
FORMAT, VERSION = "joyjax-orbax", 2
NATIVE_KEYS = {field.name for field in dataclasses.fields(Native)}
PART_BYTES = 2**27  # converting takes about three times this besides the interpreter
CHUNK_BYTES = 2**23  # what is read of an array at least; a row of the MLP's kernels falls into eight
FEW = 64  # Orbax cuts an axis that it is told to cut into single entries: only heads are so few


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a parameter's first axis, the part that holds them, and the SHA-256 of their bytes."""

    part: str
    start: int
    stop: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter of a converted component: in one piece, or where it is larger than a part in several."""

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def index(self, piece: Piece) -> tuple[slice, ...] | None:
        """Return where in the parameter a piece lies; None where it is the whole."""
        return None if len(self.pieces) == 1 else (slice(piece.start, piece.stop), *map(slice, self.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted component: its parameters by path, and a mark of the files that they were made of."""

    parameters: Mapping[str, Stored]
    origin: str

    @property
    def nbytes(self) -> int:
        """The number of bytes of all parameters."""
        return sum(stored.nbytes for stored in self.parameters.values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The converted components, and what the checkpoint says of itself."""

    components: Mapping[str, Converted]
    native: Native = Native()

    def write(self, folder: Path) -> None:
        """Write `joyjax.json`."""
        components = {
            name: {"origin": converted.origin, "parameters": _plain(converted.parameters)}
            for name, converted in self.components.items()
        }
        raw = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self.native), "components": components}
        (folder / MANIFEST).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `joyjax.json`.

        Raises:
            CheckpointError: if it is missing, damaged, or of another format or version.
        """
        file = folder / MANIFEST
        raw = read_json(file)
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise CheckpointError(
                f"{file}: format is {raw.get('format')!r}, version {raw.get('version')!r}; this joyjax reads "
                f"{FORMAT!r}, version {VERSION}: convert the model again"
            )
        try:
            components = {
                name: Converted(
                    {path: _stored(entry) for path, entry in component["parameters"].items()}, str(component["origin"])
                )
                for name, component in raw["components"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}): convert the model again") from None
        return cls(components, Native.from_json(raw, str(file)))


def is_converted(folder: Path) -> bool:
    """Say whether `joyjax convert` wrote this folder; a Diffusers folder may have the file too, with `Native` alone."""
    file = folder / MANIFEST
    return file.is_file() and not (read_json(file).keys() <= NATIVE_KEYS)


def partition(parameters: Iterable[tuple[str, Shape, str]]) -> dict[str, Stored]:
    """Put parameters, given by path, shape and dtype, into parts of about PART_BYTES at most.

    A larger one is cut along its first axis, and each piece is a part of its own.
    """
    placed: dict[str, Stored] = {}
    number, filled = 0, 0
    for path, shape, dtype in parameters:
        size, rows = Stored(shape, dtype, ()).nbytes, shape[0] if shape else 1
        each = rows if size <= PART_BYTES else max(1, rows * PART_BYTES // size)
        pieces = []
        for start in range(0, max(rows, 1), max(each, 1)):
            if filled and filled + size > PART_BYTES:
                number, filled = number + 1, 0
            filled += size
            pieces.append(Piece(f"part-{number:05}", start, min(start + each, rows)))
        placed[path] = Stored(shape, dtype, tuple(pieces))
    return placed


def parts(parameters: Mapping[str, Stored]) -> dict[str, dict[str, Piece]]:
    """Return what is in each part: pieces by path."""
    found: dict[str, dict[str, Piece]] = {}
    for path, stored in parameters.items():
        for piece in stored.pieces:
            found.setdefault(piece.part, {})[path] = piece
    return found


Told = Mapping[str, tuple[Shape, str, str]]  # shape, dtype and SHA-256 of each array of a part


def told(parameters: Mapping[str, Stored]) -> dict[str, Told]:
    """Return what each part should hold."""
    return {
        part: {
            path: ((piece.stop - piece.start, *parameters[path].shape[1:]), parameters[path].dtype, piece.sha256)
            if parameters[path].shape
            else ((), parameters[path].dtype, piece.sha256)
            for path, piece in held.items()
        }
        for part, held in parts(parameters).items()
    }


def write_part(folder: Path, arrays: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> None:
    """Write one Orbax checkpoint; returns when it is on disk. `axes`: the one that devices share out.

    Not compressed: that takes three times as long and saves a fifth.

    Raises:
        CheckpointError: if it cannot be written: a full disk, say.
    """
    how = {}
    for path, array in arrays.items():
        cut = array.nbytes > CHUNK_BYTES and array.shape[axes[path]] <= FEW
        how[path] = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(axes[path],) if cut else ())
    try:
        # Not StandardCheckpointer, which is asynchronous: after a failure its threads wait on, and report on stderr.
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays), save_args=how))
    except Exception as error:  # Orbax raises bare ones too
        raise CheckpointError(f"{folder} cannot be written ({_reason(error)})") from error


def read_part(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read one Orbax checkpoint; `wanted` says shape, dtype and place of each array, no place: NumPy's.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), dict(wanted))
    except Exception as error:  # see `write_part`
        raise CheckpointError(f"{folder} cannot be read; convert the model again ({_reason(error)})") from error


def check_part(folder: Path, held: Told) -> None:
    """Read a part and compare it with what should be in it.

    Raises:
        CheckpointError: for the first array that differs.
    """
    wanted = {path: np.empty(shape, dtype) for path, (shape, dtype, _) in held.items()}
    for path, array in read_part(folder, wanted).items():
        shape, dtype, sha256 = held[path]
        if (array.shape, str(array.dtype)) != (shape, dtype) or digest(array) != sha256:
            raise CheckpointError(f"{folder}: {path} is not what was written; is the disk sound? Convert it again")


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes, row by row."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the parts of one component fill the parameters of `abstract`. They fit; nothing has been read."""

    folder: Path
    abstract: Weights
    parameters: Mapping[str, Stored]

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return sum(stored.nbytes for stored in self.parameters.values())

    def fill(self, mesh: Mesh | None = None, progress: Progress | None = None) -> Weights:
        """Read the network: see `restore`."""
        default = jax.device_put(np.zeros(())).sharding
        wanted = {
            path: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=parameter_sharding(path, leaf.shape, leaf.axes, mesh) or default
            )
            for path, leaf in leaves(self.abstract.state).items()
        }
        arrays: dict[str, jax.Array] = {}
        done, total = 0, self.nbytes

        def advance(paths: Iterable[str]) -> None:
            nonlocal done
            done += sum(self.parameters[path].nbytes for path in paths)
            if progress:
                progress(done, total)

        whole = {path: stored for path, stored in self.parameters.items() if len(stored.pieces) == 1}
        for part, held in parts(whole).items():
            arrays |= read_part(self.folder / part, {path: wanted[path] for path in held})
            advance(held)
        for path in self.parameters.keys() - whole.keys():
            want = wanted[path]
            arrays[path] = build(want.shape, want.dtype, want.sharding, self._reader(path, want.dtype))
            advance([path])
        return self.abstract.filled(arrays)

    def _reader(self, path: str, dtype: DTypeLike) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """Return what reads any part of a parameter in pieces."""
        stored = self.parameters[path]

        @functools.lru_cache(1)
        def read_piece(piece: Piece) -> np.ndarray:
            wanted = np.empty((piece.stop - piece.start, *stored.shape[1:]), stored.dtype)
            return read_part(self.folder / piece.part, {path: wanted})[path]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            rows, *rest = index
            shares = []
            for piece in stored.pieces:
                start, stop = max(rows.start, piece.start), min(rows.stop, piece.stop)
                if start < stop:
                    share = read_piece(piece)[(slice(start - piece.start, stop - piece.start), *rest)]
                    shares.append(share.astype(dtype))
            return np.concatenate(shares)

        return read


def plan(folder: Path, component: Component, config: Any, dtype: DTypeLike) -> Plan:
    """Find the parameters of one component in a converted folder.

    Raises:
        CheckpointError: if the manifest is missing or damaged or lacks the component, or listing all parameters and
            parts that are missing, left over or of another shape.
    """
    components = Manifest.read(folder).components
    if component.folder not in components:
        raise CheckpointError(
            f"{folder / MANIFEST} has no component {component.folder}, only {', '.join(components)}: "
            f"add it with joyjax convert SOURCE {folder} --component {component.folder}"
        )
    parameters = components[component.folder].parameters
    abstract = component.abstract(config, dtype)
    wanted = {path: tuple(leaf.shape) for path, leaf in leaves(abstract.state).items()}
    faults = [f"parameter {path} {list(wanted[path])} is missing" for path in wanted if path not in parameters]
    for path, stored in parameters.items():
        if path not in wanted:
            faults.append(f"parameter {path} {list(stored.shape)} is not part of this network")
        elif stored.shape != wanted[path]:
            faults.append(f"parameter {path} has shape {list(stored.shape)}, expected {list(wanted[path])}")
    place = folder / component.folder
    faults += [f"{part} is missing" for part in parts(parameters) if not (place / part).is_dir()]
    raise_faults(f"{place}: the parameters are not those of its configuration", faults)
    return Plan(place, abstract, parameters)


def restore(
    folder: Path,
    component: Component,
    config: Any,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Read one component of a converted folder; the counterpart of `stream.fill`.

    Raises:
        CheckpointError: if folder and network do not fit, or a part cannot be read.
        MeshError: if a parameter cannot be split over the mesh.
    """
    return plan(folder, component, config, dtype).fill(mesh, progress)


def _plain(parameters: Mapping[str, Stored]) -> dict[str, Any]:
    return {path: dataclasses.asdict(stored) for path, stored in parameters.items()}


def _stored(raw: Mapping[str, Any]) -> Stored:
    shape, dtype = raw["shape"], raw["dtype"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape!r}")
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r}")
    pieces: list[Piece] = []
    end = 0
    for piece in raw["pieces"]:
        part, start, stop, sha256 = (piece[key] for key in ("part", "start", "stop", "sha256"))
        if not isinstance(part, str) or not re.fullmatch(r"part-[0-9]{5,}", part) or not isinstance(sha256, str):
            raise ValueError(f"part {part!r}, sha256 {sha256!r}")
        if type(start) is not int or type(stop) is not int or start != end or stop < start:
            raise ValueError(f"rows {start!r} to {stop!r}")
        end = stop
        pieces.append(Piece(part, start, stop, sha256))
    if not pieces or end != (shape[0] if shape else 1):
        raise ValueError(f"pieces of {end} rows")
    return Stored(tuple(shape), dtype, tuple(pieces))


def _reason(error: Exception) -> str:
    code = re.search("os_error_code='([0-9]+)'", str(error))  # somewhere in much else that TensorStore says
    return os.strerror(int(code[1])) if code else str(error).partition("\n")[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging, with tracebacks, the errors of its threads that it then raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
