"""Key table of the Qwen-Image transformer."""

from joyjax.convert.component import Component
from joyjax.convert.rules import Rule, Transform, copy, reshape, split_in, split_out, token_in, token_out, transpose
from joyjax.models.qwen_image import QwenImageConfig, QwenImageTransformer

EMBEDDER = "time_text_embed.timestep_embedder"
# Of each stream: queries, keys, values, the map out of attention, and the norms of queries and keys.
ATTENTION = {
    "img": ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
    "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
}


def rules(config: QwenImageConfig) -> tuple[Rule, ...]:
    """Return the table.

    Of the last block's text stream only keys and values reach the result. The rest of it is kept all the same: 0.4 % of
    the parameters, so that a file can be written again as it was.
    """
    table = [
        *_linear("img_in", "img_in", token_in(*config.patch), copy),
        *_linear(f"{EMBEDDER}.linear_1", "time_in"),
        *_linear(f"{EMBEDDER}.linear_2", "time_hidden"),
        Rule("txt_norm.weight", "txt_norm.scale"),
        *_linear("txt_in", "txt_in"),
        *_linear("norm_out.linear", "head_modulation", split_out, reshape),
        *_linear("proj_out", "out", token_out(*config.patch), token_out(*config.patch)),
    ]
    if config.use_additional_t_cond:
        table.append(Rule("time_text_embed.addition_t_embedding.weight", "time_added"))
    for stream, names in ATTENTION.items():
        theirs, ours = "transformer_blocks.{i}", f"blocks.{{i}}.{stream}"
        q, k, v, out, q_norm, k_norm = (f"{theirs}.attn.{name}" for name in names)
        table += _linear(f"{theirs}.{stream}_mod.1", f"{ours}.modulation", split_out, reshape)
        for source, name in ((q, "q"), (k, "k"), (v, "v")):
            table += _linear(source, f"{ours}.qkv.{name}", split_out, reshape)
        table += _linear(out, f"{ours}.out", split_in, copy)
        table += [Rule(f"{q_norm}.weight", f"{ours}.q_norm"), Rule(f"{k_norm}.weight", f"{ours}.k_norm")]
        table += _linear(f"{theirs}.{stream}_mlp.net.0.proj", f"{ours}.up")
        table += _linear(f"{theirs}.{stream}_mlp.net.2", f"{ours}.down")
    return tuple(table)


def _linear(theirs: str, ours: str, kernel: Transform = transpose, bias: Transform = copy) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", kernel), Rule(f"{theirs}.bias", f"{ours}.bias", bias)]


TRANSFORMER = Component(
    folder="transformer",
    class_names=("QwenImageTransformer2DModel",),
    configure=QwenImageConfig.from_diffusers,
    build=QwenImageTransformer,
    rules=rules,
)
