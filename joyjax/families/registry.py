"""The known families, found by the `_class_name` of a checkpoint's model_index.json."""

from joyjax.errors import CheckpointError
from joyjax.families.family import Family
from joyjax.families.joyimage import EDIT, EDIT_PLUS

FAMILIES: dict[str, Family] = {family.class_name: family for family in (EDIT, EDIT_PLUS)}


def family_of(class_name: object, where: str) -> Family:
    """Return the family of a pipeline class; `where` names the file in messages.

    Raises:
        CheckpointError: for a class that joyjax does not know.
    """
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: _class_name is {class_name!r}; this version of joyjax runs {known}")
    return FAMILIES[class_name]
