"""Qwen-Image's networks against the reference, live, on strong random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_pairs import PATCH, channel_first, channel_last

from joyjax.convert import qwen2_5_vl, qwen_image
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import fill
from joyjax.kernels.choice import PLAIN, Kernels
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.layers.patch import unpatchify
from joyjax.layers.weights import Weights
from joyjax.models.qwen_image import image_positions, modulations, text_start
from joyjax.reading import read_json

pytestmark = [pytest.mark.jax, pytest.mark.parity]
torch = pytest.importorskip("torch")

VELOCITY_TOLERANCE = 8e-5  # measured: 1.6e-5; the mistakes that were tried on purpose move it by 0.027 or more
PART_TOLERANCE = 2e-6  # the other GELU: 1e-4
STATES_TOLERANCE = 1e-5  # measured: 1.6e-6
DROPPED = 34  # tokens of the template before the prompt
predict = jax.jit(lambda weights, latents, time, condition: weights.module()(latents, time, condition))
encode = jax.jit(lambda weights, text: weights.module()(text))


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def load(component, folder, dtype=jnp.float32) -> Weights:
    place = folder / component.folder
    return fill(component, component.configure(read_json(place / "config.json")), Tensors.open(place), dtype)


@pytest.fixture(scope="module")
def transformer(qwen_folder):
    return load(qwen_image.TRANSFORMER, qwen_folder)


@pytest.fixture(scope="module")
def at_time_0(qwen_folder, qwen_reference):
    """Ours and the reference's transformer with `zero_cond_t`, which adds no weights."""
    import qwen_checkpoint

    theirs = type(qwen_reference.transformer)(**qwen_checkpoint.TRANSFORMER, zero_cond_t=True)
    theirs.load_state_dict(qwen_reference.transformer.state_dict())
    config = read_json(qwen_folder / "transformer" / "config.json") | {"zero_cond_t": True}
    held = Tensors.open(qwen_folder / "transformer")
    return fill(qwen_image.TRANSFORMER, qwen_image.TRANSFORMER.configure(config), held, jnp.float32), theirs.eval()


@pytest.fixture(scope="module")
def encoder(qwen_folder):
    return load(qwen2_5_vl.TEXT_ENCODER, qwen_folder)


# The transformer


def reference_velocity(network, tokens, sizes, txt, time, lengths=None) -> np.ndarray:
    """Return what the reference predicts for the target; all rows have pictures of these sizes."""
    dtype = network.proj_out.weight.dtype
    mask = None
    if lengths is not None:
        mask = torch.from_numpy(np.arange(txt.shape[1]) < np.array(lengths)[:, None])
    out = network(
        hidden_states=torch.from_numpy(channel_first(tokens)).to(dtype),
        encoder_hidden_states=torch.from_numpy(txt).to(dtype),
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor(time, dtype=torch.float32),
        img_shapes=[[(1, *size) for size in sizes]] * len(tokens),
        return_dict=False,
    )[0]
    return channel_last(out.float().numpy())[:, : sizes[0][0] * sizes[0][1]]


def condition_of(tokens, sizes, txt, lengths=None) -> tuple[jax.Array, Condition]:
    """Return the target's tokens and the rest, for rows with pictures of the same sizes."""
    count, rows = sizes[0][0] * sizes[0][1], len(tokens)
    condition = Condition(
        txt=jnp.asarray(txt),
        txt_lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
        references=jnp.asarray(tokens[:, count:]),
        positions=jnp.tile(jnp.asarray(image_positions(sizes)), (rows, 1, 1)),
        txt_start=jnp.full(rows, text_start(sizes), jnp.int32),
    )
    return jnp.asarray(tokens[:, :count]), condition


def ours(weights, tokens, sizes, txt, time, lengths=None) -> np.ndarray:
    target, condition = condition_of(tokens, sizes, txt, lengths)
    return np.asarray(predict(weights, target, jnp.asarray(time, jnp.float32), condition))


def count(sizes) -> int:
    return sum(rows * columns for rows, columns in sizes)


@pytest.mark.parametrize(
    "sizes",
    [[(6, 4)], [(5, 7)], [(1, 9)], [(5, 3), (4, 7)], [(3, 3), (2, 9), (8, 1)]],
    ids=["even", "odd", "one row", "a reference", "two references"],
)
def test_velocity(sizes, transformer, qwen_reference, error):
    tokens, txt, time = draw(1, 2, count(sizes), 64), 3 * draw(2, 2, 11, 96), [0.7315, 0.02]
    expected = reference_velocity(qwen_reference.transformer, tokens, sizes, txt, time)
    assert error(ours(transformer, tokens, sizes, txt, time), expected) < VELOCITY_TOLERANCE


