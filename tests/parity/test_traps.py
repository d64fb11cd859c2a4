"""Every mistake of tests/traps.py moves its stage by at least ten times what the stage's parity test lets pass.

The default run makes the first mistake of each part, the nightly one all of them.
`pytest tests/parity/test_traps.py -s -m "nightly or not nightly"` prints the table of docs/parity.md, for which alone
whole pictures are made, and what each stage lets pass.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import joyjax
from joyjax.families import encoding, joyimage, joyimage_buckets, joyimage_prompt
from joyjax.families import joyimage_stages as family
from joyjax.families.request import Request
from joyjax.layers.norm import ChannelNorm
from joyjax.layers.patch import unpatchify
from joyjax.models.autoencoder import pictures
from joyjax.processors import vision
from joyjax.sampling import loop, predictor

pytest.importorskip("torch")
from pairs import BUCKETS, SHARE, draw, photo
from parity.test_joyimage import PART_TOLERANCE
from parity.test_joyimage import TOLERANCE as TRANSFORMER_TOLERANCE
from parity.test_qwen3_vl import ENCODER_TOLERANCE, MLP_TOLERANCE, TOWER_TOLERANCE
from parity.test_stages import LATENTS_TOLERANCE
from parity.test_wan_vae import DECODE_TOLERANCE, ENCODE_TOLERANCE, NORM_TOLERANCE
from stagewise import Stages
from traps import TRAPS, Patch, Trap

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
SIZES = [(height, width) for height in range(304, 3000, 96) for width in range(304, 3000, 89)] + [(1730, 1384)]


class Edit(Stages):
    """One edit by Edit-Plus of two pictures of unlike shapes, run stage by stage and only as far as it is asked for."""

    def __init__(self, pipeline: joyjax.Pipeline):
        # These bounds have the vision tower's pictures enlarged.
        processor = dataclasses.replace(pipeline.parts.processor, min_pixels=96 * 128)
        parts = dataclasses.replace(pipeline.parts, processor=processor)
        pipeline = dataclasses.replace(pipeline, parts=parts, family=joyimage.EDIT_PLUS)
        request = Request(
            prompt="put the dog<|im_end|> on the table",
            negative_prompt=pipeline.family.defaults["negative_prompt"],
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
        self.size = family.target_size(request)
        super().__init__(pipeline, dataclasses.replace(request, noise=draw(*self.size)))

    @property
    def parts(self) -> Any:
        return self.pipeline.parts

    def network(self, name: str) -> Any:
        return self.pipeline.weights[name].module()

    def schedule(self) -> np.ndarray:
        levels = self.parts.solver.levels(40, None, None)
        return np.stack([levels.sigma, levels.time])

    def pixels(self) -> np.ndarray:
        return np.concatenate([picture.ravel() for picture in self.arrays.own.pictures])

    def token_ids(self) -> list[int]:
        return joyimage_prompt.prompt_tokens(self.parts.tokenizer, self.request.prompt, [])

    def hidden_states(self) -> np.ndarray:
        return np.concatenate([row[:count] for row, count in zip(self.txt, self.plan.own.text.lengths, strict=True)])

    def vision_tokens(self) -> jax.Array:
        vision = jax.tree.map(jnp.asarray, self.arrays.own.vision)
        tokens = self.network("text_encoder").visual(vision)[0]
        counts = np.asarray(vision.lengths) // self.parts.configs["text_encoder"].vision.merged
        return jnp.concatenate([row[:count] for row, count in zip(tokens, counts, strict=True)])

    def velocity(self) -> jax.Array:
        rows = jnp.tile(self.noise, (2, 1, 1))
        velocity = self.network("transformer")(rows, jnp.full(2, 1000, jnp.float32), self.condition)
        return velocity[:, : self.plan.lengths.target[0]]

    def decoded(self) -> jax.Array:
        own = self.plan.own.geometry
        return self.network("vae").decode(
            unpatchify(jnp.asarray(self.latents), own.patch, self.size[1] // own.sides[1])
        )


def numbers(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def norm_of_small_numbers(_: Edit) -> jax.Array:
    return ChannelNorm(24, axis=None, dtype=jnp.float32, rngs=nnx.Rngs(0))(1e-5 * numbers(1, 3, 5, 24))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A result on the way, what its parity test lets pass, and where that is. Tolerance 0: compared bit for bit.

    With `share` it is the share of values that may differ, else the largest difference over the largest number.
    """

    result: Callable[[Edit], Any]
    tolerance: float
    test: str
    share: bool = False

    def change(self, wrong: np.ndarray, right: np.ndarray, error: Callable) -> float:
        if wrong.shape != right.shape:
            return 1.0
        return float(np.mean(wrong != right)) if self.share or self.tolerance == 0 else error(wrong, right)

    def write(self, number: float) -> str:
        if self.tolerance and not self.share:
            return f"{number:.2g}"
        return f"{100 * number:.{0 if number > 0.01 else 2}f} % of values"


