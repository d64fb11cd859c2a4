"""`joyjax edit`: one edit from the command line."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import (
    GUIDANCE_UNTIL,
    LINEAR,
    VAE_DECODE,
    VAE_ENCODE,
    AllowPrivateURLs,
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
    from joyjax.runtime.engine import StepEvent
    from joyjax.runtime.result import Result

Option = typer.Option
MOST_IMAGES = 1000


def command(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to change.")] = None,
    prompt_option: Annotated[
        str | None, Option("--prompt", "-p", metavar="TEXT", help="The prompt, in place of the argument.")
    ] = None,
    image: Annotated[
        list[str] | None,
        Option(
            "--image",
            "-i",
            metavar="FILE",
            help="Picture to edit: a file, a URL, or - for standard input; repeat for several references; none: text "
            "to image.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write: .png, .jpg, .webp, .avif or .tiff, or - for standard output.  "
            "[default: edit.png, then edit-2.png, …]",
        ),
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
            help="Make a picture that joyjax wrote again; options given here win over its own.",
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
        str | None,
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
    quality: Annotated[
        str | None,
        Option(metavar="N|lossless", help="Of a .jpg, .webp or .avif, from 1 to 100.  [default: 95, lossless, 90]"),
    ] = None,
    allow_private_urls: AllowPrivateURLs = False,
    no_metadata: Annotated[bool, Option("--no-metadata", help="Leave the recipe out of the file.")] = False,
    timings: Annotated[bool, Option("--timings", help="Print the time of each stage and peak memory.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Edit a picture as the prompt says.

    Prints the path of each result; what was done to the picture is said on standard error. Ctrl-C ends the program at
    once, and results that are finished stay.
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
    if [*(image or []), mask].count("-") > 1:
        raise typer.BadParameter("- is given twice, and standard input can be read once", param_hint="--image/--mask")

    from joyjax.commands.console import note
    from joyjax.commands.console import result as show
    from joyjax.commands.progress import advising, loading, peak, stepping
    from joyjax.commands.replay import Replay, overridden, read_replay
    from joyjax.commands.targets import STANDARD_OUTPUT, Previews, Targets
    from joyjax.convert.source.model import model_folder
    from joyjax.media.image import open_picture
    from joyjax.media.load import load_image

    first = True
    if distributed:
        if mesh is None:
            raise RequestError("--distributed needs --mesh, which says how the devices of all hosts work together")
        from joyjax.sharding.hosts import agree, is_first, join_hosts

        join_hosts()
        number, first = agree(number) if seed == "random" and number is not None else number, is_first()
    replay = Replay() if recipe is None else read_replay(recipe, model, image, mask)
    if number is not None:
        given["seed"] = number
    options = {"seed": 0, **overridden(replay.options, given), **given}
    targets = Targets(output, _quality(quality), metadata=not no_metadata)
    if first:
        read_files: list[tuple[str, str | Path]] = [("--image", one) for one in image or replay.image]
        read_files += [("--mask", one) for one in (mask or replay.mask,) if one is not None]
        targets.check(num_images, read_files)
    read = functools.partial(load_image, allow_private_urls=allow_private_urls)
    pictures = [read(one) for one in image] if image else [open_picture(path) for path in replay.image]
    options["image"] = pictures or None  # None: text to image
    if mask is not None:
        options["mask"] = read(mask)
    elif replay.mask is not None:
        options["mask"] = open_picture(replay.mask)
    if preview_dir is not None and first:
        make_folder("--preview-dir", preview_dir)

    import joyjax
    from joyjax.api import edit_each
    from joyjax.sharding.mesh import parse_mesh

    folder = model_folder(model or replay.model)
    started = time.perf_counter()
    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(
            folder,
            dtype=dtype.value if dtype else replay.dtype,
            mesh=devices,
            quantize=linear.value if linear else replay.linear,
            progress=advance,
        )
    if timings and first:
        note(f"{'load':>12} {time.perf_counter() - started:8.2f} s")
    if pipeline.generation_defaults.domain == "shapes" and first:
        from joyjax.shapes.advice import ABOUT

        note(ABOUT)

    def watch(number: int) -> Any:
        previews: list[Previews] = []

        def step(event: "StepEvent") -> None:
            advance_step(event)
            if preview_dir is not None:
                drawn = event.preview()  # by all processes of the run
                if first:
                    if not previews:
                        previews.append(Previews(preview_dir, targets.expected(number).stem))
                    previews[0].save(drawn, event.step)

        return step

    with advising(), stepping() as advance_step:
        rows = [{**options, "seed": options["seed"] + n, "callback": watch(n)} for n in range(num_images)]
        for n, result in edit_each(pipeline, rows, batch_size=1):
            if not first:  # the first process writes and speaks
                continue
            for crop in result.crops if n == 0 else ():
                if crop.source != crop.size:
                    note(str(crop))
            if result.settings["cache"] is not None:
                note(f"cache: {result.computed_steps} of {result.settings['steps']} steps computed in full")
            target = targets.save(result, n)
            if seed == "random" or num_images > 1:
                note(f"seed {result.seed}" + f": {target}" * (num_images > 1))
            if timings:
                _show_times(result)
            if target != STANDARD_OUTPUT:
                show(target)
    if timings and first and (most := peak()) is not None:
        note(most)


def _show_times(result: "Result") -> None:
    from joyjax.commands.console import note

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


def _quality(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text
