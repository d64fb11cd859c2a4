"""Progress where there is no terminal: a line at the start of a stage, and one in each interval."""

import time
import types

import pytest

from joyjax.commands import progress
from joyjax.commands.progress import counting, loading, stepping, working


@pytest.fixture
def soon(monkeypatch, capsys):
    """Lines come at once; returns what waits for one that holds a text."""
    assert progress.EVERY == 10
    monkeypatch.setattr(progress, "EVERY", 0.01)
    seen: list[str] = []

    def wait(text: str) -> str:
        for _ in range(1000):
            seen.extend(capsys.readouterr().err.splitlines())
            if found := [line for line in seen if text in line]:
                return found[-1]
            time.sleep(0.01)
        raise AssertionError(f"{text!r} is not in {seen}")

    wait.seen = seen
    return wait


def event(step: int, steps: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(step=step, steps=steps, seconds=1.234)


def test_bytes(soon):
    with loading("loading") as advance:
        assert soon("loading") == "loading"
        advance(2**20, 3 * 2**30)
        assert soon(" of ") == "loading, 0 s, 1.0 MiB of 3.00 GiB"


def test_steps(soon):
    with stepping() as callback:
        assert soon("compiling") == "editing, 0 s, compiling: the first run of a size takes longer"
        callback(event(3, 40))
        assert soon("3 of 40") == "editing, 0 s, 3 of 40, 1.23 s a step"


def test_rows(soon):
    with working(200) as (callback, advance):
        callback(event(1, 4))
        advance()
        assert soon("1 of 200") == "editing, 0 s, 1 of 200, step 1 of 4, 1.23 s a step"


def test_a_count(soon):
    with counting("scoring", 8) as advance:
        for _ in range(5):
            advance()
        assert soon("5 of 8") == "scoring, 0 s, 5 of 8"


def test_nothing_is_said_after_the_end(soon, capsys):
    with counting("scoring", 8):
        soon("scoring")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_short_stage_is_one_line(capsys):
    with counting("scoring", 8) as advance:
        advance()
    assert capsys.readouterr().err == "scoring\n"
