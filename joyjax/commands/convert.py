"""`joyjax convert`: a Diffusers checkpoint to an Orbax one."""

from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.edit import DType

Option = typer.Option


def command(
    source: Annotated[Path, typer.Argument(help="Diffusers folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write; it stands alone.", show_default=False)],
    dtype: Annotated[DType | None, Option(help="Convert to this.  [default: as in the source]")] = None,
    component: Annotated[str | None, Option(help="Convert this component alone, such as vae.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing target.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert a Diffusers checkpoint to an Orbax checkpoint with its configs, tokenizer and processor."""
    from joyjax.commands.progress import loading, note
    from joyjax.convert.conversion import convert_checkpoint
