"""Qwen-Image's transformer: its configuration, positions and key table at the real sizes, without weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.convert.export import export
from joyjax.convert.qwen_image import TRANSFORMER
from joyjax.convert.rules import match, token_in, token_out
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import fill
from joyjax.errors import CheckpointError, ConfigError
from joyjax.layers.condition import Condition
from joyjax.layers.patch import patchify
from joyjax.layers.weights import Weights, count_parameters, leaves
from joyjax.models.qwen_image import QwenImageConfig, image_positions, layer_positions, text_start
from joyjax.reading import read_json
from joyjax.sharding.rules import RULES

REAL = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
LAYERED = REAL | {"zero_cond_t": False, "use_additional_t_cond": True, "use_layer3d_rope": True}
FIELDS = [key for key in REAL if not key.startswith("_") and key != "guidance_embeds"]
PARAMETERS = 20_430_401_088
SMALL = REAL | {
    "attention_head_dim": 8,
    "axes_dims_rope": [2, 2, 4],
    "in_channels": 12,
    "joint_attention_dim": 10,
    "num_attention_heads": 2,
    "num_layers": 2,
    "out_channels": 3,
}


def real_tensors() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors in the published files."""
    width, text, shapes = 3072, 3584, {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    linear("img_in", 64, width)
    linear("txt_in", text, width)
    linear("time_text_embed.timestep_embedder.linear_1", 256, width)
    linear("time_text_embed.timestep_embedder.linear_2", width, width)
    linear("norm_out.linear", width, 2 * width)
    linear("proj_out", width, 64)
    shapes["txt_norm.weight"] = (text,)
    for block in (f"transformer_blocks.{n}" for n in range(60)):
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{name}.weight"] = (128,)
        for stream in ("img", "txt"):
            linear(f"{block}.{stream}_mod.1", width, 6 * width)
            linear(f"{block}.{stream}_mlp.net.0.proj", width, 4 * width)
            linear(f"{block}.{stream}_mlp.net.2", 4 * width, width)
    return shapes


def test_real_config():
    config = QwenImageConfig.from_diffusers(REAL)
    assert (config.hidden_size, config.head_dim, config.patch, config.patch_area) == (3072, 128, (2, 2), 4)
    assert config.axes_dims_rope == (16, 56, 56)
    assert (config.modulations, config.layered) == (1, False)
    later = {"zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False}
    older = {"pooled_projection_dim": 768}
    for more in (later, older, {}):
        assert hash(config) == hash(QwenImageConfig.from_diffusers(copy.deepcopy(REAL) | more))


def test_configs_of_the_other_kinds():
    edit = QwenImageConfig.from_diffusers(REAL | {"zero_cond_t": True})  # 2511
    assert (edit.modulations, edit.layered, edit.use_additional_t_cond) == (2, False, False)
    layered = QwenImageConfig.from_diffusers(LAYERED)
    assert (layered.modulations, layered.layered, layered.use_additional_t_cond) == (1, True, True)
    with pytest.raises(ConfigError, match="zero_cond_t is True, .* zero_cond_t only without them"):
        QwenImageConfig.from_diffusers(LAYERED | {"zero_cond_t": True})


@pytest.mark.parametrize("key", FIELDS)
def test_missing_keys_have_no_defaults(key):
    with pytest.raises(ConfigError, match=f"{key} is missing; expected"):
        QwenImageConfig.from_diffusers({name: value for name, value in REAL.items() if name != key})


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("value", ["two", True, None, [1.5], {}], ids=repr)
def test_the_wrong_type_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"{key} is .*; expected"):
        QwenImageConfig.from_diffusers({**REAL, key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("unheard_of", 1, "unheard_of = 1 is not known"),
        ("guidance_embeds", True, "guidance_embeds is True; this version of joyjax implements False"),
        ("zero_cond_t", 1, "zero_cond_t is 1; expected bool"),
        ("zero_cond_t", "true", "zero_cond_t is 'true'; expected bool"),
        ("use_additional_t_cond", 0, "use_additional_t_cond is 0; expected bool"),
        ("use_layer3d_rope", [True], r"use_layer3d_rope is \[True\]; expected bool"),
        ("use_additional_t_cond", True, "use_additional_t_cond True and use_layer3d_rope False; expected the last two"),
        (
            "use_layer3d_rope",
            True,
            "use_additional_t_cond False and use_layer3d_rope True; expected the last two alike",
        ),
        ("patch_size", 1, "patch_size is 1; this version of joyjax implements 2"),
        ("num_layers", 0, "must be positive"),
        ("num_layers", 201, "num_layers is 201; expected int, 200 at most"),
        ("num_attention_heads", 0, "must be positive"),
        ("attention_head_dim", 2**17, "attention_head_dim is 131072; expected int, 65536 at most"),
        ("joint_attention_dim", -1, "must be positive"),
        ("in_channels", 16, "in_channels is 16; expected 64, which are 4 latent pixels of out_channels 16"),
        ("out_channels", 64, "in_channels is 64; expected 256"),
        ("axes_dims_rope", [16, 56, 54], r"axes_dims_rope \[16, 56, 54\] .* add up to attention_head_dim, 128"),
        ("axes_dims_rope", [64, 64], r"axes_dims_rope \[64, 64\]"),
        ("axes_dims_rope", [15, 57, 56], r"axes_dims_rope \[15, 57, 56\]"),
        ("axes_dims_rope", [-16, 88, 56], r"axes_dims_rope \[-16, 88, 56\]"),
    ],
)
def test_refusals_name_the_value(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        QwenImageConfig.from_diffusers({**REAL, key: value}, where="there/config.json")
    assert str(caught.value).startswith("there/config.json: ")


def test_rows_and_columns_are_counted_from_the_middle():
    positions = image_positions([(9, 2), (1, 4)])
    assert positions.dtype == np.int32
    assert positions[:18:2, 1].tolist() == list(range(-5, 4))
    assert positions[:2].tolist() == [[0, -5, -1], [0, -5, 0]]
    assert positions[18:].tolist() == [[1, -1, -2], [1, -1, -1], [1, -1, 0], [1, -1, 1]]
    assert text_start([(9, 2), (1, 4)]) == 4
    assert text_start([(9, 2), (1, 12)]) == 6
    assert text_start([(64, 64)]) == positions[:, 1:].max() + 29


def test_positions_of_layers():
    """Two layers and their composite are frames 0 to 2, the condition is frame -1, and text starts at 3 at least."""
    positions = layer_positions((1, 3), 2)
    assert positions[:, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 3
    assert positions[9:, 1:].tolist() == positions[:3, 1:].tolist() == [[-1, -2], [-1, -1], [-1, 0]]
    assert text_start([(1, 3)], 3) == 3
    assert text_start([(8, 3)], 3) == 4


def test_every_tensor_of_the_layered_one_is_matched():
    """One tensor more than the others have, without a bias."""
    tensors = real_tensors() | {"time_text_embed.addition_t_embedding.weight": (2, 3072)}
    config = TRANSFORMER.configure(LAYERED)
    state = TRANSFORMER.abstract(config, jnp.bfloat16).state
    parameters = {path: leaf.shape for path, leaf in leaves(state).items()}
    found = match(TRANSFORMER.rules(config), TRANSFORMER.ignored, tensors, parameters, where="transformer")
    assert {m.source for m in found} == tensors.keys()
    assert len(found) == len(parameters) == 1934
    assert count_parameters(state) == PARAMETERS + 2 * 3072
    assert leaves(state)["time_added"].dtype == "float32"
    for raw, held in ((REAL, tensors), (LAYERED, real_tensors())):  # the other kind's file
        own = TRANSFORMER.configure(raw)
        own_parameters = {
            path: leaf.shape for path, leaf in leaves(TRANSFORMER.abstract(own, jnp.bfloat16).state).items()
        }
        with pytest.raises(CheckpointError, match="addition_t_embedding"):
            match(TRANSFORMER.rules(own), TRANSFORMER.ignored, held, own_parameters, where="transformer")


def test_every_tensor_of_the_real_size_is_matched():
    tensors, config = real_tensors(), TRANSFORMER.configure(REAL)
    state = TRANSFORMER.abstract(config, jnp.bfloat16).state
    parameters = {path: leaf.shape for path, leaf in leaves(state).items()}
    found = match(TRANSFORMER.rules(config), TRANSFORMER.ignored, tensors, parameters, where="transformer")
    assert {m.source for m in found} == tensors.keys()
    assert len(found) == len(tensors) == len(parameters) == 1933
    assert count_parameters(state) == PARAMETERS
    assert parameters["blocks.59.txt.qkv.k.kernel"] == (3072, 24, 128)
    assert parameters["blocks.59.txt.modulation.kernel"] == (3072, 6, 3072)
    assert parameters["blocks.0.img.out.kernel"] == (24, 128, 3072)

    del tensors["transformer_blocks.7.attn.add_k_proj.bias"]
    tensors["transformer_blocks.60.attn.add_k_proj.bias"] = (3072,)
    with pytest.raises(CheckpointError, match=r"\.7\..* is missing\n.*\.60\..* is not part of this network"):
        match(TRANSFORMER.rules(config), TRANSFORMER.ignored, tensors, parameters, where="transformer")


@pytest.mark.parity
@pytest.mark.parametrize("raw", [REAL, pytest.param(LAYERED, marks=pytest.mark.nightly)], ids=["plain", "layered"])
def test_these_are_the_tensors_of_the_reference(raw):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.QwenImageTransformer2DModel(**{key: raw[key] for key in raw if not key.startswith("_")})
    more = {"time_text_embed.addition_t_embedding.weight": (2, 3072)} if raw is LAYERED else {}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()} == real_tensors() | more


def test_real_size():
    weights = TRANSFORMER.abstract(QwenImageConfig.from_diffusers(REAL), jnp.bfloat16)

    def predict(weights: Weights) -> jax.Array:
        condition = Condition(
            txt=jnp.zeros((2, 320, 3584), jnp.bfloat16),
            txt_lengths=jnp.full((2,), 300, jnp.int32),
            references=jnp.zeros((2, 0, 64)),
            positions=jnp.zeros((2, 4096, 3), jnp.int32),
            txt_start=jnp.full((2,), 32, jnp.int32),
        )
        return weights.module()(jnp.zeros((2, 4096, 64)), jnp.zeros((2,)), condition)

    velocity = jax.eval_shape(predict, weights)
    assert (velocity.shape, velocity.dtype) == ((2, 4096, 64), jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_time_embedder_is_float32(dtype):
    parameters = leaves(TRANSFORMER.abstract(QwenImageConfig.from_diffusers(REAL), dtype).state)
    islands = {path for path in parameters if path.startswith(("time_in.", "time_hidden."))}
    assert len(islands) == 4
    for path, leaf in parameters.items():
        assert leaf.dtype == ("float32" if path in islands else dtype), path


def test_every_dimension_has_a_logical_axis():
    for path, leaf in leaves(TRANSFORMER.abstract(QwenImageConfig.from_diffusers(REAL), jnp.bfloat16).state).items():
        assert len(leaf.axes) == leaf.ndim, path
        assert set(leaf.axes) <= {None, *RULES}, path


def test_text_without_a_position_is_refused():
    weights = TRANSFORMER.abstract(QwenImageConfig.from_diffusers(SMALL), jnp.float32)
    condition = Condition(jnp.zeros((1, 5, 10)), None, jnp.zeros((1, 0, 12)), jnp.zeros((1, 4, 3), jnp.int32))
    with pytest.raises(ValueError, match="txt_start is None"):
        jax.eval_shape(lambda w: w.module()(jnp.zeros((1, 4, 12)), jnp.zeros(1), condition), weights)


@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
def test_patches_are_channel_last_on_our_side(size):
    """A map of channel-first patches, as the file has it, gives for our patches what it gave for its own."""
    rng, (height, width) = np.random.default_rng(0), size
    x = rng.standard_normal((1, 4 * height, 5 * width, 3)).astype(np.float32)
    ours = patchify(x, size)
    theirs = ours.reshape(1, 20, height * width, 3).swapaxes(2, 3).reshape(ours.shape)
    tensor, numbers = rng.standard_normal((7, 3 * height * width)), 3 * height * width
    kernel = token_in(*size).forward(tensor, (numbers, 7))
    np.testing.assert_allclose(ours @ kernel, theirs @ tensor.T, atol=1e-5)
    np.testing.assert_array_equal(token_in(*size).inverse(kernel), tensor)

    out, bias = rng.standard_normal((numbers, 7)), rng.standard_normal(numbers)
    kernel = token_out(*size).forward(out, (7, numbers))
    hidden = rng.standard_normal((1, 20, 7))
    made = hidden @ kernel + token_out(*size).forward(bias, (numbers,))
    made = made.reshape(1, 20, height * width, 3).swapaxes(2, 3).reshape(made.shape)
    np.testing.assert_allclose(made, hidden @ out.T + bias, atol=1e-12)
    np.testing.assert_array_equal(token_out(*size).inverse(kernel), out)


@pytest.mark.parity
def test_a_file_is_written_again_as_it_was(qwen_folder, tmp_path):
    """All of it, the last block's text too, which is not computed."""
    config = TRANSFORMER.configure(read_json(qwen_folder / "transformer" / "config.json"))
    given = Tensors.open(qwen_folder / "transformer")
    weights = fill(TRANSFORMER, config, given, jnp.float32)
    parameters = {path: leaf[...] for path, leaf in leaves(weights.state).items()}
    export(TRANSFORMER, config, parameters, tmp_path, jnp.float32)
    written = Tensors.open(tmp_path / "transformer")
    assert written.shapes == given.shapes
    for name in given.shapes:
        np.testing.assert_array_equal(written.read(name), given.read(name), err_msg=name)
