"""`joyjax score`: how often a model does what it is asked, counted."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import Cache, DType, GuidanceScale, GuidanceUntil, Linears, MeshAxes, Model, Steps
from joyjax.errors import RequestError

if TYPE_CHECKING:
    from joyjax.score import Score

Option = typer.Option


def command(
    model: Model = None,
    count: Annotated[
        int, Option("--count", "-n", metavar="N", min=8, help="Edits, each of the 8 kinds as often.")
    ] = 512,
    seed: Annotated[int, Option(metavar="N", min=0, help="Which edits are drawn.")] = 0,
    seen: Annotated[bool, Option("--seen", help="New scenes with combinations that training has seen.")] = False,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guidance_until: GuidanceUntil = 1.0,
    cache: Cache = None,
    dtype: Annotated[DType, Option(help="Of parameters and matrix products.")] = DType.BFLOAT16,
    linear: Linears = None,
    mesh: MeshAxes = None,
    failures: Annotated[
        Path | None, Option(metavar="DIR", help="Write each failed edit here: source, result, expected.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print json.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Count how many edits of coloured shapes succeed.

    They are held-out ones, judged from pixels by the program that made them. `pixel`: what should change came out near
    the expected picture and the rest stayed. `strict`: every thing is nearer to its expected rendering than to any with
    one attribute changed.
    """
    if failures is not None and failures.exists() and not failures.is_dir():
        raise RequestError(f"--failures is {failures}, which is a file; name a folder")

    import joyjax
    from joyjax.commands.console import note
    from joyjax.commands.progress import counting, loading
    from joyjax.convert.source.model import model_folder
    from joyjax.score import save_comparison, score
    from joyjax.sharding.mesh import parse_mesh

    folder = model_folder(model)
    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(
            folder, dtype=dtype.value, mesh=devices, quantize=linear and linear.value, progress=advance
        )
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
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_until=guidance_until,
            cache=cache,
        )
    if cache is not None:
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
