"""`joyjax edit`: one edit from the command line."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import (
    GUIDANCE_UNTIL,
    LINEAR,
    VAE_DECODE,
    VAE_ENCODE,
    BaseSize,
    Cache,
    DType,
    Fit,
    Linear,
    VAEMode,
    make_folder,
)
from joyjax.errors import RequestError

if TYPE_CHECKING:
    from joyjax.result import Result
    from joyjax.running import StepEvent

Option = typer.Option
MOST_IMAGES = 1000
DEFAULT = Path("edit.png")


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
            metavar="MODEL",
            help="Diffusers folder, one that `convert` wrote, or a hub id.  [default: the demo]",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        Option(
            "--from",
            metavar="FILE",
            help="Make the picture of a PNG that joyjax wrote again; options given here win over its own.",
        ),
    ] = None,
    steps: Annotated[
        int | None, Option(metavar="N", min=1, max=1000, help="Denoising steps.  [default: the model's own, 40 or 30]")
    ] = None,
    guidance_scale: Annotated[
        str | None,
        Option(
            metavar="X",
            help="Strength of guidance; 1 or less: none. Or one for each step, as in 4,4,1.  "
            "[default: the model's own, 4]",
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, Option(metavar="TEXT", help="What to steer away from.  [default: the model's own]")
    ] = None,
    seed: Annotated[str | None, Option(help="A whole number, or `random`.  [default: 0]", metavar="N|random")] = None,
    num_images: Annotated[
        int, Option(metavar="N", min=1, max=MOST_IMAGES, help="How many results, each with the next seed.")
    ] = 1,
    height: Annotated[
        int | None,
        Option(
            metavar="N",
            min=16,
            max=8192,
            help="Of the result, in pixels, with --width; snapped to the nearest bucket.  [default: the picture's]",
        ),
    ] = None,
    width: Annotated[
        int | None,
        Option(metavar="N", min=16, max=8192, help="Likewise, with --height."),
    ] = None,
    exact_size: Annotated[
        bool | None, Option("--exact-size", help="Use --height and --width as they are; multiples of 16.")
    ] = None,
    base_size: Annotated[
        BaseSize | None, Option(help="Size of the buckets: side of the square.  [default: the model's own]")
    ] = None,
    fit: Annotated[
        Fit | None,
        Option(
            help="How pictures come to their size: cut at the edges, or whole with padding that the result loses "
            "again.  [default: crop]"
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="White where the picture may change, black where not a bit of it may; as large as the picture.",
        ),
    ] = None,
    paste_back: Annotated[
        bool | None, Option("--paste-back", help="Put the result back into the picture, at its own resolution.")
    ] = None,
    sigmas: Annotated[
        str | None,
        Option(metavar="X,…", help="Noise levels, falling from at most 1, one for each step, as in 1,0.7,0.3."),
    ] = None,
    dtype: Annotated[DType | None, Option(help="Of parameters and matrix products.  [default: bfloat16]")] = None,
    linear: Annotated[Linear | None, LINEAR] = None,
    mesh: Annotated[
        str | None,
        Option(
            help="Split over devices, as in tensor=4,sequence=2; axes: data, cfg, sequence, tensor.", metavar="AXES"
        ),
    ] = None,
    distributed: Annotated[
        bool, Option("--distributed", help="Run with the same command on other hosts: docs/parallel.md.")
    ] = False,
    vae_encode: Annotated[VAEMode | None, VAE_ENCODE] = None,
    vae_decode: Annotated[VAEMode | None, VAE_DECODE] = None,
    guidance_until: Annotated[float | None, GUIDANCE_UNTIL] = None,
    cache: Cache = None,
    preview_dir: Annotated[
        Path | None,
        Option(metavar="DIR", help="Write a picture of what each step points at there; each costs a decoding."),
    ] = None,
    no_metadata: Annotated[bool, Option("--no-metadata", help="Leave the recipe out of the PNG file.")] = False,
    timings: Annotated[bool, Option("--timings", help="Tell what each stage took, and the peak of memory.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Edit a picture as the prompt says.

    Prints the path of each result; what was done to the picture is told on standard error. Ctrl-C ends the edit after
    the step that is running, and results that are finished stay.
    """
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("given twice, as an argument and as --prompt", param_hint="prompt")
    given: dict[str, Any] = {
        "prompt": prompt if prompt is not None else prompt_option,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": _numbers("--guidance-scale", guidance_scale),
        "height": height,
        "width": width,
        "exact_size": exact_size,
        "base_size": None if base_size is None else int(base_size.value),
        "fit": fit and fit.value,
        "paste_back": paste_back,
        "sigmas": _numbers("--sigmas", sigmas, always_list=True),
        "vae_encode": vae_encode and vae_encode.value,
        "vae_decode": vae_decode and vae_decode.value,
        "guidance_until": guidance_until,
        "cache": cache,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if recipe is None and "prompt" not in given:
        raise typer.BadParameter(
            'missing: write what to change, as in joyjax edit "make the sky red"', param_hint="prompt"
        )
    number = None if seed is None else _seed(seed)

    from joyjax.commands.again import Again, overridden, read_again
    from joyjax.commands.progress import advising, loading, note, peak, stepping
    from joyjax.inputs.image import open_picture, save_png

    first = True
    if distributed:
        if mesh is None:
            raise RequestError("--distributed needs --mesh, which says how the devices of all hosts work together")
        from joyjax.sharding.hosts import agree, is_first, join_hosts

        join_hosts()
        number, first = agree(number) if seed == "random" and number is not None else number, is_first()
    again = Again() if recipe is None else read_again(recipe, model, image, mask)
    if number is not None:
        given["seed"] = number
    options = {"seed": 0, **overridden(again.options, given), **given}
    options["image"] = [open_picture(path) for path in image or again.image] or None
    if mask or again.mask:
        options["mask"] = open_picture(mask or again.mask or "")
    targets = _targets(output, num_images) if first else []
    if preview_dir is not None and first:
        make_folder("--preview-dir", preview_dir)

    import joyjax
    from joyjax.editing import edit_each
    from joyjax.sharding.mesh import parse_mesh

    started = time.perf_counter()
    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(
            model or again.model,
            dtype=dtype.value if dtype else again.dtype,
            mesh=devices,
            linear=linear.value if linear else again.linear,
            progress=advance,
        )
    if timings and first:
        note(f"{'load':>12} {time.perf_counter() - started:8.2f} s")
    if pipeline.native.learned == "shapes" and first:
        from joyjax.shapes.advice import ABOUT

        note(ABOUT)

    def watch(target: Path) -> Any:
        def step(event: "StepEvent") -> None:
            advance_step(event)
            if preview_dir is not None:
                drawn = event.preview()  # by all processes of the run
                if first:
                    save_png(drawn, preview_dir / f"{target.stem}-step-{event.step:03}.png")

        return step

    with advising(), stepping() as advance_step:
        rows = [
            {**options, "seed": options["seed"] + n, "callback": watch(targets[n] if first else Path())}
            for n in range(num_images)
        ]
        for n, result in edit_each(pipeline, rows, batch_size=1):
            if not first:  # the first process writes and speaks
                continue
            for crop in result.crops if n == 0 else ():
                if crop.source != crop.size:
                    note(str(crop))
            if result.settings["cache"] is not None:
                note(f"cache: {result.computed_steps} of {result.settings['steps']} steps computed in full")
            target = targets[n]
            if target != output and target.exists():  # another edit has written there meanwhile
                target = next(_free(output, targets))
            result.save(target, metadata=not no_metadata)
            if seed == "random" or num_images > 1:
                note(f"seed {result.seed}" + f": {target}" * (num_images > 1))
            if timings:
                _tell_times(result)
            typer.echo(target)
    if timings and first and (most := peak()) is not None:
        note(most)


def _tell_times(result: "Result") -> None:
    from joyjax.commands.progress import note

    for stage, seconds in result.timings.items():
        each = f", {seconds / result.settings['steps']:.3f} s a step" if stage == "denoise" else ""
        note(f"{stage:>12} {seconds:8.2f} s{each}")


def _seed(text: str) -> int:
    if text == "random":
        import secrets

        return secrets.randbelow(2**32)
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a whole number from 0, nor `random`", param_hint="--seed")
    return int(text)


def _numbers(option: str, text: str | None, *, always_list: bool = False) -> float | list[float] | None:
    """Read a number, or several with commas between them."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number, nor numbers with commas between", param_hint=option) from None
    return values if always_list or len(values) > 1 else values[0]


def _targets(output: Path | None, count: int) -> list[Path]:
    """Return where the results go, checked before the work begins; only a named file is ever overwritten."""
    if output is not None:
        _check_output(output)
    _check_writable(output or DEFAULT)
    named = [] if output is None else [output]
    return [*named, *itertools.islice(_free(output, named), count - len(named))]


def _free(output: Path | None, taken: list[Path]) -> Iterator[Path]:
    """Give edit.png, edit-2.png and so on, but for what exists or is taken."""
    first = output or DEFAULT
    numbered = (first.with_name(f"{first.stem}-{number}{first.suffix}") for number in itertools.count(2))
    return (path for path in itertools.chain([first], numbered) if path not in taken and not path.exists())


def _check_output(output: Path) -> None:
    if output.suffix.lower() != ".png":
        raise RequestError(f"--output is {output}; results are PNG files: give a name that ends in .png")
    if output.is_dir():
        raise RequestError(f"--output is {output}, which is a folder; give the name of a file")
    if not output.parent.is_dir():
        raise RequestError(f"--output is {output}; the folder {output.parent} does not exist: make it first")


def _check_writable(path: Path) -> None:
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"{path.parent.absolute()} is not writable; name another place with --output")
