"""Makes docs/options.md from the table of options: `python tests/options_page.py`."""

import re
from collections.abc import Mapping
from pathlib import Path

from joyjax.options import EDIT, LOAD, REQUIRED, SUBJECTS, Option

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

`joyjax edit --help` has also what only the command line has, such as `--output` and `--from`. This page is made from
the table in `joyjax/options.py` by `python tests/options_page.py`.

"""
EDITS = """## An edit

Arguments of `joyjax.edit`, names in a row of `joyjax batch`, options of `joyjax edit`.
"""
LOADING = """
## Loading

Arguments of `joyjax.load`, options of `joyjax edit`, `batch`, `warmup`, `bench` and `score`.

"""
COLUMNS = "| option | values | default | what it does | given by |\n|---|---|---|---|---|\n"


def page() -> str:
    """Return the text of the page."""
    loading = "".join(map(_row, LOAD.values()))
    return f"{HEAD}{EDITS}{_sections(EDIT)}{LOADING}{COLUMNS}{loading}"


def _sections(table: Mapping[str, Option]) -> str:
    sections = []
    for subject in SUBJECTS:
        rows = "".join(_row(option) for option in table.values() if option.subject == subject)
        if rows:
            title = "" if subject == SUBJECTS[0] else f"\n### {subject}\n"
            sections.append(f"{title}\n{COLUMNS}{rows}")
    return "".join(sections)


def _row(option: Option) -> str:
    default = "required" if option.default is REQUIRED else option.shown_default() or str(option.default)
    places = ["Python"]
    if option.name in EDIT and option.row:
        places.append("row")
    if option.command_line:
        places += [f"`{option.flag}`", *([f"`{option.short}`"] if option.short else [])]
    help = re.sub(r"(?<![`\w])(--[a-z-]+)", r"`\1`", option.help)
    return (
        f"| `{option.name}` | {option.type.expected.removeprefix('a ')} | {default} | {help} | {', '.join(places)} |\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
