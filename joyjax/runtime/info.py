"""What a checkpoint holds and what it needs to run, from headers, manifests and configurations alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from joyjax import dtypes
from joyjax.convert import checkpoint, manifest, stream
from joyjax.convert.component import Component
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.manifest import Stored
from joyjax.convert.safetensors import Tensor, Tensors
from joyjax.convert.stream import Progress
from joyjax.dtypes import FLOAT32
from joyjax.families.registry import class_name_in, family_in
from joyjax.layers.weights import leaves
from joyjax.sharding.attention import share_out
from joyjax.sharding.place import parameter_sharding


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
    """One network as it is stored. A Diffusers folder may hold tensors that joyjax has no use for; they count here."""

    folder: str
    class_name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Requirement:
    """Bytes of parameters on the device(s): all networks together, or one after the other, the largest alone."""

    dtype: str
    resident_bytes: int
    staged_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A checkpoint, as plain data: `dataclasses.asdict` of it can be written as json."""

    family: str
    class_name: str
    format: str  # "diffusers" or "converted"
    components: tuple[ComponentInfo, ...]
    tensors: int
    parameters: int
    bytes: int
    needs: tuple[Requirement, ...]


@dataclasses.dataclass(frozen=True)
class MeshInfo:
    """What one device of a mesh holds: bytes of parameters, heads, and image tokens of a usual request.

    `ring` groups of `ulysses` devices share a sequence (sharding/attention.py).
    """

    devices: int
    dtype: str
    component_bytes: Mapping[str, int]
    bytes: int
    heads: int
    ring: int
    ulysses: int
    image_tokens: int


def describe(folder: Path) -> ModelInfo:
    """Look into a Diffusers folder or a converted one; no array is read.

    Raises:
        CheckpointError: if it is neither, is not whole, or is of no known family.
    """
    family = family_in(folder)
    configs = {component.folder: component.read_config(folder) for component in family.components}
    components = tuple(_describe(folder, component, configs[component.folder]) for component in family.components)
    return ModelInfo(
        family=family.name,
        class_name=class_name_in(folder),
        format="converted" if manifest.is_converted(folder) else "diffusers",
        components=components,
        tensors=sum(component.tensors for component in components),
        parameters=sum(component.parameters for component in components),
        bytes=sum(component.bytes for component in components),
        needs=tuple(parameter_requirement(family.components, configs, dtype) for dtype in dtypes.NAMES),
    )


def verify(folder: Path, progress: Progress | None = None) -> None:
    """Read every weight of a checkpoint: those of a converted folder must have their SHA-256, all must be finite.

    Raises:
        CheckpointError: naming the first tensor or parameter that is otherwise.
    """
    family = family_in(folder)
    configs = {component.folder: component.read_config(folder) for component in family.components}
    steps: list[tuple[int, Callable[[], object]]] = []
    for component in family.components:
        name = component.folder
        if manifest.is_converted(folder):
            parameters = checkpoint.plan(folder, component, configs[name], FLOAT32).parameters
            for part, held in manifest.expected(parameters).items():
                size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype, _ in held.values())
                steps.append((size, functools.partial(checkpoint.check_part, folder / name / part, held)))
        else:
            plan = stream.plan(component, configs[name], Tensors.open(folder / name), FLOAT32)
            for found in plan.matches:
                dtype = plan.tensors.headers[found.source].dtype
                size = plan.tensors.headers[found.source].nbytes
                steps.append((size, functools.partial(plan.read, found, dtype)))
    done, total = 0, sum(size for size, _ in steps)
    for size, check in steps:
        check()
        done += size
        if progress:
            progress(done, total)


def parameter_requirement(components: Iterable[Component], configs: Mapping[str, Any], dtype: str) -> Requirement:
    """Return what the parameters take at run time if the networks compute in `dtype`; the arithmetic of all plans."""
    each = []
    for component in components:
        parameters = leaves(component.abstract(configs[component.folder], dtypes.by_name(dtype)).state)
        each.append(sum(leaf.size * leaf.dtype.itemsize for leaf in parameters.values()))
    return Requirement(dtype, resident_bytes=sum(each), staged_bytes=max(each))


def on_mesh(folder: Path, sizes: Mapping[str, int], dtype: str) -> MeshInfo:
    """Return what each device of a mesh would hold; the devices need not be here.

    Raises:
        CheckpointError: as `describe` does.
        MeshError: for a mesh that does not fit the networks.
    """
    family, mesh = family_in(folder), AbstractMesh(tuple(sizes.values()), tuple(sizes))
    configs = {component.folder: component.read_config(folder) for component in family.components}
    sequence = share_out(sizes, configs[family.denoiser].num_attention_heads)
    held = {}
    for component in family.components:
        held[component.folder] = 0
        state = component.abstract(configs[component.folder], dtypes.by_name(dtype)).state
        for path, leaf in leaves(state).items():
            place = parameter_sharding(path, leaf.shape, leaf.axes, mesh)
            assert place is not None
            held[component.folder] += math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    base_size = GenerationDefaults.read(folder).base_size or family.defaults["base_size"]
    lengths = family.usual(configs, base_size)
    tokens = (lengths.target[1], lengths.references[1])
    return MeshInfo(
        devices=math.prod(sizes.values()),
        dtype=dtype,
        component_bytes=held,
        bytes=sum(held.values()),
        heads=configs[family.denoiser].num_attention_heads // sizes.get("tensor", 1),
        ring=sequence.ring,
        ulysses=sequence.ulysses,
        image_tokens=sum(-(-count // sequence.devices) for count in tokens),
    )


def _describe(folder: Path, component: Component, config: Any) -> ComponentInfo:
    stored: Collection[Tensor | Stored]
    if manifest.is_converted(folder):
        stored = checkpoint.plan(folder, component, config, FLOAT32).parameters.values()
    else:
        stored = stream.plan(
            component, config, Tensors.open(folder / component.folder), FLOAT32
        ).tensors.headers.values()
    return ComponentInfo(
        folder=component.folder,
        class_name=component.class_name(folder),
        tensors=len(stored),
        parameters=sum(math.prod(tensor.shape) for tensor in stored),
        bytes=sum(tensor.nbytes for tensor in stored),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored})),
    )
