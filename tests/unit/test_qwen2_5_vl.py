"""Qwen2.5-VL's configuration, as several programs write it, and its key table at the real sizes, without weights."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.convert.export import export
from joyjax.convert.qwen2_5_vl import TEXT_ENCODER, WITH_TOWER
from joyjax.convert.rules import match
from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import fill
from joyjax.errors import CheckpointError, ConfigError
from joyjax.layers.weights import count_parameters, leaves
from joyjax.models.qwen2_5_vl import Qwen25VLConfig
from joyjax.reading import read_json
from joyjax.sharding.rules import RULES

NUMBERS = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
ROPE = {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}, "rope_theta": 1e6}
TOP = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.1",
    "video_token_id": 151656,
    "vision_config": {"depth": 32, "hidden_size": 1280, "model_type": "qwen2_5_vl", "window_size": 112},
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
}
VISION = {  # as published; Transformers 5 leaves out the two older names
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_channels": 3,
    "in_chans": 3,
    "initializer_range": 0.02,
    "intermediate_size": 3420,
    "model_type": "qwen2_5_vl",
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "torch_dtype": "float32",
    "window_size": 112,
}
INSIDE = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": None,
    "layer_types": ["full_attention"] * 28,
    "model_type": "qwen2_5_vl_text",
    "sliding_window": None,
    "torch_dtype": "float32",
    "video_token_id": None,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
}


def flat() -> dict:
    """Return the config as Transformers before 4.52 wrote it."""
    old = {"rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}, "rope_theta": 1000000.0}
    return copy.deepcopy({**TOP, **NUMBERS, **old, "sliding_window": 32768})


def both() -> dict:
    """Return the config of the published checkpoints, where the numbers stand twice."""
    return copy.deepcopy(
        {**TOP, **NUMBERS, **ROPE, "sliding_window": 32768, "text_config": {**NUMBERS, **ROPE, **INSIDE}}
    )


def nested() -> dict:
    """Return the config as Transformers 5 writes it."""
    rope = {"rope_parameters": {**ROPE["rope_scaling"], "rope_theta": 1e6}}
    return copy.deepcopy({**TOP, "text_config": {**NUMBERS, **INSIDE, **rope, "pad_token_id": None}})


FORMS = {"flat": flat, "both": both, "nested": nested}


def real_tensors(*, resaved: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors, as published or as Transformers 5 names them in memory."""
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (152064, 3584)}
    language, visual = ("model.language_model", "model.visual") if resaved else ("model", "visual")

    def linear(name: str, inputs: int, outputs: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    shapes[f"{language}.embed_tokens.weight"] = (152064, 3584)
    shapes[f"{language}.norm.weight"] = (3584,)
    for layer in (f"{language}.layers.{n}" for n in range(28)):
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (3584,)
        for name, size in {"q": 3584, "k": 512, "v": 512}.items():
            linear(f"{layer}.self_attn.{name}_proj", 3584, size, bias=True)
        linear(f"{layer}.self_attn.o_proj", 3584, 3584, bias=False)
        for name, sizes in {"gate": (3584, 18944), "up": (3584, 18944), "down": (18944, 3584)}.items():
            linear(f"{layer}.mlp.{name}_proj", *sizes, bias=False)
    shapes[f"{visual}.patch_embed.proj.weight"] = (1280, 3, 2, 14, 14)
    for block in (f"{visual}.blocks.{n}" for n in range(32)):
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (1280,)
        linear(f"{block}.attn.qkv", 1280, 3840, bias=True)
        linear(f"{block}.attn.proj", 1280, 1280, bias=True)
        for name, sizes in {"gate": (1280, 3420), "up": (1280, 3420), "down": (3420, 1280)}.items():
            linear(f"{block}.mlp.{name}_proj", *sizes, bias=True)
    shapes[f"{visual}.merger.ln_q.weight"] = (1280,)
    linear(f"{visual}.merger.mlp.0", 5120, 5120, bias=True)
    linear(f"{visual}.merger.mlp.2", 5120, 3584, bias=True)
    return shapes


@pytest.mark.parametrize("form", FORMS)
def test_config(form):
    config = Qwen25VLConfig.from_transformers(FORMS[form]())
    assert (config.text.rope_theta, config.text.mrope_section, config.text.head_dim) == (1e6, (16, 24, 24), 128)
    assert (config.text.num_attention_heads, config.text.num_key_value_heads) == (28, 4)
    assert (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id) == (151655, 151652, 151653)
    assert hash(config) == hash(Qwen25VLConfig.from_transformers(both()))


def test_frequencies_come_in_chunks():
    axes = Qwen25VLConfig.from_transformers(flat()).text.axis_of_frequency
    assert axes == (0,) * 16 + (1,) * 24 + (2,) * 24


REFUSED = [
    ("hidden_act", "gelu", "hidden_act is 'gelu'; this version of joyjax implements 'silu'"),
    ("use_sliding_window", True, "use_sliding_window is True; this version of joyjax implements False"),
    ("num_key_value_heads", 5, "num_attention_heads 28 is not divisible by num_key_value_heads 5"),
    ("num_attention_heads", 27, "hidden_size 3584 is not divisible by num_attention_heads 27"),
    ("num_attention_heads", 0, "num_attention_heads is 0; expected a positive number"),
    ("num_hidden_layers", 201, "num_hidden_layers is 201; expected int, 200 at most"),
    ("rms_norm_eps", 0.0, "rms_norm_eps is 0.0; expected a positive number"),
    ("head_dim", 64, "head_dim is 64; expected hidden_size / num_attention_heads, 128"),
    ("vocab_size", "many", "vocab_size is 'many'; expected int"),
    ("rope_theta", None, "rope_theta is None; expected float"),
    (
        "layer_types",
        ["sliding_attention"] * 28,
        "layer_types is .*; this version of joyjax implements 'full_attention'",
    ),
    ("rope_scaling", ["default"], r"rope_scaling = \['default'\] is not known"),
    ("rope_scaling", {"rope_type": "yarn", "mrope_section": [16, 24, 24]}, "rope_type is 'yarn'"),
    ("rope_scaling", {"type": "linear", "mrope_section": [16, 24, 24]}, "type is 'linear'"),
    ("rope_scaling", {"rope_type": "default", "mrope_section": [24, 20, 22]}, r"mrope_section \[24, 20, 22\]"),
    ("rope_scaling", {"rope_type": "default", "mrope_section": [32, 32]}, r"mrope_section \[32, 32\]"),
    ("rope_scaling", {"rope_type": "default", "mrope_section": [-8, 40, 32]}, r"mrope_section \[-8, 40, 32\]"),
    ("rope_scaling", {"mrope_section": [16, 24, 24], "factor": 2.0}, "factor = 2.0 is not known"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
@pytest.mark.parametrize("form", ["flat", "in text_config"])
def test_config_refuses(form, key, value, message):
    given = flat()
    if form == "in text_config":
        given = {**TOP, "text_config": {**NUMBERS, **ROPE, **INSIDE}}
        given["text_config"][key] = value
    else:
        given[key] = value
    with pytest.raises(ConfigError, match=message) as caught:
        Qwen25VLConfig.from_transformers(given, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "qwen2_vl", "model_type is 'qwen2_vl'"),
        ("image_token_id", 1.5, "image_token_id is 1.5; expected int"),
        ("unheard_of", 1, "unheard_of = 1 is not known"),
        ("text_config", [], r"text_config is \[\]; expected a json object"),
        ("hidden_size", 4096, "hidden_size is 4096, but 3584 in text_config; which is right"),
        ("rope_theta", 5e6, "rope_theta is 5000000.0, but 1000000.0 in text_config"),
        ("rope_scaling", {"mrope_section": [24, 20, 20]}, "mrope_section is .*, but .* in text_config"),
    ],
)
def test_config_refuses_in_both_places(key, value, message):
    with pytest.raises(ConfigError, match=message):
        Qwen25VLConfig.from_transformers({**both(), key: value})


@pytest.mark.parametrize(
    "key", ["image_token_id", "vision_start_token_id", "hidden_size", "rope_theta", "rope_scaling"]
)
def test_config_refuses_what_is_missing(key):
    given = flat()
    del given[key]
    with pytest.raises(ConfigError, match="mrope_section is missing" if key == "rope_scaling" else f"{key} is missing"):
        Qwen25VLConfig.from_transformers(given)


@pytest.mark.parametrize("resaved", [False, True], ids=["published", "resaved"])
@pytest.mark.parametrize("head", [True, False], ids=["with the head", "without"])
def test_every_tensor_of_the_real_size_is_matched(resaved, head):
    tensors, config = real_tensors(resaved=resaved), TEXT_ENCODER.configure(both())
    assert len(tensors) == 729
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == 8_292_166_656
    assert len([name for name in tensors if "visual." in name]) == 390
    if not head:
        del tensors["lm_head.weight"]
    state = TEXT_ENCODER.abstract(config, jnp.bfloat16).state
    parameters = {path: leaf.shape for path, leaf in leaves(state).items()}
    found = match(TEXT_ENCODER.rules(config), TEXT_ENCODER.ignored, tensors, parameters, where="text encoder")
    assert len({m.source for m in found}) == len(found) == len(parameters) == 338
    assert {name for name in tensors.keys() - {m.source for m in found} if "visual." not in name} <= {"lm_head.weight"}
    assert parameters["language.layers.27.q.kernel"] == (3584, 28, 128)
    assert parameters["language.layers.27.k.bias"] == (4, 128)
    assert parameters["language.norm.scale"] == (3584,)
    assert count_parameters(state) == 8_292_166_656 - 152064 * 3584 - 676_550_144

    prefix = "model.language_model" if resaved else "model"
    bias = tensors.pop(f"{prefix}.layers.3.self_attn.q_proj.bias")
    tensors[f"{prefix}.layers.3.self_attn.o_proj.bias"] = bias
    with pytest.raises(CheckpointError, match=r"q_proj\.bias .* is missing\n.*o_proj\.bias .* is not part"):
        match(TEXT_ENCODER.rules(config), TEXT_ENCODER.ignored, tensors, parameters, where="text encoder")


@pytest.mark.parametrize("resaved", [False, True], ids=["published", "resaved"])
def test_every_tensor_of_the_real_size_is_matched_with_the_vision_tower(resaved):
    tensors, config = real_tensors(resaved=resaved), WITH_TOWER.configure(both() | {"vision_config": VISION})
    state = WITH_TOWER.abstract(config, jnp.bfloat16).state
    parameters = {path: leaf.shape for path, leaf in leaves(state).items()}
    found = match(WITH_TOWER.rules(config), WITH_TOWER.ignored, tensors, parameters, where="text encoder")
    assert {m.source for m in found} == tensors.keys() - {"lm_head.weight"}
    assert len(found) == len(parameters) == 728
    assert count_parameters(state) == 8_292_166_656 - 152064 * 3584
    assert parameters["visual.patch.kernel"] == (3 * 2 * 14 * 14, 1280)
    assert parameters["visual.blocks.31.qkv.kernel"] == (1280, 3, 16, 80)
    assert parameters["visual.merger.down.kernel"] == (5120, 3584)
    for path, leaf in leaves(state).items():
        assert len(leaf.axes) == leaf.ndim, path
        assert set(leaf.axes) <= {None, *RULES}, path
    name = next(name for name in tensors if name.endswith("blocks.7.mlp.gate_proj.bias"))
    del tensors[name]
    with pytest.raises(CheckpointError, match=r"blocks\.7\.mlp\.gate_proj\.bias .* is missing"):
        match(WITH_TOWER.rules(config), WITH_TOWER.ignored, tensors, parameters, where="text encoder")


def vision(**changes) -> dict:
    return both() | {"vision_config": {**VISION, **changes}}


def test_the_vision_towers_config():
    """As published, as files from before 4.50 have it, and as Transformers 5 writes it."""
    old = {key: value for key, value in VISION.items() if key not in ("in_channels", "model_type", "torch_dtype")}
    rope = {"rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0}, "model_type": "qwen2_5_vl_vision"}
    new = {**{key: value for key, value in VISION.items() if key not in ("in_chans", "spatial_patch_size")}, **rope}
    configs = [WITH_TOWER.configure(both() | {"vision_config": form}) for form in (VISION, old, new)]
    assert configs[0] == configs[1] == configs[2]
    found = configs[0].vision
    assert (found.window, found.head_dim, found.patch_values, found.rope_theta) == (4, 80, 1176, 10000.0)
    assert TEXT_ENCODER.configure(vision()).vision is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"num_heads": 7}, r"hidden_size 1280 is not divisible by 4 · num_heads 7"),
        ({"window_size": 27}, "window_size is 27; expected at least one token, 28 pixels"),
        ({"fullatt_block_indexes": [7, 32]}, r"fullatt_block_indexes \[7, 32\] must be ascending numbers below depth"),
        ({"fullatt_block_indexes": [15, 7]}, r"fullatt_block_indexes \[15, 7\] must be ascending"),
        ({"fullatt_block_indexes": 7}, "fullatt_block_indexes is 7; expected tuple"),
        ({"in_chans": 1}, "in_chans is 1, but in_channels is 3"),
        ({"spatial_patch_size": 16}, "spatial_patch_size is 16, but patch_size is 14"),
        ({"out_hidden_size": 2048}, "out_hidden_size 2048 is not the text's hidden_size 3584"),
        ({"depth": 0}, "depth is 0; expected a positive number"),
        ({"depth": 201}, "depth is 201; expected int, 200 at most"),
        ({"rope_theta": "much"}, "rope_theta is 'much'; expected float"),
        ({"unheard_of": 1}, "unheard_of = 1 is not known"),
    ],
)
def test_the_vision_towers_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        WITH_TOWER.configure(vision(**changes))
    assert str(caught.value).startswith("text_encoder/config.json")


