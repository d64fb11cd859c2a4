"""Reading a checkpoint's JSON files, and checking that its folder holds regular files and no links out of it."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError, RequestError
from joyjax.signatures import stand_in

LONGEST_JSON = 2**24  # bytes; the largest real one, a tokenizer, has two thirds of that
DEEPEST_JSON = 100  # far below the recursion limits of Python and of what prints a value
LARGEST_FLOAT = 3e38  # everything is computed in float32
MOST_FILES = 10_000
DEEPEST_FOLDER = 32
LOCALE = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1 in the environment"

Pairs = list[tuple[str, Any]]
Stamp = tuple[int, int, int, int]  # device, inode, size, modification time: equal for one unchanged file


def stamp(file: int | Path) -> Stamp:
    """Return the identity and version of a file, given by path or descriptor.

    Raises:
        OSError: if it is not a regular file. Reading a pipe, for example, might never end.
    """
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def quoted(value: object) -> str:
    """Return the repr of a value for a message, truncated to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def printable(text: str) -> str:
    """Return a text with unprintable characters escaped, except line breaks.

    Text from a file may hold control sequences of the terminal.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def check_name(name: str) -> None:
    """Check that the locale can encode the name of a file; otherwise Python reports that the file does not exist.

    Raises:
        RequestError: naming the encoding and what to set.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        if error.encoding != "utf-8":  # which lacks lone surrogates alone
            raise RequestError(
                f"the file {name!r} cannot be named in {error.encoding}, the encoding of the locale; {LOCALE}"
            ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: if the file is missing or unreadable, is not JSON, does not hold an object, or holds a number
            that is not finite.
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
                raise ValueError(f"{name[:100]!r} is {number}, which is not finite in float32")
    return _without_doubles(pairs)


def parse_json(text: bytes, hook: Callable[[Pairs], dict[str, Any]] = _without_doubles) -> dict[str, Any]:
    """Return the JSON object in untrusted UTF-8 text. `hook` builds each object in it from its pairs.

    Raises:
        ValueError: if it is not valid JSON, or too deeply nested.
        TypeError: if it is not an object.
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
    """Write a JSON object, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def unfinished(target: Path) -> Path:
    """Return the folder beside a target into which `joyjax convert` writes until the target is complete."""
    return target.with_name(f".{target.name}.unfinished")


def check_files(folder: Path) -> None:
    """Check that a checkpoint consists of folders and regular files, and that no link leads out of it.

    The links of the hub's cache, from `snapshots/<revision>/` to `blobs/`, are allowed.

    Raises:
        CheckpointError: for the first entry of another type, or link that leads elsewhere.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    seen = 0
    for parent, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path, seen = Path(parent, name), seen + 1
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
    """Return whether the target of a link is allowed. A folder among the blobs is not: its content is unchecked."""
    return real.is_relative_to(root) or (real.is_relative_to(blobs) and real.is_file())
