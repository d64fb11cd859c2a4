"""The diffusion transformer's configuration and key table at the real sizes, without weights."""

import copy
import math

import jax
import jax.numpy as jnp
import pytest

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.rules import match
from joyjax.errors import CheckpointError, ConfigError
from joyjax.layers.condition import Condition
from joyjax.layers.weights import Weights, count_parameters, leaves
from joyjax.models.joyimage import JoyImageConfig
from joyjax.reading import read_json
from joyjax.sharding.rules import RULES

REAL = {
    "_class_name": "JoyImageEditTransformer3DModel",
    "_diffusers_version": "0.38.0.dev0",
    "hidden_size": 4096,
    "in_channels": 16,
    "mlp_width_ratio": 4.0,
    "num_attention_heads": 32,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "rope_dim_list": [16, 56, 56],
    "rope_type": "rope",
    "text_dim": 4096,
    "theta": 10000,
}
FIELDS = [key for key in REAL if not key.startswith("_")]
PARAMETERS = 16_263_675_968


def test_these_are_the_files_values(reference_files):
    assert read_json(reference_files / "transformer" / "config.json") == REAL


def test_real_config():
    config = JoyImageConfig.from_diffusers(REAL)
    assert (config.head_dim, config.mlp_dim, config.patch, config.patch_area) == (128, 16384, (2, 2), 4)
    assert config.rope_dim_list == (16, 56, 56)
    assert hash(config) == hash(JoyImageConfig.from_diffusers(copy.deepcopy(REAL)))


def test_the_class_of_edit_plus_does_not_read_its_rope_type():
    for class_name, expected in (
        ("JoyImageEditTransformer3DModel", "mrope"),
        ("JoyImageEditPlusTransformer3DModel", "rope"),
    ):
        config = JoyImageConfig.from_diffusers({**REAL, "_class_name": class_name, "rope_type": "mrope"})
        assert config.rope_type == expected


def test_out_channels_are_in_channels_unless_they_are_named():
    assert JoyImageConfig.from_diffusers({**REAL, "out_channels": None}).out_channels == 16


@pytest.mark.parametrize("key", [key for key in FIELDS if key != "out_channels"])
def test_missing_keys_have_no_defaults(key):
    with pytest.raises(ConfigError, match=f"{key} is missing; expected"):
        JoyImageConfig.from_diffusers({name: value for name, value in REAL.items() if name != key})


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("value", ["two", True, [1.5], {}], ids=repr)
def test_the_wrong_type_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"{key} is .*; (expected|this version)"):
        JoyImageConfig.from_diffusers({**REAL, key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("unheard_of", 1, "unheard_of = 1 is not known"),
        ("rope_type", "alibi", "rope_type is 'alibi'; .* 'rope' or 'mrope'"),
        ("patch_size", [2, 2, 2], r"patch_size is \(2, 2, 2\); expected one frame"),
        ("patch_size", [2, 2], r"patch_size is \(2, 2\)"),
        ("patch_size", [1, 2, 0], r"patch_size is \(1, 2, 0\)"),
        ("hidden_size", 4097, "hidden_size 4097 is not divisible by num_attention_heads 32"),
        ("hidden_size", 4096.0, "hidden_size is 4096.0; expected int"),
        ("hidden_size", 0, "must be positive"),
        ("num_attention_heads", 0, "must be positive"),
        ("num_layers", 0, "must be positive"),
        ("text_dim", -1, "must be positive"),
        ("in_channels", 0, "must be positive"),
        ("mlp_width_ratio", 0.0, "must be positive"),
        ("mlp_width_ratio", 1e-9, "must have a unit"),
        ("mlp_width_ratio", math.nan, "must be positive"),
        ("theta", 0, "must be positive"),
        ("theta", math.inf, "must be positive"),
        ("out_channels", 32, "out_channels 32 .* in_channels 16"),
        ("rope_dim_list", [16, 56, 54], r"rope_dim_list \[16, 56, 54\] .* add up to the head's, 128"),
        ("rope_dim_list", [64, 64], r"rope_dim_list \[64, 64\]"),
        ("rope_dim_list", [15, 57, 56], r"rope_dim_list \[15, 57, 56\]"),
        ("rope_dim_list", [-16, 88, 56], r"rope_dim_list \[-16, 88, 56\]"),
    ],
)
def test_refusals_name_the_value(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        JoyImageConfig.from_diffusers({**REAL, key: value}, where="there/config.json")
    assert str(caught.value).startswith("there/config.json: ")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"])
def test_every_tensor_of_the_reference_is_matched(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = getattr(diffusers, name)(**{key: REAL[key] for key in FIELDS})
    tensors = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    config = TRANSFORMER.configure({**REAL, "_class_name": name})
    state = TRANSFORMER.abstract(config, jnp.bfloat16).state
    parameters = {path: leaf.shape for path, leaf in leaves(state).items()}
    found = match(TRANSFORMER.rules(config), TRANSFORMER.ignored, tensors, parameters, where="transformer")
    assert name in TRANSFORMER.class_names
    assert {m.source for m in found} == tensors.keys()
    assert {m.target for m in found} == parameters.keys()
    assert len(found) == len(tensors) == 894
    assert count_parameters(state) == theirs.num_parameters() == PARAMETERS

    del tensors["double_blocks.7.attn.txt_attn_qkv.bias"]
    tensors["double_blocks.40.attn.txt_attn_qkv.bias"] = (12288,)
    with pytest.raises(CheckpointError, match=r"\.7\..* is missing\n.*\.40\..* is not part of this network"):
        match(TRANSFORMER.rules(config), TRANSFORMER.ignored, tensors, parameters, where="transformer")


def test_real_size():
    weights = TRANSFORMER.abstract(JoyImageConfig.from_diffusers(REAL), jnp.bfloat16)
    assert count_parameters(weights.state) == PARAMETERS

    def predict(weights: Weights) -> jax.Array:
        condition = Condition(
            txt=jnp.zeros((2, 320, 4096), jnp.bfloat16),
            txt_lengths=jnp.full((2,), 300, jnp.int32),
            references=jnp.zeros((2, 4096, 64)),
            positions=jnp.zeros((2, 8192, 3), jnp.int32),
        )
        return weights.module()(jnp.zeros((2, 4096, 64)), jnp.zeros((2,)), condition)

    velocity = jax.eval_shape(predict, weights)
    assert (velocity.shape, velocity.dtype) == ((2, 4096, 64), jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_time_embedder_stays_in_float32(dtype):
    parameters = leaves(TRANSFORMER.abstract(JoyImageConfig.from_diffusers(REAL), dtype).state)
    islands = {path for path in parameters if path.startswith(("time_in.", "time_hidden."))}
    assert len(islands) == 4
    for path, leaf in parameters.items():
        assert leaf.dtype == ("float32" if path in islands else dtype), path


def test_every_dimension_has_a_logical_axis():
    for path, leaf in leaves(TRANSFORMER.abstract(JoyImageConfig.from_diffusers(REAL), jnp.bfloat16).state).items():
        assert len(leaf.axes) == leaf.ndim, path
        assert set(leaf.axes) <= {None, *RULES}, path
