"""Counting successes: intervals, the same tasks every time, and a small run of the demo."""

import json

import numpy as np
import pytest
from PIL import Image

import joyjax
from joyjax.score import Rate, Score, save_comparison, score, tasks
from joyjax.shapes.draw import render
from joyjax.shapes.edits import KINDS, held_out
from joyjax.shapes.judge import Verdict

FLOOR = 3 / 4  # of 16 edits by the bundled model; of 512, 95 % pass both tests


@pytest.mark.parametrize(
    ("passed", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilsons_interval(passed, count, low, high):
    """The first two as in Newcombe (1998), table I."""
    assert Rate(passed, count).interval == pytest.approx((low, high), abs=2e-4)


def test_tasks_are_the_same_every_time_and_held_out():
    drawn = list(tasks(32, 5))
    assert drawn == list(tasks(32, 5))
    assert drawn != list(tasks(32, 6))
    assert [kind for kind, _ in drawn] == list(KINDS) * 4
    assert all(held_out(task.pair) and task.pair.edit.kind == kind for kind, task in drawn)
    assert not any(held_out(task.pair) for _, task in tasks(32, 5, held=False))
    assert list(tasks(16, 5)) == drawn[:16]  # more edits are more of the same


def test_a_score_adds_up():
    good, half, bad = Verdict(True, True, 30.0), Verdict(True, False, 20.0), Verdict(False, False, 10.0)
    result = Score({"add": (good, half), "move": (bad, Verdict(True, True, float("inf")))})
    assert result.rate("pixel") == Rate(3, 4)
    assert result.rate("strict") == Rate(2, 4)
    assert result.rate("both", "add") == Rate(1, 2)
    assert result.psnr() == pytest.approx(30.0)
    assert result.psnr("move") == pytest.approx(35.0)
    assert json.loads(json.dumps(result.as_dict()))["all"]["pixel"]["share"] == 0.75


def test_the_demo_does_what_it_is_asked(tmp_path):
    pipeline = joyjax.load()
    seen = []
    result = score(pipeline, 16, report=lambda *progress: seen.append(progress))
    assert [number for number, *_ in seen] == list(range(16))
    assert result.rate("pixel").count == 16
    assert result.rate("both").share >= FLOOR
    _, task, image, _ = seen[0]
    save_comparison(tmp_path / "one.png", task, image)
    sheet = Image.open(tmp_path / "one.png")
    assert sheet.text["prompt"] == task.prompt
    np.testing.assert_array_equal(np.asarray(sheet)[:, :128], render(task.pair.source))
    np.testing.assert_array_equal(np.asarray(sheet)[:, 256:], render(task.pair.target))
    few = score(pipeline, 8, steps=1)
    assert few.psnr() != score(pipeline, 8).psnr()  # options reach the edit
