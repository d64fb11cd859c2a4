"""`joyjax convert`: convert a Diffusers checkpoint to Orbax."""

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
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.")],
    dtype: Annotated[DType | None, Option(help="Dtype to convert to.  [default: as in the source]")] = None,
    quantize: Annotated[
        Form | None,
        Option(
            help="Form of the transformer's linear maps; `float8`, approximate, halves their size.  [default: exact]"
        ),
    ] = None,
    component: Annotated[str | None, Option(help="Convert only this component, such as vae.", metavar="NAME")] = None,
    share: Annotated[
        Path | None, Option(help="Converted folder, of which equal parts are linked.", metavar="FOLDER")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing files in the target.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to Orbax.

    The converted folder is self-contained, with configs, tokenizer and processor. Every part is read back and compared.
    The same command resumes a stopped conversion. Prints the folder's path.
    """
    from joyjax.commands.cancel import GOES_ON, message_on_interrupt
    from joyjax.commands.console import note
    from joyjax.commands.progress import gibibytes, loading
    from joyjax.families.registry import family_in
    from joyjax.runtime.convert import convert_model

    with message_on_interrupt(lambda: GOES_ON), loading("converting") as advance:
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
        if "layers" in family.tasks:
            example = '"a red fox in the snow" --image fox.jpg'  # says what is in the picture
        note(f"next: joyjax edit {example} --model {shlex.quote(str(target))}")
    typer.echo(target)
