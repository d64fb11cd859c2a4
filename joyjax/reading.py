"""Parts of a checkpoint: small json ones, and that every one of them is the checkpoint's own."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError, RequestError
from joyjax.signatures import stand_in

LONGEST_JSON = 2**24  # bytes; the largest real one, a tokenizer, has two thirds of that
DEEPEST_JSON = 100  # far below where Python, or what prints a value, gives up
LARGEST_FLOAT = 3e38  # everything is computed in float32
MOST_FILES = 10_000
DEEPEST_FOLDER = 32
LOCALE = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1 in the environment"

Pairs = list[tuple[str, Any]]
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


def quoted(value: object) -> str:
    """Return a value of a checkpoint as a message shows it: no longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def printable(text: str) -> str:
    """Return a text of a file as a terminal may have it: what is no letter or line break is told by its number.

    What a file holds is not for the terminal to obey.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def check_name(name: str) -> None:
    """Check that the locale can name a file so; Python would say that there is no such file.

    Raises:
        RequestError: naming the encoding and what to set.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        if error.encoding != "utf-8":  # in which only half a character has no form
            raise RequestError(
                f"the file {name!r} cannot be named in {error.encoding}, the encoding of the locale; {LOCALE}"
            ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the json object in a file.

    Raises:
        CheckpointError: if the file is missing or unreadable, is not json, holds something else than an object, or a
            number that is not finite.
    """
    try:
        size = stamp(path)[2]
        if size > LONGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; a json file of a checkpoint has {LONGEST_JSON} at most")
        with path.open("rb") as file:
            return parse_json(file.read(size), _finite)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a Diffusers folder has it: is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except TypeError as error:
        raise CheckpointError(f"{path} holds {error}; expected an object") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is {stand_in(path) or f'not valid json: {error}'}") from None


def _without_doubles(pairs: Pairs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} is there twice")
        found[name] = value
    return found


def _finite(pairs: Pairs) -> dict[str, Any]:
    for name, value in pairs:
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, float) and not abs(number) <= LARGEST_FLOAT:
                raise ValueError(f"{name[:100]!r} is {number}, which is no finite number in float32")
    return _without_doubles(pairs)


def parse_json(text: bytes, hook: Callable[[Pairs], dict[str, Any]] = _without_doubles) -> dict[str, Any]:
    """Return the json object in UTF-8 text, whatever was sent: ValueError for no json, TypeError for no object.

    `hook` makes the objects in it of their names and values.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise TypeError(f"a json {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        held = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for values in held for inner in values if isinstance(inner, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


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
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    seen = 0
    for place, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path, seen = Path(place, name), seen + 1
            if seen > MOST_FILES:
                raise CheckpointError(f"{folder} holds more than {MOST_FILES} files; is it a checkpoint's folder?")
            if len(path.relative_to(root).parts) > DEEPEST_FOLDER:
                raise CheckpointError(f"{path} lies more than {DEEPEST_FOLDER} folders deep; is it a checkpoint's?")
            try:
                if path.is_symlink() and not _is_own(path.resolve(strict=True), root, blobs):
                    raise CheckpointError(f"{path} is a link to {os.readlink(path)}, outside of the checkpoint")
                if not path.is_dir():
                    stamp(path)
            except (OSError, RuntimeError) as error:  # a link to nothing, or in a circle
                raise CheckpointError(f"{path} cannot be read: {error}") from None


def _is_own(real: Path, root: Path, blobs: Path) -> bool:
    """Say whether a link's end is the checkpoint's. A folder among the blobs is not: nobody has looked into it."""
    return real.is_relative_to(root) or (real.is_relative_to(blobs) and real.is_file())
