"""The text encoder's configuration and key table at the real sizes, without weights."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.rules import match
from joyjax.errors import ConfigError
from joyjax.layers.weights import count_parameters, leaves
from joyjax.models.qwen3_vl import Qwen3VLConfig
from joyjax.models.qwen3_vl_vision import patch_positions

TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": 151936,
}
ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
VISION = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "dtype": "bfloat16",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOP = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "transformers_version": "4.57.6",
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def raw() -> dict:
    """Return the config of the real checkpoint, as Transformers 4 wrote it."""
    text = {**TEXT, "rope_scaling": ROPE, "rope_theta": 5000000}
    return copy.deepcopy({**TOP, "text_config": text, "vision_config": {**VISION, "model_type": "qwen3_vl"}})


def raw_5() -> dict:
    """Return the same config as Transformers 5 writes it."""
    text = {**TEXT, "pad_token_id": None, "rope_parameters": {**ROPE, "rope_theta": 5000000.0}}
    vision = {**VISION, "model_type": "qwen3_vl_vision"}
    vision["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    return copy.deepcopy({**TOP, "text_config": text, "vision_config": vision})


@pytest.mark.parametrize("written", [raw, raw_5], ids=["Transformers 4", "Transformers 5"])
def test_config(written):
    config = Qwen3VLConfig.from_transformers(written())
    assert (config.text.rope_theta, config.vision.rope_theta) == (5e6, 1e4)
    assert config.text.mrope_section == (24, 20, 20)
    assert config.vision.deepstack_visual_indexes == (8, 16, 24)
    assert (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id) == (151655, 151652, 151653)
    assert (config.vision.head_dim, config.vision.patch_values, config.vision.grid_size) == (72, 1536, 48)
    assert hash(config) == hash(Qwen3VLConfig.from_transformers(raw()))


def test_config_of_the_checkpoint(reference_files):
    given = json.loads((reference_files / "text_encoder" / "config.json").read_text())
    assert Qwen3VLConfig.from_transformers(given) == Qwen3VLConfig.from_transformers(raw())


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "attention_bias", True),
        ("text_config", "num_key_value_heads", 5),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "rms_norm_eps", 0.0),
        ("text_config", "sliding_window", 4096),
        ("text_config", "model_type", "qwen3_vl_moe_text"),
        ("text_config", "vocab_size", "many"),
        ("text_config", "rope_theta", None),
        ("text_config", "rope_scaling", ["default"]),
        ("text_config.rope_scaling", "rope_type", "yarn"),
        ("text_config.rope_scaling", "mrope_interleaved", False),
        ("text_config.rope_scaling", "mrope_section", [24, 20, 22]),
        ("text_config.rope_scaling", "mrope_section", [20, 24, 20]),
        ("text_config.rope_scaling", "mrope_section", [32, 32]),
        ("text_config.rope_scaling", "factor", 2.0),
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "num_heads", 15),
        ("vision_config", "num_heads", 64),
        ("vision_config", "num_position_embeddings", 2303),
        ("vision_config", "patch_size", [16, 16]),
        ("vision_config", "deepstack_visual_indexes", [8, 16, 27]),
        ("vision_config", "deepstack_visual_indexes", [16, 8, 24]),
        ("vision_config", "deepstack_visual_indexes", [8, 8, 24]),
        ("vision_config", "deepstack_visual_indexes", [-1]),
        ("vision_config", "out_hidden_size", 2048),
        ("vision_config", "rope_type", "default"),
        ("vision_config", "rope_theta", -1.0),
        ("", "model_type", "qwen2_5_vl"),
        ("", "image_token_id", 1.5),
        ("", "quantization_config", {}),
    ],
)
def test_config_refuses(section, key, value):
    given = raw()
    place = given
    for name in filter(None, section.split(".")):
        place = place[name]
    place[key] = value
    with pytest.raises(ConfigError, match=key) as caught:
        Qwen3VLConfig.from_transformers(given, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json")


@pytest.mark.parametrize("key", ["text_config", "vision_config", "image_token_id"])
def test_config_refuses_what_is_missing(key):
    given = raw()
    del given[key]
    with pytest.raises(ConfigError, match=key):
        Qwen3VLConfig.from_transformers(given)


def test_config_refuses_more_deepstack_layers_than_layers():
    given = raw()
    given["text_config"]["num_hidden_layers"] = 2
    with pytest.raises(ConfigError, match="deepstack_visual_indexes"):
        Qwen3VLConfig.from_transformers(given)


def test_rotary_frequencies_are_interleaved():
    axes = np.array(Qwen3VLConfig.from_transformers(raw()).text.axis_of_frequency)
    assert np.flatnonzero(axes == 1).tolist() == list(range(1, 59, 3))
    assert np.flatnonzero(axes == 2).tolist() == list(range(2, 60, 3))
    assert len(axes) == 64
    assert (axes == 0).sum() == 24


def test_patches_are_in_block_order():
    positions, taps, weights = patch_positions(4, 6, Qwen3VLConfig.from_transformers(raw()).vision)
    first_blocks = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert [tuple(p) for p in positions[:8].tolist()] == first_blocks
    assert positions[12].tolist() == [2, 0]
    assert (positions.dtype, taps.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


def test_corners_of_the_position_table_fall_on_the_corners_of_the_picture():
    positions, taps, weights = patch_positions(10, 14, Qwen3VLConfig.from_transformers(raw()).vision)
    for corner, row in {(0, 0): 0, (0, 13): 47, (9, 0): 47 * 48, (9, 13): 48 * 48 - 1}.items():
        index = positions.tolist().index(list(corner))
        assert taps[index][weights[index] > 0].tolist() == [row]
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_a_grid_that_is_not_made_of_blocks_is_refused():
    with pytest.raises(ValueError, match="5×6"):
        patch_positions(5, 6, Qwen3VLConfig.from_transformers(raw()).vision)


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(2, 2), (2, 50), (42, 64), (64, 64), (52, 72), (96, 48), (120, 34)])
def test_patch_positions_equal_the_reference_bit_by_bit(grid):
    torch = pytest.importorskip("torch")
    from transformers import vision_utils

    grid_thw = torch.tensor([[1, *grid]])
    positions, taps, weights = patch_positions(*grid, Qwen3VLConfig.from_transformers(raw()).vision)
    expected_taps, expected_weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid_thw, 48, align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(positions, vision_utils.get_vision_position_ids(grid_thw, 2).numpy())
    np.testing.assert_array_equal(taps, expected_taps.numpy())
    np.testing.assert_array_equal(weights, expected_weights.numpy())


@pytest.mark.parity
def test_every_tensor_of_the_real_size_is_matched():
    torch = pytest.importorskip("torch")
    from transformers import Qwen3VLConfig as TheirConfig
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(TheirConfig(**raw()))
    config = TEXT_ENCODER.configure(raw())
    state = TEXT_ENCODER.abstract(config, jnp.bfloat16).state
    tensors = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    parameters = {name: leaf.shape for name, leaf in leaves(state).items()}
    matches = match(TEXT_ENCODER.rules(config), TEXT_ENCODER.ignored, tensors, parameters, where="reference")
    assert len(tensors) == 750
    assert len(matches) == len(parameters) == 748
    assert {m.source for m in matches} | set(TEXT_ENCODER.ignored) == set(tensors)
    assert len({m.source for m in matches}) == len(matches)
    assert count_parameters(state) == 8_767_123_696 - 622_333_952
    assert parameters["language.layers.3.q.kernel"] == (4096, 32, 128)
    assert parameters["language.layers.3.k.kernel"] == (4096, 8, 128)
    assert parameters["language.layers.3.o.kernel"] == (32, 128, 4096)
    assert parameters["visual.blocks.2.qkv.kernel"] == (1152, 3, 16, 72)
    assert parameters["visual.patch.kernel"] == (1536, 1152)
    assert {leaf.dtype for leaf in leaves(state).values()} == {jnp.dtype(jnp.bfloat16)}
