"""Loading a model: its family, its files, and its networks on the devices."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from joyjax import dtypes
from joyjax.convert import checkpoint, stream
from joyjax.convert.native import Native
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import Progress
from joyjax.errors import CheckpointError, RequestError
from joyjax.families.family import Family, Files
from joyjax.families.registry import family_of
from joyjax.inputs.files import read_json
from joyjax.layers.weights import Weights
from joyjax.sharding.mesh import check_mesh

BASE_SIZE = 1024  # where a checkpoint names no other
DEMO = Path(__file__).parent / "demo"


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

    @property
    def base_size(self) -> int:
        """Side of the square whose area the buckets have, in pixels."""
        return self.native.base_size or BASE_SIZE


def load(
    model: str | os.PathLike | None = None,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Load a Diffusers folder or a folder that `joyjax convert` wrote; without `model`, the bundled demo.

    `dtype` is that of parameters and matrix products, "bfloat16" or "float32". `mesh` places the networks on several
    devices; None takes one. `progress` is called with the bytes read so far and in all.

    Raises:
        CheckpointError: if the folder is not a whole checkpoint of a known family; ConfigError, a kind of it, for a
            configuration value that joyjax does not implement.
        RequestError: for an unknown dtype.
        MeshError: for a mesh that does not fit.
    """
    number = dtypes.by_name(dtype)
    if mesh is not None:
        mesh = check_mesh(mesh)
    folder = model_folder(model)
    index = folder / "model_index.json"
    family = family_of(read_json(index).get("_class_name"), str(index))
    configs = {component.folder: component.read_config(folder) for component in family.components}
    files = family.read(folder, configs)

    # Everything is planned, and so checked, before the first byte is read.
    plans: dict[str, stream.Plan | checkpoint.Plan] = {}
    native = Native.read(folder)
    converted = checkpoint.is_converted(folder)
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
    return Pipeline(family, files, weights, dtype, mesh, native, str(folder))


def model_folder(model: str | os.PathLike | None) -> Path:
    """Return the folder of a model; of the bundled demo where None is given.

    Raises:
        RequestError: if what is given is no path.
        CheckpointError: if there is no such folder.
    """
    if model is None:
        return DEMO
    if not isinstance(model, str | os.PathLike):
        raise RequestError(f"model is a {type(model).__name__}; expected the path of a folder")
    folder = Path(model)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"model {str(model)!r} {what}; download one with: "
            "hf download jdopensource/JoyAI-Image-Edit-Diffusers --local-dir JoyAI-Image-Edit-Diffusers"
        )
    return folder


def _advance(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)
