"""Contents and memory requirements of a checkpoint, from headers, manifests and configurations alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from joyjax import dtypes
from joyjax.convert import checkpoint, manifest, orbax_part, stream
from joyjax.convert.component import Component
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.manifest import Stored
from joyjax.convert.safetensors import Tensor, Tensors
from joyjax.convert.stream import Progress
from joyjax.dtypes import FLOAT32
from joyjax.families.registry import class_name_in, family_in
from joyjax.layers.stored import array_leaves, nbytes, shardings
from joyjax.layers.weights import Weights, count_parameters
from joyjax.options import EXACT
from joyjax.runtime.storage import has_storable, loaded_form, stored_form
from joyjax.sharding.attention import share_out
from joyjax.storage.forms import FORMS


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
    """One network as it is stored. Tensors of a Diffusers folder that joyjax does not use are counted, too."""

    folder: str
    class_name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Requirement:
    """Bytes of parameters on the devices: `resident_bytes` of all networks, `staged_bytes` of the largest alone.

    `linear` is the form of the kernels that can be quantized.
    """

    dtype: str
    resident_bytes: int
    staged_bytes: int
    linear: str = EXACT


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A checkpoint, as plain data: `dataclasses.asdict` of it can be written as JSON.

    `needs` is the memory when it is loaded without options, `needs_quantized` that in each further form of the kernels.
    """

    family: str
    class_name: str
    format: str  # "diffusers" or "converted"
    components: tuple[ComponentInfo, ...]
    tensors: int
    parameters: int
    bytes: int
    needs: tuple[Requirement, ...]
    needs_quantized: tuple[Requirement, ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshInfo:
    """The share of one device of a mesh: bytes of parameters, heads, and image tokens of a typical request.

    `linear` is the form of the kernels that can be quantized. `ring` groups of `ulysses` devices share a sequence
    (sharding/attention.py).
    """

    devices: int
    dtype: str
    component_bytes: Mapping[str, int]
    bytes: int
    heads: int
    ring: int
    ulysses: int
    image_tokens: int
    linear: str = EXACT


def describe(folder: Path) -> ModelInfo:
    """Describe a Diffusers folder or a converted one; no array is read.

    Raises:
        CheckpointError: if it is neither, incomplete, or of an unknown family.
    """
    family = family_in(folder)
    configs = {component.folder: component.read_config(folder) for component in family.components}
    components = tuple(_describe(folder, component, configs[component.folder]) for component in family.components)
    held = stored_form(folder)

    def needs(dtype: str, linear: str) -> Requirement:
        return parameter_requirement(family.components, configs, dtype, linear)

    others = FORMS if held == EXACT and has_storable(family, configs) else ()
    return ModelInfo(
        family=family.name,
        class_name=class_name_in(folder),
        format="converted" if manifest.is_converted(folder) else "diffusers",
        components=components,
        tensors=sum(component.tensors for component in components),
        parameters=sum(component.parameters for component in components),
        bytes=sum(component.bytes for component in components),
        needs=tuple(needs(dtype, held) for dtype in dtypes.NAMES),
        needs_quantized=tuple(needs(dtype, form) for form in others for dtype in dtypes.NAMES),
    )


def verify(folder: Path, progress: Progress | None = None) -> None:
    """Read every weight of a checkpoint, and check that it is finite and, in a converted folder, has its SHA-256.

    Raises:
        CheckpointError: naming the first tensor or parameter that fails.
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
                steps.append((size, functools.partial(orbax_part.check_part, folder / name / part, held)))
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


def parameter_requirement(
    components: Iterable[Component], configs: Mapping[str, Any], dtype: str, linear: str = EXACT
) -> Requirement:
    """Return the memory of the parameters at run time if the networks compute in `dtype`."""
    each = [nbytes(_abstract(component, configs[component.folder], dtype, linear).state) for component in components]
    return Requirement(dtype, resident_bytes=sum(each), staged_bytes=max(each), linear=linear)


def _abstract(component: Component, config: Any, dtype: str, linear: str) -> Weights:
    return component.abstract(config, dtypes.by_name(dtype), None if linear == EXACT else linear)


def on_mesh(folder: Path, sizes: Mapping[str, int], dtype: str, quantize: str | None = None) -> MeshInfo:
    """Return the share of each device of a mesh, which need not exist here. `quantize` is as in `joyjax.load`.

    Raises:
        CheckpointError: as `describe` does.
        MeshError: for a mesh that does not fit the networks.
    """
    family, mesh = family_in(folder), AbstractMesh(tuple(sizes.values()), tuple(sizes))
    configs = {component.folder: component.read_config(folder) for component in family.components}
    sequence = share_out(sizes, configs[family.denoiser].num_attention_heads)
    linear, held = loaded_form(folder, quantize), {}
    for component in family.components:
        state = _abstract(component, configs[component.folder], dtype, linear).state
        sharding_of, held[component.folder] = shardings(state, mesh), 0
        for path, array in array_leaves(state).items():
            sharding = sharding_of[path]
            assert sharding is not None
            size = math.prod(sharding.shard_shape(tuple(array.value.shape)))
            held[component.folder] += size * array.value.dtype.itemsize
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
        linear=linear,
    )


def _describe(folder: Path, component: Component, config: Any) -> ComponentInfo:
    stored: Collection[Tensor | Stored]
    if manifest.is_converted(folder):
        plan = checkpoint.plan(folder, component, config, FLOAT32)
        stored, parameters = plan.parameters.values(), count_parameters(plan.abstract.state)
    else:
        tensors = stream.plan(component, config, Tensors.open(folder / component.folder), FLOAT32).tensors
        stored = tensors.headers.values()
        parameters = sum(math.prod(tensor.shape) for tensor in stored)
    return ComponentInfo(
        folder=component.folder,
        class_name=component.class_name(folder),
        tensors=len(stored),
        parameters=parameters,
        bytes=sum(tensor.nbytes for tensor in stored),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored})),
    )
