"""Conversion of a Diffusers folder: atomic, and resumed where it was stopped."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from joyjax.convert import manifest, orbax_part, stream
from joyjax.convert.blocks import ReusedMemory, reading_threads
from joyjax.convert.component import Component
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.journal import Journal, open_journal
from joyjax.convert.manifest import Converted, Manifest, Piece
from joyjax.convert.publish import INDEX, copy_files, flush, link, publish_folder
from joyjax.convert.rules import Shape
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import Progress
from joyjax.convert.written import forms_of, layout, reader, source_bytes
from joyjax.errors import CheckpointError, RequestError
from joyjax.layers.stored import array_leaves
from joyjax.reading import read_json
from joyjax.sharding.devices import cpu_device
from joyjax.sharding.rules import partition_spec

Content = frozenset[tuple[str, Shape, str, str]]  # path, shape, dtype and SHA-256 of each array of a part

SPARE = 2**26  # bytes, for what is not weights


def convert_checkpoint(
    source: Path,
    target: Path,
    components: Sequence[Component],
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    component: str | None = None,
    overwrite: bool = False,
    share: Path | None = None,
    tensors: Callable[[str], Tensors] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the model in the Diffusers folder `source` to `target`, as manifest.py describes.

    `components` are all networks of the model. `dtype` None keeps each tensor's own; any other keeps float32 for
    parameters that the networks hold in float32. `quantize` is the form of the storable kernels, which are cast to
    `dtype` and then quantized. `component` converts only that one, and adds it to a target converted from the same
    model; components of the target that were converted from the same files are kept. Parts that are equal in `share`,
    another converted folder, are linked, not written again. `tensors` opens a component's weights if they are not in
    the source folder.

    Every part is read back and compared. The target is renamed into place when it is complete; until then everything is
    beside it (journal.py), and the same call resumes there after a kill or an error. Parts in the target are kept;
    `overwrite` replaces those that the conversion writes too.

    Raises:
        CheckpointError: if the source is not a whole Diffusers checkpoint or the target cannot be written.
        RequestError: if there is no such component, nothing in it has the form `quantize`, or the target holds files
            that would have to go.
    """
    source, target = source.resolve(), target.resolve()
    if manifest.is_converted(source):
        raise CheckpointError(f"{source} is a converted checkpoint already; convert from the Diffusers folder")
    index = read_json(source / INDEX)
    open_tensors = tensors or (lambda name: Tensors.open(source / name))
    chosen = _chosen(components, component)
    plans = {
        each.folder: stream.plan(
            each, each.read_config(source), open_tensors(each.folder), dtype or jnp.float32, quantize
        )
        for each in chosen
    }
    made = {
        name: Converted(layout(plan, dtype is None), _origin(plan, dtype, quantize), forms_of(plan))
        for name, plan in plans.items()
    }
    if quantize and not any(converted.forms for converted in made.values()):
        raise RequestError(
            f"quantize is {quantize!r}, but {', '.join(made)} has no kernels that may be stored so; leave it out"
        )
    defaults = GenerationDefaults.read(source)
    job = _sha256(
        [
            str(target),
            index,
            defaults.plain(),
            *(dataclasses.asdict(converted) for converted in made.values()),
        ]
    )
    _check_target(source, target)
    try:
        with open_journal(target, job) as journal:
            try:
                if journal.publishing:
                    overwrite = overwrite or journal.overwrite  # the run that began it may have removed things already
                    rest = {name: converted for name, converted in made.items() if (journal.new / name).exists()}
                    _kept(target, index, rest, overwrite)  # the target may have changed since
                else:
                    kept = _kept(target, index, made, overwrite)
                    made = {name: converted for name, converted in made.items() if name not in kept}
                    if not made:
                        return Manifest.read(target)
                    _check_space(journal, made)
                    journal.begin()
                    copy_files(source, journal.new, index, made, {each.folder for each in components})
                    advance = _counter(sum(plans[name].nbytes for name in made), progress)
                    with reading_threads() as pool:
                        made = {
                            name: _write_component(journal, name, plans[name], converted, share, advance, pool)
                            for name, converted in made.items()
                        }
                    Manifest({**kept, **made}, defaults).write(journal.new)
                    journal.all_done(overwrite)
                publish_folder(journal.new, target, overwrite)
                journal.done.clear()
            except (CheckpointError, OSError) as error:
                said = error if isinstance(error, CheckpointError) else f"{target} cannot be written: {error}"
                raise CheckpointError(f"{said}{_kept_beside(journal)}") from error
            finally:
                journal.clear()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    return Manifest.read(target)


