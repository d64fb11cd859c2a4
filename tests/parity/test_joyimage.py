"""The diffusion transformer against both of the reference's, live, on strong random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import fill
from joyjax.layers.condition import Condition
from joyjax.layers.patch import patchify, unpatchify
from joyjax.reading import read_json

pytestmark = [pytest.mark.jax, pytest.mark.parity]
torch = pytest.importorskip("torch")

TOLERANCE = 8e-5  # measured: 2.0e-5, most of it the reference's own rounding
PART_TOLERANCE = 2e-6  # measured: 5e-7
PATCH = (2, 2)
predict = jax.jit(lambda weights, latents, time, condition: weights.module()(latents, time, condition))


def positions(*sizes: tuple[int, int]) -> np.ndarray:
    """(item, row, column) of every token; sizes in tokens."""
    return np.array([(n, y, x) for n, (h, w) in enumerate(sizes) for y in range(h) for x in range(w)], np.int32)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def load(pipeline, folder, dtype=jnp.float32):
    pipeline.transformer.save_pretrained(folder)
    config = TRANSFORMER.configure(read_json(folder / "config.json"))
    return fill(TRANSFORMER, config, Tensors.open(folder), dtype)


def reference_edit(transformer, reference, target, txt, time):
    """Edit's form: items `[b n c f h w]`, references first, target last. Returns the target's velocity `[b h w c]`."""
    items = np.stack([np.moveaxis(item, -1, 1)[:, :, None] for item in (*reference, target)], axis=1)
    dtype = transformer.proj_out.weight.dtype
    out = transformer(
        torch.from_numpy(items).to(dtype), torch.tensor(time), torch.from_numpy(txt).to(dtype), return_dict=False
    )[0]
    return np.moveaxis(out[:, -1, :, 0].float().numpy(), 1, -1)


def ours(weights, reference, target, txt, time, txt_lengths=None):
    width = target.shape[2] // 2
    sizes = [(item.shape[1] // 2, item.shape[2] // 2) for item in (target, *reference)]
    tokens = [patchify(jnp.asarray(item), PATCH) for item in reference]
    rows = target.shape[0]
    condition = Condition(
        txt=jnp.asarray(txt),
        txt_lengths=None if txt_lengths is None else jnp.asarray(txt_lengths, jnp.int32),
        references=jnp.concatenate([jnp.zeros((rows, 0, 64)), *tokens], axis=1),
        positions=jnp.tile(jnp.asarray(positions(*sizes)), (rows, 1, 1)),
    )
    out = predict(weights, patchify(jnp.asarray(target), PATCH), jnp.asarray(time, jnp.float32), condition)
    return unpatchify(out, PATCH, width)


@pytest.mark.parametrize("rope_type", ["rope", "mrope"])
@pytest.mark.parametrize("references", [0, 1])
def test_edit(rope_type, references, tmp_path, error):
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", rope_type=rope_type)
    weights = load(pipeline, tmp_path)
    target, txt = draw(1, 2, 6, 10, 16), 3 * draw(2, 2, 13, 64)
    reference = [draw(3, 2, 6, 10, 16)] * references
    time = [731.5, 24.25]
    expected = reference_edit(pipeline.transformer, reference, target, txt, time)
    assert error(ours(weights, reference, target, txt, time), expected) < TOLERANCE


@pytest.mark.parametrize("stream", ["img", "txt"])
def test_mlp_has_the_tanh_gelu(stream, reference, loaded, error):
    """In the whole network the other GELU would hide behind rounding."""
    x = draw(1, 1, 40, 64)
    theirs = getattr(reference.transformer.double_blocks[0], f"{stream}_mlp")(torch.from_numpy(x))
    block = loaded.weights["transformer"].module().blocks[0]
    assert error(getattr(block, stream).mlp(jnp.asarray(x)), theirs) < PART_TOLERANCE


def test_text_embedding_has_the_tanh_gelu(reference, loaded, error):
    x = draw(1, 1, 40, 64)
    theirs = reference.transformer.condition_embedder.text_embedder(torch.from_numpy(x))
    assert error(loaded.weights["transformer"].module()._embed_text(jnp.asarray(x)), theirs) < PART_TOLERANCE


def test_text_padding_changes_nothing(reference, tmp_path, error):
    weights = load(reference, tmp_path)
    target, txt, items = draw(1, 2, 6, 10, 16), draw(2, 2, 13, 64), [draw(3, 2, 6, 10, 16)]
    time = [731.5, 731.5]
    padded = np.concatenate([txt, 1e3 * draw(4, 2, 7, 64)], axis=1)
    padded[1, 8:] = 1e3
    result = ours(weights, items, target, padded, time, txt_lengths=[13, 8])
    for row, length in enumerate((13, 8)):
        alone = [item[row : row + 1] for item in (target, items[0])]
        expected = ours(weights, alone[1:], alone[0], txt[row : row + 1, :length], time[:1])
        assert error(result[row : row + 1], expected) < 1e-5
        theirs = reference_edit(reference.transformer, alone[1:], alone[0], txt[row : row + 1, :length], time[:1])
        assert error(result[row : row + 1], theirs) < TOLERANCE


def test_ragged_rows_against_edit_plus(tmp_path, error):
    """Rows with other numbers and sizes of references, padded to one shape by both sides, and masked by both."""
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", plus=True)
    weights = load(pipeline, tmp_path)
    sizes = [[(3, 5), (4, 2), (2, 3)], [(4, 4), (3, 3)]]  # tokens: target, references
    txt, txt_lengths = draw(2, 2, 11, 64), [11, 6]
    time = np.float32([502.0, 502.0])
    rows = [[draw(10 * n + m, 1, 2 * h, 2 * w, 16) for m, (h, w) in enumerate(row)] for n, row in enumerate(sizes)]
    packed = [np.concatenate([patchify(jnp.asarray(item), PATCH)[0] for item in row]) for row in rows]

    most = max(map(len, packed))
    theirs = np.zeros((2, most, 16, 1, 2, 2), np.float32)
    for n, tokens in enumerate(packed):
        theirs[n, : len(tokens)] = np.moveaxis(tokens.reshape(-1, 1, 2, 2, 16), -1, 1)
    expected = pipeline.transformer(
        torch.from_numpy(theirs),
        torch.from_numpy(time),
        torch.from_numpy(txt),
        encoder_hidden_states_mask=torch.from_numpy(np.arange(11) < np.array(txt_lengths)[:, None]).float(),
        shape_list=[[(1, h, w) for h, w in row] for row in sizes],
        return_dict=False,
    )[0].numpy()

    target_lengths = np.int32([h * w for h, w in (row[0] for row in sizes)])
    reference_lengths = np.int32([len(tokens) for tokens in packed]) - target_lengths
    latents, references = 50 * draw(5, 2, 18, 64), 50 * draw(6, 2, 16, 64)  # padding that must not matter
    where = np.full((2, 34, 3), 77, np.int32)
    for n, tokens in enumerate(packed):
        count = target_lengths[n]
        latents[n, :count], references[n, : len(tokens) - count] = tokens[:count], tokens[count:]
        own = positions(*sizes[n])
        where[n, :count], where[n, 18 : 18 + len(tokens) - count] = own[:count], own[count:]
    condition = Condition(
        txt=jnp.asarray(txt),
        txt_lengths=jnp.int32(txt_lengths),
        references=jnp.asarray(references),
        positions=jnp.asarray(where),
        target_lengths=jnp.asarray(target_lengths),
        reference_lengths=jnp.asarray(reference_lengths),
    )
    result = np.asarray(predict(weights, jnp.asarray(latents), jnp.asarray(time), condition))
    for n, count in enumerate(target_lengths):
        velocity = np.moveaxis(expected[n, :count], 1, -1).reshape(count, 64)
        assert error(result[n, :count], velocity) < TOLERANCE


def test_bfloat16_is_as_exact_as_the_reference(reference, checkpoint, error):
    """Our error against float32 is at most 1.1 times the reference's own, averaged over several draws."""
    config = TRANSFORMER.configure(read_json(checkpoint / "transformer" / "config.json"))
    single = fill(TRANSFORMER, config, Tensors.open(checkpoint / "transformer"), jnp.float32)
    half = fill(TRANSFORMER, config, Tensors.open(checkpoint / "transformer"), jnp.bfloat16)
    theirs = type(reference.transformer).from_pretrained(checkpoint / "transformer", torch_dtype=torch.bfloat16)
    assert theirs.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    ratios = []
    for seed in range(5):
        target, txt, items = draw(seed, 1, 6, 10, 16), draw(20 + seed, 1, 13, 64), [draw(40 + seed, 1, 6, 10, 16)]
        time = [900.0 - 200 * seed]
        truth = np.asarray(ours(single, items, target, txt, time))
        txt = np.asarray(jnp.asarray(txt, jnp.bfloat16).astype(jnp.float32))
        ours_off = np.asarray(ours(half, items, target, txt, time)) - truth
        theirs_off = reference_edit(theirs, items, target, txt, time) - truth
        ratios.append(np.sqrt((ours_off**2).mean() / (theirs_off**2).mean()))
    print("bfloat16 error over the reference's:", np.round(ratios, 3))
    assert np.mean(ratios) < 1.1