@pytest.mark.parametrize("key", ["depth", "window_size", "fullatt_block_indexes", "intermediate_size"])
def test_the_vision_towers_config_refuses_what_is_missing(key):
    given = vision()
    del given["vision_config"][key]
    with pytest.raises(ConfigError, match=f"vision_config: {key} is missing"):
        WITH_TOWER.configure(given)
    with pytest.raises(ConfigError, match="vision_config is None; expected a json object"):
        WITH_TOWER.configure({key: value for key, value in both().items() if key != "vision_config"})


def test_a_tensor_under_both_names_is_refused():
    tensors, config = real_tensors(resaved=False), TEXT_ENCODER.configure(both())
    tensors["model.language_model.norm.weight"] = (3584,)
    parameters = {path: leaf.shape for path, leaf in leaves(TEXT_ENCODER.abstract(config, "bfloat16").state).items()}
    with pytest.raises(
        CheckpointError, match=r"model\.language_model\.norm\.weight \[3584\] is not part of this network"
    ):
        match(TEXT_ENCODER.rules(config), TEXT_ENCODER.ignored, tensors, parameters, where="text encoder")


@pytest.mark.parity
def test_these_are_the_tensors_of_the_reference():
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**(both() | {"vision_config": vision})))
    assert {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()} == real_tensors(resaved=True)


