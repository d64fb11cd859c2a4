"""`joyjax bench`: the speed of edits on this machine."""

import json
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import (
    OF_LOAD,
    AllowPrivateURLs,
    AsJSON,
    Debug,
    declared,
    given,
    load_pipeline,
    quantized_form,
    takes,
)

if TYPE_CHECKING:
    from joyjax.bench import Bench
    from joyjax.runtime.result import Result

Option = typer.Option
MEASURED = ("steps", "guidance_scale", "guidance_until", "base_size", "cache")  # options of the edits


@takes(*MEASURED, *OF_LOAD)
def command(
    model: Annotated[str | None, declared("model")] = None,
    image: Annotated[
        str | None,
        Option(
            "--image",
            "-i",
            metavar="FILE",
            help="Picture to edit: a file, a URL, or - for standard input.  [default: a drawing, if the "
            "model edits pictures]",
        ),
    ] = None,
    repeats: Annotated[int, Option("--repeats", "-n", metavar="N", min=1, help="Number of measured edits.")] = 5,
    allow_private_urls: AllowPrivateURLs = False,
    as_json: AsJSON = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure the speed of edits on this machine.

    A first edit compiles, measures the kernels of a GPU (--kernels), and is timed separately. Whole edits are then
    timed stage by stage. Prints peak memory, too.
    """
    from joyjax.bench import bench
    from joyjax.commands.console import note
    from joyjax.commands.progress import counting
    from joyjax.convert.source.model import model_folder
    from joyjax.media.load import load_image
    from joyjax.runtime.kernel_choice import NOTE

    picture = None if image is None else load_image(image, allow_private_urls=allow_private_urls)
    form = quantized_form(options)
    pipeline = load_pipeline(model_folder(model), options, form)
    notes: list[str] = []

    def report(result: "Result") -> None:
        notes.extend(one for one in result.notes if one.startswith(NOTE))
        advance_by_one()

    with counting("measuring", repeats + 1) as advance_by_one:
        found = bench(
            pipeline,
            picture,
            repeats=repeats,
            report=report,
            **given(options, MEASURED),
        )
    for line in dict.fromkeys(notes):
        note(line)
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else table(found))


def table(found: "Bench") -> str:
    """Return the measurements as lines of text."""
    from joyjax.commands.progress import gibibytes

    settings = found.settings
    scale = settings["guidance_scale"]
    scales = ", ".join(f"{each:g}" for each in (scale if isinstance(scale, list) else [scale]))
    lines = [
        f"{found.device}; {found.devices} used; " + ", ".join(f"{name} {v}" for name, v in found.versions.items()),
        f"{settings['family']}, {settings['height']} × {settings['width']}, {settings['steps']} steps, "
        f"guidance {scales}, {settings['dtype']}, kernels {settings['kernels']}",
        f"first edit, with compiling: {found.first:.2f} s",
        "",
        f"{'stage':12}{'median':>10}{'least':>10}{'most':>10}",
    ]
    for name, seconds in found.seconds.items():
        lines.append(f"{name:12}" + "".join(f"{pick(seconds):8.3f} s" for pick in (statistics.median, min, max)))
    lines += ["", f"a step: {found.step_seconds * 1000:.1f} ms"]
    if found.peak_bytes is not None:
        lines.append(f"peak memory: {gibibytes(found.peak_bytes)}")
    return "\n".join(lines)
