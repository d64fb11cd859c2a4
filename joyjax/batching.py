"""Many edits from a file of requests: one warm model, errors kept by row, and resuming where it was stopped.

A row is a JSON object with the keyword arguments of `joyjax.edit`; `image` and `mask` are names of files, relative to
the file of requests, or URLs. Beside every result, `NAME.png`, lies `NAME.json`: the row, the model, and what came of
it, that is `picture`, `crops` and `timings`, or `error`. Neither is ever there in part.
"""

import codecs
import dataclasses
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from joyjax.editing import check_options, edit_batch
from joyjax.errors import AdviceWarning, Cancelled, JoyJaxError, RequestError
from joyjax.families.family import Request
from joyjax.fingerprint import fingerprint
from joyjax.inputs.files import check_name, parse_json, quoted
from joyjax.inputs.load import load_image
from joyjax.pipeline import Pipeline
from joyjax.result import Result
from joyjax.running import Callback, program

NAME = re.compile(r"\w[\w.-]{0,99}")
LONGEST_NAME = 200  # bytes, as most file systems allow 255
FILES = ("image", "mask")
NOT_IN_ROWS = ("noise", "callback")  # what JSON cannot hold
LONGEST_ROW = 2**20  # bytes
MOST_WAITING = 64  # rows that wait, with their pictures, for others of their shape

State = Literal["new", "done", "other"]
Open = tuple["Row", dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the file: its number, the name of its results, and its options as they stand there, or its error."""

    line: int
    name: str
    options: Mapping[str, Any]
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of a row: the file of its picture, or its error; `skipped`: it was there already.

    `notes` are for the user: what was done to its pictures, and where the request leaves what the model does well.
    """

    row: Row
    picture: Path
    error: str | None = None
    skipped: bool = False
    result: Result | None = None
    notes: tuple[str, ...] = ()


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
        return cls(os.fspath(folder), fingerprint(Path(folder)), dtype, linear)


def read_rows(file: Path) -> list[Row]:
    """Read a file of requests; a row that is no JSON object of options is kept, with its error.

    Empty lines are passed over. A row's name is its `id`, else its line as four digits.

    Raises:
        RequestError: if the file cannot be read, is empty or not UTF-8 as a whole, or two rows have one name.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror or error}") from None
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError(f"{file} is in UTF-16; save it as UTF-8")
    rows: dict[str, Row] = {}
    for number, line in enumerate(text.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if not line.strip():
            continue
        row = _read_row(number, line)
        key = unicodedata.normalize("NFC", row.name).casefold()  # some file systems take these for one name
        if key in rows:
            raise RequestError(
                f"{file}: lines {rows[key].line} and {number} are both named {row.name!r}; give other ids"
            )
        rows[key] = row
    if not rows:
        raise RequestError(f"{file} holds no request; expected one JSON object in each line")
    return list(rows.values())


def _read_row(number: int, line: bytes) -> Row:
    name = f"{number:04}"
    try:
        if len(line) > LONGEST_ROW:
            raise ValueError(f"it has {len(line)} bytes; {LONGEST_ROW} at most are read")
        options = parse_json(line)
        json.dumps(options, allow_nan=False)
    except TypeError as error:
        return Row(number, name, {}, f"line {number} holds {error}; expected a JSON object")
    except ValueError as error:
        return Row(number, name, {}, f"line {number} is not valid JSON: {error}")
    given = options.pop("id", name)
    if isinstance(given, bool) or not isinstance(given, str | int) or not _is_name(str(given)):
        return Row(
            number,
            name,
            options,
            f"id is {quoted(given)}; expected up to 100 letters, digits, '.', '-' and '_', the first of them a letter "
            "or digit: it names the result's file",
        )
    for key in NOT_IN_ROWS:
        if key in options:
            return Row(number, str(given), options, f"{key} cannot be given in a file of requests")
    return Row(number, str(given), options)


def _is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None and len(text.encode()) <= LONGEST_NAME


def check_folder(folder: Path, rows: Sequence[Row], model: Model) -> dict[str, State]:
    """Return what a folder holds of each row, by its name: a "new" one is not done yet.

    Raises:
        RequestError: if what is named `folder` is not one.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; name one for the results")
    return {row.name: _found(folder, row, model)[0] for row in rows}


def refuse_others(folder: Path, rows: Sequence[Row], model: Model) -> None:
    """Raise RequestError if results of other rows or of another model would have to be replaced."""
    faults = [fault for row in rows if (fault := _found(folder, row, model)[1])]
    if faults:
        more = f", and so with {len(faults) - 1} more" if len(faults) > 1 else ""
        raise RequestError(f"{faults[0]}{more}; name another folder, or replace such results with --overwrite")


def _found(folder: Path, row: Row, model: Model) -> tuple[State, str]:
    """Return what a folder holds of a row, and of an "other" one why it is."""
    note, picture = folder / f"{row.name}.json", folder / f"{row.name}.png"
    if not note.exists():
        return ("other", f"{picture} is there and not from these requests") if picture.exists() else ("new", "")
    try:
        held = parse_json(note.read_bytes())
        before = held["row"], *(held["model"][key] for key in ("fingerprint", "dtype", "linear"))
    except (OSError, ValueError, TypeError, KeyError):
        return "other", f"{note} is there and not from `joyjax batch`"
    if "picture" not in held or not picture.exists():
        return "new", ""
    if before[0] != row.options:
        return "other", f"{picture} is of a row that was another then"
    if before[1:] != (model.fingerprint, model.dtype, model.linear):
        return "other", f"{picture} was made by another model, or one loaded otherwise ({_told(held['model'])})"
    return "done", ""


def _told(model: Mapping[str, Any]) -> str:
    return ", ".join(str(model.get(key)) for key in ("source", "dtype", "linear"))


def run_rows(
    pipeline: Pipeline,
    rows: Sequence[Row],
    source: Path,
    folder: Path,
    *,
    batch_size: int = 1,
    overwrite: bool = False,
    metadata: bool = True,
    allow_private_urls: bool = False,
    callback: Callback | None = None,
) -> Iterator[Done]:
    """Run all rows and give what came of each, in the order in which they end.

    `source` is the folder that files in rows are relative to. `metadata`: pictures carry their recipes. What is in
    `folder` from an earlier run of the same rows and the same model is not done again; rows that failed are. Rows of
    one program, up to `batch_size`, run together. `allow_private_urls`: pictures may come from addresses that are not
    public.

    Raises:
        RequestError: before anything runs, if `folder` holds the results of other rows and `overwrite` is not given.
        PictureError: if results cannot be written.
        Cancelled: from the callback. What is written stays.
    """
    model = Model.of(pipeline.source, pipeline.dtype, pipeline.linear)
    found = check_folder(folder, rows, model)
    if not overwrite:
        refuse_others(folder, rows, model)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder, rows)
    writer = _Writer(folder, model, metadata)
    waiting: dict[Hashable, list[Open]] = {}
    for row in rows:
        if found[row.name] == "done":
            yield Done(row, writer.picture(row), skipped=True)
            continue
        try:
            if row.error is not None:
                raise RequestError(row.error)
            options = _opened(row, source, allow_private_urls) | {"callback": callback}
            key = _key(pipeline, options) if batch_size > 1 else None
        except Exception as error:  # whatever is wrong with one row, the others go on
            yield writer.failed(row, error)
            continue
        waiting.setdefault(key, []).append((row, options))
        if len(waiting[key]) == batch_size:
            yield from _run(pipeline, waiting.pop(key), writer)
        elif sum(map(len, waiting.values())) >= MOST_WAITING:
            yield from _run(pipeline, waiting.pop(next(iter(waiting))), writer)
    while waiting:
        yield from _run(pipeline, waiting.pop(next(iter(waiting))), writer)


