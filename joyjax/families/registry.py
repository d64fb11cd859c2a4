"""The known families, found by the `_class_name` of a checkpoint's model_index.json."""

from pathlib import Path

from joyjax.convert.source.identify import identify
from joyjax.errors import CheckpointError
from joyjax.families.family import Family, Layout
from joyjax.families.joyimage import EDIT, EDIT_PLUS
from joyjax.families.qwen_image import TEXT_TO_IMAGE
from joyjax.families.qwen_image_edit import EDIT as QWEN_EDIT
from joyjax.families.qwen_image_edit import EDIT_PLUS as QWEN_EDIT_PLUS
from joyjax.families.qwen_image_layered import LAYERED
from joyjax.reading import quoted, read_json

FAMILIES: dict[str, Family] = {
    class_name: family
    for family in (EDIT, EDIT_PLUS, TEXT_TO_IMAGE, QWEN_EDIT, QWEN_EDIT_PLUS, LAYERED)
    for class_name in family.class_names
}
DEFAULT = EDIT  # `joyjax info` says whether its published model fits this machine


def family_in(folder: Path) -> Family:
    """Return the family of the checkpoint in a folder.

    Raises:
        CheckpointError: if the folder is not a checkpoint, with what it is; if its index cannot be read or names an
            unknown class.
    """
    return FAMILIES[class_name_in(folder)]


def class_name_in(folder: Path) -> str:
    """Return the pipeline class that a checkpoint's index names; raises as `family_in` does."""
    index = folder / "model_index.json"
    if not index.exists():
        raise CheckpointError(str(identify(folder)))
    name = read_json(index).get("_class_name")
    family_of(name, str(index))
    return str(name)


def family_of(class_name: object, where: str) -> Family:
    """Return the family of a pipeline class; `where` names the file in messages.

    Raises:
        CheckpointError: for an unknown class.
    """
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: _class_name is {quoted(class_name)}; this version of joyjax runs {known}")
    return FAMILIES[class_name]


def layout_of(folder: Path) -> Layout | None:
    """Return the layout of a folder from a model's own repository; None for all other folders."""
    layouts = [layout for family in FAMILIES.values() for layout in family.layouts]
    return next((layout for layout in layouts if layout.recognises(folder)), None)
