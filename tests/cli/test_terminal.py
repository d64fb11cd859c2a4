"""What a person sees: the screen of a terminal of 24 rows, wide and narrow."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyte")
if sys.platform == "win32":
    pytest.skip("a pseudo-terminal", allow_module_level=True)
from terminal import show

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
BAR = re.compile(r"(loading|editing) .*\d/[\d?]")


def unwrapped(lines: list[str], columns: int) -> list[str]:
    """Join lines that the terminal has wrapped: those that fill it."""
    text = "".join(line if len(line) == columns else f"{line}\n" for line in lines)
    return text.splitlines()


@pytest.mark.parametrize("columns", [100, 40])
def test_an_edit(tmp_path, columns):
    shown = show(
        *("edit", "make the red circle blue", "-i", EXAMPLE, "-o", "out/tty.png", "--num-images", 2, "--steps", 8),
        cwd=tmp_path,
        columns=columns,
    )
    assert shown.status == 0
    lines = shown.lines
    assert lines.count("out/tty.png") == 1  # a line of its own
    assert lines.count("out/tty-2.png") == 1
    assert not any(map(BAR.search, lines))  # no bar is left
    assert shown.cursor_is_shown
    for frame in shown.frames:  # one bar at a time, and never beside something else
        bars = [line for line in frame if BAR.search(line)]
        assert len(bars) <= 1, frame
        assert not any("tty" in line and line.strip() not in PATHS for line in frame), frame
    assert any(BAR.search(line) for frame in shown.frames for line in frame)


PATHS = ("out/tty.png", "out/tty-2.png", "seed 0: out/tty.png", "seed 1: out/tty-2.png")


def test_a_batch_on_a_narrow_terminal(tmp_path):
    name = "a-name-that-is-longer-than-the-terminal-is-wide"
    rows = [
        f'{{"id": "{name}", "image": "{EXAMPLE}", "prompt": "make the red circle blue"}}',
        '{"id": "missing", "image": "nothing.png", "prompt": "x"}',
        f'{{"id": "last", "image": "{EXAMPLE}", "prompt": "make the red circle green"}}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    shown = show("batch", "rows.jsonl", "-o", "out", cwd=tmp_path, columns=40)
    assert shown.status == 1
    lines = unwrapped(shown.lines, 40)
    assert lines.count(f"out/{name}.png") == 1
    assert lines.count("out/last.png") == 1
    assert lines.count("missing: failed: nothing.png does not exist") == 1
    assert not any(map(BAR.search, lines))
    assert shown.cursor_is_shown


def test_an_edit_that_is_cancelled(tmp_path):
    shown = show(
        *("edit", "make the red circle blue", "-i", EXAMPLE, "--num-images", 50, "--steps", 20),
        cwd=tmp_path,
        interrupt_after="a step",
    )
    assert shown.status == 1
    assert shown.lines[-1] == "joyjax: cancelled"
    assert not any(map(BAR.search, shown.lines))
    assert shown.cursor_is_shown


def test_an_error(tmp_path):
    shown = show("edit", "x", "-i", "nothing.png", cwd=tmp_path, columns=40)
    assert shown.status == 1
    assert unwrapped(shown.lines, 40) == ["joyjax: nothing.png does not exist"]
