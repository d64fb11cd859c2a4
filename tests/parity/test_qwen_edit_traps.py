"""Every mistake of tests/qwen_edit_traps.py moves its stage by at least ten times what its parity test lets pass.

As parity/test_traps.py, of which this has the measure: the default run makes the first mistake of each part,
and `pytest tests/parity/test_qwen_edit_traps.py -s -m "nightly or not nightly"` prints the table of docs/parity.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import joyjax
from joyjax.families import qwen_image_edit_stages as family
from joyjax.families.qwen_image_edit import EDIT_PLUS
from joyjax.families.qwen_image_prompt import DROPPED
from joyjax.families.request import Request

pytest.importorskip("torch")
from pairs import SHARE, draw
from parity.test_qwen2_5_vl_vision import ENCODER_TOLERANCE, MERGER_TOLERANCE, TOWER_TOLERANCE
from parity.test_qwen_image import VELOCITY_TOLERANCE
from parity.test_traps import PAGE, SIZES, Stage, fixtures_of, part, run_as_written, sampled
from parity.test_wan_vae import ENCODE_TOLERANCE
from qwen_edit_traps import PICTURES, TRAPS
from stagewise import Stages

pytestmark = [pytest.mark.parity, pytest.mark.slow]

READ = 192  # the side of the text encoder's pictures, so that they have several windows


class Edit(Stages):
    """One edit by Edit-Plus of two pictures of unlike shapes, run stage by stage and only as far as it is asked for."""

    def __init__(self, pipeline: joyjax.Pipeline):
        request = Request(
            prompt="put the dog<|im_end|> on the table",
            negative_prompt=" ",
            pictures=PICTURES,
            steps=3,
            guidance_scale=4.0,
            seed=0,
            height=None,
            width=None,
            exact_size=False,
            base_size=256,
            noise=None,
        )
        self.size = family.natural_size((PICTURES[-1].height, PICTURES[-1].width), 256)
        super().__init__(pipeline, dataclasses.replace(request, noise=draw(*self.size)))

    def network(self, name: str) -> Any:
        return self.pipeline.weights[name].module()

    def pixels(self) -> np.ndarray:
        return np.concatenate([picture.ravel() for picture in self.arrays.own.pictures])

    def token_ids(self) -> list[int]:
        return list(self.plan.own.text.rows[-1])

    def patches(self) -> np.ndarray:
        """The patches of each picture, in the order of rows of tokens."""
        vision = self.arrays.own.vision
        rows = [
            patches.reshape(-1, 4, patches.shape[-1])[slots[: count // 4]]
            for patches, slots, count in zip(vision.patches, vision.slots, vision.lengths, strict=True)
        ]
        return np.concatenate(rows)

    def vision_tokens(self) -> jax.Array:
        vision = jax.tree.map(jnp.asarray, self.arrays.own.vision)
        tokens = self.network("text_encoder").visual(vision)
        return jnp.concatenate([row[: int(count) // 4] for row, count in zip(tokens, vision.lengths, strict=True)])

    def hidden_states(self) -> np.ndarray:
        return np.concatenate([row[:count] for row, count in zip(self.txt, self.plan.own.text.lengths, strict=True)])

    def velocity(self) -> jax.Array:
        rows = jnp.tile(self.noise, (2, 1, 1))
        velocity = self.network("transformer")(rows, jnp.full(2, 0.8, jnp.float32), self.condition)
        return velocity[:, : self.plan.lengths.target[0]]


STAGES = {
    "size": Stage(lambda it: it.size, 0, "parity/test_qwen_edits.py"),
    "sizes": Stage(lambda _: [family.size_of_area(size, 1024) for size in SIZES], 0, "unit/test_qwen_edit_requests.py"),
    "pixels": Stage(Edit.pixels, 0, "unit/test_qwen_edit_requests.py"),
    "token ids": Stage(Edit.token_ids, 0, "parity/test_qwen_edits.py"),
    "vision patches": Stage(Edit.patches, 0, "parity/test_qwen2_5_vl_vision.py"),
    "vision merger": Stage(
        part("text_encoder", lambda it: it.visual.merger, 48), MERGER_TOLERANCE, "parity/test_qwen2_5_vl_vision.py"
    ),
    "vision tokens": Stage(Edit.vision_tokens, TOWER_TOLERANCE, "parity/test_qwen2_5_vl_vision.py"),
    "hidden states": Stage(Edit.hidden_states, ENCODER_TOLERANCE, "parity/test_qwen2_5_vl_vision.py"),
    "reference latents": Stage(lambda it: it.references, ENCODE_TOLERANCE, "parity/test_wan_vae.py"),
    "velocity": Stage(Edit.velocity, VELOCITY_TOLERANCE, "parity/test_qwen_image.py"),
    "picture": Stage(lambda it: it.picture, SHARE, "parity/test_qwen_edits.py", share=True),
}


@pytest.fixture(autouse=True)
def without_jit(monkeypatch):
    run_as_written(monkeypatch)
    monkeypatch.setattr(family, "read_side", lambda base_size, plus: READ)


rows, measure = fixtures_of(STAGES)


@pytest.mark.parametrize("trap", sampled(TRAPS))
def test_a_mistake_is_seen(trap, qwen_plus_loaded, qwen_plus_folder, measure):
    measure.check(trap, Edit, qwen_plus_loaded, qwen_plus_folder)


def test_the_page_lists_every_mistake():
    page = PAGE.read_text(encoding="utf-8").partition("## Mistakes in Qwen-Image's edits")[2]
    assert [trap.mistake for trap in TRAPS if f"| {trap.mistake} |" not in page] == []


def test_the_prefix_is_longer_than_that_of_text_to_image(qwen_plus_loaded):
    assert qwen_plus_loaded.family is EDIT_PLUS
    assert family.EDIT_DROPPED == 64 > DROPPED
