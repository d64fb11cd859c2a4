"""The known families, found by the `_class_name` of a checkpoint's model_index.json."""

from pathlib import Path

from joyjax.convert.source.identify import identify
from joyjax.errors import CheckpointError
from joyjax.families.family import Family, Layout
from joyjax.families.joyimage import EDIT, EDIT_PLUS
from joyjax.families.qwen_image import TEXT_TO_IMAGE
from joyjax.reading import quoted, read_json

FAMILIES: dict[str, Family] = {
    class_name: family for family in (EDIT, EDIT_PLUS, TEXT_TO_IMAGE) for class_name in family.class_names
}
DEFAULT = EDIT  # whose published model a machine is measured against


def family_in(folder: Path) -> Family:
    """Return the family of the checkpoint in a folder.

    Raises:
        CheckpointError: if it is no such folder, saying what it is; if its index cannot be read, or names a class that
            joyjax does not know.
    """
    return FAMILIES[class_name_in(folder)]


def class_name_in(folder: Path) -> str:
    """Return the pipeline class that a checkpoint's index names, a known one; raises as `family_in` does."""
    index = folder / "model_index.json"
    if not index.exists():
        raise CheckpointError(str(identify(folder)))
    name = read_json(index).get("_class_name")
    family_of(name, str(index))
    return str(name)


def family_of(class_name: object, where: str) -> Family:
    """Return the family of a pipeline class; `where` names the file in messages.

    Raises:
        CheckpointError: for a class that joyjax does not know.
    """
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: _class_name is {quoted(class_name)}; this version of joyjax runs {known}")
    return FAMILIES[class_name]


def layout_of(folder: Path) -> Layout | None:
    """Return the layout of a model's own repository that a folder has; None for all other folders."""
    layouts = [layout for family in FAMILIES.values() for layout in family.layouts]
    return next((layout for layout in layouts if layout.recognises(folder)), None)
