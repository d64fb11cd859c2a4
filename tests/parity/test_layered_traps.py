"""Every mistake of tests/layered_traps.py moves its stage by at least ten times what the stage's parity test lets pass.

As parity/test_qwen_traps.py: `pytest tests/parity/test_layered_traps.py -s -m "nightly or not nightly"` prints the
table of docs/parity.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import joyjax
from joyjax.families import qwen_image_layered_stages as family
from joyjax.families.request import Request
from joyjax.runtime import result
from joyjax.runtime.job import Clock

pytest.importorskip("torch")
from layered_pairs import cutout, draw
from layered_traps import TRAPS
from pairs import SHARE
from parity.test_qwen_edit import LATENTS_TOLERANCE
from parity.test_qwen_image import VELOCITY_TOLERANCE
from parity.test_traps import PAGE, Stage, fixtures_of, run_as_written
from stagewise import Stages

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PICTURE = cutout(41, 60)


class Layers(Stages):
    """Two layers of one picture, run stage by stage and only as far as they are asked for."""

    def __init__(self, pipeline: joyjax.Pipeline, base_size: int = 64, layers: int = 2):
        # The stages are looked up anew, so that patched ones run.
        given = {name: getattr(family, name) for name in ("plan", "prepare", "guidance", "finish")}
        given["prepare"].__module__ = family.__name__  # by which the others are found
        pipeline = dataclasses.replace(pipeline, family=dataclasses.replace(pipeline.family, **given))
        request = Request(
            prompt="a small blue house beside a tree",
            negative_prompt=" ",
            pictures=(PICTURE,),
            originals=(PICTURE,),
            steps=3,
            guidance_scale=4.0,
            seed=0,
            height=None,
            width=None,
            exact_size=False,
            base_size=base_size,
            noise=draw(PICTURE, layers, base_size),
            own={"layers": layers, "cfg_normalize": False},
        )
        super().__init__(pipeline, request)

    def velocity(self) -> jax.Array:
        rows = jnp.tile(self.noise, (2, 1, 1))
        network = self.pipeline.weights["transformer"].module()
        velocity = network(rows, jnp.full(2, 0.8, jnp.float32), self.condition)
        return velocity[:, : self.plan.lengths.target[0]]

    def velocity_of_a_small_picture(self) -> jax.Array:
        """Of more frames than half a side has tokens: text starts behind the frames."""
        return Layers(self.pipeline, 32, 3).velocity()

    def schedule(self) -> np.ndarray:
        return self.pipeline.parts.solver.levels(40, None, self.plan.shift).sigma

    def composite(self) -> np.ndarray:
        media = self.pipeline.family.finish(self.networks, self.latents, self.plan, Clock())
        return np.asarray(result.shown(media))


STAGES = {
    "pixels": Stage(lambda it: it.arrays.own.pictures[0], 0, "parity/test_qwen_layered.py"),
    "velocity": Stage(Layers.velocity, VELOCITY_TOLERANCE, "parity/test_qwen_layered.py"),
    "velocity of a small picture": Stage(
        Layers.velocity_of_a_small_picture, VELOCITY_TOLERANCE, "parity/test_qwen_layered.py"
    ),
    "schedule": Stage(Layers.schedule, 0, "parity/test_qwen_layered.py"),
    "latents": Stage(lambda it: it.latents, LATENTS_TOLERANCE, "parity/test_qwen_layered.py"),
    "layers": Stage(lambda it: it.picture, SHARE, "parity/test_qwen_layered.py", share=True),
    "composite": Stage(Layers.composite, SHARE, "unit/test_qwen_layered.py", share=True),
}


@pytest.fixture(autouse=True)
def without_jit(monkeypatch):
    run_as_written(monkeypatch)


rows, measure = fixtures_of(STAGES)


DAILY = ("condition_is_frame_0", "linear_mu", "laid_on_black")


@pytest.mark.parametrize(
    "trap",
    [
        pytest.param(trap, id=name, marks=() if name in DAILY else pytest.mark.nightly)
        for trap, name in ((trap, trap.patch.__name__) for trap in TRAPS)
    ],
)
def test_a_mistake_is_seen(trap, layered_loaded, layered_folder, measure):
    measure.check(trap, Layers, layered_loaded, layered_folder)


def test_the_page_lists_every_mistake():
    page = PAGE.read_text(encoding="utf-8").partition("## Mistakes in Qwen-Image-Layered")[2]
    assert [trap.mistake for trap in TRAPS if f"| {trap.mistake} |" not in page] == []
