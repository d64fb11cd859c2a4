"""`joyjax bench`: how fast a model edits on this machine."""

import json
import statistics
from typing import TYPE_CHECKING, Annotated

import typer

from joyjax.commands.options import (
    AllowPrivateURLs,
    BaseSize,
    Cache,
    DType,
    GuidanceScale,
    GuidanceUntil,
    Linears,
    MeshAxes,
    Model,
    Steps,
)

if TYPE_CHECKING:
    from joyjax.bench import Bench

Option = typer.Option


def command(
    model: Model = None,
    image: Annotated[
        str | None,
        Option(
            "--image",
            "-i",
            metavar="FILE",
            help="Picture to edit: a file, a URL, or - for standard input.  [default: a drawing]",
        ),
    ] = None,
    repeats: Annotated[int, Option("--repeats", "-n", metavar="N", min=1, help="Edits that are measured.")] = 5,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    base_size: Annotated[
        BaseSize | None, Option(help="Size of the buckets: side of the square.  [default: the model's own]")
    ] = None,
    dtype: Annotated[DType, Option(help="Of parameters and matrix products.")] = DType.BFLOAT16,
    guidance_until: GuidanceUntil = 1.0,
    cache: Cache = None,
    linear: Linears = None,
    mesh: MeshAxes = None,
    allow_private_urls: AllowPrivateURLs = False,
    as_json: Annotated[bool, Option("--json", help="Print json.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure how fast a model edits on this machine.

    One edit compiles and does not count; then whole edits are timed, stage by stage. Also tells the peak of memory.
    """
    import joyjax
    from joyjax.bench import bench
    from joyjax.commands.progress import counting, loading
    from joyjax.convert.source.model import model_folder
    from joyjax.media.load import load_image
    from joyjax.sharding.mesh import parse_mesh

    picture = None if image is None else load_image(image, allow_private_urls=allow_private_urls)
    folder = model_folder(model)
    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(
            folder, dtype=dtype.value, mesh=devices, quantize=linear and linear.value, progress=advance
        )
    with counting("measuring", repeats + 1) as advance_by_one:
        found = bench(
            pipeline,
            picture,
            repeats=repeats,
            report=lambda result: advance_by_one(),
            steps=steps,
            guidance_scale=guidance_scale,
            base_size=None if base_size is None else int(base_size.value),
            guidance_until=guidance_until,
            cache=cache,
        )
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else table(found))


def table(found: "Bench") -> str:
    """Return the figures as lines of text."""
    from joyjax.commands.progress import gibibytes

    settings = found.settings
    lines = [
        f"{found.device}; {found.devices} used; " + ", ".join(f"{name} {v}" for name, v in found.versions.items()),
        f"{settings['family']}, {settings['height']} × {settings['width']}, {settings['steps']} steps, "
        f"guidance {settings['guidance_scale']:g}, {settings['dtype']}",
        f"first edit, with compiling: {found.first:.2f} s",
        "",
        f"{'stage':12}{'median':>10}{'least':>10}{'most':>10}",
    ]
    for name, seconds in found.seconds.items():
        lines.append(f"{name:12}" + "".join(f"{pick(seconds):8.3f} s" for pick in (statistics.median, min, max)))
    lines += ["", f"a step: {found.step_seconds * 1000:.1f} ms"]
    if found.peak_bytes is not None:
        lines.append(f"peak of memory: {gibibytes(found.peak_bytes)}")
    return "\n".join(lines)
