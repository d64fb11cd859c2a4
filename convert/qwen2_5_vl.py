"""Key table of the text encoder Qwen2.5-VL, in the names of the published files and in those of Transformers 5.

published                 Transformers 5 in memory
model.layers.0. …         model.language_model.layers.0. …
model.embed_tokens. …     model.language_model.embed_tokens. …
visual. …                 model.visual. …
"""

import dataclasses

from joyjax.convert.component import Component
from joyjax.convert.rules import Rule, Transform, copy, flatten_in, reshape, split_in, split_out, transpose
from joyjax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from joyjax.models.qwen2_5_vl_vision import VisionConfig

NO_PICTURES = "reads pictures, which text to image has none of"
LINEAR = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VISUAL = (
    "patch_embed.proj.weight",
    *(f"blocks.{{i}}.{name}.weight" for name in ("norm1", "norm2")),
    *(f"blocks.{{i}}.{name}.{kind}" for name in LINEAR for kind in ("weight", "bias")),
    "merger.ln_q.weight",
    *(f"merger.mlp.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")),
)
HEAD = {"lm_head.weight": "makes words, which an encoder does not"}
TOWER = {f"{prefix}.{name}": NO_PICTURES for prefix in ("visual", "model.visual") for name in VISUAL}


def rules(config: Qwen25VLConfig) -> tuple[Rule, ...]:
    """Return the table."""
    theirs, ours = "layers.{i}", "language.layers.{i}"
    table = [
        _rule("embed_tokens.weight", "language.embed.table"),
        _rule("norm.weight", "language.norm.scale"),
        _rule(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.scale"),
        _rule(f"{theirs}.self_attn.o_proj.weight", f"{ours}.o.kernel", split_in),
        _rule(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.scale"),
    ]
    for name in ("q", "k", "v"):
        table.append(_rule(f"{theirs}.self_attn.{name}_proj.weight", f"{ours}.{name}.kernel", split_out))
        table.append(_rule(f"{theirs}.self_attn.{name}_proj.bias", f"{ours}.{name}.bias", reshape))
    for name in ("gate", "up", "down"):
        table.append(_rule(f"{theirs}.mlp.{name}_proj.weight", f"{ours}.{name}.kernel", transpose))
    return (*table, *(() if config.vision is None else _visual(config.vision)))


def _visual(vision: VisionConfig) -> list[Rule]:
    patch = flatten_in(vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    theirs, ours = "blocks.{i}", "visual.blocks.{i}"
    table = [
        _visual_rule("patch_embed.proj.weight", "visual.patch.kernel", patch),
        _visual_rule(f"{theirs}.norm1.weight", f"{ours}.attention_norm.scale"),
        _visual_rule(f"{theirs}.attn.qkv.weight", f"{ours}.qkv.kernel", split_out),
        _visual_rule(f"{theirs}.attn.qkv.bias", f"{ours}.qkv.bias", reshape),
        _visual_rule(f"{theirs}.attn.proj.weight", f"{ours}.out.kernel", split_in),
        _visual_rule(f"{theirs}.attn.proj.bias", f"{ours}.out.bias"),
        _visual_rule(f"{theirs}.norm2.weight", f"{ours}.mlp_norm.scale"),
        _visual_rule("merger.ln_q.weight", "visual.merger.norm.scale"),
    ]
    linear = {f"{theirs}.mlp.{name}_proj": f"{ours}.{name}" for name in ("gate", "up", "down")}
    for name, target in {**linear, "merger.mlp.0": "visual.merger.up", "merger.mlp.2": "visual.merger.down"}.items():
        table.append(_visual_rule(f"{name}.weight", f"{target}.kernel", transpose))
        table.append(_visual_rule(f"{name}.bias", f"{target}.bias"))
    return table


def _visual_rule(theirs: str, ours: str, transform: Transform = copy) -> Rule:
    return Rule(f"visual.{theirs}", ours, transform, also=(f"model.visual.{theirs}",))


def _rule(theirs: str, ours: str, transform: Transform = copy) -> Rule:
    return Rule(f"model.{theirs}", ours, transform, also=(f"model.language_model.{theirs}",))


TEXT_ENCODER = Component(
    folder="text_encoder",
    class_names=("Qwen2_5_VLForConditionalGeneration",),
    configure=Qwen25VLConfig.from_transformers,
    build=Qwen25VL,
    rules=rules,
    ignored=HEAD | TOWER,
)
WITH_TOWER = dataclasses.replace(TEXT_ENCODER, configure=Qwen25VLConfig.with_vision, ignored=HEAD)