def _kept_beside(journal: Journal) -> str:
    """Return the end of the error message: the folder that the failed conversion leaves, if any."""
    if not journal.done:
        return ""
    return f"; what was done lies in {journal.folder}; if the source stays, the same command goes on from there"


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return advance


def _chosen(components: Sequence[Component], name: str | None) -> list[Component]:
    chosen = [each for each in components if name in (None, each.folder)]
    if not chosen:
        raise RequestError(f"component {name!r} is not in this model; it has {', '.join(c.folder for c in components)}")
    return chosen


def _check_target(source: Path, target: Path) -> None:
    if target in (source, *source.parents):
        raise RequestError(f"target {target} holds the source {source}; name another")
    if target.exists() and not target.is_dir():
        raise RequestError(f"target {target} is a file; name a folder")
    if target.exists() and target.stat().st_dev != target.parent.stat().st_dev:
        raise RequestError(f"target {target} is the root of a disk, where no folder can be moved to; name one in it")
    if target.exists() and not os.access(target, os.W_OK):
        raise CheckpointError(f"target {target} is read-only; make it writable, or name another")


def _kept(
    target: Path, index: Mapping[str, Any], made: Mapping[str, Converted], overwrite: bool
) -> Mapping[str, Converted]:
    """Return the components that stay in the target, if it may be written to."""
    if not target.exists() or not any(target.iterdir()):
        return {}
    there = _converted(target, index)
    if there is not None:
        clash = [name for name in made if name in there and (overwrite or there[name].origin != made[name].origin)]
        strays = [] if overwrite else [name for name in made if name not in there and (target / name).exists()]
        if strays:
            raise RequestError(
                f"target {target} holds {', '.join(strays)}, which no conversion has made; "
                "move that away, or give --overwrite to replace it"
            )
        if not clash:
            return there
        if overwrite:
            return {name: converted for name, converted in there.items() if name not in clash}
        raise RequestError(
            f"target {target} has {', '.join(clash)} already, from other files, in another form or in another dtype; "
            "name another, or give --overwrite to replace it"
        )
    if not overwrite:
        raise RequestError(f"target {target} holds files already; name another, or give --overwrite to replace them")
    return {}


def _converted(target: Path, index: Mapping[str, Any]) -> Mapping[str, Converted] | None:
    """Return the components in a target made from the same model; None where it holds anything else, or is damaged."""
    with contextlib.suppress(CheckpointError):
        if manifest.is_converted(target) and read_json(target / INDEX) == index:
            return Manifest.read(target).components
    return None


def _origin(plan: stream.ReadPlan, dtype: DTypeLike | None, quantize: str | None) -> str:
    """Return a mark of the files that a component is made of, by name, size and time of change, and of dtype and form.

    A file in the hub's cache is called after the SHA-256 of its content: that stands for the time, so that what was
    fetched once more, on a machine that had lost it, is the same source.
    """
    headers = plan.tensors.headers.values()
    found = {(tensor.file.name, tensor.stamp[2], _version(tensor.file, tensor.stamp[3])) for tensor in headers}
    files = sorted(found, key=lambda file: (*file[:2], str(file[2])))
    form = [quantize] if quantize and forms_of(plan) else []  # of others the mark is that of joyjax 0.1.0
    return _sha256([manifest.VERSION, manifest.PART_BYTES, str(dtype), files, sorted(plan.tensors.headers), *form])


def _version(file: Path, changed: int) -> str | int:
    blob = file.resolve()
    in_hub_cache = file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if in_hub_cache else changed


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_space(journal: Journal, made: Mapping[str, Converted]) -> None:
    done = sum(path.stat().st_size for path in journal.new.rglob("*") if path.is_file())
    needed = SPARE + sum(converted.nbytes for converted in made.values()) - done
    free = shutil.disk_usage(journal.folder).free
    if free < needed:
        raise CheckpointError(
            f"{journal.folder.parent} has {free / 2**30:.1f} GiB free; {needed / 2**30:.1f} GiB are needed: "
            "make room, or name a target on another disk"
        )


