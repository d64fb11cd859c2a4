"""`joyjax edit`: one edit from the command line."""

import os
from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.options import BaseSize, Cache, DType, GuidanceUntil, Linear, Linears, VAEMode
from joyjax.errors import RequestError

Option = typer.Option


def command(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to change.")] = None,
    prompt_option: Annotated[
        str | None, Option("--prompt", "-p", metavar="TEXT", help="The prompt, in place of the argument.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        Option(
            "--image", "-i", metavar="FILE", help="Picture to edit; repeat for several references; none: text to image."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="FILE", help="Where to write.  [default: edit.png, then edit-2.png, …]"),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            "--model",
            "-m",
            metavar="FOLDER",
            help="Diffusers folder, or one that `convert` wrote.  [default: the demo]",
        ),
    ] = None,
    steps: Annotated[
        int | None, Option(metavar="N", min=1, max=1000, help="Denoising steps.  [default: the model's own, 40 or 30]")
    ] = None,
    guidance_scale: Annotated[
        float | None, Option(metavar="X", help="Strength of guidance; 1 or less: none.  [default: the model's own, 4]")
    ] = None,
    negative_prompt: Annotated[
        str | None, Option(metavar="TEXT", help="What to steer away from.  [default: the model's own]")
    ] = None,
    seed: Annotated[str, Option(help="A whole number, or `random`.", metavar="N|random")] = "0",
    height: Annotated[
        int | None,
        Option(metavar="N", min=16, max=8192, help="Of the result, in pixels; snapped to the nearest bucket."),
    ] = None,
    width: Annotated[
        int | None,
        Option(metavar="N", min=16, max=8192, help="Of the result, in pixels; snapped to the nearest bucket."),
    ] = None,
    exact_size: Annotated[bool, Option("--exact-size", help="Use --height and --width as they are.")] = False,
    base_size: Annotated[
        BaseSize | None, Option(help="Size of the buckets: side of the square.  [default: the model's own]")
    ] = None,
    dtype: Annotated[DType, Option(help="Of parameters and matrix products.")] = DType.BFLOAT16,
    linear: Linears = Linear.EXACT,
    mesh: Annotated[
        str | None,
        Option(
            help="Split over devices, as in tensor=4,sequence=2; axes: data, cfg, sequence, tensor.", metavar="AXES"
        ),
    ] = None,
    distributed: Annotated[
        bool, Option("--distributed", help="Run with the same command on other hosts: docs/parallel.md.")
    ] = False,
    vae_encode: Annotated[
        VAEMode, Option(help="How pictures become latents; all but `exact` are approximations: docs/parallel.md.")
    ] = VAEMode.EXACT,
    vae_decode: Annotated[
        VAEMode, Option(help="How latents become a picture; `tiled` needs the least memory, `exact` is exact.")
    ] = VAEMode.EXACT,
    guidance_until: GuidanceUntil = 1.0,
    cache: Cache = None,
    timings: Annotated[bool, Option("--timings", help="Print what each stage took.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Edit a picture as the prompt says.

    Prints the path of the result.
    """
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("given twice, as an argument and as --prompt", param_hint="prompt")
    text = prompt if prompt is not None else prompt_option
    if text is None:
        raise typer.BadParameter(
            'missing: write what to change, as in joyjax edit "make the sky red"', param_hint="prompt"
        )
    number = _seed(seed)

    from joyjax.commands.progress import advising, loading, note, stepping
    from joyjax.inputs.image import open_picture, save_png

    first = True
    if distributed:
        if mesh is None:
            raise RequestError("--distributed needs --mesh, which says how the devices of all hosts work together")
        from joyjax.sharding.hosts import agree, is_first, join_hosts

        join_hosts()
        number, first = agree(number) if seed == "random" else number, is_first()
    pictures = [open_picture(path) for path in image or []]
    target = _target(output) if first else None

    import joyjax
    from joyjax.sharding.mesh import parse_mesh

    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(model, dtype=dtype.value, mesh=devices, linear=linear.value, progress=advance)
    if model is None and first:
        from joyjax.shapes.advice import ABOUT

        note(ABOUT)
    with advising(), stepping() as callback:
        result = joyjax.edit(
            pipeline,
            pictures,
            text,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=number,
            height=height,
            width=width,
            exact_size=exact_size,
            base_size=None if base_size is None else int(base_size.value),
            vae_encode=vae_encode.value,
            vae_decode=vae_decode.value,
            guidance_until=guidance_until,
            cache=cache,
            callback=callback,
        )
    if target is None:  # the first process writes and speaks
        return
    if result.crop is not None and result.crop.lost > 0.005:
        left, top, right, bottom = (round(side) for side in result.crop.box)
        height, width = result.crop.source
        note(
            f"cropped: {result.crop.lost:.1%} of the picture ({width} × {height}) is lost to fit the size; "
            f"columns {left} to {right} and rows {top} to {bottom} are left"
        )
    if cache is not None:
        note(f"cache: {result.computed_steps} of {result.settings['steps']} steps computed in full")
    if seed == "random":
        note(f"seed {number}")
    save_png(result.image, target)
    if timings:
        for stage, seconds in result.timings.items():
            note(f"{stage:>12} {seconds:8.2f} s")
    typer.echo(target)


def _seed(text: str) -> int:
    if text == "random":
        import secrets

        return secrets.randbelow(2**32)
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a whole number from 0, nor `random`", param_hint="--seed")
    return int(text)


def _target(output: Path | None) -> Path:
    """Return where the result goes, checked before the work begins; only a named file is ever overwritten."""
    if output is None:
        number = 1
        while (path := Path("edit.png" if number == 1 else f"edit-{number}.png")).exists():
            number += 1
        _check_writable(path)
        return path
    if output.suffix.lower() != ".png":
        raise RequestError(f"--output is {output}; results are PNG files: give a name that ends in .png")
    if output.is_dir():
        raise RequestError(f"--output is {output}, which is a folder; give the name of a file")
    if not output.parent.is_dir():
        raise RequestError(f"--output is {output}; the folder {output.parent} does not exist: make it first")
    _check_writable(output)
    return output


def _check_writable(path: Path) -> None:
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"{path.parent.absolute()} is not writable; name another place with --output")
