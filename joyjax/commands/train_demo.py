"""`joyjax train-demo`: train the bundled demo model from scratch, or train it further."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.options import Debug, DType
from joyjax.errors import RequestError

Option = typer.Option


def command(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write the checkpoint to.")],
    work: Annotated[
        Path, Option(metavar="DIR", help="Folder for states, metrics and plots; the same command resumes from it.")
    ] = Path("demo-training"),
    start: Annotated[
        Path | None, Option(metavar="FOLDER", help="A demo checkpoint to train further, in place of random weights.")
    ] = None,
    steps: Annotated[int, Option(metavar="N", min=100, help="Of text encoder and transformer.")] = 12000,
    autoencoder_steps: Annotated[int, Option(metavar="N", min=100, help="Of the autoencoder.")] = 2000,
    batch: Annotated[int, Option(metavar="N", min=1, help="Edits in a step.")] = 32,
    rate: Annotated[float, Option(metavar="X", min=0, help="Peak rate of Muon; Adam's is 0.15 of it.")] = 0.02,
    decay: Annotated[
        float, Option(metavar="X", min=0, max=1, help="Last part of the steps, with a falling rate.")
    ] = 0.5,
    seed: Annotated[int, Option(metavar="N", min=0, help="Fixes weights, data and noise.")] = 0,
    dtype: Annotated[DType, Option(help="Of matrix products; parameters are float32.")] = DType.FLOAT32,
    mesh: Annotated[str | None, Option(help="Split over devices, as in data=8.", metavar="AXES")] = None,
    debug: Debug = False,
) -> None:
    """Train the demo model from scratch, or train it further.

    Takes minutes on a GPU and hours on two CPU cores, and needs the packages of joyjax[train].
    """
    if target.exists() and not target.is_dir():
        raise RequestError(f"target {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "joyjax.json").is_file():
        raise RequestError(f"target {target} holds other files; name a new folder, or one with a demo model to replace")
    try:
        import matplotlib  # noqa: F401
        import optax  # noqa: F401
    except ImportError as error:
        raise RequestError(f"training needs {error.name}; install it with: pip install 'joyjax[train]'") from None

    from joyjax.commands.cancel import GOES_ON, message_on_interrupt
    from joyjax.commands.console import note
    from joyjax.convert.source.model import model_folder
    from joyjax.sharding.mesh import parse_mesh
    from joyjax.training.recipe import Recipe, train_demo

    recipe = Recipe(steps=steps, seed=seed, dtype=dtype.value, muon_rate=rate, adam_rate=0.15 * rate, decay=decay)
    recipe = dataclasses.replace(
        recipe,
        autoencoder=dataclasses.replace(recipe.autoencoder, steps=autoencoder_steps),
        stream=dataclasses.replace(recipe.stream, batch=batch),
    )
    devices = None if mesh is None else parse_mesh(mesh)
    folder = None if start is None else model_folder(start)
    with message_on_interrupt(lambda: GOES_ON):
        train_demo(recipe, work, target, start=folder, mesh=devices, report=note)
    typer.echo(target)
