"""Fingerprints that distinguish checkpoints without reading all bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert import manifest
from joyjax.convert.component import Component
from joyjax.convert.manifest import Manifest
from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError, RequestError
from joyjax.families.registry import family_in
from joyjax.reading import stamp

SEEN = 4096  # bytes of each tensor: 7 MB of the real model's 51 GB
FOLDERS = ("processor", "scheduler", "tokenizer")
SMALL = (".jinja", ".json", ".txt")


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of a checkpoint's weights and settings: "sha256:" and 64 digits.

    It covers the configurations, every file of tokenizer, processor and scheduler, and the name, shape, dtype and first
    4 KiB of each tensor; for a folder of `joyjax convert`, the SHA-256 of each parameter in the manifest. Training and
    casting change it. Two things do not: in a Diffusers folder, a change behind the first 4 KiB of a tensor; in a
    converted one, damage since it was written (`joyjax info --verify` finds that). The distribution of tensors over
    files does not matter. A Diffusers folder and its conversion have different fingerprints.

    Raises:
        CheckpointError: if the folder is not a whole checkpoint of a known family.
    """
    found = hashlib.sha256(b"joyjax fingerprint 1\n")
    for entry in _contents(folder):
        found.update(json.dumps(entry).encode() + b"\n")
    return f"sha256:{found.hexdigest()}"


def check_model(recipe: Mapping[str, Any], folder: Path) -> None:
    """Raise RequestError unless the checkpoint in `folder` is the one that a recipe was written with."""
    now, then = fingerprint(folder), recipe["model"]["fingerprint"]
    if now != then:
        source = recipe["model"]["source"]
        was = "the bundled demo of another version of joyjax" if source is None else source
        raise RequestError(
            f"the model in {folder} is not the one that made the picture ({was}): its fingerprint is {now[:15]}… and "
            f"was {then[:15]}…; name the right one with --model. A converted folder and its source differ"
        )


def _contents(folder: Path) -> Iterator[list[Any]]:
    """Yield the entries that the fingerprint covers."""
    components = sorted(family_in(folder).components, key=lambda component: component.folder)
    converted = manifest.is_converted(folder)
    files = [folder / "model_index.json", *(folder / component.folder / "config.json" for component in components)]
    if not converted:
        files += [path for path in (folder / manifest.MANIFEST,) if path.exists()]
    for name in FOLDERS:
        files += sorted(path for path in (folder / name).rglob("*") if path.suffix in SMALL and path.is_file())
    for file in files:
        yield ["file", file.relative_to(folder).as_posix(), _sha256(file)]
    if converted:
        yield from _converted(Manifest.read(folder), components)
    else:
        for component in components:
            yield from _tensors(component, Tensors.open(folder / component.folder))


def _converted(held: Manifest, components: list[Component]) -> Iterator[list[Any]]:
    yield ["native", *sorted((name, value) for name, value in held.generation_defaults.plain().items())]
    for component in components:
        if component.folder not in held.components:
            raise CheckpointError(f"the component {component.folder} is missing: convert it, too")
        for path, stored in sorted(held.components[component.folder].parameters.items()):
            pieces = [[piece.start, piece.stop, piece.sha256] for piece in stored.pieces]
            yield ["parameter", component.folder, path, stored.shape, stored.dtype, pieces]


def _tensors(component: Component, tensors: Tensors) -> Iterator[list[Any]]:
    for name, tensor in sorted(tensors.headers.items()):
        size = tensor.nbytes // np.dtype(tensor.dtype).itemsize
        first = tensors.read(name, (size,), [slice(0, SEEN // np.dtype(tensor.dtype).itemsize)])
        seen = hashlib.sha256(first.tobytes()).hexdigest()
        yield ["tensor", component.folder, name, tensor.shape, tensor.dtype, seen]


def _sha256(file: Path) -> str:
    try:
        stamp(file)  # raises for what is not a regular file
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