def part(network: str, path: Callable[[Any], Callable], width: int) -> Callable[[Edit], jax.Array]:
    return lambda edit: path(edit.network(network))(numbers(1, 40, width))


STAGES = {
    "size": Stage(lambda edit: edit.size, 0, "parity/test_edit.py"),
    "buckets": Stage(
        lambda _: [joyimage_buckets.nearest_bucket(*size, 1024) for size in SIZES], 0, "unit/test_image.py"
    ),
    "pixels": Stage(Edit.pixels, 0, "unit/test_image.py"),
    "vision sizes": Stage(
        lambda _: [vision.smart_resize(*size, 32, 65536, 2**24) for size in SIZES], 0, "parity/test_inputs.py"
    ),
    "vision patches": Stage(lambda edit: edit.arrays.own.vision.patches, 0, "parity/test_inputs.py"),
    "token ids": Stage(Edit.token_ids, 0, "parity/test_inputs.py"),
    "vision MLP": Stage(
        part("text_encoder", lambda it: it.visual.blocks[0].mlp, 32), MLP_TOLERANCE, "parity/test_qwen3_vl.py"
    ),
    "vision merger": Stage(
        part("text_encoder", lambda it: it.visual.merger, 32), MLP_TOLERANCE, "parity/test_qwen3_vl.py"
    ),
    "vision tokens": Stage(Edit.vision_tokens, TOWER_TOLERANCE, "parity/test_qwen3_vl.py"),
    "hidden states": Stage(Edit.hidden_states, ENCODER_TOLERANCE, "parity/test_qwen3_vl.py"),
    "norm of small numbers": Stage(norm_of_small_numbers, NORM_TOLERANCE, "parity/test_wan_vae.py"),
    "reference latents": Stage(lambda edit: edit.references, ENCODE_TOLERANCE, "parity/test_wan_vae.py"),
    "schedule": Stage(Edit.schedule, 0, "unit/test_sampling.py"),
    "transformer MLP": Stage(
        part("transformer", lambda it: it.blocks[0].img.mlp, 64), PART_TOLERANCE, "parity/test_joyimage.py"
    ),
    "text embedding": Stage(
        part("transformer", lambda it: it._embed_text, 64), PART_TOLERANCE, "parity/test_joyimage.py"
    ),
    "velocity": Stage(Edit.velocity, TRANSFORMER_TOLERANCE, "parity/test_joyimage.py"),
    "latents": Stage(lambda edit: edit.latents, LATENTS_TOLERANCE, "parity/test_stages.py"),
    "decoded": Stage(Edit.decoded, DECODE_TOLERANCE, "parity/test_wan_vae.py"),
    "picture": Stage(lambda edit: edit.picture, SHARE, "parity/test_edit.py", share=True),
}


@pytest.fixture(autouse=True)
def small_and_without_jit(monkeypatch):
    run_as_written(monkeypatch)
    published = joyimage_buckets.buckets
    monkeypatch.setattr(
        joyimage_buckets, "buckets", lambda base_size: BUCKETS if base_size == 256 else published(base_size)
    )


