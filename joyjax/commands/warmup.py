"""`joyjax warmup`: compiled programs, made before they are needed."""

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from joyjax.commands.options import (
    GUIDANCE_UNTIL,
    VAE_DECODE,
    VAE_ENCODE,
    BaseSize,
    Cache,
    DType,
    GuidanceScale,
    Linears,
    MeshAxes,
    VAEMode,
)

if TYPE_CHECKING:
    from joyjax.runtime.load import Pipeline

Option = typer.Option

SIDES = ((64, 64), (256, 64))  # one for each canvas of the autoencoder, in every table
USUAL, LONGEST = 256, 1500  # tokens of a prompt


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or hub id, as for edit.  [default: the demo]")
    ] = None,
    references: Annotated[
        list[int] | None,
        Option(
            metavar="N",
            min=0,
            help="Pictures that an edit is given; repeat for several numbers.  [default: 0 and 1; Edit-Plus: 0 to 2]",
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
    linear: Linears = None,
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

    from PIL import Image

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
        pipeline = joyjax.load(
            folder, dtype=dtype.value, mesh=devices, quantize=linear and linear.value, progress=advance
        )
    if references is None:
        references = [0, 1] if pipeline.family.references == 1 else [0, 1, 2]
    several = [1] if batch_size is None else [1, batch_size]
    prompts = list(_prompts(pipeline, LONGEST if long_prompts else USUAL))
    runs = list(itertools.product(several, dict.fromkeys(references), _pairs(prompts)))
    with counting("compiling", len(runs)) as advance_by_one, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # nobody looks at the results
        for together, count, ((height, width), prompt) in runs:
            request = {
                "image": [Image.new("RGB", (width, height))] * count or None,
                "prompt": prompt,
                "steps": 2,  # a step cache does not act before the second, nor does the end of guidance
                "height": height,
                "width": width,
                "guidance_scale": guidance_scale,
                "guidance_until": guidance_until,
                "base_size": None if base_size is None else int(base_size.value),
                "vae_encode": (vae_encode or VAEMode.EXACT).value,
                "vae_decode": (vae_decode or VAEMode.EXACT).value,
                "cache": cache,
            }
            joyjax.edit_batch(pipeline, [request] * together)
            advance_by_one()
    typer.echo(os.environ["JAX_COMPILATION_CACHE_DIR"])


def _prompts(pipeline: "Pipeline", longest: int) -> Iterator[str]:
    """Give a prompt for each size that texts are padded to, up to that of `longest` tokens."""
    from joyjax.processors.qwen_vl import TEXT_SIZES
    from joyjax.processors.text import plain_tokens

    piece = "a " * 16
    per_piece = len(plain_tokens(pipeline.parts.tokenizer, piece))
    yield ""
    for before, size in itertools.pairwise(TEXT_SIZES):
        if before >= longest:
            break
        tokens = min(longest, (before + size) // 2)  # the template's, which are with it, are far fewer than the rest
        yield piece * (tokens // per_piece)


def _pairs(prompts: list[str]) -> list[tuple[tuple[int, int], str]]:
    """Return edits that have each size and each prompt once; no program depends on both."""
    return list(zip(itertools.cycle(SIDES), prompts, strict=False))
