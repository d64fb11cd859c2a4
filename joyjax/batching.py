"""Many edits from a file of requests: one warm model, errors kept by row, and resuming where it was stopped.

A row is a JSON object with the keyword arguments of `joyjax.edit`; `image` and `mask` are names of files, relative to
the file of requests. Beside every result, `NAME.png`, lies `NAME.json` with the row and what came of it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from joyjax.editing import check_options, edit_batch
from joyjax.errors import JoyJaxError, RequestError
from joyjax.families.family import Request
from joyjax.inputs.files import parse_json
from joyjax.inputs.image import open_picture
from joyjax.pipeline import Pipeline
from joyjax.result import Result
from joyjax.running import Callback, program

NAME = re.compile(r"[\w][\w.-]{0,99}")
FILES = ("image", "mask")
NOT_IN_ROWS = ("noise", "callback")  # what JSON cannot hold
LONGEST_ROW = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the file: its number, the name of its results, and its options as they stand there, or its error."""

    line: int
    name: str
    options: Mapping[str, Any]
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of a row: the file of its picture, or its error; `skipped`: it was there already."""

    row: Row
    picture: Path
    error: str | None = None
    skipped: bool = False
    result: Result | None = None


def read_rows(file: Path) -> list[Row]:
    """Read a file of requests; a row that is no JSON object of options is kept, with its error.

    Empty lines are passed over. A row's name is its `id`, else its line as four digits.

    Raises:
        RequestError: if the file cannot be read or is empty, or two rows have one name.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror or error}") from None
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _read_row(number, line)
        if row.name.casefold() in rows:  # where upper and lower case are one name of a file
            other = rows[row.name.casefold()]
            raise RequestError(f"{file}: lines {other.line} and {number} are both named {row.name!r}; give other ids")
        rows[row.name.casefold()] = row
    if not rows:
        raise RequestError(f"{file} holds no request; expected one JSON object in each line")
    return list(rows.values())


def _read_row(number: int, line: bytes) -> Row:
    name = f"{number:04}"
    try:
        if len(line) > LONGEST_ROW:
            raise ValueError(f"it has {len(line)} bytes; {LONGEST_ROW} at most")
        options = parse_json(line)
    except TypeError as error:
        return Row(number, name, {}, f"line {number} holds {error}; expected a JSON object")
    except ValueError as error:
        return Row(number, name, {}, f"line {number} is not valid JSON: {error}")
    given = options.pop("id", name)
    if not isinstance(given, str | int) or not NAME.fullmatch(str(given)):
        return Row(number, name, options, f"id is {given!r:.200}; expected letters, digits, '.', '-' and '_'")
    for key in NOT_IN_ROWS:
        if key in options:
            return Row(number, str(given), options, f"{key} cannot be given in a file of requests")
    return Row(number, str(given), options)


def run_rows(
    pipeline: Pipeline,
    rows: Sequence[Row],
    source: Path,
    folder: Path,
    *,
    batch_size: int = 1,
    overwrite: bool = False,
    metadata: bool = True,
    callback: Callback | None = None,
) -> Iterator[Done]:
    """Run all rows and give what came of each, in the order in which they end.

    `source` is the folder that files in rows are relative to. `metadata`: pictures carry their recipes. What is in
    `folder` from an earlier run of the same rows and the same model is not done again; rows that failed are. Rows of
    one program, up to `batch_size`, run together.

    Raises:
        RequestError: before anything runs, if `folder` holds the results of other rows and `overwrite` is not given.
        Cancelled: from the callback. What is written stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {row.name: _found(folder, row, pipeline.source) for row in rows}
    for row in rows:
        if found[row.name] == "other" and not overwrite:
            raise RequestError(
                f"{folder / row.name}.json is of another request or model; name another folder, or give --overwrite"
            )
    waiting: dict[Any, list[tuple[Row, dict[str, Any]]]] = {}
    for row in rows:
        picture = folder / f"{row.name}.png"
        if found[row.name] == "done":
            yield Done(row, picture, skipped=True)
            continue
        try:
            if row.error is not None:
                raise RequestError(row.error)
            options = _opened(row, source) | {"callback": callback}
            request = check_options(pipeline, options)
            key = _key(pipeline, request) if batch_size > 1 else None
        except JoyJaxError as error:
            yield _failed(row, picture, pipeline, str(error))
            continue
        group = waiting.setdefault(key, [])
        group.append((row, options))
        if len(group) == batch_size:
            yield from _run(pipeline, waiting.pop(key), folder, metadata)
    for group in waiting.values():
        yield from _run(pipeline, group, folder, metadata)


def _key(pipeline: Pipeline, request: Request) -> Hashable:
    """Return what rows must have in common to be no slower together: their program and the sizes of all sequences."""
    inputs = pipeline.family.prepare(request, pipeline.files)
    return program(request, inputs), inputs.reference_tokens, inputs.prompt_size


def _run(
    pipeline: Pipeline,
    group: Sequence[tuple[Row, dict[str, Any]]],
    folder: Path,
    metadata: bool,
) -> Iterator[Done]:
    """Run rows together; if that fails, each by itself, so that the error is that of its row."""
    try:
        results = edit_batch(pipeline, [options for _, options in group])
    except JoyJaxError as error:
        if len(group) == 1:
            row = group[0][0]
            yield _failed(row, folder / f"{row.name}.png", pipeline, str(error))
            return
        for one in group:
            yield from _run(pipeline, [one], folder, metadata)
        return
    for (row, _), result in zip(group, results, strict=True):
        picture = folder / f"{row.name}.png"
        result.save(picture, metadata=metadata)
        _note(picture, row, pipeline, {"picture": picture.name, "timings": dict(result.timings)})
        yield Done(row, picture, result=result)


def _opened(row: Row, source: Path) -> dict[str, Any]:
    """Return the options with their pictures read."""
    options = dict(row.options)
    for key in FILES:
        named = options.get(key)
        if named is None:
            continue
        several = isinstance(named, list) and key == "image"
        files = named if several else [named]
        if not all(isinstance(file, str) for file in files):
            raise RequestError(f"{key} is {named!r:.200}; expected the name of a file{' or a list' * (key == 'image')}")
        pictures = [open_picture(source / file) for file in files]
        options[key] = pictures if several else pictures[0]
    return options


def _found(folder: Path, row: Row, model: str) -> str:
    """Say what a folder holds of a row: "nothing", what is "done", or what is of an "other" row or model."""
    note, picture = folder / f"{row.name}.json", folder / f"{row.name}.png"
    if not note.exists():
        return "other" if picture.exists() else "nothing"
    try:
        held = parse_json(note.read_bytes())
    except (OSError, ValueError, TypeError):
        return "other"
    if held.get("row") != json.loads(json.dumps(row.options)) or held.get("model") != model:
        return "other" if "picture" in held else "nothing"
    return "done" if "picture" in held and picture.exists() else "nothing"


def _failed(row: Row, picture: Path, pipeline: Pipeline, error: str) -> Done:
    _note(picture, row, pipeline, {"error": error})
    return Done(row, picture, error=error)


def _note(picture: Path, row: Row, pipeline: Pipeline, outcome: Mapping[str, Any]) -> None:
    """Write what came of a row beside its picture; the file appears when it is whole."""
    path = picture.with_suffix(".json")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = json.dumps({"id": row.name, "row": row.options, "model": pipeline.source, **outcome}, indent=2)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)
