"""`joyjax score`: the success rate of a model on held-out edits."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import OF_LOAD, AsJSON, Debug, declared, given, load_pipeline, quantized_form, takes
from joyjax.errors import RequestError
from joyjax.options import RECORDS

if TYPE_CHECKING:
    from joyjax.score import Score

Option = typer.Option
SCORED = ("steps", "guidance_scale", "guidance_until", "cache")  # options of the edits


@takes(*SCORED, *OF_LOAD)
def command(
    model: Annotated[str | None, declared("model")] = None,
    count: Annotated[
        int, Option("--count", "-n", metavar="N", min=8, help="Number of edits, the 8 kinds in turn.")
    ] = 512,
    seed: Annotated[int, Option(metavar="N", min=0, help="Seed of the edits.")] = 0,
    seen: Annotated[bool, Option("--seen", help="New scenes with combinations that training has seen.")] = False,
    failures: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Write each failed edit into this folder: source, result, expected picture.",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    as_json: AsJSON = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure the success rate on held-out edits of coloured shapes.

    Results are judged from their pixels. `pixel`: the region to change is close to the expected picture, and the rest
    is unchanged. `strict`: every object is closer to its expected rendering than to any with one attribute changed.
    """
    if failures is not None and failures.exists() and not failures.is_dir():
        raise RequestError(f"--failures is {failures}, which is a file; name a folder")

    from joyjax.commands.console import note
    from joyjax.commands.progress import counting
    from joyjax.convert.source.model import model_folder
    from joyjax.score import save_comparison, score

    form = quantized_form(options)
    pipeline = load_pipeline(model_folder(model), options, form)
    if failures is not None:
        failures.mkdir(parents=True, exist_ok=True)
    with counting("scoring", count) as advance_by_one:

        def report(number: int, task: Any, image: Any, verdict: Any) -> None:
            advance_by_one()
            if failures is not None and not (verdict.pixel and verdict.strict):
                save_comparison(failures / f"{number:04}.png", task, image)

        result = score(
            pipeline,
            count,
            seed=seed,
            held=not seen,
            report=report,
            **given(options, SCORED),
        )
    if options["cache"] is not None:
        note(f"cache: {result.computed:.2f} steps of an edit computed in full, on average")
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else table(result))


def table(score: "Score") -> str:
    """Return the score as lines of text."""
    lines = [f"{'kind':12}{'edits':>6}  {'pixel test':>22}  {'strict test':>22}  {'both':>6}  {'PSNR':>8}"]
    for kind in (*score.verdicts, None):
        cells = []
        for test in ("pixel", "strict"):
            rate = score.rate(test, kind)
            low, high = rate.interval
            cells.append(f"{rate.share:7.1%} ({low:5.1%} – {high:5.1%})".rjust(22))
        rate = score.rate("both", kind)
        lines.append(
            f"{kind or 'all':12}{rate.count:6}  {'  '.join(cells)}  {rate.share:6.1%}  {score.psnr(kind):5.1f} dB"
        )
    return "\n".join(lines)
