"""What `joyjax edit --from FILE` takes from the recipe in a PNG file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Replay:
    """Options of an edit, its pictures, and how the model is loaded; without a recipe, the defaults."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image: tuple[Path, ...] = ()
    mask: Path | None = None
    model: str | None = None
    dtype: str = "bfloat16"
    linear: str | None = None


def read_replay(file: Path, model: str | None, image: Sequence[str] | None, mask: str | None) -> Replay:
    """Read a recipe; `model`, `image` and `mask` are what the user gave in place of its own.

    Raises:
        RequestError: if there is no recipe, one of its pictures is missing or another by now, or the model is.
    """
    from joyjax.commands.console import note
    from joyjax.convert.source.model import model_folder
    from joyjax.media.image import nearest_bucket
    from joyjax.media.references import find_mask, find_references
    from joyjax.provenance.fingerprint import check_model, fingerprint
    from joyjax.provenance.recipe import edit_arguments, read_recipe

    recipe = read_recipe(file)
    used, options = recipe["model"], edit_arguments(recipe)
    if model is None:
        check_model(recipe, model_folder(used["source"]))
    elif fingerprint(model_folder(model)) != used["fingerprint"]:
        note("the model is another one than the recipe's: the result will not be the same")
    if image and not options["exact_size"]:
        height, width = recipe["references"][-1]["size"] if recipe["references"] else (1, 1)
        if (options["height"], options["width"]) == nearest_bucket(height, width, options["base_size"]):
            del options["height"], options["width"]  # they were the picture's; another one brings its own
    return Replay(
        options=options,
        image=() if image else tuple(find_references(recipe, file.parent)),
        mask=None if mask else find_mask(recipe, file.parent),
        model=used["source"],
        dtype=used["dtype"],
        linear=used["linear"],
    )


def overridden(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's options without those that would contradict, or be without effect beside, what is given."""
    kept = dict(options)
    for name, other in (("steps", "sigmas"), ("sigmas", "steps")):  # there are as many sigmas as steps
        if name in given and kept.get(other) is not None:
            del kept[other]
    scale = given.get("guidance_scale")
    if scale is not None and max(scale if isinstance(scale, list) else [scale]) <= 1:
        kept.pop("negative_prompt", None)
        kept.pop("guidance_until", None)
    return kept
