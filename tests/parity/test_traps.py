"""Every mistake of tests/traps.py moves its stage by at least ten times what the stage's parity test lets pass.

    pytest tests/parity/test_traps.py -s        prints the table of docs/parity.md
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import joyjax
import numpy as np
import pytest
from flax import nnx
from joyjax import editing
from joyjax.families import joyimage as family
from joyjax.families.family import Inputs, Request
from joyjax.inputs import image, vision
from joyjax.layers.norm import ChannelNorm
from joyjax.layers.patch import patchify, unpatchify
from joyjax.sampling import steps

pytest.importorskip("torch")
from parity.test_edit import SHARE, draw, photo
from parity.test_qwen3_vl import ENCODER_TOLERANCE, MLP_TOLERANCE, TOWER_TOLERANCE
from parity.test_stages import BUCKETS, TOLERANCES
from parity.test_wan_vae import DECODE_TOLERANCE, ENCODE_TOLERANCE
from traps import TRAPS, Trap

pytestmark = pytest.mark.parity

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
SIDES = [(height, width) for height in range(300, 3000, 97) for width in range(300, 3000, 89)] + [(1730, 1384)]


class Edit:
    """One edit of Edit-Plus with two pictures of unlike shapes, stage by stage and only as far as it is asked for."""

    def __init__(self, pipeline: joyjax.Pipeline):
        self.pipeline = pipeline
        self.config = pipeline.files.configs["transformer"]
        # Enlarges what the buckets below give, so that the vision tower's pictures are resized.
        self.files = dataclasses.replace(
            pipeline.files, vision=dataclasses.replace(pipeline.files.vision, min_pixels=96 * 128)
        )
        self.request = Request(
            prompt="put the dog on the table",
            negative_prompt=" ",
            pictures=(photo(70, 103), photo(131, 91, seed=1)),
            steps=3,
            guidance_scale=4.0,
            seed=0,
            height=None,
            width=None,
            exact_size=False,
            base_size=256,
            noise=None,
        )

    def network(self, name: str) -> nnx.Module:
        return self.pipeline.weights[name].module()

    @functools.cached_property
    def inputs(self) -> Inputs:
        request = dataclasses.replace(self.request, noise=draw(*family.target_size(self.request)))
        return self.pipeline.family.prepare(request, self.files)

    @functools.cached_property
    def txt(self) -> jax.Array:
        return editing.encode_prompt(self.pipeline, self.inputs)

    @functools.cached_property
    def references(self) -> jax.Array:
        return editing.encode_references(self.pipeline, self.inputs)

    @functools.cached_property
    def condition(self):
        return self.pipeline.family.condition(self.inputs, self.txt, self.references)

    @functools.cached_property
    def latents(self) -> jax.Array:
        return editing._denoise(self.pipeline, self.request, self.inputs, self.condition, None)

    @functools.cached_property
    def picture(self) -> np.ndarray:
        return np.asarray(editing.decode(self.pipeline, self.inputs, self.latents)[0])

    def schedule(self) -> np.ndarray:
        levels = editing.sigmas(40, self.files.schedule)
        return np.stack([levels, editing.timesteps(levels, self.files.schedule)])

    def hidden_states(self) -> np.ndarray:
        return np.concatenate([row[:n] for row, n in zip(self.txt, self.inputs.prompt_lengths, strict=True)])

    def velocity(self) -> jax.Array:
        rows = jnp.tile(patchify(jnp.asarray(self.inputs.noise), self.config.patch), (2, 1, 1))
        return self.network("transformer")(rows, jnp.full(2, 1000, jnp.float32), self.condition)

    def decoded(self) -> jax.Array:
        columns = self.inputs.noise.shape[2] // self.config.patch[1]
        return self.network("vae").decode(unpatchify(self.latents, self.config.patch, columns))

    def norm_of_small_numbers(self) -> jax.Array:
        norm = ChannelNorm(24, axis=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
        return norm(1e-5 * jax.random.normal(jax.random.key(0), (1, 3, 5, 24)))

    def vision_mlp(self) -> jax.Array:
        return self.network("text_encoder").visual.blocks[0].mlp(jax.random.normal(jax.random.key(0), (1, 40, 32)))

    def vision_merger(self) -> jax.Array:
        return self.network("text_encoder").visual.merger(jax.random.normal(jax.random.key(0), (1, 40, 32)))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A result on the way, what its parity test lets pass (0: compared bit for bit), and where that test is."""

    result: Callable[[Edit], object]
    tolerance: float
    test: str


