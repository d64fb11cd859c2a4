"""`joyjax warmup`: compiled programs, made before they are needed."""

import os
from typing import Annotated

import typer

from joyjax.commands.options import (
    GUIDANCE_UNTIL,
    VAE_DECODE,
    VAE_ENCODE,
    BaseSize,
    Cache,
    DType,
    GuidanceScale,
    Linear,
    Linears,
    MeshAxes,
    VAEMode,
)

Option = typer.Option


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or hub id, as for edit.  [default: the demo]")
    ] = None,
    references: Annotated[
        list[int] | None,
        Option(
            metavar="N",
            min=0,
            help="Pictures that an edit is given; repeat for several numbers.  [default: up to 2]",
        ),
    ] = None,
    long_prompts: Annotated[bool, Option("--long-prompts", help="Also for prompts of more than 240 tokens.")] = False,
    batch_size: Annotated[
        int | None, Option(metavar="N", min=2, max=1024, help="Also for `joyjax batch --batch-size N`.")
    ] = None,
    base_size: Annotated[
        BaseSize | None, Option(help="Size of the buckets: side of the square.  [default: the model's own]")
    ] = None,
    guidance_scale: GuidanceScale = None,
    guidance_until: Annotated[float, GUIDANCE_UNTIL] = 1.0,
    cache: Cache = None,
    vae_encode: Annotated[VAEMode | None, VAE_ENCODE] = None,
    vae_decode: Annotated[VAEMode | None, VAE_DECODE] = None,
    dtype: Annotated[DType, Option(help="Of parameters and matrix products.")] = DType.BFLOAT16,
    linear: Linears = Linear.EXACT,
    mesh: MeshAxes = None,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compile what edits need, so that later runs start at once.

    Edits of this model then run without compiling: with every bucket of the base size, any seed, number of steps and
    strength of guidance, prompts of up to 240 tokens (some 180 words), masks, padding and previews. Options that make
    other programs must be given here as they will be for edit: dtype, base size, guidance or none, numbers of
    references, mesh, and the approximations. Sizes of --exact-size compile when they are first used.

    Prints the folder that keeps the programs. Delete it to clear them; JAX_COMPILATION_CACHE_DIR names another and
    JAX_COMPILATION_CACHE_MAX_SIZE its most bytes (2 GiB).
    """
    import warnings

    import joyjax
    from joyjax.commands.progress import counting, loading
    from joyjax.convert.source.model import model_folder
    from joyjax.errors import AdviceWarning, JoyJaxError
    from joyjax.sharding.mesh import parse_mesh

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise JoyJaxError("compiled programs are not kept, so there is nothing to fill: see JAX_COMPILATION_CACHE_DIR")
    folder = model_folder(model)
    with loading("loading") as advance:
        devices = None if mesh is None else parse_mesh(mesh)
        pipeline = joyjax.load(folder, dtype=dtype.value, mesh=devices, linear=linear.value, progress=advance)
    several = [1] if batch_size is None else [1, batch_size]
    requests = list(pipeline.family.warmup(pipeline.parts, references, long_prompts))
    given = {
        "steps": 2,  # a step cache does not act before the second, nor does the end of guidance
        "guidance_scale": guidance_scale,
        "guidance_until": guidance_until,
        "base_size": None if base_size is None else int(base_size.value),
        "vae_encode": (vae_encode or VAEMode.EXACT).value,
        "vae_decode": (vae_decode or VAEMode.EXACT).value,
        "cache": cache,
    }
    runs = [[{**request, **given}] * together for together in several for request in requests]
    with counting("compiling", len(runs)) as advance_by_one, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # nobody looks at the results
        for batch in runs:
            joyjax.edit_batch(pipeline, batch)
            advance_by_one()
    typer.echo(os.environ["JAX_COMPILATION_CACHE_DIR"])
