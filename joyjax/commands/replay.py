"""Reading the recipe of `joyjax edit --from FILE` as options of the edit."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from joyjax.options import EDIT


@dataclasses.dataclass(frozen=True)
class Replay:
    """Options of an edit, its pictures, and the options of the model; the defaults are those without a recipe."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image: tuple[Path, ...] = ()
    mask: Path | None = None
    model: str | None = None
    dtype: str = "bfloat16"
    linear: str | None = None
    kernels: str | None = None


def read_replay(file: Path, model: str | None, image: Sequence[str] | None, mask: str | None) -> Replay:
    """Read a recipe; `model`, `image` and `mask` are the user's replacements, or None.

    Raises:
        RequestError: if there is no recipe, or its model or one of its pictures is missing or has changed.
    """
    from joyjax.commands.console import note
    from joyjax.convert.source.model import model_folder
    from joyjax.families.registry import family_in
    from joyjax.media.references import find_mask, find_references
    from joyjax.provenance.fingerprint import check_model, fingerprint
    from joyjax.provenance.recipe import edit_arguments, read_recipe

    recipe = read_recipe(file)
    used, options = recipe["model"], edit_arguments(recipe)
    folder = model_folder(model or used["source"])
    if model is None:
        check_model(recipe, folder)
    elif fingerprint(folder) != used["fingerprint"]:
        note("the model is not the one in the recipe: the result will not be the same")
    family = family_in(folder)
    for name in ("height", "width"):
        if not family.has(EDIT[name]):  # what its picture makes it, not an option
            del options[name]
    if image and not options["exact_size"] and "height" in options:
        last = tuple(recipe["references"][-1]["size"]) if recipe["references"] else None
        if (options["height"], options["width"]) == family.natural_size(last, options["base_size"]):
            del options["height"], options["width"]  # they came from the recipe's picture; take the new one's
    return Replay(
        options=options,
        image=() if image else tuple(find_references(recipe, file.parent)),
        mask=None if mask else find_mask(recipe, file.parent),
        model=used["source"],
        dtype=used["dtype"],
        linear=used["linear"],
        kernels="xla" if used["kernels"] == "xla" else None,
    )


def overridden(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's options without those that the given ones contradict or leave without effect."""
    kept = dict(options)
    for name, other in (("steps", "sigmas"), ("sigmas", "steps")):  # there are as many sigmas as steps
        if name in given and kept.get(other) is not None:
            del kept[other]
    scale = given.get("guidance_scale")
    if scale is not None and max(scale if isinstance(scale, list) else [scale]) <= 1:
        kept.pop("negative_prompt", None)
        kept.pop("guidance_until", None)
    return kept
