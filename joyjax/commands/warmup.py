"""`joyjax warmup`: compile programs before they are needed."""

import os
from typing import Annotated, Any

import typer

from joyjax.commands.options import COMPILING, OF_LOAD, Debug, given, load_pipeline, quantized_form, takes
from joyjax.options import LOAD

Option = typer.Option


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
            help="Number of pictures of an edit; repeat for several numbers.  [default: up to 2]",
        ),
    ] = None,
    long_prompts: Annotated[bool, Option("--long-prompts", help="Also for prompts of more than 240 tokens.")] = False,
    batch_size: Annotated[
        int | None, Option(metavar="N", min=2, max=1024, help="Also for `joyjax batch --batch-size N`.")
    ] = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compile the programs of edits before they are needed.

    Edits with this model then run without compiling: all sizes of the base size, any seed, number of steps and guidance
    scale, prompts of up to 240 tokens (about 180 words), masks, padding and previews. Options listed here need other
    programs; give them as for edit. Sizes of --exact-size compile when they are first used; so do all but the square of
    the base size for a model without a table of sizes.

    On a GPU the first edit also measures the kernels (--kernels), and so does this command.

    Prints the folder of the compile cache. Delete it to clear the cache; JAX_COMPILATION_CACHE_DIR sets another
    folder, and JAX_COMPILATION_CACHE_MAX_SIZE its largest size in bytes (2 GiB).
    """
    import warnings

    import joyjax
    from joyjax.commands.console import note
    from joyjax.commands.progress import counting
    from joyjax.convert.source.model import model_folder
    from joyjax.errors import AdviceWarning, JoyJaxError
    from joyjax.runtime.kernel_choice import NOTE

    form = quantized_form(options)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise JoyJaxError("compiled programs are not kept, so there is nothing to fill: see JAX_COMPILATION_CACHE_DIR")
    pipeline = load_pipeline(model_folder(model), options, form)
    chosen = given(options, COMPILING)
    if isinstance(scales := chosen.get("guidance_scale"), list):
        chosen["guidance_scale"] = [max(scales), min(scales)]  # for the two steps, with and without guidance
    chosen["steps"] = 2  # the step cache and the end of guidance take effect in the second
    several = [1] if batch_size is None else [1, batch_size]
    requests = list(pipeline.family.warmup(pipeline.parts, references, long_prompts))
    runs = [[{**request, **chosen}] * together for together in several for request in requests]
    notes: list[str] = []
    with counting("compiling", len(runs)) as advance_by_one, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # the results are not used
        for batch in runs:
            for result in joyjax.edit_batch(pipeline, batch):
                notes += [one for one in result.notes if one.startswith(NOTE)]
            advance_by_one()
    for line in dict.fromkeys(notes):
        note(line)
    typer.echo(os.environ["JAX_COMPILATION_CACHE_DIR"])
