"""Key table of the text encoder, Qwen3-VL."""

from joyjax.convert.component import Component
from joyjax.convert.rules import Rule, Shape, flatten_in, reshape, split_in, split_out, transpose
from joyjax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig

IGNORED = {
    "lm_head.weight": "the LM head, which a text encoder does not use",
    "model.language_model.norm.weight": "applies after the hidden states that are used",
}


def rules(config: Qwen3VLConfig) -> tuple[Rule, ...]:
    """Return the table."""
    return (*_language(), *_visual(config))


def _language() -> list[Rule]:
    theirs, ours = "model.language_model.layers.{i}", "language.layers.{i}"
    return [
        Rule("model.language_model.embed_tokens.weight", "language.embed.table"),
        Rule(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.scale"),
        Rule(f"{theirs}.self_attn.q_proj.weight", f"{ours}.q.kernel", split_out),
        Rule(f"{theirs}.self_attn.k_proj.weight", f"{ours}.k.kernel", split_out),
        Rule(f"{theirs}.self_attn.v_proj.weight", f"{ours}.v.kernel", split_out),
        Rule(f"{theirs}.self_attn.o_proj.weight", f"{ours}.o.kernel", split_in),
        Rule(f"{theirs}.self_attn.q_norm.weight", f"{ours}.q_norm"),
        Rule(f"{theirs}.self_attn.k_norm.weight", f"{ours}.k_norm"),
        Rule(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.scale"),
        Rule(f"{theirs}.mlp.gate_proj.weight", f"{ours}.gate.kernel", transpose),
        Rule(f"{theirs}.mlp.up_proj.weight", f"{ours}.up.kernel", transpose),
        Rule(f"{theirs}.mlp.down_proj.weight", f"{ours}.down.kernel", transpose),
    ]


def _visual(config: Qwen3VLConfig) -> list[Rule]:
    vision = config.vision
    patch = flatten_in(vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    theirs, ours = "model.visual.blocks.{i}", "visual.blocks.{i}"
    table = [
        Rule("model.visual.patch_embed.proj.weight", "visual.patch.kernel", patch),
        Rule("model.visual.patch_embed.proj.bias", "visual.patch.bias"),
        Rule("model.visual.pos_embed.weight", "visual.position.table"),
        *_norm(f"{theirs}.norm1", f"{ours}.attention_norm"),
        Rule(f"{theirs}.attn.qkv.weight", f"{ours}.qkv.kernel", split_out),
        Rule(f"{theirs}.attn.qkv.bias", f"{ours}.qkv.bias", reshape),
        Rule(f"{theirs}.attn.proj.weight", f"{ours}.out.kernel", split_in),
        Rule(f"{theirs}.attn.proj.bias", f"{ours}.out.bias"),
        *_norm(f"{theirs}.norm2", f"{ours}.mlp_norm"),
        *_linear(f"{theirs}.mlp.linear_fc1", f"{ours}.up"),
        *_linear(f"{theirs}.mlp.linear_fc2", f"{ours}.down"),
    ]
    for theirs, ours in (
        ("model.visual.merger", "visual.merger"),
        ("model.visual.deepstack_merger_list.{i}", "visual.deepstack.{i}"),
    ):
        table += _norm(f"{theirs}.norm", f"{ours}.norm")
        table += _linear(f"{theirs}.linear_fc1", f"{ours}.up")
        table += _linear(f"{theirs}.linear_fc2", f"{ours}.down")
    return table


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")]


def _linear(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", transpose), Rule(f"{theirs}.bias", f"{ours}.bias")]


def unused(config: Qwen3VLConfig) -> dict[str, tuple[Shape, float]]:
    """Return the other tensors of `Qwen3VLForConditionalGeneration` with a head that is tied to the embedding."""
    return {"model.language_model.norm.weight": ((config.text.hidden_size,), 1.0)}


TEXT_ENCODER = Component(
    folder="text_encoder",
    class_names=("Qwen3VLForConditionalGeneration",),
    configure=Qwen3VLConfig.from_transformers,
    build=Qwen3VL,
    rules=rules,
    ignored=IGNORED,
    unused=unused,
)
