"""Moving files about: what a conversion copies beside the weights, and giving the finished folder its name."""

import os
import shutil
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from joyjax.convert.manifest import MANIFEST
from joyjax.errors import CheckpointError

INDEX = "model_index.json"


def copy_files(source: Path, target: Path, index: Mapping[str, Any], chosen: Iterable[str], networks: Set[str]) -> None:
    """Copy what is not weights: the index, the chosen networks' configurations, the folders of what is no network."""
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
            shutil.rmtree(target / name, ignore_errors=True)  # of a run that was killed
            _copy_folder(source / name, target / name)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy the files, but not their modes: what is read-only could not be replaced or moved later."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy_folder(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def flush(folder: Path) -> None:
    """Have the disk hold what is in a folder, so that a loss of power takes nothing that the journal calls done."""
    for place, _, files in os.walk(folder):
        for path in (*(os.path.join(place, name) for name in files), place):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def place_folder(new: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name, or move what is in it into a target that has files already.

    May be called again where an earlier call was killed.
    """
    if not new.exists():
        return
    if not target.exists() or not any(target.iterdir()):
        os.replace(new, target)
        return
    # Without these two nothing loads the target, whatever model is left in it: they go first and come last.
    for name in (INDEX, MANIFEST):
        if overwrite and (new / name).exists():
            (target / name).unlink(missing_ok=True)
    for entry in sorted(new.iterdir(), key=lambda entry: (entry.name == INDEX, entry.name == MANIFEST)):
        place = target / entry.name
        if place.exists() and not overwrite and entry.name != MANIFEST:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif entry.is_dir():
            place.unlink(missing_ok=True)
        os.replace(entry, place)
    new.rmdir()


def link(source: str, target: str) -> None:
    """Give a file a second name, or where that cannot be, copy it. Parts are never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
