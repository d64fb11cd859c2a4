"""The storage form of a model's kernels: as requested, as stored, and whether the device supports it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.convert import manifest
from joyjax.convert.manifest import Manifest
from joyjax.errors import CheckpointError, RequestError
from joyjax.families.family import Family
from joyjax.layers.stored import storable
from joyjax.options import EXACT
from joyjax.storage.forms import FORMS

AS_STORED = "as stored"  # `linear` where it is not given


def check_options(quantize: object, linear: object = AS_STORED) -> str | None:
    """Return the form given by `quantize`, or by its older name `linear`; None if neither is given.

    Raises:
        RequestError: for a form that does not exist, or two that differ.
    """
    choices = (EXACT, *FORMS)
    for option, value, missing in (("quantize", quantize, None), ("linear", linear, AS_STORED)):
        if value != missing and (not isinstance(value, str) or value not in choices):
            raise RequestError(f"{option} is {value!r}; choose one of: {', '.join(choices)}")
    named = {str(value) for value in (quantize, linear) if value not in (None, AS_STORED)}
    if len(named) > 1:
        raise RequestError(f"quantize is {quantize!r} and linear is {linear!r}, which is its older name; give one")
    return next(iter(named), None)


def stored_form(folder: Path) -> str:
    """Return the form of the kernels in a checkpoint's folder; "exact" for every Diffusers folder.

    Raises:
        CheckpointError: if the manifest of a converted folder is damaged, or has an unknown form.
    """
    if not manifest.is_converted(folder):
        return EXACT
    found = set()
    for name, converted in Manifest.read(folder).components.items():
        for path, form in converted.forms.items():
            if form not in FORMS:
                known = ", ".join(FORMS)
                raise CheckpointError(
                    f"{folder / name}: parameter {path} has the form {form!r:.100}; this joyjax supports {known}"
                )
            found.add(form)
    return ", ".join(sorted(found)) or EXACT


def loaded_form(folder: Path, form: str | None) -> str:
    """Return the form of the kernels after loading the folder with this option."""
    return form or stored_form(folder)


def check_form(
    form: str | None, folder: Path, family: Family, configs: Mapping[str, Any], device: Any, option: str = "quantize"
) -> None:
    """Check that the networks of a folder can be loaded in a form and run on a device; `option` is named in messages.

    Raises:
        RequestError: if the family has no such form, or "exact" is requested of quantized kernels.
        JoyJaxError: for a device that does not support the form.
    """
    held = stored_form(folder)
    if form == EXACT != held:
        raise RequestError(
            f"{option} is {form!r}, but {folder} holds its kernels as {held}, from which the exact ones cannot be "
            "recovered; leave the option out, or name the checkpoint that the folder was converted from"
        )
    used = form or held
    if used in FORMS:
        if form and not has_storable(family, configs):
            raise RequestError(f"{option} is {form!r}, but {family.name} has no such form; leave it out")
        FORMS[used].check_device(device, f"{option} is {form!r}" if form else f"{folder} holds {held}")


def has_storable(family: Family, configs: Mapping[str, Any]) -> bool:
    """Return whether any network of a family has kernels that can be quantized."""
    return any(
        storable(component.abstract(configs[component.folder], "float32").state) for component in family.components
    )
