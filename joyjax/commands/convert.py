"""`joyjax convert`: a Diffusers checkpoint to an Orbax one."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.options import Debug, DType, Form

Option = typer.Option


def command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Diffusers folder, or hub id such as owner/name@revision.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write; it stands alone.")],
    dtype: Annotated[DType | None, Option(help="Convert to this.  [default: as in the source]")] = None,
    quantize: Annotated[
        Form | None,
        Option(
            help="Store the transformer's linear maps so: `float8` halves them, an approximation.  [default: exact]"
        ),
    ] = None,
    component: Annotated[str | None, Option(help="Convert this component alone, such as vae.", metavar="NAME")] = None,
    share: Annotated[
        Path | None, Option(help="Converted folder; link to its parts where they are equal.", metavar="FOLDER")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is in the target already.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to Orbax.

    The converted folder stands alone, with configs, tokenizer and processor. Every part is read back. If it is stopped,
    the same command goes on from there. Prints the folder's path.
    """
    from joyjax.commands.cancel import GOES_ON, last_words
    from joyjax.commands.console import note
    from joyjax.commands.progress import gibibytes, loading
    from joyjax.families.registry import family_in
    from joyjax.runtime.convert import convert_model

    with last_words(lambda: GOES_ON), loading("converting") as advance:
        manifest = convert_model(
            source,
            target,
            dtype=None if dtype is None else dtype.value,
            quantize=None if quantize is None else quantize.value,
            component=component,
            share=share,
            overwrite=overwrite,
            progress=advance,
        )
    for name, converted in manifest.components.items():
        kinds = ", ".join(sorted({stored.dtype for stored in converted.parameters.values()}))
        note(f"{name:14} {len(converted.parameters):5} tensors  {gibibytes(converted.nbytes):>10}  {kinds}")
    family = family_in(target)
    if set(manifest.components) == {component.folder for component in family.components}:
        example = '"make the sky red" --image photo.jpg' if "edit" in family.tasks else '"a red fox in the snow"'
        note(f"next: joyjax edit {example} --model {shlex.quote(str(target))}")
    typer.echo(target)
