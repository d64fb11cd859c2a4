"""Key table of the JoyImage-Edit transformer."""

from joyjax.convert.component import Component
from joyjax.convert.rules import Rule, copy, patch_in, reshape, split_in, split_out, squeeze_front, transpose
from joyjax.models.joyimage import JoyImageConfig, JoyImageTransformer

EMBEDDER = "condition_embedder"


def rules(config: JoyImageConfig) -> tuple[Rule, ...]:
    """Return the table; Edit and Edit-Plus have the same keys and shapes."""
    table = [
        Rule("img_in.weight", "img_in.kernel", patch_in(*config.patch_size)),
        Rule("img_in.bias", "img_in.bias"),
        Rule("proj_out.weight", "out.kernel", transpose),
        Rule("proj_out.bias", "out.bias"),
        Rule(f"{EMBEDDER}.time_proj.weight", "time_out.kernel", split_out),
        Rule(f"{EMBEDDER}.time_proj.bias", "time_out.bias", reshape),
    ]
    for source, target in {
        "time_embedder.linear_1": "time_in",
        "time_embedder.linear_2": "time_hidden",
        "text_embedder.linear_1": "txt_in",
        "text_embedder.linear_2": "txt_hidden",
    }.items():
        table.append(Rule(f"{EMBEDDER}.{source}.weight", f"{target}.kernel", transpose))
        table.append(Rule(f"{EMBEDDER}.{source}.bias", f"{target}.bias"))
    for stream in ("img", "txt"):
        block, attn = "double_blocks.{i}", f"double_blocks.{{i}}.attn.{stream}_attn"
        ours = f"blocks.{{i}}.{stream}"
        table += [
            Rule(f"{block}.{stream}_mod.modulate_table", f"{ours}.table", squeeze_front),
            Rule(f"{attn}_qkv.weight", f"{ours}.qkv.kernel", split_out),
            Rule(f"{attn}_qkv.bias", f"{ours}.qkv.bias", reshape),
            Rule(f"{attn}_q_norm.weight", f"{ours}.q_norm"),
            Rule(f"{attn}_k_norm.weight", f"{ours}.k_norm"),
            Rule(f"{attn}_proj.weight", f"{ours}.out.kernel", split_in),
            Rule(f"{attn}_proj.bias", f"{ours}.out.bias", copy),
            Rule(f"{block}.{stream}_mlp.net.0.proj.weight", f"{ours}.up.kernel", transpose),
            Rule(f"{block}.{stream}_mlp.net.0.proj.bias", f"{ours}.up.bias"),
            Rule(f"{block}.{stream}_mlp.net.2.weight", f"{ours}.down.kernel", transpose),
            Rule(f"{block}.{stream}_mlp.net.2.bias", f"{ours}.down.bias"),
        ]
    return tuple(table)


TRANSFORMER = Component(
    folder="transformer",
    class_names=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    configure=JoyImageConfig.from_diffusers,
    build=JoyImageTransformer,
    rules=rules,
)
