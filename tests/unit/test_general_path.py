"""The general path speaks of no model: its code and its docstrings, but for the registry of families."""

import re
from pathlib import Path

import joyjax

ROOT = Path(joyjax.__file__).parent
ROOMS = ("runtime", "sampling", "storage", "media", "provenance", "commands", "batch", "server")
FILES = (
    *("api.py", "options.py", "option_types.py", "bench.py", "score.py", "notebook.py", "names.py", "cli.py"),
    *("__init__.py", "__main__.py", "files.py", "config.py", "reading.py", "errors.py"),
)
WORDS = re.compile(r"joyimage|joy-image|joyai|qwen|bucket|edit[-_ ]?plus", re.IGNORECASE)


def general_path() -> list[Path]:
    files = [ROOT / name for name in FILES]
    return files + [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def test_no_model_is_named():
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in general_path()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if WORDS.search(line)
    ]
    assert found == []


def test_the_search_reads_what_it_should():
    """Every room but the one to come has files, and a model's own file would be found."""
    files = general_path()
    assert all(file.is_file() for file in files)
    for room in ROOMS[:-1]:
        assert [file for file in files if file.is_relative_to(ROOT / room)], room
    assert WORDS.search((ROOT / "families" / "registry.py").read_text(encoding="utf-8"))