def run_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stages of all families without `jax.jit`, so that no compiled program hides a patch."""

    def unjitted(stage):
        return lambda *args, **kwargs: stage.__wrapped__(*jax.tree.map(jnp.asarray, args), **kwargs)

    for owner, name in (
        (encoding, "encode_prompt"),
        (pictures, "encode_images"),
        (pictures, "decode_latents"),
        (predictor, "predict"),
        (loop, "advance"),
    ):
        monkeypatch.setattr(owner, name, unjitted(getattr(owner, name)))


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the tests of a module share: the right edits, and the rows of the page's table, by mistake."""

    right: dict[Any, Any] = dataclasses.field(default_factory=dict)
    shown: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measure:
    """How far mistakes move their stages; `shown`: the table is printed, for which whole pictures are made."""

    stages: dict[str, Stage]
    rows: Rows
    error: Callable
    patch: Patch
    shown: bool

    def check(self, trap: Trap, make: Callable[[joyjax.Pipeline], Any], loaded: joyjax.Pipeline, folder: Path) -> None:
        """Make an edit right and with a mistake; assert that its stage moves by ten times what the test lets pass."""
        stage = self.stages[trap.stage]
        if trap.given:
            trap.given(self.patch)
        right = self.rows.right.setdefault(trap.given, make(loaded))
        expected, picture = np.asarray(stage.result(right)), right.picture.astype(int) if self.shown else None
        trap.patch(self.patch)
        wrong = make(joyjax.load(folder, dtype="float32") if trap.reload else loaded)
        change = stage.change(np.asarray(stage.result(wrong)), expected, self.error)
        if picture is not None:
            other = wrong.picture.shape != picture.shape
            levels = "another size" if other else np.abs(wrong.picture - picture).max()
            row = f"| {trap.part} | {trap.mistake} | {trap.stage} | {stage.write(change)} | {levels} |"
            self.rows.shown[trap.mistake] = row
        assert change > 10 * stage.tolerance


def print_tables(rows: dict[str, str], stages: dict[str, Stage]) -> None:
    """Print the tables of docs/parity.md."""
    print("\n\n| part | mistake | seen at | moves it by | and the picture by |\n|---|---|---|---|---|")
    print("\n".join(rows.values()))
    print("\n| stage | lets pass | test |\n|---|---|---|")
    for name, stage in stages.items():
        allowed = "nothing" if stage.tolerance == 0 else stage.write(stage.tolerance)
        print(f"| {name} | {allowed} | `tests/{stage.test}` |")


def fixtures_of(stages: dict[str, Stage]) -> tuple[Any, Any]:
    """Return the fixtures `rows` and `measure` of a module with these stages; its tables are printed at the end."""

    @pytest.fixture(scope="module")
    def rows():
        held = Rows()
        yield held
        print_tables(held.shown, stages)

    @pytest.fixture
    def measure(rows, error, monkeypatch, request):
        return Measure(stages, rows, error, Patch(monkeypatch), shown=request.config.option.capture == "no")

    return rows, measure


def sampled(traps: list[Trap]) -> list[Any]:
    """Return all traps; those that are not the first of their part are nightly."""
    first = {trap.part: trap for trap in reversed(traps)}
    return [
        pytest.param(
            trap,
            id=trap.patch.__name__,
            marks=() if first[trap.part] is trap else pytest.mark.nightly,
        )
        for trap in traps
    ]


rows, measure = fixtures_of(STAGES)


@pytest.mark.parametrize("trap", sampled(TRAPS))
def test_a_mistake_is_seen(trap, loaded, checkpoint, measure):
    measure.check(trap, Edit, loaded, checkpoint)


def test_the_page_lists_every_mistake():
    page = PAGE.read_text(encoding="utf-8")
    assert [trap.mistake for trap in TRAPS if f"| {trap.mistake} |" not in page] == []
