"""`joyjax batch`: many edits with one warm model."""

from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.options import DType, Linear, Linears, MeshAxes, Model
from joyjax.errors import JoyJaxError

Option = typer.Option


def command(
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS.jsonl", help="One JSON object in each line: options of an edit.")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for the results; made if missing.")],
    model: Model = None,
    batch_size: Annotated[
        int, Option(metavar="N", min=1, help="Edits denoised together, where their shapes agree.")
    ] = 1,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace results of other requests in DIR.")] = False,
    no_metadata: Annotated[bool, Option("--no-metadata", help="Leave the recipe out of the PNG files.")] = False,
    dtype: Annotated[DType, Option(help="Of parameters and matrix products.")] = DType.BFLOAT16,
    linear: Linears = Linear.EXACT,
    mesh: MeshAxes = None,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run many edits with one warm model.

    A row is like {"id": "sky", "image": "photo.jpg", "prompt": "make the sky red", "seed": 3}; its files are relative
    to the file of requests. Each row gives DIR/ID.png and DIR/ID.json; a row that fails gives its error in DIR/ID.json,
    and the others go on. The same command again does what is missing. Prints the path of each result.
    """
    import joyjax
    from joyjax.batching import read_rows, run_rows
    from joyjax.commands.progress import advising, loading, note, working
    from joyjax.sharding.mesh import parse_mesh

    rows = read_rows(requests)
    if output.exists() and not output.is_dir():
        raise JoyJaxError(f"--output is {output}, which is a file; name a folder")
    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(model, dtype=dtype.value, mesh=devices, linear=linear.value, progress=advance)
    failed = skipped = 0
    with advising(), working(len(rows)) as (callback, advance_row):
        for done in run_rows(
            pipeline,
            rows,
            requests.parent,
            output,
            batch_size=batch_size,
            overwrite=overwrite,
            metadata=not no_metadata,
            callback=callback,
        ):
            advance_row()
            if done.error is not None:
                failed += 1
                note(f"{done.row.name}: {done.error}")
            elif done.skipped:
                skipped += 1
            else:
                typer.echo(done.picture)
    note(f"{len(rows) - failed - skipped} done, {skipped} there already, {failed} failed")
    if failed:
        raise JoyJaxError(f"{failed} of {len(rows)} requests failed; each error is in its .json file in {output}")
