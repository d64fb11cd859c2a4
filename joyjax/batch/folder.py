"""The output folder of a batch: its lock, the state of each row, and the files that must not be overwritten.

Beside every result, `NAME.png`, is a note, `NAME.json`: the row, the model, and the outcome, `picture`, `seed`, `crops`
and `timings`, or `error`. A note without an outcome is of a picture that was not finished.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
    """The identity of a loaded model: equal models and rows give equal results."""

    source: str
    fingerprint: str
    dtype: str
    linear: str

    @classmethod
    def of(cls, folder: str | os.PathLike, dtype: str, linear: str) -> "Model":
        """Return that of the checkpoint in a folder; see provenance/fingerprint.py."""
        from joyjax.provenance.fingerprint import fingerprint  # imports JAX, which the lock does not need

        return cls(os.fspath(folder), fingerprint(Path(folder)), dtype, linear)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, so that one batch at a time writes into it.

    The operating system releases the lock when the process ends, however it ends. The empty lock file stays: if one
    process removed it while another locks it, two could hold the folder.

    Raises:
        RequestError: if another batch holds the folder, or it is not writable.
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
    """Return the state of each row in a folder, by row name, after checking that the rows may be written there.

    A "new" row has no result. A "begun" one has an unfinished result or none. An "other" result is of another row,
    model or program; `overwrite` replaces it. `source` is the folder that files in rows are relative to, `requests` the
    file of the rows.

    Raises:
        RequestError: if `folder` is not a folder, or a result would replace an input of this batch or, without
            `overwrite`, an "other" result.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; name one for the results")
    found = {row.name: _found(folder, row, model) for row in rows}
    states = {name: state for name, (state, _) in found.items()}
    _protect_inputs(folder, rows, states, source, requests)
    faults = [fault for _, fault in found.values() if fault]
    if faults and not overwrite:
        more = f", and so with {len(faults) - 1} more" if len(faults) > 1 else ""
        raise RequestError(f"{faults[0]}{more}; name another folder, or replace such results with --overwrite")
    return states


def targets(folder: Path, row: Row) -> tuple[Path, Path]:
    """Return the files of a row's picture and note."""
    return folder / f"{row.name}.png", folder / f"{row.name}.json"


def check_layers(
    folder: Path,
    rows: Sequence[Row],
    states: Mapping[str, State],
    source: Path,
    files: Mapping[str, Sequence[Path]],
    *,
    overwrite: bool = False,
) -> None:
    """Check the `files` of each row's layers, by row name, as `check_folder` checks the pictures.

    Raises:
        RequestError: if one is another row's result or an input of this batch, or exists and is not from this batch.
    """
    results = {target: row for row in rows for target in targets(folder, row)}
    read = {key for row in rows for file in _named_files(row) if (key := file_key(source / file)) is not None}
    for row in rows:
        for file in files.get(row.name, ()):
            if file in results:
                raise RequestError(
                    f"{file} is the result of {results[file].place} and a layer of {row.name!r} ({row.place}); give "
                    "one of them another id"
                )
            if states[row.name] in ("done", "begun") or not os.path.lexists(file):
                continue
            if file.is_dir() or file_key(file) in read or not overwrite:
                raise RequestError(
                    f"{file}, a layer of {row.name!r} ({row.place}), exists and would be replaced; give the row "
                    "another id, or name another folder"
                )


def _protect_inputs(
    folder: Path, rows: Sequence[Row], states: Mapping[str, State], source: Path, requests: Path | None
) -> None:
    """Raise RequestError if a result would replace a file that the batch reads, or a folder.

    Files are compared by device and inode, which covers links and other spellings. A result that is done, or that an
    unfinished run of the same row wrote, belongs to the batch: a later row may read it.
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
    """Return the state of a row, and for "other" the reason."""
    picture, note = targets(folder, row)
    if not note.exists():
        return ("other", f"{picture} exists and is not from these requests") if picture.exists() else ("new", "")
    try:
        held = parse_json(note.read_bytes())
        before = held["row"], *(held["model"][key] for key in ("fingerprint", "dtype", "linear"))
    except (OSError, ValueError, TypeError, KeyError):
        return "other", f"{note} exists and is not from `joyjax batch`"
    if "picture" not in held or not picture.exists():
        return ("begun" if before[0] == row.options and "error" not in held else "new"), ""
    if before[0] != row.options:
        return "other", f"{picture} is of a row that has changed since"
    if before[1:] != (model.fingerprint, model.dtype, model.linear):
        return "other", f"{picture} was made by another model, or with other options ({_described(held['model'])})"
    return "done", ""


def _described(model: Mapping[str, object]) -> str:
    return ", ".join(str(model.get(key)) for key in ("source", "dtype", "linear"))


def sweep(folder: Path, rows: Sequence[Row], layers: Mapping[str, Sequence[Path]] = MappingProxyType({})) -> None:
    """Remove temporary files of killed processes. The caller holds the folder, so no process is writing one."""
    names = {target.name for row in rows for target in (*targets(folder, row), *layers.get(row.name, ()))}
    for path in folder.glob(".*.part"):
        if re.sub(r"(\.\d+)?\.[0-9a-f]+\.part$", "", path.name[1:]) in names:
            path.unlink(missing_ok=True)