def _sweep(folder: Path, rows: Sequence[Row]) -> None:
    """Remove what a process that was killed had not finished writing."""
    names = {f"{row.name}.{ending}" for row in rows for ending in ("json", "png")}
    for path in folder.glob(".*.part"):
        if re.sub(r"\.\d+\.part$", "", path.name[1:]) in names:
            path.unlink(missing_ok=True)


def _key(pipeline: Pipeline, options: Mapping[str, Any]) -> Hashable:
    """Return what rows must have in common to be no slower together: their program and the sizes of all sequences."""
    request: Request = check_options(pipeline, options)
    inputs = pipeline.family.prepare(request, pipeline.files)
    return program(request, inputs), inputs.reference_tokens, inputs.prompt_size


def _run(pipeline: Pipeline, group: Sequence[Open], writer: "_Writer") -> Iterator[Done]:
    """Run rows together; if that fails, each by itself, so that the error is that of its row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdviceWarning)  # each result has its own notes
            results = edit_batch(pipeline, [options for _, options in group])
    except Cancelled:
        raise
    except Exception as error:  # also what only the device finds, such as too little memory
        if len(group) == 1:
            yield writer.failed(group[0][0], error)
            return
        for one in group:
            yield from _run(pipeline, [one], writer)
        return
    for (row, _), result in zip(group, results, strict=True):
        yield writer.drawn(row, result)


def _opened(row: Row, source: Path, allow_private_urls: bool) -> dict[str, Any]:
    """Return the options with their pictures read."""
    options = dict(row.options)
    for key in FILES:
        named = options.get(key)
        if named is None:
            continue
        several = isinstance(named, list) and key == "image"
        files = named if several else [named]
        if not all(isinstance(file, str) and file for file in files):
            expected = "the name of a file or a URL" + (", or a list of them" if key == "image" else "")
            raise RequestError(f"{key} is {quoted(named)}; expected {expected}")
        for file in files:
            check_name(file)
        pictures = [
            load_image(file, folder=source, pipes=False, allow_private_urls=allow_private_urls) for file in files
        ]
        options[key] = pictures if several else pictures[0]
    return options


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes what came of rows into a folder."""

    folder: Path
    model: Model
    metadata: bool

    def picture(self, row: Row) -> Path:
        """Return where a row's picture goes."""
        return self.folder / f"{row.name}.png"

    def drawn(self, row: Row, result: Result) -> Done:
        """Write a picture. The note beside it says that it is there only once it is."""
        picture = self.picture(row)
        self._note(row, {})
        result.save(picture, metadata=self.metadata)
        crops = [str(crop) for crop in result.crops]
        self._note(row, {"picture": picture.name, "crops": crops, "timings": dict(result.timings)})
        changed = tuple(str(crop) for crop in result.crops if crop.source != crop.size)
        return Done(row, picture, result=result, notes=result.notes + changed)

    def failed(self, row: Row, error: Exception) -> Done:
        """Write an error; a picture of that name, of another row, goes."""
        said = str(error) if isinstance(error, JoyJaxError) else f"internal error, {type(error).__name__}: {error}"
        picture = self.picture(row)
        self._note(row, {"error": said})
        picture.unlink(missing_ok=True)
        return Done(row, picture, error=said)

    def _note(self, row: Row, outcome: Mapping[str, Any]) -> None:
        path = self.picture(row).with_suffix(".json")
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        held = {"id": row.name, "row": row.options, "model": dataclasses.asdict(self.model), **outcome}
        try:
            beside.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
