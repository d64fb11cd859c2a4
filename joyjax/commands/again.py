"""What `joyjax edit --from FILE` takes from the recipe in a PNG file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Again:
    """Options of an edit, its pictures, and how the model is loaded; without a recipe, the defaults."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image: tuple[Path, ...] = ()
    mask: Path | None = None
    model: str | None = None
    dtype: str = "bfloat16"
    linear: str = "exact"


def read_again(file: Path, model: str | None, image: Sequence[Path] | None, mask: Path | None) -> Again:
    """Read a recipe; `model`, `image` and `mask` are what the user gave in place of its own.

    Raises:
        RequestError: if there is no recipe, one of its pictures is missing or another by now, or the model is.
    """
    from joyjax.commands.progress import note
    from joyjax.fingerprint import check_model, fingerprint
    from joyjax.inputs.model import model_folder
    from joyjax.recipe import edit_arguments, read_recipe
    from joyjax.sources import find_mask, find_references

    recipe = read_recipe(file)
    used = recipe["model"]
    if model is None:
        check_model(recipe, model_folder(used["source"]))
    elif fingerprint(model_folder(model)) != used["fingerprint"]:
        note("the model is another one than the recipe's: the result will not be the same")
    return Again(
        options=edit_arguments(recipe),
        image=() if image else tuple(find_references(recipe, file.parent)),
        mask=None if mask else find_mask(recipe, file.parent),
        model=used["source"],
        dtype=used["dtype"],
        linear=used["linear"],
    )
