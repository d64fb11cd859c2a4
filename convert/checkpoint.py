"""The converted folder: each component as a few Orbax checkpoints, and a manifest that says what is where.

    joyjax.json                 the manifest, written last: without it the folder is not a checkpoint
    model_index.json            as in the Diffusers folder; so are scheduler/, tokenizer/, processor/
    transformer/config.json     as in the Diffusers folder
    transformer/part-00000/     an Orbax checkpoint of a flat dict {path: array}

A part is small, so that writing and reading hold little in memory, and stands alone: any program opens one with
`orbax.checkpoint.StandardCheckpointer().restore(part)`. Shapes and dtypes alone decide which part a parameter is in.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
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
from joyjax.sharding.place import parameter_sharding

MANIFEST = native.FILE
FORMAT, VERSION = "joyjax-orbax", 1
NATIVE_KEYS = {field.name for field in dataclasses.fields(Native)}
PART_BYTES = 2**27  # converting takes about three times this besides the interpreter


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter of a converted component, and the part that holds it."""

    shape: Shape
    dtype: str
    part: str

    @property
    def nbytes(self) -> int:
        """The number of bytes in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The parameters of each converted component by path, and what the checkpoint says of itself."""

    components: Mapping[str, Mapping[str, Stored]]
    native: Native = Native()

    def write(self, folder: Path) -> None:
        """Write `joyjax.json`."""
        components = {
            name: {
                "parts": list(parts(parameters)),
                "parameters": {path: dataclasses.asdict(stored) for path, stored in parameters.items()},
            }
            for name, parameters in self.components.items()
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
                name: {path: _stored(entry, component["parts"]) for path, entry in component["parameters"].items()}
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
    """Put parameters, given by path, shape and dtype, into parts of at most PART_BYTES or of one parameter."""
    placed: dict[str, Stored] = {}
    number, filled = 0, 0
    for path, shape, dtype in parameters:
        size = Stored(shape, dtype, "").nbytes
        if filled and filled + size > PART_BYTES:
            number, filled = number + 1, 0
        filled += size
        placed[path] = Stored(shape, dtype, f"part-{number:05}")
    return placed


def parts(parameters: Mapping[str, Stored]) -> dict[str, list[str]]:
    """Return the paths in each part."""
    paths: dict[str, list[str]] = {}
    for path, stored in parameters.items():
        paths.setdefault(stored.part, []).append(path)
    return paths


def write_part(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one Orbax checkpoint; returns when it is on disk.

    Raises:
        CheckpointError: if it cannot be written: a full disk, say.
    """
    try:
        # Not StandardCheckpointer, which is asynchronous: after a failure its threads wait on, and report on stderr.
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.StandardSave(dict(arrays)))
    except Exception as error:  # Orbax raises bare ones too
        raise CheckpointError(f"{folder} cannot be written ({_first_line(error)})") from error


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
        for part, paths in parts(self.parameters).items():
            folder = self.folder / part
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    arrays |= checkpointer.restore(folder.absolute(), {path: wanted[path] for path in paths})
            except Exception as error:  # see `write_part`
                raise CheckpointError(
                    f"{folder} cannot be read; convert the model again ({_first_line(error)})"
                ) from error
            done += sum(self.parameters[path].nbytes for path in paths)
            if progress:
                progress(done, total)
        return self.abstract.filled(arrays)


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
    parameters = components[component.folder]
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


def _stored(raw: Mapping[str, Any], known: list[str]) -> Stored:
    shape, dtype, part = raw["shape"], raw["dtype"], raw["part"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape!r}")
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r}")
    if part not in known or not re.fullmatch(r"part-[0-9]+", part):
        raise ValueError(f"part {part!r}")
    return Stored(tuple(shape), dtype, part)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
