"""`joyjax info`: describe a checkpoint, the recipe of a picture, or another file or folder."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import AsJSON, Debug

if TYPE_CHECKING:
    from joyjax.convert.source.identity import Identity
    from joyjax.runtime.info import ModelInfo

Option = typer.Option


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_PNG",
            help="Diffusers folder, folder of `convert`, or hub id; or a picture that joyjax wrote.",
        ),
    ] = None,
    verified: Annotated[bool, Option("--verify", help="Also read and check every weight.")] = False,
    mesh: Annotated[
        str | None,
        Option(help="Print what each device of a mesh would hold, as in tensor=4,sequence=2.", metavar="AXES"),
    ] = None,
    kernels: Annotated[
        bool, Option("--kernels", help="In place of a model: print what was measured of GPU kernels on this machine.")
    ] = False,
    as_json: AsJSON = False,
    debug: Debug = False,
) -> None:
    """Describe a checkpoint, or how a picture was made.

    For a checkpoint: its family, networks, sizes and dtypes, and the memory to run it; weights are read only with
    --verify. For a picture that joyjax wrote: its recipe. For another model or file: its kind, and what joyjax needs.
    With --kernels, without a model: the measurements by which edits choose between GPU kernels and XLA's own forms.
    """
    if kernels:
        for option, given in (
            ("MODEL_OR_PNG", model is not None),
            ("--verify", verified),
            ("--mesh", mesh is not None),
        ):
            if given:
                raise typer.BadParameter("is of a model, and --kernels is of this machine", param_hint=option)
        _show_kernels(as_json)
        return
    if model is None:
        raise typer.BadParameter("missing: name a folder, a hub id or a picture", param_hint="MODEL_OR_PNG")

    from joyjax.convert.source.identify import identify
    from joyjax.convert.source.model import model_folder
    from joyjax.errors import CheckpointError

    options = (("--verify", verified), ("--mesh", mesh is not None))
    known = identify(model)
    if known.kind == "picture" or model.lower().endswith(".png"):
        _refuse_for(f"{model} is a file", options)
        _show_recipe(Path(model), as_json)
        return
    fetched = model_folder(model) if known.kind == "missing" else None  # a hub id, or an error
    known = known if fetched is None else identify(fetched)
    if known.state in ("foreign", "converts"):
        _refuse_for(str(known), options)
        _show_identity(known, as_json)
        return
    if known.state != "runs":
        raise CheckpointError(str(known))

    from joyjax.commands.progress import gibibytes, loading
    from joyjax.dtypes import NAMES
    from joyjax.runtime.info import describe, on_mesh, verify
    from joyjax.sharding.mesh import parse_axes

    folder = fetched or model_folder(model)
    described = describe(folder)
    meshes = [] if mesh is None else [on_mesh(folder, parse_axes(mesh), dtype) for dtype in NAMES]
    if mesh is not None:
        meshes += [on_mesh(folder, parse_axes(mesh), need.dtype, need.linear) for need in described.needs_quantized]
    if verified:
        with loading("verifying") as advance:
            verify(folder, advance)
    if as_json:
        on_meshes = {} if mesh is None else {"mesh": [dataclasses.asdict(held) for held in meshes]}
        kind = {"kind": known.kind, "state": known.state}
        typer.echo(json.dumps(kind | dataclasses.asdict(described) | on_meshes, indent=2))
        return
    checked = ", every weight verified" if verified else ""
    typer.echo(f"{described.family} ({described.class_name}), {described.format} folder, complete{checked}")
    typer.echo(f"{'component':14} {'class':42} {'tensors':>8} {'parameters':>16} {'size':>11}  dtype")
    for part in described.components:
        row = (
            f"{part.folder:14} {part.class_name:42} {part.tensors:8} {part.parameters:16,} {gibibytes(part.bytes):>11}"
        )
        typer.echo(f"{row}  {', '.join(part.dtypes)}")
    total = f"{described.tensors:8} {described.parameters:16,} {gibibytes(described.bytes):>11}"
    typer.echo(f"{'total':57} {total}")
    typer.echo("parameters in memory while it runs, besides the working memory of each stage:")
    for need in (*described.needs, *described.needs_quantized):
        alone = f"the largest network alone {gibibytes(need.staged_bytes)}"
        typer.echo(f"  {need.dtype:9} {gibibytes(need.resident_bytes):>11}  ({alone}){_form(need.linear, described)}")
    if meshes:
        held = meshes[0]
        typer.echo(f"mesh {mesh}: each of {held.devices} devices holds")
        shared = f"ring {held.ring} × ulysses {held.ulysses}"
        typer.echo(f"  {held.heads} of the transformer's heads")
        typer.echo(f"  {held.image_tokens} image tokens of an edit with one reference ({shared})")
        for held in meshes:
            parts = ", ".join(f"{name} {gibibytes(size)}" for name, size in held.component_bytes.items())
            typer.echo(f"  {held.dtype:9} {gibibytes(held.bytes):>11}  ({parts}){_form(held.linear, described)}")


def _show_kernels(as_json: bool) -> None:
    from joyjax.runtime.kernel_cache import cache_folder, kept

    folder = cache_folder()
    found = list(kept(folder))
    if as_json:
        plain = [{**key, "rows": [dataclasses.asdict(row) for row in rows]} for key, rows in found]
        typer.echo(json.dumps(plain, indent=2))
        return
    if not found:
        typer.echo(
            f"no kernels have been measured here ({folder}); the first edit on a GPU does, or joyjax warmup MODEL"
        )
    for key, rows in found:
        shape = key["shape"]
        driver = f"driver {key['driver']}, " if key["driver"] else ""
        typer.echo(_printed(f"{key['device']}, {driver}JAX {key['jax']}, joyjax {key['joyjax']}", 4))
        typer.echo(
            f"{key['dtype']}, {shape['rows']} × ({shape['images']} + {shape['texts']}) tokens of {shape['channels']} "
            f"channels, {shape['heads']} heads of {shape['width']}"
        )
        typer.echo(f"  {'operation':38}{'XLA µs':>10}{'kernel µs':>11}  {'choice':8}reason")
        for row in rows:
            times = "".join(
                f"{'–' if value is None else f'{value:.1f}':>{width}}"
                for value, width in ((row.xla_us, 10), (row.kernel_us, 11))
            )
            chosen = row.kernel if row.chosen else "xla"
            reason = row.reason or (f"{row.ratio:.2f} × XLA's speed" if row.ratio else "")
            typer.echo("  " + _printed(f"{row.operation:38}{times}  {chosen:8}{reason}", 4).rstrip())


def _form(linear: str, described: "ModelInfo") -> str:
    """Describe the form of the kernels, and whether it is stored or needs an option."""
    if linear == described.needs[0].linear:
        return "" if linear == "exact" else f", {linear} as stored"
    return f", with --quantize {linear}"


def _refuse_for(reason: str, options: Iterable[tuple[str, bool]]) -> None:
    """Raise BadParameter for the first of the options, by name, that was given."""
    for option, given in options:
        if given:
            raise typer.BadParameter(f"is for a checkpoint, and {reason}", param_hint=option)


def _show_identity(known: "Identity", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(known), indent=2))
        return
    typer.echo(_printed(f"{known.path} is {known.what}", 4))
    for name, value in known.details.items():
        if value is not None:
            typer.echo("  " + _printed(f"{name:16} {value if isinstance(value, str) else json.dumps(value)}", 19))
    typer.echo(_printed(f"what to do: {known.advice}", 4))


def _show_recipe(path: Path, as_json: bool) -> None:
    from joyjax.provenance.recipe import read_recipe

    recipe = read_recipe(path)
    if as_json:
        typer.echo(json.dumps(recipe, indent=2))  # ASCII, so it holds no control sequences
        return
    made = f"{path}: made by joyjax {recipe['joyjax']} with JAX {recipe['jax']} on {recipe['device']}"
    typer.echo(_printed(made, 4))
    for name, value in _recipe_rows(recipe):
        typer.echo("  " + _printed(f"{name:16} {value}", 19).rstrip())


def _printed(text: str, indent: int) -> str:
    """Return a text with continuation lines indented, so that none looks like another row."""
    from joyjax.reading import printable

    return printable(text).replace("\n", "\n" + " " * indent)


def _recipe_rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    settings, model = dict(recipe["settings"]), recipe["model"]
    for name in ("prompt", "negative_prompt"):
        yield name, settings.pop(name)
    for number, source in enumerate(recipe["references"], 1):
        yield f"reference {number}", _picture(source)
    if recipe["mask"] is not None:
        yield "mask", _picture(recipe["mask"])
    source = "the bundled demo" if model["source"] is None else model["source"]
    kind = f"{model['family']}, {model['dtype']}, linear maps {model['linear']}, kernels {model['kernels']}"
    yield "model", f"{source}\n{kind}\n{model['fingerprint']}"
    for name, value in settings.items():
        yield name, value if isinstance(value, str) else json.dumps(value)


def _picture(source: Mapping[str, Any]) -> str:
    height, width = source["size"]
    file = source["file"] or source.get("url") or "not a file"
    return f"{file}\n{width} × {height} pixels, {source['digest']}"
