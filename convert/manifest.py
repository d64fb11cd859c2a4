"""The manifest of a converted folder, `joyjax.json`: its components, and the part of every parameter.

    joyjax.json                 written after everything else: without it the folder is not a checkpoint
    model_index.json            as in the Diffusers folder; so are scheduler/, tokenizer/, processor/
    transformer/config.json     as in the Diffusers folder
    transformer/part-00000/     small arrays, see checkpoint.py
    transformer/files-00001/    large arrays, see array_files.py

Parts are small, so that writing and reading need little memory. The part of a parameter depends only on shapes and
dtypes. A parameter larger than a part is split along its first axis over several parts.

A kernel that is stored in another form than an array (joyjax/storage/forms.py) has an entry for each array of the
form, such as `blocks.0.img.qkv.kernel.q` and `….scale`, and `forms` names its form.

Versions: 2, which joyjax 0.1.0 wrote, has parts named `part-…` only and no forms; 3 has forms; 4 has parts named
`files-…` too. All are read; 0.1.0 refuses the newer ones by name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert import generation_defaults
from joyjax.convert.array_files import PREFIX, in_files
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.rules import Shape
from joyjax.dtypes import STORED
from joyjax.errors import CheckpointError
from joyjax.reading import read_json
from joyjax.storage.forms import FORMS

MANIFEST = generation_defaults.FILE
FORMAT, VERSION, VERSION_OF_FORMS, VERSION_OF_FILES = "joyjax-orbax", 2, 3, 4
GENERATION_KEYS = set(GenerationDefaults().plain())
PART_BYTES = 2**27  # converting takes about four times this besides the interpreter


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a parameter's first axis, the part that holds them, and the SHA-256 of their bytes."""

    part: str
    start: int
    stop: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored array of a converted component: in one piece, or in several if it is larger than a part."""

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def piece_shape(self, piece: Piece) -> Shape:
        """Return the shape of one of the pieces."""
        return (piece.stop - piece.start, *self.shape[1:]) if self.shape else ()

    def index(self, piece: Piece) -> tuple[slice, ...] | None:
        """Return the index of a piece in the parameter; None if it is all of it."""
        return None if len(self.pieces) == 1 else (slice(piece.start, piece.stop), *map(slice, self.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted component: its arrays by path, and a hash of the files that they were converted from.

    `forms` are the forms of the kernels that are not stored as arrays, by the path of the parameter.
    """

    parameters: Mapping[str, Stored]
    origin: str
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all parameters."""
        return sum(stored.nbytes for stored in self.parameters.values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The converted components, and the checkpoint's generation defaults."""

    components: Mapping[str, Converted]
    generation_defaults: GenerationDefaults = GenerationDefaults()

    def write(self, folder: Path) -> None:
        """Write `joyjax.json`."""
        components = {
            name: {
                "origin": converted.origin,
                **({"forms": dict(converted.forms)} if converted.forms else {}),
                "parameters": _plain(converted.parameters),
            }
            for name, converted in self.components.items()
        }
        has_forms = any(converted.forms for converted in self.components.values())
        stored = (stored for converted in self.components.values() for stored in converted.parameters.values())
        has_files = any(in_files(piece.part) for each in stored for piece in each.pieces)
        version = VERSION_OF_FILES if has_files else VERSION_OF_FORMS if has_forms else VERSION
        raw = {"format": FORMAT, "version": version, **self.generation_defaults.plain(), "components": components}
        (folder / MANIFEST).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `joyjax.json`.

        Raises:
            CheckpointError: if it is missing, damaged, or of another format or version.
        """
        file = folder / MANIFEST
        raw = read_json(file)
        versions = VERSION, VERSION_OF_FORMS, VERSION_OF_FILES
        if raw.get("format") != FORMAT or raw.get("version") not in versions:
            raise CheckpointError(
                f"{file}: format is {raw.get('format')!r}, version {raw.get('version')!r}; this joyjax reads "
                f"{FORMAT!r}, version {VERSION} to {VERSION_OF_FILES}: convert the model again"
            )
        try:
            components = {
                name: Converted(
                    {path: _stored(entry) for path, entry in component["parameters"].items()},
                    str(component["origin"]),
                    _forms(component.get("forms", {})),
                )
                for name, component in raw["components"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}): convert the model again") from None
        return cls(components, GenerationDefaults.from_json(raw, str(file)))


def is_converted(folder: Path) -> bool:
    """Return whether `joyjax convert` wrote this folder; a Diffusers folder's file has only generation defaults."""
    file = folder / MANIFEST
    return file.is_file() and not (read_json(file).keys() <= GENERATION_KEYS)


