"""The engine: plans that take nothing, batches whose levels differ, jobs that end apart, and the guard."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import joyjax
from joyjax.api import check_options
from joyjax.runtime.engine import Engine
from joyjax.sampling import predictor

pytestmark = pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")  # the demo is given noise to edit

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 140, 3), np.uint8))
ROW = {"image": PICTURE, "prompt": "make it red", "steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def demo():
    return joyjax.load(dtype="float32")


def submit(engine, *rows):
    return [engine.submit(check_options(engine.pipeline, {**ROW, **row}), row.get("callback")) for row in rows]


def off(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def test_edits_with_other_levels_share_a_batch(demo, monkeypatch):
    """Each has its own levels and the times that the network is given for them; one program runs all."""
    rows = [{"seed": 1}, {"seed": 1, "sigmas": [1.0, 0.4, 0.1], "guidance_scale": 4.0}, {"sigmas": [0.9, 0.8, 0.7]}]
    alone = [joyjax.edit(demo, **{**ROW, **row}) for row in rows]
    assert len({np.asarray(result.image).tobytes() for result in alone}) == 3
    seen, right = [], predictor.predict
    monkeypatch.setattr(predictor, "predict", lambda *given: seen.append(given[2]) or right(*given))
    together = joyjax.edit_batch(demo, [{**ROW, **row} for row in rows])
    assert [off(a.image, b.image) <= 1 for a, b in zip(alone, together, strict=True)] == [True] * 3
    assert len(seen) == 3  # steps, of one batch
    assert all(len(set(np.asarray(time).tolist())) == 3 for time in seen[1:])


def test_the_encode_key_is_what_the_condition_depends_on(demo):
    """A difference in any of the first rows is encoded anew; none of the others has to be."""
    other = Image.fromarray(255 - np.asarray(PICTURE))
    fresh = [
        {"prompt": "make it blue"},
        {"negative_prompt": "grey"},
        {"image": other},
        {"image": [PICTURE.crop((0, 0, 140, 89))]},
        {"image": None},
        {"height": 64, "width": 96},
        {"height": 64, "width": 96, "exact_size": True},
        {"height": 96, "width": 64, "exact_size": True},
        {"fit": "pad"},
        {"vae_encode": "tiled"},
        {"guidance_scale": 1.0},
    ]
    same = [{"seed": 5}, {"steps": 4}, {"sigmas": [1.0, 0.4, 0.1]}, {"guidance_scale": 3.0}, {"image": PICTURE.copy()}]
    keys = [job.plan.encode_key for job in submit(Engine(demo), {}, *fresh, *same)]
    assert len(set(keys[: len(fresh) + 1])) == len(fresh) + 1
    assert set(keys[len(fresh) + 1 :]) == {keys[0]}


def test_a_plan_puts_nothing_on_a_device(demo):
    engine, before = Engine(demo), len(jax.live_arrays())
    jobs = submit(engine, *({"seed": n, "prompt": f"make it {n}"} for n in range(40)))
    assert len(jax.live_arrays()) == before
    assert len({job.plan.batch_key for job in jobs}) == 1


def test_jobs_end_apart_where_they_are_isolated(demo):
    """One is cancelled, one fails in its callback: the third has the picture that it has beside them anyway."""

    def cancel(event):
        if event.step == 2:
            raise joyjax.Cancelled

    def fail(event):
        raise ZeroDivisionError

    rows = [{"callback": cancel}, {"seed": 5}, {"callback": fail}]
    expected = joyjax.edit_batch(demo, [{**ROW, "seed": seed} for seed in (0, 5, 0)])[1]
    engine = Engine(demo, isolate=True)
    submit(engine, *rows)
    done = list(engine.run())
    assert [type(job.error) for job in done] == [joyjax.Cancelled, type(None), ZeroDivisionError]
    np.testing.assert_array_equal(np.asarray(done[1].result.image), np.asarray(expected.image))
    assert [job.result is None for job in done] == [True, False, True]


def test_a_batch_stops_when_no_edit_is_left(demo):
    seen = []

    def cancel(event):
        seen.append(event.step)
        raise joyjax.Cancelled

    engine = Engine(demo, isolate=True)
    submit(engine, *({"seed": n, "callback": cancel} for n in range(2)))
    assert all(isinstance(job.error, joyjax.Cancelled) for job in engine.run())
    assert seen == [1, 1]


def test_a_cancelled_job_is_not_run(demo):
    engine = Engine(demo, isolate=True, batch_size=1)
    first, second = submit(engine, {}, {"seed": 1})
    second.cancel(joyjax.Cancelled())
    assert [job.result is None for job in engine.run()] == [False, True]
    assert first.result is not None


class Refuses:
    def __init__(self, what):
        self.what = what

    def check_text(self, prompt):
        if "forbidden" in prompt:
            raise joyjax.JoyJaxError("the prompt is refused")

    def check_pixels(self, media):
        if self.what == "pixels":
            raise joyjax.JoyJaxError("the picture is refused")


def guarded(demo, what):
    return dataclasses.replace(demo, parts=dataclasses.replace(demo.parts, guard=Refuses(what)))


def test_a_guard_refuses_text_before_anything_runs(demo, monkeypatch):
    monkeypatch.setattr(predictor, "predict", lambda *_: pytest.fail("something ran"))
    with pytest.raises(joyjax.JoyJaxError, match="the prompt is refused"):
        joyjax.edit(guarded(demo, "text"), **{**ROW, "prompt": "forbidden"})


@pytest.mark.parametrize("preview", [False, True])
def test_no_pixels_leave_where_a_guard_refuses_them(preview, demo):
    previews = []
    callback = (lambda event: previews.append(event.preview())) if preview else None
    with pytest.raises(joyjax.JoyJaxError, match="the picture is refused"):
        joyjax.edit(guarded(demo, "pixels"), callback=callback, **ROW)
    assert previews == []
