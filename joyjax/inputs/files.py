"""Files of a checkpoint: small json ones, and that every one of them is the checkpoint's own."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError

LONGEST_JSON = 2**24  # bytes; a vocabulary has a fifth of that
MOST_FILES = 10_000

Stamp = tuple[int, int, int, int]  # device, inode, size, time of change: two files that have it alike are one


def stamp(file: int | Path) -> Stamp:
    """Return what tells a file, by name or descriptor, from another and from itself at another time.

    Raises:
        OSError: if it is not a regular file. A pipe, say, would never come to its end.
    """
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_json(path: Path) -> dict[str, Any]:
    """Return the json object in a file.

    Raises:
        CheckpointError: if the file is missing or unreadable, is not json, or holds something else than an object.
    """
    try:
        size = stamp(path)[2]
        if size > LONGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; a json file of a checkpoint has {LONGEST_JSON} at most")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a Diffusers folder has it: is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except TypeError as error:
        raise CheckpointError(f"{path} holds {error}; expected an object") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid json: {error}") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """Return the json object in UTF-8 text, whatever was sent: ValueError for no json, TypeError for no object."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise TypeError(f"a json {type(value).__name__}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a json object, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def unfinished(target: Path) -> Path:
    """Return the folder beside a target where `joyjax convert` makes it until it is whole."""
    return target.with_name(f".{target.name}.unfinished")


def check_files(folder: Path) -> None:
    """Check that a checkpoint is made of folders and regular files, and that no link in it leads out of it.

    The hub's cache is made of links from `snapshots/<revision>/` to `blobs/`; those are its own.

    Raises:
        CheckpointError: for the first thing that is neither, or leads elsewhere.
    """
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    seen = 0
    for place, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path, seen = Path(place, name), seen + 1
            if seen > MOST_FILES:
                raise CheckpointError(f"{folder} holds more than {MOST_FILES} files; is it a checkpoint's folder?")
            try:
                if path.is_symlink() and not any(path.resolve(strict=True).is_relative_to(home) for home in homes):
                    raise CheckpointError(f"{path} is a link to {os.readlink(path)}, outside of the checkpoint")
                if not path.is_dir():
                    stamp(path)
            except (OSError, RuntimeError) as error:  # a link to nothing, or in a circle
                raise CheckpointError(f"{path} cannot be read: {error}") from None
