"""`joyjax convert`: a Diffusers checkpoint to an Orbax one."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.options import DType

Option = typer.Option


def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Diffusers folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write; it stands alone.")],
    dtype: Annotated[DType | None, Option(help="Convert to this.  [default: as in the source]")] = None,
    component: Annotated[str | None, Option(help="Convert this component alone, such as vae.", metavar="NAME")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is in the target already.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert a Diffusers checkpoint to Orbax.

    The converted folder stands alone, with configs, tokenizer and processor. Prints its path.
    """
    from joyjax import dtypes
    from joyjax.commands.progress import gibibytes, loading, note
    from joyjax.convert.conversion import convert_checkpoint
    from joyjax.families.registry import family_of
    from joyjax.inputs.files import read_json
    from joyjax.pipeline import model_folder

    folder = model_folder(source)
    index = folder / "model_index.json"
    family = family_of(read_json(index).get("_class_name"), str(index))
    with loading("converting") as advance:
        manifest = convert_checkpoint(
            folder,
            target,
            family.components,
            dtype=None if dtype is None else dtypes.by_name(dtype.value),
            component=component,
            overwrite=overwrite,
            progress=advance,
        )
    for name, converted in manifest.components.items():
        kinds = ", ".join(sorted({stored.dtype for stored in converted.parameters.values()}))
        note(f"{name:14} {len(converted.parameters):5} tensors  {gibibytes(converted.nbytes):>10}  {kinds}")
    if len(manifest.components) == len(family.components):
        note(f'next: joyjax edit "make the sky red" --image photo.jpg --model {shlex.quote(str(target))}')
    typer.echo(target)