STAGES = {
    "schedule": Stage(Edit.schedule, 0, "unit/test_sampling.py"),
    "buckets": Stage(lambda _: [image.nearest_bucket(*size, 1024) for size in SIDES], 0, "unit/test_image.py"),
    "vision sizes": Stage(
        lambda _: [vision.smart_resize(*size, 32, 65536, 2**24) for size in SIDES], 0, "parity/test_inputs.py"
    ),
    "size": Stage(lambda edit: family.target_size(edit.request), 0, "parity/test_edit.py"),
    "pixels": Stage(lambda edit: np.concatenate([p.ravel() for p in edit.inputs.pictures]), 0, "unit/test_image.py"),
    "token ids": Stage(lambda edit: family.prompt_tokens(edit.files.tokenizer, "a<|im_end|>b", []), 0, "unit/test_text.py"),
    "vision patches": Stage(lambda edit: edit.inputs.vision.patches, 0, "parity/test_inputs.py"),
    "vision MLP": Stage(Edit.vision_mlp, MLP_TOLERANCE, "parity/test_qwen3_vl.py"),
    "vision merger": Stage(Edit.vision_merger, MLP_TOLERANCE, "parity/test_qwen3_vl.py"),
    "vision tokens": Stage(
        lambda edit: edit.network("text_encoder").visual(edit.inputs.vision)[0], TOWER_TOLERANCE, "parity/test_qwen3_vl.py"
    ),
    "hidden states": Stage(Edit.hidden_states, ENCODER_TOLERANCE, "parity/test_qwen3_vl.py"),
    "norm of small numbers": Stage(Edit.norm_of_small_numbers, 1e-5, "parity/test_wan_vae.py"),
    "reference latents": Stage(lambda edit: edit.references, ENCODE_TOLERANCE, "parity/test_wan_vae.py"),
    "velocity": Stage(Edit.velocity, TOLERANCES["first velocity"], "parity/test_joyimage.py"),
    "latents": Stage(lambda edit: edit.latents, TOLERANCES["latents"], "parity/test_stages.py"),
    "decoded": Stage(Edit.decoded, DECODE_TOLERANCE, "parity/test_wan_vae.py"),
    "picture": Stage(lambda edit: edit.picture, SHARE, "parity/test_edit.py"),
}


@pytest.fixture(autouse=True)
def without_jit(monkeypatch):
    """Run the stages as they are written, so that no compiled program hides a patch; and with small buckets."""

    def unjitted(stage):
        return lambda *args, **kwargs: stage.__wrapped__(*jax.tree.map(jnp.asarray, args), **kwargs)

    for name in ("encode_prompt", "encode_images", "denoise_step", "decode_latents"):
        monkeypatch.setattr(steps, name, unjitted(getattr(steps, name)))
    published = image.buckets
    monkeypatch.setattr(image, "buckets", lambda base_size: BUCKETS if base_size == 256 else published(base_size))


@pytest.fixture(scope="module")
def load(checkpoint):
    return lambda: dataclasses.replace(joyjax.load(checkpoint, dtype="float32"), family=family.EDIT_PLUS)


@pytest.fixture(scope="module")
def rows():
    """The table, printed when all of it is there."""
    rows = []
    yield rows
    print("\n\n| | mistake | seen at | moves it by | and the picture by |\n|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


@pytest.fixture(scope="module")
def edits():
    """What is right, by what was given to both sides."""
    return {}


@pytest.fixture(scope="module")
def pipeline(load):
    return load()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.patch.__name__)
def test_a_trap_is_seen(trap, load, pipeline, edits, rows, error, monkeypatch):
    stage = STAGES[trap.stage]
    if trap.given:
        trap.given(monkeypatch.setattr)
    right = edits.setdefault(trap.given, Edit(pipeline))
    expected, picture = np.asarray(stage.result(right)), right.picture
    trap.patch(monkeypatch.setattr)
    wrong = Edit(load() if trap.reload else pipeline)
    result = np.asarray(stage.result(wrong))
    share = result.shape != expected.shape or np.mean(result != expected)
    exact = stage.tolerance in (0, SHARE)
    change = share if exact else error(result, expected)
    moved = "another size" if wrong.picture.shape != picture.shape else str(np.abs(picture.astype(int) - wrong.picture).max())
    rows.append((trap.part, trap.mistake, trap.stage, f"{share:.0%} of the values" if exact else f"{change:.1e}", moved))
    assert change > 10 * stage.tolerance


def test_the_page_has_every_trap():
    page = PAGE.read_text(encoding="utf-8")
    assert [trap.mistake for trap in TRAPS if f"| {trap.mistake} |" not in page] == []