def _write_component(
    journal: Journal,
    name: str,
    plan: stream.ReadPlan,
    converted: Converted,
    share: Path | None,
    advance: Callable[[int], None],
    pool: Executor,
) -> Converted:
    """Write the parts of one component that are not done yet; return it with the digests of all its pieces."""
    matches = {found.target: found for found in plan.matches}
    own = array_leaves(plan.abstract.state)
    axes = {path: _split_axis(array.axes) for path, array in own.items()}
    memory = ReusedMemory(manifest.PART_BYTES)
    read = reader(plan, matches, pool, memory.take)
    shared = {} if share is None else _by_content(share, name)
    parts = manifest.parts(converted.parameters)

    def done(part: str, written: Future[Future[None]] | None) -> None:
        """Wait until a part is written and checked."""
        if written is not None:
            written.result().result()
        pieces = parts[part].items()
        advance(sum(source_bytes(plan, matches[own[path].parameter], own[path], path, piece) for path, piece in pieces))

    def write(part: str, arrays: Mapping[str, np.ndarray]) -> Future[None]:
        folder = journal.new / name / part
        equal = shared.get(_content(arrays)) if shared else None
        if equal is None:
            orbax_part.write_part(folder, arrays, axes)
        else:
            shutil.copytree(equal, folder, copy_function=link)
        return checker.submit(check, part, arrays)

    def check(part: str, arrays: Mapping[str, np.ndarray]) -> None:
        folder = journal.new / name / part
        flush(folder)
        journal.part_done(name, part, orbax_part.compare_part(folder, arrays))
        for array in arrays.values():
            memory.give(array)

    # A part is checked while the next one is written and the one after it is read.
    with ThreadPoolExecutor(1, "joyjax-check") as checker, ThreadPoolExecutor(1, "joyjax-write") as writer:
        waiting: collections.deque[tuple[str, Future[Future[None]] | None]] = collections.deque()
        for part, held in parts.items():
            folder, written = journal.new / name / part, None
            if (name, part) not in journal.done or not folder.is_dir():
                for left in folder.parent.glob(f"{part}*"):  # of a run that was killed
                    shutil.rmtree(left)
                arrays = {}
                for path, piece in held.items():
                    arrays[path] = _contiguous(read(path, converted.parameters[path], piece))
                written = writer.submit(write, part, arrays)
                del arrays
            waiting.append((part, written))
            if len(waiting) > 2:
                done(*waiting.popleft())
        while waiting:
            done(*waiting.popleft())
    parameters = {
        path: dataclasses.replace(stored, pieces=tuple(_with_digest(journal, name, path, p) for p in stored.pieces))
        for path, stored in converted.parameters.items()
    }
    return dataclasses.replace(converted, parameters=parameters)


def _split_axis(axes: tuple[str | None, ...]) -> int:
    """Return the axis that tensor parallelism splits, so that a device reads its own share; else the first."""
    spec = partition_spec(axes, ("tensor",))
    return next((axis for axis, names in enumerate(spec) if names is not None), 0)


def _by_content(folder: Path, name: str) -> dict[Content, Path]:
    """Return the parts of a component of another converted folder by their content."""
    components = Manifest.read(folder).components
    if name not in components:
        return {}
    parts = manifest.expected(components[name].parameters)
    return {
        frozenset((path, *what) for path, what in held.items()): folder / name / part for part, held in parts.items()
    }


def _content(arrays: Mapping[str, np.ndarray]) -> Content:
    return frozenset((path, array.shape, str(array.dtype), orbax_part.digest(array)) for path, array in arrays.items())


def _with_digest(journal: Journal, name: str, path: str, piece: Piece) -> Piece:
    return dataclasses.replace(piece, sha256=journal.done[name, piece.part][path])


def _contiguous(value: np.ndarray) -> np.ndarray:
    """Return a contiguous copy of a transposed array. JAX's CPU client is several times as fast as NumPy."""
    return value if value.flags.c_contiguous else np.asarray(jax.device_put(value, cpu_device()))