def test_every_dimension_has_a_logical_axis():
    state = TEXT_ENCODER.abstract(Qwen25VLConfig.from_transformers(both()), jnp.bfloat16).state
    for path, leaf in leaves(state).items():
        assert len(leaf.axes) == leaf.ndim, path
        assert set(leaf.axes) <= {None, *RULES}, path
        assert leaf.dtype == jnp.bfloat16, path


@pytest.mark.parity
def test_export_restores_the_tensors(qwen_folder, tmp_path):
    config = TEXT_ENCODER.configure(read_json(qwen_folder / "text_encoder" / "config.json"))
    given = Tensors.open(qwen_folder / "text_encoder")
    weights = fill(TEXT_ENCODER, config, given, jnp.float32)
    parameters = {path: leaf[...] for path, leaf in leaves(weights.state).items()}
    export(TEXT_ENCODER, config, parameters, tmp_path, jnp.float32)
    written = Tensors.open(tmp_path / "text_encoder")
    left_out = {name for name in given.shapes if name == "lm_head.weight" or name.startswith("visual.")}
    assert written.shapes.keys() == given.shapes.keys() - left_out
    for name in written.shapes:
        np.testing.assert_array_equal(written.read(name), given.read(name), err_msg=name)


@pytest.mark.parity
def test_export_restores_the_tensors_of_the_vision_tower(qwen_edit_folder, tmp_path):
    config = WITH_TOWER.configure(read_json(qwen_edit_folder / "text_encoder" / "config.json"))
    given = Tensors.open(qwen_edit_folder / "text_encoder")
    weights = fill(WITH_TOWER, config, given, jnp.float32)
    parameters = {path: leaf[...] for path, leaf in leaves(weights.state).items()}
    export(WITH_TOWER, config, parameters, tmp_path, jnp.float32)
    written = Tensors.open(tmp_path / "text_encoder")
    assert written.shapes.keys() == given.shapes.keys() - {"lm_head.weight"}
    for name in written.shapes:
        np.testing.assert_array_equal(written.read(name), given.read(name), err_msg=name)
