"""File operations of a conversion: copying what is not weights, and publishing the finished folder."""

import os
import shutil
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from joyjax.convert.manifest import MANIFEST
from joyjax.errors import CheckpointError

INDEX = "model_index.json"


def copy_files(source: Path, target: Path, index: Mapping[str, Any], chosen: Iterable[str], networks: Set[str]) -> None:
    """Copy all but weights: the index, the chosen networks' configurations, and the folders of other components."""
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / INDEX, target / INDEX)
    for name in chosen:
        (target / name).mkdir(exist_ok=True)
        shutil.copyfile(source / name / "config.json", target / name / "config.json")
    for name, entry in index.items():
        names_a_class = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        if names_a_class and name not in networks:
            if not name.isidentifier() or not (source / name).is_dir():
                raise CheckpointError(f"{source / INDEX} names {name}, but {source} has no such folder")
            shutil.rmtree(target / name, ignore_errors=True)  # left by a killed run
            _copy_folder(source / name, target / name)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy the files without their modes: read-only files could not be replaced or moved later."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy_folder(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def flush(folder: Path) -> None:
    """Sync a folder to the disk, so that a power loss loses nothing that the journal records as done."""
    for parent, _, files in os.walk(folder):
        for path in (*(os.path.join(parent, name) for name in files), parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def publish_folder(new: Path, target: Path, overwrite: bool) -> None:
    """Rename the finished folder to `target`, or move its entries into a target that has files already.

    May be called again after an earlier call was killed.
    """
    if not new.exists():
        return
    if not target.exists() or not any(target.iterdir()):
        os.replace(new, target)
        return
    # Nothing loads a target without these two: they are removed first and moved last.
    for name in (INDEX, MANIFEST):
        if overwrite and (new / name).exists():
            (target / name).unlink(missing_ok=True)
    for entry in sorted(new.iterdir(), key=lambda entry: (entry.name == INDEX, entry.name == MANIFEST)):
        old = target / entry.name
        if old.exists() and not overwrite and entry.name != MANIFEST:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif entry.is_dir():
            old.unlink(missing_ok=True)
        os.replace(entry, old)
    new.rmdir()


def link(source: str, target: str) -> None:
    """Hard-link a file, or copy it where that fails. Parts are never modified later."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
