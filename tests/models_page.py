"""Makes docs/models.md from the registry of families: `python tests/models_page.py`."""

from collections.abc import Iterator
from pathlib import Path

from joyjax.families.family import Family
from joyjax.families.registry import FAMILIES
from joyjax.options import EDIT, LOAD

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Models

A model is known by `_class_name` in its `model_index.json`, whatever its folder is called. `joyjax info MODEL` says
what a folder holds. Defaults are those of the model's card or of its reference pipeline; a checkpoint may bring its own
(`joyjax.json`). This page is made from the registry by `python tests/models_page.py`.

| model | pipeline | makes | pictures | steps | guidance | negative prompt | base size |
|---|---|---|---|---|---|---|---|
"""
SIZES = """
## Memory

Bytes of the published model in bfloat16. *Loaded* is all networks, *step* the working memory of a denoising step with
guidance at the base size. docs/parallel.md has them on several devices, docs/speed.md the step cache and float8.

| model | published as | loaded | step |
|---|---|---|---|
"""
MISSING = """
## Options that a model does not have

All others work with every model; one that is missing is an error that says what to do.

| model | options |
|---|---|
"""
TASKS = {
    "edit": "an edit of pictures",
    "text-to-image": "a picture from words",
    "layers": "a picture taken apart into layers",
}


def page() -> str:
    """Return the text of the page."""
    families = list({family.name: family for family in FAMILIES.values()}.values())
    rows = "".join(map(_row, families))
    sizes = "".join(
        f"| {family.name} | {family.published.name} | {_gb(family.published.resident_bytes)} "
        f"| {_gb(family.published.working_bytes)} |\n"
        for family in families
    )
    missing = "".join(
        f"| {family.name} | {', '.join(f'`{name}`' for name in names) or 'none'} |\n"
        for family in families
        for names in [list(_without(family))]
    )
    return f"{HEAD}{rows}{SIZES}{sizes}{MISSING}{missing}"


def _row(family: Family) -> str:
    least, most = family.references
    count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
    tasks = "; ".join(text for task, text in TASKS.items() if task in family.tasks)
    shown = (family.defaults.get(name) for name in ("steps", "guidance_scale", "negative_prompt", "base_size"))
    defaults = " | ".join(f"`{value!r}`" if isinstance(value, str) else str(value) for value in shown)
    classes = ", ".join(f"`{name}`" for name in family.class_names)
    return f"| {family.name} | {classes} | {tasks} | {count} | {defaults} |\n"


def _without(family: Family) -> Iterator[str]:
    return (option.name for option in (*EDIT.values(), *LOAD.values()) if not family.has(option))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
