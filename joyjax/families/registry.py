"""The known families, found by the `_class_name` of a checkpoint's model_index.json."""

from pathlib import Path

from joyjax.convert.source.identify import identify
from joyjax.errors import CheckpointError
from joyjax.families.family import Family
from joyjax.families.joyimage import EDIT, EDIT_PLUS
from joyjax.reading import quoted, read_json

FAMILIES: dict[str, Family] = {family.class_name: family for family in (EDIT, EDIT_PLUS)}


def family_in(folder: Path) -> Family:
    """Return the family of the checkpoint in a folder.

    Raises:
        CheckpointError: if it is no such folder, saying what it is; if its index cannot be read, or names a class that
            joyjax does not know.
    """
    index = folder / "model_index.json"
    if not index.exists():
        raise CheckpointError(str(identify(folder)))
    return family_of(read_json(index).get("_class_name"), str(index))


def family_of(class_name: object, where: str) -> Family:
    """Return the family of a pipeline class; `where` names the file in messages.

    Raises:
        CheckpointError: for a class that joyjax does not know.
    """
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: _class_name is {quoted(class_name)}; this version of joyjax runs {known}")
    return FAMILIES[class_name]
