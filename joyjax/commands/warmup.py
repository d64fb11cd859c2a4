"""`joyjax warmup`: compiled programs, made before they are needed."""

import os
from pathlib import Path
from typing import Annotated

import typer

from joyjax.commands.options import BaseSize, Cache, DType, GuidanceScale, Linear, Linears, MeshAxes

Option = typer.Option

# Pictures whose sides and prompts whose lengths take every program that the usual ones share.
SIDES = ((64, 64), (128, 64))
WORDS = (4, 120)


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As for edit.  [default: the demo]")] = None,
    references: Annotated[
        list[int] | None,
        Option(metavar="N", min=0, help="Reference pictures of an edit; repeatable.  [default: 0 and 1]"),
    ] = None,
    base_size: Annotated[
        BaseSize | None, Option(help="Size of the buckets: side of the square.  [default: the model's own]")
    ] = None,
    guidance_scale: GuidanceScale = None,
    cache: Cache = None,
    dtype: Annotated[DType, Option(help="Of parameters and matrix products.")] = DType.BFLOAT16,
    linear: Linears = Linear.EXACT,
    mesh: MeshAxes = None,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fill the cache of compiled programs, so that later runs start at once.

    Edits with every bucket of the base size and prompts of up to some 200 words then run without compiling, with the
    given numbers of references. Prints the folder of the cache.
    """
    import warnings

    from PIL import Image

    import joyjax
    from joyjax.commands.progress import counting, loading
    from joyjax.errors import AdviceWarning
    from joyjax.sharding.mesh import parse_mesh

    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(model, dtype=dtype.value, mesh=devices, linear=linear.value, progress=advance)
    counts = [0, 1] if references is None else references
    with counting("compiling", len(counts) * len(SIDES)) as advance_by_one, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # nobody looks at the results
        for count in counts:
            for (height, width), words in zip(SIDES, WORDS, strict=True):
                joyjax.edit(
                    pipeline,
                    [Image.new("RGB", (width, height))] * count,
                    "word " * words,
                    steps=2,  # a step cache does not act before the second
                    height=height,
                    width=width,
                    guidance_scale=guidance_scale,
                    base_size=None if base_size is None else int(base_size.value),
                    cache=cache,
                )
                advance_by_one()
    typer.echo(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
