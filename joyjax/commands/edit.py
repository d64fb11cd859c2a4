"""`joyjax edit`: one edit from the command line."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import (
    OF_EDIT,
    OF_LOAD,
    AllowPrivateURLs,
    Debug,
    declared,
    given,
    load_pipeline,
    make_folder,
    parsed,
    quantized_form,
    takes,
)
from joyjax.errors import RequestError
from joyjax.options import DEVICES, EDIT, RECORDS

if TYPE_CHECKING:
    from joyjax.runtime.job import StepEvent
    from joyjax.runtime.result import Result

Option = typer.Option
MOST_IMAGES = 1000


@takes(*OF_EDIT, *OF_LOAD)
def command(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help=EDIT["prompt"].help)] = None,
    prompt_option: Annotated[
        str | None, Option("--prompt", "-p", metavar="TEXT", help="The prompt, in place of the argument.")
    ] = None,
    image: Annotated[list[str] | None, declared("image")] = None,
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write: .png, .jpg, .webp, .avif or .tiff, or - for standard output.  "
            "[default: edit.png, then edit-2.png, …]",
        ),
    ] = None,
    model: Annotated[str | None, declared("model")] = None,
    recipe: Annotated[
        Path | None,
        Option(
            "--from",
            metavar="FILE",
            help="Repeat the edit whose recipe is in this picture; options given here replace those of the recipe.",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    seed: Annotated[str | None, declared("seed")] = None,
    num_images: Annotated[
        int, Option(metavar="N", min=1, max=MOST_IMAGES, help="Number of results, each with the next seed.")
    ] = 1,
    mesh: Annotated[str | None, declared("mesh")] = None,
    distributed: Annotated[
        bool,
        Option(
            "--distributed",
            help="Run together with the same command on other hosts: docs/parallel.md.",
            rich_help_panel=DEVICES,
        ),
    ] = False,
    preview_dir: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Write a preview of each step into this folder; each takes one decoding.",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    quality: Annotated[
        str | None,
        Option(
            metavar="N|lossless",
            help="Quality of a .jpg, .webp or .avif, from 1 to 100.  [default: 95, lossless, 90]",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    allow_private_urls: AllowPrivateURLs = False,
    no_metadata: Annotated[
        bool, Option("--no-metadata", help="Leave the recipe out of the file.", rich_help_panel=RECORDS)
    ] = False,
    timings: Annotated[
        bool,
        Option("--timings", help="Print the time of each stage and peak memory.", rich_help_panel=RECORDS),
    ] = False,
    profile: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Write a JAX profile of the denoising into this folder, new or empty.",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Edit a picture by a prompt.

    Prints the path of each result on standard output, and notes on the fit of the picture on standard error. Ctrl-C
    stops the edit at once; finished results are kept.
    """
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("given twice, as an argument and as --prompt", param_hint="prompt")
    if profile is not None and num_images > 1:
        raise typer.BadParameter(f"is of one edit, and --num-images is {num_images}", param_hint="--profile")
    mask, form = options.pop("mask"), quantized_form(options)
    chosen = given({**options, "prompt": prompt if prompt is not None else prompt_option}, OF_EDIT)
    if recipe is None and "prompt" not in chosen:
        raise typer.BadParameter(
            'missing: write what to change, as in joyjax edit "make the sky red"', param_hint="prompt"
        )
    number = _random_seed() if seed == "random" else parsed("seed", seed)
    if [*(image or []), mask].count("-") > 1:
        raise typer.BadParameter("- is given twice, and standard input can be read once", param_hint="--image/--mask")

    from joyjax.commands.console import note
    from joyjax.commands.console import result as show
    from joyjax.commands.progress import advising, peak, stepping
    from joyjax.commands.replay import Replay, overridden, read_replay
    from joyjax.commands.targets import STANDARD_OUTPUT, Previews, Targets
    from joyjax.convert.source.model import model_folder
    from joyjax.media.image import open_picture
    from joyjax.media.load import load_image

    first = True
    if distributed:
        if mesh is None:
            raise RequestError("--distributed needs --mesh, which gives the axes over the devices of all hosts")
        from joyjax.sharding.hosts import agree, is_first, join_hosts

        join_hosts()
        number, first = agree(number) if seed == "random" and number is not None else number, is_first()
    replay = Replay() if recipe is None else read_replay(recipe, model, image, mask)
    if number is not None:
        chosen["seed"] = number
    request = {"seed": EDIT["seed"].default, **overridden(replay.options, chosen), **chosen}
    targets = Targets(output, _quality(quality), metadata=not no_metadata)
    read_files: list[tuple[str, str | Path]] = [("--image", one) for one in image or replay.image]
    read_files += [("--mask", one) for one in (mask or replay.mask,) if one is not None]
    if first:
        targets.check(num_images, read_files)
    read = functools.partial(load_image, allow_private_urls=allow_private_urls)
    pictures = [read(one) for one in image] if image else [open_picture(path) for path in replay.image]
    request["image"] = pictures or None  # None: text to image
    if mask is not None:
        request["mask"] = read(mask)
    elif replay.mask is not None:
        request["mask"] = open_picture(replay.mask)
    if preview_dir is not None and first:
        make_folder("--preview-dir", preview_dir)
    if profile is not None:
        from joyjax.runtime.profile import check_profile_folder, trace_file

        check_profile_folder(profile)
        profile = profile if first else None

    from joyjax.api import edit_each

    folder = model_folder(model or replay.model)
    started = time.perf_counter()
    of_load = {
        "dtype": options["dtype"] or replay.dtype,
        "mesh": mesh,
        "kernels": options["kernels"] or replay.kernels,
    }
    pipeline = load_pipeline(folder, of_load, form or replay.linear)
    if timings and first:
        note(f"{'load':>12} {time.perf_counter() - started:8.2f} s")
    if pipeline.domain is not None and first:
        note(pipeline.domain.about)
    if "layers" in pipeline.family.tasks and first:
        targets.check_layers(read_files)

    def watch(number: int) -> Any:
        previews: list[Previews] = []

        def step(event: "StepEvent") -> None:
            advance_step(event)
            if preview_dir is not None:
                drawn = event.preview()  # runs on all processes
                if first:
                    if not previews:
                        previews.append(Previews(preview_dir, targets.expected(number).stem))
                    previews[0].save(drawn, event.step)

        return step

    with advising(), stepping() as advance_step:
        rows = [{**request, "seed": request["seed"] + n, "callback": watch(n)} for n in range(num_images)]
        for n, result in edit_each(pipeline, rows, batch_size=1, profile=profile):
            if not first:  # only the first process writes and prints
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
            for file in result.files(target) if target != STANDARD_OUTPUT else ():
                show(file)
    if profile is not None:
        note(f"profile: {trace_file(profile)}, for https://ui.perfetto.dev; or the folder, for xprof {profile}")
    if timings and first and (most := peak()) is not None:
        note(most)


def _show_times(result: "Result") -> None:
    from joyjax.commands.console import note

    for stage, seconds in result.timings.items():
        each = f", {seconds / result.settings['steps']:.3f} s a step" if stage == "denoise" else ""
        note(f"{stage:>12} {seconds:8.2f} s{each}")


def _random_seed() -> int:
    import secrets

    return secrets.randbelow(2**32)


def _quality(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text
