"""Every mistake of tests/qwen_traps.py moves its stage by at least ten times what the stage's parity test lets pass.

As parity/test_traps.py, of which this has the measure: the default run makes the first mistake of each part,
and `pytest tests/parity/test_qwen_traps.py -s -m "nightly or not nightly"` prints the table of docs/parity.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import joyjax
from joyjax.families import qwen_image, qwen_image_prompt
from joyjax.families.request import Request
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.layers.patch import unpatchify
from joyjax.models.qwen_image import image_positions, text_start

pytest.importorskip("torch")
from pairs import SHARE, draw
from parity.test_qwen_edit import LATENTS_TOLERANCE
from parity.test_qwen_image import PART_TOLERANCE, STATES_TOLERANCE, VELOCITY_TOLERANCE
from parity.test_traps import (
    PAGE,
    Stage,
    fixtures_of,
    norm_of_small_numbers,
    part,
    run_as_written,
    sampled,
)
from parity.test_wan_vae import DECODE_TOLERANCE, NORM_TOLERANCE
from qwen_traps import TRAPS
from stagewise import Stages

pytestmark = [pytest.mark.parity, pytest.mark.slow]

SIZE = (80, 144)  # 5 × 9 tokens


class Picture(Stages):
    """One picture from words, run stage by stage and only as far as it is asked for."""

    def __init__(self, pipeline: joyjax.Pipeline):
        pipeline = dataclasses.replace(pipeline, family=qwen_image.TEXT_TO_IMAGE)
        request = Request(
            prompt="a red fox<|im_end|> in the snow beside a small blue house",
            negative_prompt=pipeline.family.defaults["negative_prompt"],
            pictures=(),
            steps=3,
            guidance_scale=4.0,
            seed=0,
            height=SIZE[0],
            width=SIZE[1],
            exact_size=False,
            base_size=1024,
            noise=draw(*SIZE),
        )
        super().__init__(pipeline, request)

    def network(self, name: str) -> Any:
        return self.pipeline.weights[name].module()

    def schedule(self) -> np.ndarray:
        """Levels of a small picture, of this one, and of one larger than the largest of the config."""
        solver = self.pipeline.parts.solver
        return np.stack([solver.levels(40, None, solver.shift(tokens)).sigma for tokens in (16, 45, 4097, 9001)])

    def token_ids(self) -> list[int]:
        return qwen_image_prompt.prompt_tokens(self.pipeline.parts.tokenizer, self.request.prompt)

    def hidden_states(self) -> np.ndarray:
        return np.concatenate([row[:count] for row, count in zip(self.txt, self.plan.own.text.lengths, strict=True)])

    def states_of_axes(self) -> jax.Array:
        """Hidden states where the three positions of a token differ, as behind a picture."""
        rng = np.random.default_rng(0)
        ids, positions = rng.integers(0, 380, (1, 14)), rng.integers(0, 30, (1, 14, 3))
        text = TextInputs(jnp.int32(ids), jnp.int32(positions), jnp.full((1, 14), -1, jnp.int32))
        return self.network("text_encoder")(text)

    def velocity(self) -> jax.Array:
        rows = jnp.tile(self.noise, (2, 1, 1))
        velocity = self.network("transformer")(rows, jnp.full(2, 0.8, jnp.float32), self.condition)
        return velocity[:, : self.plan.lengths.target[0]]

    def velocity_at_time_0(self) -> jax.Array:
        """The velocity of a target of 5 × 3 tokens beside a reference of 4 × 7, whose time is 0."""
        network = self.network("transformer")
        network.config = dataclasses.replace(network.config, zero_cond_t=True)
        rng, sizes = np.random.default_rng(0), [(5, 3), (4, 7)]
        latents, references, txt = (jnp.float32(rng.standard_normal((2, *s))) for s in ((15, 64), (28, 64), (11, 96)))
        where = jnp.tile(image_positions(sizes), (2, 1, 1))
        condition = Condition(txt, None, references, where, txt_start=jnp.full(2, text_start(sizes), jnp.int32))
        return network(latents, jnp.float32([0.7, 0.2]), condition)

    def decoded(self) -> jax.Array:
        own = self.plan.own.geometry
        return self.network("vae").decode(unpatchify(jnp.asarray(self.latents), own.patch, SIZE[1] // own.sides[1]))


STAGES = {
    "token ids": Stage(Picture.token_ids, 0, "parity/test_qwen_edit.py"),
    "hidden states": Stage(Picture.hidden_states, STATES_TOLERANCE, "parity/test_qwen_image.py"),
    "hidden states of three axes": Stage(Picture.states_of_axes, STATES_TOLERANCE, "parity/test_qwen_image.py"),
    "schedule": Stage(Picture.schedule, 0, "unit/test_sampling.py"),
    "transformer MLP": Stage(
        part("transformer", lambda it: it.blocks[0].img.mlp, 80), PART_TOLERANCE, "parity/test_qwen_image.py"
    ),
    "velocity": Stage(Picture.velocity, VELOCITY_TOLERANCE, "parity/test_qwen_image.py"),
    "velocity beside references at time 0": Stage(
        Picture.velocity_at_time_0, VELOCITY_TOLERANCE, "parity/test_qwen_image.py"
    ),
    "latents": Stage(lambda it: it.latents, LATENTS_TOLERANCE, "parity/test_qwen_edit.py"),
    "norm of small numbers": Stage(norm_of_small_numbers, NORM_TOLERANCE, "parity/test_wan_vae.py"),
    "decoded": Stage(Picture.decoded, DECODE_TOLERANCE, "parity/test_wan_vae.py"),
    "picture": Stage(lambda it: it.picture, SHARE, "parity/test_qwen_edit.py", share=True),
}


@pytest.fixture(autouse=True)
def without_jit(monkeypatch):
    run_as_written(monkeypatch)


rows, measure = fixtures_of(STAGES)


@pytest.mark.parametrize("trap", sampled(TRAPS))
def test_a_mistake_is_seen(trap, qwen_loaded, qwen_folder, measure):
    measure.check(trap, Picture, qwen_loaded, qwen_folder)


def test_the_page_lists_every_mistake():
    page = PAGE.read_text(encoding="utf-8").partition("## Mistakes in Qwen-Image")[2]
    assert [trap.mistake for trap in TRAPS if f"| {trap.mistake} |" not in page] == []