def partition(parameters: Iterable[tuple[str, Shape, str]], prefix: str = "part-", first: int = 0) -> dict[str, Stored]:
    """Assign parameters, given by path, shape and dtype, to parts of about PART_BYTES at most, numbered from `first`.

    A larger parameter is split along its first axis; each piece is a part of its own.
    """
    placed: dict[str, Stored] = {}
    number, filled = first, 0
    for path, shape, dtype in parameters:
        size, rows = Stored(shape, dtype, ()).nbytes, shape[0] if shape else 1
        each = rows if size <= PART_BYTES else max(1, rows * PART_BYTES // size)
        pieces = []
        for start in range(0, max(rows, 1), max(each, 1)):
            if filled and filled + size > PART_BYTES:
                number, filled = number + 1, 0
            filled += size
            pieces.append(Piece(f"{prefix}{number:05}", start, min(start + each, rows)))
        placed[path] = Stored(shape, dtype, tuple(pieces))
    return placed


def parts(parameters: Mapping[str, Stored]) -> dict[str, dict[str, Piece]]:
    """Return the pieces of each part by path."""
    found: dict[str, dict[str, Piece]] = {}
    for path, stored in parameters.items():
        for piece in stored.pieces:
            found.setdefault(piece.part, {})[path] = piece
    return found


Told = Mapping[str, tuple[Shape, str, str]]  # shape, dtype and SHA-256 of each array of a part


def expected(parameters: Mapping[str, Stored]) -> dict[str, Told]:
    """Return the expected arrays of each part."""
    return {
        part: {
            path: (parameters[path].piece_shape(piece), parameters[path].dtype, piece.sha256)
            for path, piece in held.items()
        }
        for part, held in parts(parameters).items()
    }


def _plain(parameters: Mapping[str, Stored]) -> dict[str, Any]:
    return {path: dataclasses.asdict(stored) for path, stored in parameters.items()}


def _forms(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(form, str) for form in raw.values()):
        raise ValueError(f"forms {raw!r:.100}")
    return raw


def _stored(raw: Mapping[str, Any]) -> Stored:
    shape, dtype = raw["shape"], raw["dtype"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape!r}")
    if dtype not in STORED and not any(dtype in form.dtypes for form in FORMS.values()):
        raise ValueError(f"dtype {dtype!r}")
    pieces: list[Piece] = []
    end = 0
    for piece in raw["pieces"]:
        part, start, stop, sha256 = (piece[key] for key in ("part", "start", "stop", "sha256"))
        if (
            not isinstance(part, str)
            or not re.fullmatch(rf"(part-|{PREFIX})[0-9]{{5,9}}", part)
            or not isinstance(sha256, str)
        ):
            raise ValueError(f"part {part!r}, sha256 {sha256!r}")
        if type(start) is not int or type(stop) is not int or start != end or stop < start:
            raise ValueError(f"rows {start!r} to {stop!r}")
        end = stop
        pieces.append(Piece(part, start, stop, sha256))
    if not pieces or end != (shape[0] if shape else 1):
        raise ValueError(f"pieces of {end} rows")
    return Stored(tuple(shape), dtype, tuple(pieces))