def test_rows_with_texts_of_unlike_length(transformer, qwen_reference, error):
    """The reference masks padding; ours is never read, whatever it holds."""
    sizes, lengths, time = [(5, 7)], [13, 6, 1], [0.9, 0.5, 0.1]
    tokens, txt = draw(1, 3, 35, 64), draw(2, 3, 13, 96)
    expected = reference_velocity(qwen_reference.transformer, tokens, sizes, txt, time, lengths)
    padded = np.concatenate([txt, 1e3 * draw(3, 3, 4, 96)], axis=1)
    for row, length in enumerate(lengths):
        padded[row, length:] = 1e3
    assert error(ours(transformer, tokens, sizes, padded, time, lengths), expected) < VELOCITY_TOLERANCE


@pytest.mark.parametrize("zero", [False, True], ids=["one time", "references at time 0"])
def test_rows_with_pictures_of_unlike_size(zero, transformer, qwen_reference, at_time_0, error):
    """The reference cannot batch these; each row is what it gives alone."""
    weights, theirs = at_time_0 if zero else (transformer, qwen_reference.transformer)
    sizes, txt_lengths = [[(3, 5), (4, 2)], [(7, 3)]], [9, 4]
    time, txt = [0.8, 0.3], draw(2, 2, 9, 96)
    target, references, where = 50 * draw(5, 2, 24, 64), 50 * draw(6, 2, 10, 64), np.full((2, 34, 3), 99, np.int32)
    expected = []
    for row, own in enumerate(sizes):
        tokens, first = draw(10 + row, 1, count(own), 64), own[0][0] * own[0][1]
        target[row, :first], references[row, : count(own) - first] = tokens[0, :first], tokens[0, first:]
        where[row, :first] = image_positions(own)[:first]
        where[row, 24 : 24 + count(own) - first] = image_positions(own)[first:]
        alone = txt[row : row + 1, : txt_lengths[row]]
        expected.append(reference_velocity(theirs, tokens, own, alone, time[row : row + 1])[0])
    condition = Condition(
        txt=jnp.asarray(txt),
        txt_lengths=jnp.int32(txt_lengths),
        references=jnp.asarray(references),
        positions=jnp.asarray(where),
        target_lengths=jnp.int32([15, 21]),
        reference_lengths=jnp.int32([8, 0]),
        txt_start=jnp.int32([text_start(own) for own in sizes]),
    )
    result = np.asarray(predict(weights, jnp.asarray(target), jnp.float32(time), condition))
    for row, velocity in enumerate(expected):
        assert error(result[row, : len(velocity)], velocity) < VELOCITY_TOLERANCE


SELECTING = Kernels(layer_norm_scale_shift_select01="triton", residual_gate_layer_norm_scale_shift_select01="triton")


@pytest.mark.parametrize(
    ("sizes", "kernels"),
    [
        ([(5, 3), (4, 7)], PLAIN),
        ([(5, 3), (4, 7)], SELECTING),  # interpreted
        ([(3, 3), (2, 9), (8, 1)], PLAIN),
        ([(5, 7)], PLAIN),
    ],
    ids=["a reference", "by kernels", "two references", "none"],
)
def test_velocity_with_references_at_time_0(sizes, kernels, at_time_0, error):
    weights, theirs = at_time_0
    tokens, txt, time = draw(1, 2, count(sizes), 64), 3 * draw(2, 2, 11, 96), [0.7315, 0.02]
    expected = reference_velocity(theirs, tokens, sizes, txt, time)
    chosen = dataclasses.replace(weights, kernels=kernels)
    assert error(ours(chosen, tokens, sizes, txt, time), expected) < VELOCITY_TOLERANCE


