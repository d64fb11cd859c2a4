"""Key table of the Wan 2.1 autoencoder."""

from joyjax.convert.component import Component
from joyjax.convert.rules import Rule, Shape, Transform, conv2d, last_frame, squeeze
from joyjax.models.autoencoder.wan import WanVAE, WanVAEConfig


def rules(config: WanVAEConfig) -> tuple[Rule, ...]:
    """Return the table. The encoder's blocks are one list in both; the decoder's are nested by level in the source."""
    table = [*_conv("quant_conv", "quant", last_frame(1)), *_conv("post_quant_conv", "post_quant", last_frame(1))]
    for half in ("encoder", "decoder"):
        table += [
            *_conv(f"{half}.conv_in", f"{half}.conv_in", last_frame(3)),
            *_res_block(f"{half}.mid_block.resnets.0", f"{half}.middle.before"),
            Rule(f"{half}.mid_block.attentions.0.norm.gamma", f"{half}.middle.attention.norm.scale", squeeze(2)),
            *_conv(f"{half}.mid_block.attentions.0.to_qkv", f"{half}.middle.attention.qkv", conv2d),
            *_conv(f"{half}.mid_block.attentions.0.proj", f"{half}.middle.attention.out", conv2d),
            *_res_block(f"{half}.mid_block.resnets.1", f"{half}.middle.after"),
            Rule(f"{half}.norm_out.gamma", f"{half}.norm_out.scale", squeeze(3)),
            *_conv(f"{half}.conv_out", f"{half}.conv_out", last_frame(3)),
        ]
    table += _res_block("encoder.down_blocks.{i}", "encoder.blocks.{i}")
    table += _conv("encoder.down_blocks.{i}.resample.1", "encoder.blocks.{i}", conv2d)
    blocks = config.num_res_blocks + 1
    for level in range(len(config.dim_mult)):
        source, first = f"decoder.up_blocks.{level}", level * (blocks + 1)
        for block in range(blocks):
            table += _res_block(f"{source}.resnets.{block}", f"decoder.blocks.{first + block}")
        table += _conv(f"{source}.upsamplers.0.resample.1", f"decoder.blocks.{first + blocks}.conv", conv2d)
    return tuple(table)


def _res_block(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.norm1.gamma", f"{target}.norm1.scale", squeeze(3)),
        *_conv(f"{source}.conv1", f"{target}.conv1", last_frame(3)),
        Rule(f"{source}.norm2.gamma", f"{target}.norm2.scale", squeeze(3)),
        *_conv(f"{source}.conv2", f"{target}.conv2", last_frame(3)),
        *_conv(f"{source}.conv_shortcut", f"{target}.shortcut", last_frame(1)),
    ]


def _conv(source: str, target: str, transform: Transform) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", transform), Rule(f"{source}.bias", f"{target}.bias")]


def unused(config: WanVAEConfig) -> dict[str, tuple[Shape, float]]:
    """Return the temporal convolutions of the reference's resampling."""
    levels = len(config.temperal_downsample)
    found: dict[str, tuple[Shape, float]] = {}
    for level, temporal in enumerate(config.temperal_downsample):
        if not temporal:
            continue
        width, index = config.widths[level], (level + 1) * (config.num_res_blocks + 1) - 1
        found |= _time_conv(f"encoder.down_blocks.{index}.time_conv", width, width)
        width = config.widths[level + 1]
        found |= _time_conv(f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.time_conv", width, 2 * width)
    return found


def _time_conv(name: str, width: int, width_out: int) -> dict[str, tuple[Shape, float]]:
    return {f"{name}.weight": ((width_out, width, 3, 1, 1), 0.0), f"{name}.bias": ((width_out,), 0.0)}


WHY_IGNORED = "resamples in time, which the first frame skips"

VAE = Component(
    folder="vae",
    class_names=("AutoencoderKLWan", "AutoencoderKLQwenImage"),
    configure=WanVAEConfig.from_diffusers,
    build=WanVAE,
    rules=rules,
    unused=unused,
    ignored={
        "encoder.down_blocks.{i}.time_conv.weight": WHY_IGNORED,
        "encoder.down_blocks.{i}.time_conv.bias": WHY_IGNORED,
        "decoder.up_blocks.{i}.upsamplers.0.time_conv.weight": WHY_IGNORED,
        "decoder.up_blocks.{i}.upsamplers.0.time_conv.bias": WHY_IGNORED,
    },
)
