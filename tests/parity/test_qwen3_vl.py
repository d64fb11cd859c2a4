"""The text encoder against Transformers' own, stage by stage."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.rules import match
from joyjax.layers.decoder import TextInputs
from joyjax.layers.weights import Weights, leaves
from joyjax.models.qwen3_vl import Qwen3VL
from joyjax.models.qwen3_vl_vision import VisionInputs, gelu, patch_positions

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.jax, pytest.mark.parity]

# Measured on this checkpoint: 5e-7 for an MLP, 1.9e-6 for the vision tower, 3.2e-6 for the whole encoder. The mistake
# that moves them least, a GELU of the other kind, moves them by 2.5e-4.
MLP_TOLERANCE = 2e-6
TOWER_TOLERANCE = 6e-6
ENCODER_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of rows × columns patches, with random numbers in them."""

    rows: int
    columns: int

    @property
    def patches(self) -> np.ndarray:
        rng = np.random.default_rng(100 * self.rows + self.columns)
        return rng.uniform(-1, 1, (self.rows * self.columns, 1536)).astype(np.float32)

    @property
    def tokens(self) -> int:
        return self.rows * self.columns // 4


WIDE, TALL, SMALL = Picture(4, 6), Picture(10, 6), Picture(2, 2)  # the table of position embeddings is 8×8

# A prompt is a sequence of words, given as their number, and pictures.
PROMPTS = {
    "text": [(4,), (9,), (6,)],
    "one picture": [(3, WIDE, 5)],
    "two pictures of unlike size": [(3, TALL, 2, WIDE, 4)],
    "unlike rows": [(3, WIDE, 5), (2, TALL, 1, SMALL, 7), (6,)],
    "two prompts about one picture": [(3, WIDE, 4), (3, WIDE, 11)],
}


@jax.jit
def apply(weights: Weights, *inputs):
    """Run a network."""
    return weights.module()(*inputs)


def load(encoder, dtype) -> Qwen3VL:
    """Return our network with the weights of theirs."""
    config = TEXT_ENCODER.configure(encoder.config.to_diff_dict())
    weights = TEXT_ENCODER.abstract(config, dtype)
    tensors = {name: tensor.float().numpy() for name, tensor in encoder.state_dict().items()}
    parameters = leaves(weights.state)
    matches = match(
        TEXT_ENCODER.rules(config),
        TEXT_ENCODER.ignored,
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: leaf.shape for name, leaf in parameters.items()},
        where="reference",
    )
    arrays = {m.target: m.transform.forward(tensors[m.source], parameters[m.target].shape) for m in matches}
    filled = [
        (tuple(path), leaf.replace(jnp.asarray(arrays[".".join(map(str, path))], leaf.dtype)))
        for path, leaf in nnx.to_flat_state(weights.state)
    ]
    return nnx.merge(weights.graph, nnx.from_flat_state(filled))


@pytest.fixture(scope="module")
def theirs(reference):
    return reference.text_encoder


@pytest.fixture(scope="module")
def ours(theirs) -> Qwen3VL:
    return load(theirs, jnp.float32)


def vision_inputs(pictures, config, length=None) -> VisionInputs:
    """Pad the pictures to `length` patches with numbers that would be seen if anything read them."""
    length = length or max(4 * picture.tokens for picture in pictures)
    padded = []
    for picture in pictures:
        arrays = (picture.patches, *patch_positions(picture.rows, picture.columns, config))
        blank = length - len(picture.patches)
        padded.append([np.pad(a, ((0, blank), (0, 0)), constant_values=3) for a in arrays])
    lengths = np.array([len(picture.patches) for picture in pictures], np.int32)
    return VisionInputs(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*padded, strict=True)), jnp.asarray(lengths))


def grids(pictures):
    return torch.tensor([[1, picture.rows, picture.columns] for picture in pictures])


def vision_reference(encoder, pictures):
    """Return the tokens of each picture: from the tower's end, and from each tap."""
    patches = torch.from_numpy(np.concatenate([picture.patches for picture in pictures]))
    out = encoder.model.get_image_features(patches, grids(pictures), return_dict=True)
    stages = [out.pooler_output, *out.deepstack_features]
    return [[tokens.float().numpy() for tokens in stage] for stage in stages]


