"""The folder that a batch writes into: its lock, what it holds of each row, and what must not be overwritten there.

Beside every result, `NAME.png`, is `NAME.json`: the row, the model, and the outcome, that is `picture`, `seed`, `crops`
and `timings`, or `error`. A note without an outcome was written before a picture that then was not finished.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import filelock

from joyjax.batch.rows import Row
from joyjax.errors import RequestError
from joyjax.files import FileKey, file_key
from joyjax.reading import parse_json

LOCK = ".joyjax-batch.lock"
FILES = ("image", "mask")  # options of a row that name files

State = Literal["new", "begun", "done", "other"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What makes results of the same row the same: the checkpoint, and how it is loaded."""

    source: str
    fingerprint: str
    dtype: str
    linear: str

    @classmethod
    def of(cls, folder: str | os.PathLike, dtype: str, linear: str) -> "Model":
        """Describe the checkpoint in a folder; see fingerprint.py."""
        from joyjax.provenance.fingerprint import fingerprint  # brings JAX, which a lock does without

        return cls(os.fspath(folder), fingerprint(Path(folder)), dtype, linear)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for one batch at a time.

    The operating system owns the lock, so it ends with the process, however that ends. The empty hidden file stays:
    where one process removes it while another takes it, two could hold the folder.

    Raises:
        RequestError: if another batch holds the folder, or nothing can be written there.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RequestError(
            f"{folder} is being written by another batch at this time; let it end, or name another folder"
        ) from None
    except OSError as error:
        raise RequestError(f"{folder} cannot be written into: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def check_folder(
    folder: Path,
    rows: Sequence[Row],
    model: Model,
    source: Path,
    *,
    requests: Path | None = None,
    overwrite: bool = False,
) -> dict[str, State]:
    """Return what a folder holds of each row, by its name, if the rows may be run into it.

    A "new" row is not done; nor is a "begun" one, whose picture, if there is one, is of an unfinished run. An "other"
    result is of another row, model or program, and replaced where `overwrite` is given. `source` is the folder that
    files in rows are relative to, `requests` the file that the rows came from.

    Raises:
        RequestError: if `folder` is not a folder, a result would replace an input of this batch, or one that is "other"
            without `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; name one for the results")
    found = {row.name: _found(folder, row, model) for row in rows}
    states = {name: state for name, (state, _) in found.items()}
    _keep_inputs(folder, rows, states, source, requests)
    faults = [fault for _, fault in found.values() if fault]
    if faults and not overwrite:
        more = f", and so with {len(faults) - 1} more" if len(faults) > 1 else ""
        raise RequestError(f"{faults[0]}{more}; name another folder, or replace such results with --overwrite")
    return states


def targets(folder: Path, row: Row) -> tuple[Path, Path]:
    """Return the files of a row's picture and note."""
    return folder / f"{row.name}.png", folder / f"{row.name}.json"


def _keep_inputs(
    folder: Path, rows: Sequence[Row], states: Mapping[str, State], source: Path, requests: Path | None
) -> None:
    """Raise RequestError if a result would replace a file that the batch reads, or a folder.

    Parts are the same by device and inode, so through links and other spellings too. A result that is done, or that an
    unfinished run of the same row wrote, is the batch's own: a later row may read it.
    """
    read: dict[FileKey, str] = {}
    for row in rows:
        for file in _named_files(row):
            if (key := file_key(source / file)) is not None:
                read.setdefault(key, f"a picture that {row.name!r} ({row.place}) reads")
    if requests is not None and (key := file_key(requests)) is not None:
        read[key] = "the file of requests"
    for row in rows:
        if states[row.name] in ("done", "begun"):
            continue
        for target in targets(folder, row):
            if target.is_dir():
                raise RequestError(f"{target} is a folder, and the result of {row.place} has its name; give another id")
            key = file_key(target)
            if key in read:
                raise RequestError(
                    f"{target}, the result of {row.name!r} ({row.place}), would replace {read[key]}; give the row "
                    "another id, or name another folder"
                )


def _named_files(row: Row) -> Iterator[str]:
    for option in FILES:
        value = row.options.get(option)
        yield from (file for file in (value if isinstance(value, list) else [value]) if isinstance(file, str) and file)


def _found(folder: Path, row: Row, model: Model) -> tuple[State, str]:
    """Return what a folder holds of a row, and of an "other" one why it is."""
    picture, note = targets(folder, row)
    if not note.exists():
        return ("other", f"{picture} is there and not from these requests") if picture.exists() else ("new", "")
    try:
        held = parse_json(note.read_bytes())
        before = held["row"], *(held["model"][key] for key in ("fingerprint", "dtype", "linear"))
    except (OSError, ValueError, TypeError, KeyError):
        return "other", f"{note} is there and not from `joyjax batch`"
    if "picture" not in held or not picture.exists():
        return ("begun" if before[0] == row.options and "error" not in held else "new"), ""
    if before[0] != row.options:
        return "other", f"{picture} is of a row that was another then"
    if before[1:] != (model.fingerprint, model.dtype, model.linear):
        return "other", f"{picture} was made by another model, or one loaded otherwise ({_told(held['model'])})"
    return "done", ""


def _told(model: Mapping[str, object]) -> str:
    return ", ".join(str(model.get(key)) for key in ("source", "dtype", "linear"))


def sweep(folder: Path, rows: Sequence[Row]) -> None:
    """Remove what a process that was killed had not finished writing; the folder is held, so none is being written."""
    names = {target.name for row in rows for target in targets(folder, row)}
    for path in folder.glob(".*.part"):
        if re.sub(r"(\.\d+)?\.[0-9a-f]+\.part$", "", path.name[1:]) in names:
            path.unlink(missing_ok=True)