def test_stages_with_references_at_time_0(at_time_0, error):
    """Both modulations of a block, and image and text after it: target, references and text each at its own time."""
    weights, theirs = at_time_0
    network, block = weights.module(), theirs.transformer_blocks[0]
    sizes, tokens, txt, time = [(5, 3), (4, 7)], draw(1, 2, 43, 64), draw(2, 2, 11, 96), np.float32([0.7315, 0.02])
    kept = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: kept.setdefault(name, output))
        for name, module in (("img", block.img_mod), ("txt", block.txt_mod), ("block", block))
    ]
    reference_velocity(theirs, tokens, sizes, txt, time)
    for hook in hooks:
        hook.remove()
    target, condition = condition_of(tokens, sizes, txt)
    [(img, text)] = modulations(network.blocks[:1], network._embed_times(jnp.asarray(time)))
    of_times = kept["img"].numpy().reshape(2, 2, 6, 80).swapaxes(0, 1)  # the reference's rows: first all t, then all 0
    assert error(img, of_times) < VELOCITY_TOLERANCE
    assert error(text[:, 0], kept["txt"].reshape(2, 6, 80)) < VELOCITY_TOLERANCE
    found = network.first_block(target, jnp.asarray(time), condition)
    assert error(found.txt, kept["block"][0]) < VELOCITY_TOLERANCE
    assert error(found.img, kept["block"][1]) < VELOCITY_TOLERANCE


def test_embedding_of_the_time(transformer, qwen_reference, error):
    time = np.float32([1.0, 0.74337, 0.02, 0.0])
    theirs = qwen_reference.transformer.time_text_embed(torch.from_numpy(time), torch.zeros(1))
    assert error(transformer.module()._embed_time(jnp.asarray(time)), theirs) < 2e-5  # angles up to 1000 in float32


def test_modulation_and_mlp_of_a_block(transformer, qwen_reference, error):
    """In the whole network the other GELU would hide behind rounding."""
    ours, theirs = transformer.module().blocks[1], qwen_reference.transformer.transformer_blocks[1]
    x, temb = draw(1, 1, 40, 80), draw(2, 3, 80)
    for stream in ("img", "txt"):
        mine = getattr(ours, stream)
        expected = getattr(theirs, f"{stream}_mlp")(torch.from_numpy(x))
        assert error(mine.mlp(jnp.asarray(x)), expected) < PART_TOLERANCE
        expected = getattr(theirs, f"{stream}_mod")(torch.from_numpy(temb)).reshape(3, 6, 80)
        assert error(mine.modulation(jax.nn.silu(jnp.asarray(temb))), expected) < PART_TOLERANCE


def test_the_last_blocks_text_does_not_reach_the_result(transformer, qwen_folder):
    """It is kept, as the file has it, and not computed."""
    sizes, tokens, txt = [(3, 4)], draw(1, 1, 12, 64), draw(2, 1, 5, 96)
    right = ours(transformer, tokens, sizes, txt, [0.5])
    weights = load(qwen_image.TRANSFORMER, qwen_folder)
    network = weights.module()
    last = network.blocks[-1].txt
    for part in (last.out, last.up, last.down, last.qkv.q):
        part.kernel[...] = jnp.full_like(part.kernel[...], jnp.nan)
    np.testing.assert_array_equal(ours(Weights.of(network), tokens, sizes, txt, [0.5]), right)


def test_bfloat16_velocity_is_as_exact_as_the_reference(transformer, qwen_reference, qwen_folder):
    """Our error against float32 is at most 1.1 times the reference's own, averaged over several draws."""
    half = load(qwen_image.TRANSFORMER, qwen_folder, jnp.bfloat16)
    theirs = type(qwen_reference.transformer).from_pretrained(qwen_folder / "transformer", torch_dtype=torch.bfloat16)
    ratios = []
    for seed in range(5):
        sizes = [(5, 7), (3, 4)]
        tokens, txt = draw(seed, 1, 47, 64), draw(20 + seed, 1, 13, 96)
        time = [float(jnp.bfloat16(0.9 - 0.2 * seed))]  # else the reference rounds it, and stands at another level
        truth = ours(transformer, tokens, sizes, txt, time)
        off = (
            velocity - truth
            for velocity in (
                ours(half, tokens, sizes, np.asarray(txt, jnp.bfloat16), time),
                reference_velocity(theirs, tokens, sizes, txt, time),
            )
        )
        ratios.append(np.divide(*(np.sqrt((difference**2).mean()) for difference in off)))
    print("bfloat16 error over the reference's:", np.round(ratios, 3))
    assert np.mean(ratios) < 1.1


# The text encoder


def text_inputs(ids: np.ndarray, shared: int = 0) -> TextInputs:
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32)[None, :, None], (*ids.shape, 3))
    slots = np.full(ids.shape, -1, np.int32)
    return TextInputs(jnp.int32(ids), jnp.asarray(positions), jnp.asarray(slots), shared=shared)


