"""Qwen-Image at the real size, as shapes: text to image and edits at 1024 × 1024 with guidance, in bfloat16.

python tests/qwen_full_size.py                    # a step as compiled for an H100, by blocks: memory, arithmetic
python tests/qwen_full_size.py --references 1     # of an edit
python tests/qwen_full_size.py 2 3 --references 2 --mesh tensor=4 cfg=2,sequence=4    # collectives, parameters
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from collectives import count_collectives
from contents import flops
from full_size import PASSES, TARGET, WAN, parameters
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from whole_step import denoise_step

from joyjax.convert.qwen2_5_vl import TEXT_ENCODER, WITH_TOWER
from joyjax.convert.qwen_image import TRANSFORMER
from joyjax.convert.wan_vae import VAE
from joyjax.families.qwen_image_stages import TEXT_SIZES
from joyjax.layers.condition import Condition
from joyjax.layers.weights import Weights, leaves
from joyjax.sharding.mesh import parse_axes

LAYERS = 60
TEXT = TEXT_SIZES[1]  # hidden states of a prompt
EDIT_TEXT = 1536  # with one picture of 1024²
VISION = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_channels": 3,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
}


def transformer(layers: int = LAYERS, **kind: bool) -> Any:
    """Return the transformer's configuration, with so many blocks; `kind` are further keys of it."""
    raw = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
        **kind,
    }
    return TRANSFORMER.configure(raw)


def text_encoder(*, vision: bool = False) -> Any:
    """Return the text encoder's configuration, with its vision tower or without."""
    raw = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    return WITH_TOWER.configure({**raw, "vision_config": VISION}) if vision else TEXT_ENCODER.configure(raw)


LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}


def configs(*, vision: bool = False, layered: bool = False) -> dict[str, Any]:
    """Return the configurations of all networks; `vision`: those of the edits, `layered`: of layers."""
    vae = dataclasses.replace(WAN, input_channels=4 if layered else 3)
    kind = LAYERED if layered else {}
    return {"text_encoder": text_encoder(vision=vision), "transformer": transformer(**kind), "vae": vae}


def step(
    mesh: Mesh, layers: int, *, target: int = TARGET, references: int = 0, text: int = TEXT, **kind: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a step of a network of so many blocks as a function of arrays, and the shapes of these on a mesh."""

    def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    config, integers, numbers = transformer(layers, **kind), jnp.int32, jnp.float32
    condition = [
        array(jnp.bfloat16, PASSES, text, config.joint_attention_dim),
        array(integers, PASSES),
        array(numbers, PASSES, references, config.in_channels),
        array(integers, PASSES, target + references, 3),
        *[array(integers, PASSES)] * 3,
    ]

    def run(weights: Weights, latents: jax.Array, condition: list[jax.Array], levels: list[jax.Array]) -> jax.Array:
        return denoise_step(weights, latents, Condition(*condition), *levels, channels=config.in_channels)

    weights, latents = parameters(TRANSFORMER, config, mesh), array(numbers, 1, target, config.in_channels)
    return run, (weights, latents, condition, [*[array(numbers)] * 3, array(numbers, 1)])


def compiled(layers: int, axes: Mapping[str, int] | None = None, **sizes: Any) -> jax.stages.Compiled:
    """Return a step as compiled for H100s; `sizes` are those of `step`."""
    import gpu_compile

    mesh = gpu_compile.gpu_mesh(axes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, arguments = step(mesh, layers, **sizes)
    return gpu_compile.compile_for_gpu(function, *arguments, mesh=mesh)


def least_tflop(layers: int, *, target: int = TARGET, references: int = 0, text: int = TEXT, **kind: bool) -> float:
    """Return the required arithmetic of a step with guidance, in 10¹² operations.

    In each pass and block, with D channels, I image and J text tokens: qkv, the map out and the MLP take 24 D² a token,
    attention 4 D (I + J)², and the modulations 12 D² for each stream and each time. The last block needs keys and
    values of all tokens, and the rest of the target's alone.
    """
    config = transformer(layers, **kind)
    width, images = config.hidden_size, target + references
    everything, times = images + text, config.modulations
    modulation = 12 * width**2 * (times + 1)
    block = 24 * width**2 * everything + 4 * width * everything**2 + modulation
    last = 4 * width**2 * everything + 20 * width**2 * target + 4 * width * target * everything + modulation
    ends = 2 * width * (images * config.in_channels + text * config.joint_attention_dim + target * config.in_channels)
    return PASSES * ((layers - 1) * block + last + ends) / 1e12


def parameter_bytes(mesh: Mesh, *, vision: bool) -> dict[str, int]:
    """Return the bytes of each network's parameters on one device of a mesh."""
    networks = {"text_encoder": WITH_TOWER if vision else TEXT_ENCODER, "transformer": TRANSFORMER, "vae": VAE}
    found = {}
    for name, component in networks.items():
        held = leaves(parameters(component, configs(vision=vision)[name], mesh).state).values()
        arrays = [leaf.get_value() for leaf in held]
        found[name] = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    return found


def main() -> None:
    """Print a JSON line for each mesh and number of blocks. From four blocks on, another one adds next to nothing."""
    import gpu_compile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", type=int, nargs="*", default=[4, 6, LAYERS])
    parser.add_argument("--references", type=int, default=0, help="pictures of 1024 × 1024")
    parser.add_argument(
        "--mesh", nargs="+", type=parse_axes, default=[{}], help="such as tensor=4; [default: one device]"
    )
    parser.add_argument("--zero", action="store_true", help="references at time 0, as of the version 2511")
    given = parser.parse_args()
    sizes: dict[str, Any] = {"references": given.references * TARGET, "text": EDIT_TEXT if given.references else TEXT}
    sizes |= {"zero_cond_t": given.zero}
    for axes in given.mesh:
        mesh = gpu_compile.gpu_mesh(axes or None)
        held = {
            name: round(size / 2**30, 2) for name, size in parameter_bytes(mesh, vision=given.references > 0).items()
        }
        for layers in given.layers:
            program = compiled(layers, axes or None, **sizes)
            text = program.as_text()
            row = {
                **{"mesh": axes, "blocks": layers, "references": given.references, "parameters_gib": held},
                "working_gib": round(program.memory_analysis().temp_size_in_bytes / 2**30, 3),
                "collectives": dict(count_collectives(text)),
            }
            if not axes:
                row["tflop over least"] = round(flops(text) / 1e12 / least_tflop(layers, **sizes), 4)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