def test_only_the_target_reaches_the_result(loaded):
    """The last block asks no queries of references and text: they are not even in the compiled program's outputs."""
    config = loaded.parts.configs["transformer"]
    assert dataclasses.is_dataclass(config)
    target, txt = draw(1, 1, 4, 6, 16), draw(2, 1, 5, 64)
    condition = Condition(
        txt=jnp.asarray(txt),
        txt_lengths=None,
        references=jnp.asarray(draw(3, 1, 6, 64)),
        positions=jnp.asarray(positions((2, 3), (2, 3)))[None],
    )
    weights = loaded.weights["transformer"]
    program = jax.jit(lambda latents, time: weights.module()(latents, time, condition))
    lowered = program.lower(patchify(jnp.asarray(target), PATCH), jnp.float32([500]))
    width, last = config.hidden_size, config.num_layers
    flops = lowered.compile().cost_analysis()["flops"]
    tokens, image, heads = 6 + 6 + 5, 6 + 6, config.num_attention_heads
    block = 2 * width * width * 12 * tokens + 4 * tokens * tokens * width
    final = 2 * width * width * (2 * tokens + 10 * 6) + 4 * tokens * 6 * width
    assert heads * config.head_dim == width
    assert image == 12
    # embeddings, norms and softmax are the rest
    assert (last - 1) * block + final <= flops < 1.25 * ((last - 1) * block + final)
