"""Loading a model: its family, its files, and its networks on the devices."""

import dataclasses
import os
from collections.abc import Mapping

from jax.sharding import Mesh

from joyjax import dtypes
from joyjax.convert import checkpoint, manifest, stream
from joyjax.convert.native import BASE_SIZE, Native
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import Progress
from joyjax.families.family import Family, Files
from joyjax.families.registry import family_in
from joyjax.inputs.model import model_folder
from joyjax.layers.weights import Weights
from joyjax.quantize import check_linear, quantize_linears
from joyjax.sharding.attention import share_out
from joyjax.sharding.devices import devices
from joyjax.sharding.mesh import check_mesh


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A loaded model. `weights` are its networks by folder name, `native` is what the checkpoint says of itself."""

    family: Family
    files: Files
    weights: Mapping[str, Weights]
    dtype: str
    mesh: Mesh | None
    native: Native
    source: str
    linear: str = "exact"

    @property
    def base_size(self) -> int:
        """Side of the square whose area the buckets have, in pixels."""
        return self.native.base_size or BASE_SIZE


def load(
    model: str | os.PathLike | None = None,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    linear: str = "exact",
    progress: Progress | None = None,
) -> Pipeline:
    """Load a Diffusers folder, one that `joyjax convert` wrote, or a hub id; without `model`, the bundled demo.

    `dtype` is that of parameters and matrix products, "bfloat16" or "float32". `mesh` places the networks on several
    devices; None takes one. `linear` is "exact", or "float8" for the linear maps of the transformer's blocks in eight
    bits, an approximation that halves their memory (joyjax/quantize.py; docs/speed.md has its price). `progress` is
    called with the bytes read so far and in all.

    Raises:
        CheckpointError: if the folder is not a whole checkpoint of a known family; ConfigError, a kind of it, for a
            configuration value that joyjax does not implement.
        RequestError: for an unknown dtype, or a form of linear maps that the family does not have.
        JoyJaxError: for a device that cannot run it.
        MeshError: for a mesh that does not fit.
    """
    number = dtypes.by_name(dtype)
    if mesh is not None:
        mesh = check_mesh(mesh)
    folder = model_folder(model)
    family = family_in(folder)
    float8 = check_linear(linear, family.float8, family.name, mesh.devices.flat[0] if mesh else devices()[0])
    configs = {component.folder: component.read_config(folder) for component in family.components}
    files = family.read(folder, configs)
    if mesh is not None:
        share_out(dict(mesh.shape), configs["transformer"].num_attention_heads)

    # Everything is planned, and so checked, before the first byte is read.
    plans: dict[str, stream.Plan | checkpoint.Plan] = {}
    native = Native.read(folder)
    converted = manifest.is_converted(folder)
    for component in family.components:
        config = configs[component.folder]
        if converted:
            plans[component.folder] = checkpoint.plan(folder, component, config, number)
        else:
            plans[component.folder] = stream.plan(component, config, Tensors.open(folder / component.folder), number)
    total, before = sum(plan.nbytes for plan in plans.values()), 0
    weights = {}
    for name, plan in plans.items():
        advance = None if progress is None else _advance(progress, before, total)
        weights[name] = plan.fill(mesh, advance)
        before += plan.nbytes
        if name == "transformer" and float8:
            weights[name] = quantize_linears(weights[name], family.float8, mesh)
    return Pipeline(family, files, weights, dtype, mesh, native, str(folder), linear)


def _advance(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)
