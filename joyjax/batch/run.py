"""Running a file of requests: the model is loaded once, errors are kept by row, and a stopped run can be resumed.

A row is a JSON object with the keyword arguments of `joyjax.edit`; `image` and `mask` are names of files, relative to
the file of requests, or URLs, and `seed` may be "random". Pictures and notes are written atomically.
"""

import dataclasses
import json
import secrets
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from joyjax.api import check_options
from joyjax.batch.folder import FILES, Model, check_folder, check_layers, sweep, targets
from joyjax.batch.rows import Row
from joyjax.errors import Cancelled, JoyJaxError, RequestError
from joyjax.families.family import Plan
from joyjax.files import publish
from joyjax.media.formats import writing
from joyjax.media.load import load_image
from joyjax.options import MOST_LAYERS
from joyjax.reading import check_name, quoted
from joyjax.runtime.engine import Engine
from joyjax.runtime.job import Callback, Job
from joyjax.runtime.load import Pipeline
from joyjax.runtime.result import Result, layer_files

MOST_WAITING = 64  # rows that wait, with their pictures in memory, for others of equal shapes

Planned = tuple[Row, Job]


@dataclasses.dataclass(frozen=True)
class Done:
    """The outcome of a row: the file of its picture, or its error; `skipped`: an earlier run made it.

    `notes` are for the user: crops of the pictures, the drawn seed, and advice.
    """

    row: Row
    picture: Path
    error: str | None = None
    skipped: bool = False
    result: Result | None = None
    notes: tuple[str, ...] = ()


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
    """Run all rows and yield the outcome of each, in the order in which they end.

    `source` is the folder that files in rows are relative to. `metadata`: store the recipes in the pictures. Results in
    `folder` from an earlier run of the same rows and model are skipped; failed rows run again. Up to `batch_size` rows
    of equal shapes run together. `allow_private_urls`: pictures may come from addresses that are not public. The caller
    holds `folder` (`hold_folder`).

    Raises:
        RequestError: before anything runs, if a result would replace an input or, without `overwrite`, another result.
        PictureError: if a result cannot be written, as on a full disk. Finished results stay.
        Cancelled: from the callback. Finished results stay.
    """
    model = Model.of(pipeline.source, pipeline.dtype, pipeline.linear)
    found = check_folder(folder, rows, model, source, overwrite=overwrite)
    layers = {row.name: layer_files(targets(folder, row)[0], _layers(pipeline, row)) for row in rows}
    check_layers(folder, rows, found, source, layers, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, rows, layers)
    writer = _Writer(folder, model, metadata, layers)
    engine = Engine(pipeline, batch_size=batch_size)
    waiting: dict[Hashable, list[Planned]] = {}
    for row in rows:
        if found[row.name] == "done" and all(file.exists() for file in layers[row.name]):
            yield Done(row, writer.picture(row), skipped=True)
            continue
        try:
            if row.error is not None:
                raise RequestError(row.error)
            request = check_options(pipeline, _opened(row, source, allow_private_urls))
            job = engine.plan(request, callback)
            key = _key(job.plan) if batch_size > 1 else None
        except Exception as error:  # an error of one row does not stop the others
            yield writer.failed(row, error)
            continue
        waiting.setdefault(key, []).append((row, job))
        if len(waiting[key]) == batch_size:
            yield from _run(engine, waiting.pop(key), writer)
        elif sum(map(len, waiting.values())) >= MOST_WAITING:
            yield from _run(engine, waiting.pop(next(iter(waiting))), writer)
    while waiting:
        yield from _run(engine, waiting.pop(next(iter(waiting))), writer)


def _key(plan: Plan) -> Hashable:
    """Return what rows must share to gain from one batch: the batch key and the padded lengths of all sequences."""
    return plan.batch_key, plan.lengths.references[1], plan.lengths.text[1]


def _run(engine: Engine, group: Sequence[Planned], writer: "_Writer") -> Iterator[Done]:
    """Run rows as one batch; if that fails, run each alone, so that an error belongs to its row."""
    try:
        for _ in engine.run([job for _, job in group]):
            pass
    except Cancelled:
        raise
    except Exception as error:  # errors of the device too, such as out of memory
        if len(group) == 1:
            yield writer.failed(group[0][0], error)
            return
        for one in group:
            yield from _run(engine, [one], writer)
        return
    for row, job in group:
        if job.result is not None:
            yield writer.drawn(row, job.result)


def _layers(pipeline: Pipeline, row: Row) -> int:
    """Return the number of layers that a row's result has; 0 for models that make none, and values that are refused."""
    if "layers" not in pipeline.family.tasks:
        return 0
    asked = row.options.get("layers")
    count = pipeline.family.defaults["layers"] if asked is None else asked
    return count if type(count) is int and 1 <= count <= MOST_LAYERS else 0


def _opened(row: Row, source: Path, allow_private_urls: bool) -> dict[str, Any]:
    """Return the options with their pictures read and a random seed drawn."""
    options = dict(row.options)
    if options.get("seed") == "random":
        options["seed"] = secrets.randbelow(2**32)
    elif isinstance(options.get("seed"), str):
        raise RequestError(f'seed is {quoted(options["seed"])}; expected a whole number from 0, or "random"')
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
    """Writes the outcomes of rows into a folder."""

    folder: Path
    model: Model
    metadata: bool
    layers: Mapping[str, Sequence[Path]]

    def picture(self, row: Row) -> Path:
        """Return the path of a row's picture."""
        return targets(self.folder, row)[0]

    def drawn(self, row: Row, result: Result) -> Done:
        """Write a picture. Its note names it only after it is written."""
        picture = self.picture(row)
        self._note(row, {})
        result.save(picture, metadata=self.metadata)
        crops = [str(crop) for crop in result.crops]
        outcome = {"picture": picture.name, "seed": result.seed, "crops": crops, "timings": dict(result.timings)}
        if result.layers:
            outcome["layers"] = [file.name for file in result.files(picture)[1:]]
        self._note(row, outcome)
        changed = tuple(str(crop) for crop in result.crops if crop.source != crop.size)
        drawn = (f"seed {result.seed}",) if row.options.get("seed") == "random" else ()
        return Done(row, picture, result=result, notes=result.notes + changed + drawn)

    def failed(self, row: Row, error: Exception) -> Done:
        """Write an error, and remove an older picture of that name."""
        message = str(error) if isinstance(error, JoyJaxError) else f"internal error, {type(error).__name__}: {error}"
        picture = self.picture(row)
        self._note(row, {"error": message})
        with writing(picture):
            for file in (picture, *self.layers[row.name]):
                file.unlink(missing_ok=True)
        return Done(row, picture, error=message)

    def _note(self, row: Row, outcome: Mapping[str, Any]) -> None:
        path = targets(self.folder, row)[1]
        held = {"id": row.name, "row": row.options, "model": dataclasses.asdict(self.model), **outcome}
        with writing(path):  # a full disk ends the run: no other row could be written either
            publish(f"{json.dumps(held, indent=2)}\n".encode(), path)
