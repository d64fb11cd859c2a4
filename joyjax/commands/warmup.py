"""`joyjax warmup`: compiled programs, made before they are needed."""

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.commands.options import COMPILING, OF_LOAD, Debug, given, load_pipeline, quantized_form, takes
from joyjax.options import LOAD

if TYPE_CHECKING:
    from joyjax.runtime.load import Pipeline

Option = typer.Option

SIDES = ((64, 64), (256, 64))  # one for each canvas of the autoencoder, in every table
USUAL, LONGEST = 256, 1500  # tokens of a prompt


@takes(*COMPILING, *OF_LOAD)
def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=f"{LOAD['model'].help}  [default: the demo]")
    ] = None,
    references: Annotated[
        list[int] | None,
        Option(
            metavar="N",
            min=0,
            help="Number of pictures of an edit; repeat for several numbers.  "
            "[default: 0 and 1; 0 to 2 for a model that takes several]",
        ),
    ] = None,
    long_prompts: Annotated[bool, Option("--long-prompts", help="Also for prompts of more than 240 tokens.")] = False,
    batch_size: Annotated[
        int | None, Option(metavar="N", min=2, max=1024, help="Also for `joyjax batch --batch-size N`.")
    ] = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compile what edits need, so that later runs start at once.

    Edits with this model then run without compiling, for every size of the base size, any seed, number of steps and
    strength of guidance, prompts of up to 240 tokens (about 180 words), masks, padding and previews. Options listed
    here need other programs; give them as for edit. Sizes of --exact-size compile when they are first used.

    Prints the folder of the compile cache. Delete it to clear the cache; JAX_COMPILATION_CACHE_DIR sets another
    folder, and JAX_COMPILATION_CACHE_MAX_SIZE its largest size in bytes (2 GiB).
    """
    import warnings

    from PIL import Image

    import joyjax
    from joyjax.commands.progress import counting
    from joyjax.convert.source.model import model_folder
    from joyjax.errors import AdviceWarning, JoyJaxError

    form = quantized_form(options)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise JoyJaxError("compiled programs are not kept, so there is nothing to fill: see JAX_COMPILATION_CACHE_DIR")
    pipeline = load_pipeline(model_folder(model), dtype=options["dtype"], form=form, mesh=options["mesh"])
    if references is None:
        references = [0, 1] if pipeline.family.references == 1 else [0, 1, 2]
    chosen = given(options, COMPILING)
    if isinstance(scales := chosen.get("guidance_scale"), list):
        chosen["guidance_scale"] = [max(scales), min(scales)]  # for the two steps below, with and without guidance
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
                **chosen,
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