def compare_tower(tower, encoder, pictures, length=None) -> float:
    features, deepstack = apply(Weights.of(tower), vision_inputs(pictures, tower.config, length))
    stages = vision_reference(encoder, pictures)
    assert len(deepstack) == len(stages) - 1 == 3
    worst = 0.0
    for ours, theirs in zip((features, *deepstack), stages, strict=True):
        for row, tokens in zip(np.asarray(ours, np.float32), theirs, strict=True):
            worst = max(worst, np.abs(row[: len(tokens)] - tokens).max() / np.abs(tokens).max())
    return worst


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Prompts as the reference reads them and as we do; `valid` marks what is not padding."""

    given: dict
    text: TextInputs
    pictures: tuple[Picture, ...]
    valid: np.ndarray


def encode(encoder, prompts) -> Encoded:
    """Write prompts as tokens. Each picture is in our inputs once, in theirs as often as it is named."""
    rng = np.random.default_rng(0)
    named = [part for prompt in prompts for part in prompt if isinstance(part, Picture)]
    pictures = tuple(dict.fromkeys(named))
    room = max((picture.tokens for picture in pictures), default=0)
    ids, slots = [], []
    for prompt in prompts:
        ids.append([])
        slots.append([])
        for part in prompt:
            if isinstance(part, Picture):
                ids[-1] += [encoder.config.image_token_id] * part.tokens
                slots[-1] += [pictures.index(part) * room + token for token in range(part.tokens)]
            else:
                ids[-1] += rng.integers(0, 300, part).tolist()
                slots[-1] += [-1] * part
    longest = max(map(len, ids))
    valid = np.array([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
    ids = np.array([row + [301] * (longest - len(row)) for row in ids], np.int32)
    slots = np.array([row + [-1] * (longest - len(row)) for row in slots], np.int32)
    mask = torch.from_numpy(valid.astype(np.int64))
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": mask}
    kinds = torch.from_numpy((slots >= 0).astype(np.int32))
    image_grids = grids(named) if named else None
    positions, _ = encoder.model.get_rope_index(given["input_ids"], kinds, image_grids, attention_mask=mask)
    if named:
        given["pixel_values"] = torch.from_numpy(np.concatenate([picture.patches for picture in named]))
        given["image_grid_thw"] = image_grids
        given["mm_token_type_ids"] = kinds
    positions = np.moveaxis(positions.numpy(), 0, -1).astype(np.int32)
    text = TextInputs(jnp.asarray(ids), jnp.asarray(positions), jnp.asarray(slots))
    return Encoded(given, text, pictures, valid)


def last_layer(encoder, given) -> np.ndarray:
    """Return what the last decoder layer gives, as the reference's pipeline takes it."""
    captured = []
    handle = encoder.model.language_model.layers[-1].register_forward_hook(lambda *a: captured.append(a[2]))
    try:
        encoder(**given)
    finally:
        handle.remove()
    return captured[0].float().numpy()


def run(network, encoded) -> np.ndarray:
    vision = vision_inputs(encoded.pictures, network.visual.config) if encoded.pictures else None
    return np.asarray(apply(Weights.of(network), encoded.text, vision), np.float32)


@pytest.mark.parametrize(
    ("pictures", "length"),
    [((WIDE,), 24), ((SMALL, TALL), 60), ((TALL, WIDE, SMALL), 72)],
    ids=["one", "two of unlike size", "three with padding to spare"],
)
def test_tower(ours, theirs, pictures, length):
    assert compare_tower(ours.visual, theirs, pictures, length) < TOWER_TOLERANCE


def test_mlp_of_the_tower_has_the_tanh_gelu(ours, theirs, error):
    block, x = ours.visual.blocks[0], np.random.default_rng(0).normal(size=(1, 40, 32)).astype(np.float32)
    expected = theirs.model.visual.blocks[0].mlp(torch.from_numpy(x))
    assert error(block.mlp(jnp.asarray(x)), expected) < MLP_TOLERANCE
    mistaken = block.down(gelu(block.up(jnp.asarray(x)), approximate=False))
    assert error(mistaken, expected) > 10 * MLP_TOLERANCE