def prompts(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random token ids, padded to the longest row, and which of them are valid."""
    ids = np.random.default_rng(sum(lengths)).integers(0, 600, (len(lengths), max(lengths)))
    valid = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    return np.where(valid, ids, 601), valid


def reference_states(network, ids, valid) -> np.ndarray:
    """Return what the pipeline takes of the text encoder: the last of its hidden states."""
    mask = torch.from_numpy(valid.astype(np.int64))
    out = network(input_ids=torch.from_numpy(ids).long(), attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1].float().numpy()


@pytest.mark.parametrize("lengths", [(9,), (5, 17, 1)], ids=["one row", "unlike rows"])
def test_states(lengths, encoder, qwen_reference, error):
    ids, valid = prompts(*lengths)
    expected = reference_states(qwen_reference.text_encoder, ids, valid)
    result = np.asarray(encode(encoder, text_inputs(ids)))
    assert error(result[valid], expected[valid]) < STATES_TOLERANCE


def test_shared_tokens_are_computed_once(encoder, qwen_reference, error):
    ids, valid = prompts(19, 19, 19)
    ids[:, :12] = ids[0, :12]
    expected = reference_states(qwen_reference.text_encoder, ids, valid)
    assert error(encode(encoder, text_inputs(ids, shared=12)), expected) < STATES_TOLERANCE
    assert error(encode(encoder, text_inputs(ids, shared=15)), expected) > 100 * STATES_TOLERANCE


def test_each_axis_has_its_chunk_of_frequencies(encoder, qwen_reference, error):
    """Positions that differ by axis, as behind a picture: chunks of frequencies, and never in turn."""
    ids, _ = prompts(14, 14)
    positions = np.random.default_rng(0).integers(0, 30, (2, 14, 3)).astype(np.int32)
    expected = qwen_reference.text_encoder.model.language_model(
        input_ids=torch.from_numpy(ids).long(),
        position_ids=torch.from_numpy(np.moveaxis(positions, -1, 0).copy()).long(),
    ).last_hidden_state
    text = dataclasses.replace(text_inputs(ids), positions=jnp.asarray(positions))
    assert error(encode(encoder, text), expected) < STATES_TOLERANCE


def test_both_names_of_the_tensors_load(encoder, qwen_reference, tmp_path):
    import qwen_checkpoint

    folder = qwen_checkpoint.save(qwen_reference, tmp_path, resaved=True)
    names = qwen_checkpoint.text_encoder_names(folder)
    assert {name.partition(".layers.")[0] for name in names if ".layers." in name} == {"model.language_model"}
    again = load(qwen2_5_vl.TEXT_ENCODER, folder)
    jax.tree.map(np.testing.assert_array_equal, again.state, encoder.state)


def test_bfloat16_states_are_as_exact_as_the_reference(encoder, qwen_reference, qwen_folder):
    half = load(qwen2_5_vl.TEXT_ENCODER, qwen_folder, jnp.bfloat16)
    theirs = type(qwen_reference.text_encoder).from_pretrained(qwen_folder / "text_encoder", dtype=torch.bfloat16)
    squares = np.zeros(2)
    for lengths in ((30, 12), (9,), (25, 25, 25)):
        ids, valid = prompts(*lengths)
        truth = np.asarray(encode(encoder, text_inputs(ids)))
        results = (
            np.asarray(encode(half, text_inputs(ids)), np.float32),
            reference_states(theirs, ids, valid),
        )
        squares += [np.square((result - truth)[valid]).sum() for result in results]
    print("bfloat16 error over the reference's:", np.round(np.sqrt(squares[0] / squares[1]), 3))
    assert np.sqrt(squares[0]) <= 1.1 * np.sqrt(squares[1])


# The pipeline; whole pictures are in test_qwen_edit.py


def test_the_template_takes_as_many_tokens_as_with_the_real_tokenizer(qwen_reference):
    before, _, after = qwen_reference.prompt_template_encode.partition("{}")
    count = [len(qwen_reference.tokenizer(part)["input_ids"]) for part in (before, after)]
    assert count == [DROPPED, 5]


def test_unpacking_is_the_references(qwen_reference):
    tokens = draw(1, 1, 54, 64)
    theirs = qwen_reference._unpack_latents(torch.from_numpy(channel_first(tokens)), 96, 144, 8).numpy()
    np.testing.assert_array_equal(unpatchify(jnp.asarray(tokens), PATCH, 9), np.moveaxis(theirs[:, :, 0], 1, -1))
