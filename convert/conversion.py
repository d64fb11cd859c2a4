"""From a Diffusers folder to a converted one."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from joyjax.convert import checkpoint, stream
from joyjax.convert.checkpoint import MANIFEST, Manifest, Stored
from joyjax.convert.component import Component
from joyjax.convert.native import Native
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import Progress
from joyjax.errors import CheckpointError, RequestError
from joyjax.inputs.files import read_json
from joyjax.layers.weights import leaves

INDEX = "model_index.json"


def convert_checkpoint(
    source: Path,
    target: Path,
    components: Sequence[Component],
    *,
    dtype: DTypeLike | None = None,
    component: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the model in the Diffusers folder `source` to `target`, as checkpoint.py describes.

    `components` are all networks of the model. `dtype` None keeps each tensor's own; another leaves in float32 what the
    networks hold in float32. `component` converts that one alone, and adds it to a target made from the same model. The
    target has its name when it is whole: a conversion that fails leaves what was there. Files in the target are kept;
    only with `overwrite` are those replaced that the conversion writes too.

    Raises:
        CheckpointError: if the source is not a whole Diffusers checkpoint or the target cannot be written.
        RequestError: if there is no such component, or the target holds files that would have to go.
    """
    source, target = source.resolve(), target.resolve()
    if checkpoint.is_converted(source):
        raise CheckpointError(f"{source} is a converted checkpoint already; convert from the Diffusers folder")
    index = read_json(source / INDEX)
    others = _others(source, target, index, component, overwrite)
    plans = {
        each.folder: stream.plan(each, each.read_config(source), Tensors(source / each.folder), dtype or jnp.float32)
        for each in _chosen(components, component)
    }
    layouts = {name: _layout(plan, keep=dtype is None) for name, plan in plans.items()}
    manifest = Manifest({**others, **layouts}, Native.read(source))

    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _check_space(unfinished, sum(stored.nbytes for layout in layouts.values() for stored in layout.values()))
        _copy_files(source, unfinished, index, plans, {each.folder for each in components})
        _write_networks(unfinished, plans, layouts, progress)
        manifest.write(unfinished)
        _publish(unfinished, target, overwrite)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def _chosen(components: Sequence[Component], name: str | None) -> list[Component]:
    chosen = [each for each in components if name in (None, each.folder)]
    if not chosen:
        raise RequestError(f"component {name!r} is not in this model; it has {', '.join(c.folder for c in components)}")
    return chosen


def _others(
    source: Path, target: Path, index: Mapping[str, Any], component: str | None, overwrite: bool
) -> Mapping[str, Mapping[str, Stored]]:
    """Return the components that stay in the target beside the new ones, if it may be written to."""
    if target in (source, *source.parents):
        raise RequestError(f"target {target} holds the source {source}; name another")
    if target.exists() and not target.is_dir():
        raise RequestError(f"target {target} is a file; name a folder")
    if not target.exists() or not any(target.iterdir()):
        return {}
    if component and checkpoint.is_converted(target) and read_json(target / INDEX) == index:
        if overwrite or not (target / component).exists():
            return Manifest.read(target).components
    if not overwrite:
        raise RequestError(f"target {target} holds files already; name another, or give --overwrite to replace them")
    return {}


def _layout(plan: stream.Plan, keep: bool) -> dict[str, Stored]:
    """Say in which dtype and part each parameter is stored: the tensor's own dtype, or that of the network."""
    parameters, headers = leaves(plan.abstract.state), plan.tensors.headers
    return checkpoint.partition(
        (found.target, found.shape, headers[found.source].dtype if keep else str(parameters[found.target].dtype))
        for found in plan.matches
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder.parent} has {free / 2**30:.1f} GiB free; {needed / 2**30:.1f} GiB are needed")


def _write_networks(
    folder: Path,
    plans: Mapping[str, stream.Plan],
    layouts: Mapping[str, Mapping[str, Stored]],
    progress: Progress | None,
) -> None:
    done, total = 0, sum(plan.nbytes for plan in plans.values())
    for name, plan in plans.items():
        matches = {found.target: found for found in plan.matches}
        for part, paths in checkpoint.parts(layouts[name]).items():
            arrays = {}
            for path in paths:
                arrays[path] = _contiguous(plan.read(matches[path], layouts[name][path].dtype))
                done += plan.tensors.headers[matches[path].source].nbytes
                if progress:
                    progress(done, total)
            checkpoint.write_part(folder / name / part, arrays)


def _contiguous(value: np.ndarray) -> np.ndarray:
    """Lay a rearranged array out in memory. JAX's CPU client goes by tiles, several times as fast as NumPy."""
    return value if value.flags.c_contiguous else np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0]))


def _copy_files(
    source: Path, target: Path, index: Mapping[str, Any], chosen: Iterable[str], networks: Set[str]
) -> None:
    """Copy what is not weights: the index, the chosen networks' configurations, the folders of what is no network."""
    shutil.copy(source / INDEX, target)
    for name in chosen:
        (target / name).mkdir()
        shutil.copy(source / name / "config.json", target / name)
    for name, entry in index.items():
        names_a_class = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        if names_a_class and name not in networks:
            if not name.isidentifier() or not (source / name).is_dir():
                raise CheckpointError(f"{source / INDEX} names {name}, but {source} has no such folder")
            shutil.copytree(source / name, target / name)


def _publish(unfinished: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name, or move what is in it into a target that has files already."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(unfinished, target)
        return
    if overwrite:
        (target / MANIFEST).unlink(missing_ok=True)
    for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.name == MANIFEST):  # the manifest comes last
        place = target / entry.name
        if place.exists() and not overwrite and entry.name != MANIFEST:
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif entry.is_dir():
            place.unlink(missing_ok=True)
        os.replace(entry, place)
