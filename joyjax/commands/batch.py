"""`joyjax batch`: many edits with a model that is loaded once."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from joyjax.commands.options import (
    OF_LOAD,
    AllowPrivateURLs,
    Debug,
    declared,
    load_pipeline,
    make_folder,
    quantized_form,
    takes,
)
from joyjax.errors import JoyJaxError
from joyjax.options import LOAD, RECORDS, SPEED

Option = typer.Option


@takes(*OF_LOAD)
def command(
    requests: Annotated[
        Path,
        typer.Argument(
            metavar="REQUESTS.jsonl",
            help="A JSON object in each line, or an array of objects: options of edits.",
        ),
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for the results; made if missing.")],
    model: Annotated[str | None, declared("model")] = None,
    batch_size: Annotated[
        int,
        Option(
            metavar="N",
            min=1,
            max=1024,
            help="Most edits of equal shapes that are denoised together.",
            rich_help_panel=SPEED,
        ),
    ] = 1,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace results of other rows or another model in DIR.")
    ] = False,
    allow_private_urls: AllowPrivateURLs = False,
    no_metadata: Annotated[
        bool, Option("--no-metadata", help="Leave the recipe out of the files.", rich_help_panel=RECORDS)
    ] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Run many edits with a model that is loaded once.

    A row is like {"id": "sky", "image": "photo.jpg", "prompt": "make the sky red", "seed": 3}. The prompt is required.
    The other names are arguments of joyjax.edit in Python: options of `joyjax edit` with _ for -. "image" is a file or
    a list of files, "mask" a file. Files are relative to the folder of REQUESTS.jsonl, or to the current one if that is
    a pipe, and may be URLs. "seed" may be "random". The default id is the number of the line, as in 0007.

    A row gives DIR/ID.png, and DIR/ID.json with a record of the edit. A row that fails gives its error in DIR/ID.json;
    the others go on, and the exit status is 1. If the run is stopped, the same command runs the missing and the failed
    rows. A row counts as done by its text: changes in the files that it names are not detected.

    Prints the path of each result.
    """
    from joyjax.batch.folder import Model as Used
    from joyjax.batch.folder import check_folder, hold_folder
    from joyjax.batch.rows import read_rows
    from joyjax.batch.run import run_rows
    from joyjax.commands.cancel import GOES_ON, message_on_interrupt
    from joyjax.commands.console import note, result
    from joyjax.commands.progress import peak, working
    from joyjax.convert.source.model import model_folder
    from joyjax.runtime.storage import loaded_form

    form = quantized_form(options)
    rows = read_rows(requests)
    source = requests.parent if requests.is_file() else Path()
    folder = model_folder(model)
    used = Used.of(folder, options["dtype"] or LOAD["dtype"].default, loaded_form(folder, form))
    make_folder("--output", output)
    with hold_folder(output):
        # before a large model is loaded
        found = check_folder(output, rows, used, source, requests=requests, overwrite=overwrite)
        there = Counter(found.values())["done"]

        pipeline = load_pipeline(folder, options, form)
        if pipeline.domain is not None:
            note(pipeline.domain.about)
        if there:
            note(f"{there} of {len(rows)} are there already")
        done = failed = 0

        def stopped() -> str:
            return f"{done} done, {there} there already, {failed} failed; {GOES_ON}"

        with message_on_interrupt(stopped), working(len(rows)) as (callback, advance_row):
            try:
                for one in run_rows(
                    pipeline,
                    rows,
                    source,
                    output,
                    batch_size=batch_size,
                    overwrite=overwrite,
                    metadata=not no_metadata,
                    allow_private_urls=allow_private_urls,
                    callback=callback,
                ):
                    advance_row()
                    for text in one.notes:
                        note(f"{one.row.name}: {text}")
                    if one.error is not None:
                        failed += 1
                        note(f"{one.row.name}: failed: {one.error}")
                    elif not one.skipped:
                        done += 1
                        result(one.picture)
            except JoyJaxError:  # nothing can be written any more
                note(stopped())
                raise
    most = peak()
    note(f"{done} done, {there} there already, {failed} failed" + ("" if most is None else f"; {most}"))
    if failed:
        raise JoyJaxError(f"{failed} of {len(rows)} requests failed; each error is in its .json file in {output}")