@pytest.mark.parametrize("tap", [None, 0, 2])
def test_mergers_have_the_exact_gelu(ours, theirs, error, tap):
    visual = theirs.model.visual
    merger = ours.visual.merger if tap is None else ours.visual.deepstack[tap]
    expected_merger = visual.merger if tap is None else visual.deepstack_merger_list[tap]
    x = np.random.default_rng(0).normal(size=(1, 40, 32)).astype(np.float32)
    expected = expected_merger(torch.from_numpy(x[0]))[None]
    assert error(merger(jnp.asarray(x)), expected) < MLP_TOLERANCE
    normed = merger.norm(jnp.asarray(x).reshape(1, 10, 128)) if merger.joined_norm else merger.norm(jnp.asarray(x))
    mistaken = merger.down(gelu(merger.up(normed.reshape(1, 10, 128)), approximate=True))
    assert error(mistaken, expected) > 10 * MLP_TOLERANCE


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_encoder(ours, theirs, error, prompts):
    encoded = encode(theirs, prompts)
    expected = last_layer(theirs, encoded.given)
    result = run(ours, encoded)
    assert error(result[encoded.valid], expected[encoded.valid]) < ENCODER_TOLERANCE


@pytest.mark.parametrize("shared", [2, 10, 19, 21])
def test_shared_tokens_are_computed_once(ours, theirs, error, shared):
    """Three rows with one beginning of 21 tokens, a picture of 15 among them; cut before, in and behind it."""
    encoded = encode(theirs, [(4, TALL, 6)] * 3)
    rows = np.repeat(np.asarray(encoded.text.ids[:1]), 3, axis=0)
    rows[1:, 21:] = np.random.default_rng(1).integers(0, 300, (2, 4))
    text = dataclasses.replace(encoded.text, ids=jnp.asarray(rows))
    expected = last_layer(theirs, encoded.given | {"input_ids": torch.from_numpy(rows).long()})
    once = dataclasses.replace(encoded, text=dataclasses.replace(text, shared=shared))
    assert error(run(ours, once), expected) < ENCODER_TOLERANCE
    too_many = dataclasses.replace(encoded, text=dataclasses.replace(text, shared=23))
    assert error(run(ours, too_many), expected) > 100 * ENCODER_TOLERANCE


def test_row_equals_the_row_alone(ours, theirs, error):
    prompts = PROMPTS["unlike rows"]
    encoded, alone = encode(theirs, prompts), encode(theirs, prompts[:1])
    size = alone.text.ids.shape[1]
    together = run(ours, encoded)[:1, :size]
    alone = dataclasses.replace(alone, text=dataclasses.replace(alone.text, ids=encoded.text.ids[:1, :size]))
    assert error(together, run(ours, alone)) < ENCODER_TOLERANCE


def test_pictures_do_not_see_each_other(ours):
    inputs = vision_inputs((WIDE, SMALL), ours.visual.config)
    other = dataclasses.replace(inputs, patches=inputs.patches.at[1].multiply(-1))
    before, after = (apply(Weights.of(ours.visual), given)[0] for given in (inputs, other))
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])


def test_last_layer_is_taken_before_deepstack_adds_to_it(theirs, error):
    import random_checkpoint

    config = copy.deepcopy(theirs.config)
    config.text_config.num_hidden_layers = len(config.vision_config.deepstack_visual_indexes)
    short = type(theirs)(config).eval()
    random_checkpoint.strong_(short, torch.Generator().manual_seed(1))
    encoded = encode(short, PROMPTS["one picture"])
    network = load(short, jnp.float32)
    result = run(network, encoded)
    assert error(result[encoded.valid], last_layer(short, encoded.given)[encoded.valid]) < ENCODER_TOLERANCE


def test_bfloat16_is_as_close_as_the_reference(checkpoint, theirs):
    rounded = type(theirs).from_pretrained(checkpoint / "text_encoder", dtype=torch.bfloat16)
    ours = load(rounded, jnp.bfloat16)
    squares = np.zeros(2)
    for name in ("text", "unlike rows"):
        encoded = encode(theirs, PROMPTS[name])
        exact = last_layer(theirs, encoded.given)
        results = run(ours, encoded), last_layer(rounded, encoded.given)
        squares += [np.square((result - exact)[encoded.valid]).sum() for result in results]
    our_error, their_error = np.sqrt(squares)
    assert our_error <= 1.1 * their_error
