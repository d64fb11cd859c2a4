"""The compiled stages of an edit at the real size, as shapes: for compiling without weights or devices.

An edit of 1024 × 1024 with one reference and guidance, in bfloat16.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from whole_step import denoise_step

from joyjax.convert import joyimage_original
from joyjax.convert.component import Component
from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.wan_vae import VAE
from joyjax.families.joyimage_buckets import buckets
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.layers.weights import Weights, leaves
from joyjax.models.autoencoder.buckets import Placement, padded_sizes
from joyjax.models.autoencoder.stages import decode_latents, encode_images
from joyjax.models.autoencoder.wan import WanVAEConfig
from joyjax.models.joyimage import JoyImageConfig
from joyjax.models.qwen3_vl import Qwen3VLConfig, TextConfig
from joyjax.models.qwen3_vl_vision import VisionConfig, VisionInputs
from joyjax.models.text_encoding import encode_prompt
from joyjax.sharding.place import parameter_sharding

SIDE = 1024  # pixels
TARGET, REFERENCE = 4096, 4096  # image tokens
TEXT, PASSES = 1088, 2  # hidden states of a prompt of about 40 words with its picture; the passes of guidance
PROMPT = 1152  # tokens of the text encoder: those, and the system turn that is dropped
SHARED = 928  # length of the common prefix of both passes, for every size of the table
PATCHES = (SIDE // 16) ** 2  # of the picture, in the vision tower

JOYIMAGE = JoyImageConfig.from_diffusers(joyimage_original.TRANSFORMER)
WAN = WanVAEConfig.from_diffusers({**joyimage_original.VAE, "in_channels": 3, "is_residual": False, "patch_size": None})
QWEN = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
    ),
    vision=VisionConfig(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(8, 16, 24),
        rope_theta=1e4,
    ),
    image_token_id=151655,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)
STAGES = ("encode_prompt", "encode_images", "denoise_step", "decode_latents")


def stage(name: str, mesh: Mesh, *, layers: int | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a stage as a function of arrays, and their shapes and shardings on a mesh.

    `layers`: number of layers of the transformer or text encoder, instead of all.
    """

    def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    integers, floats = jnp.int32, jnp.float32
    token = JOYIMAGE.in_channels * JOYIMAGE.patch_area
    bucket = padded_sizes(buckets(SIDE))[0]
    patches = bucket[0] * bucket[1] // (WAN.spatial_factor**2 * JOYIMAGE.patch_area)
    placement = [array(integers, 2), array(bool), array(integers), array(integers, TARGET), array(integers, patches)]
    # Dataclasses of arrays are built inside the functions, since they hold arrays, not shapes.
    if name == "encode_prompt":
        text = QWEN.text if layers is None else dataclasses.replace(QWEN.text, num_hidden_layers=layers)
        weights = parameters(TEXT_ENCODER, dataclasses.replace(QWEN, text=text), mesh)
        prompt = [array(integers, PASSES, PROMPT), array(integers, PASSES, PROMPT, 3), array(integers, PASSES, PROMPT)]
        picture = [
            array(floats, 1, PATCHES, QWEN.vision.patch_values),
            array(integers, 1, PATCHES, 2),
            array(integers, 1, PATCHES, 4),
            array(floats, 1, PATCHES, 4),
            array(integers, 1),
        ]

        def encode(weights: Weights, first: jax.Array, prompt: list[jax.Array], picture: list[jax.Array]) -> jax.Array:
            given = TextInputs(*prompt, shared=SHARED), VisionInputs(*picture)
            return encode_prompt(weights, *given, first, length=TEXT)

        return encode, (weights, array(integers, PASSES), prompt, picture)
    if name == "encode_images":
        pixels = array(jnp.uint8, 1, *bucket, 3)
        return (
            lambda *given: encode_images(*given[:2], Placement(*given[2]), patch=JOYIMAGE.patch),
            (parameters(VAE, WAN, mesh), pixels, placement),
        )
    if name == "decode_latents":
        latents = array(floats, 1, TARGET, token)
        return (
            lambda *given: decode_latents(*given[:2], Placement(*given[2]), patch=JOYIMAGE.patch, bucket=bucket),
            (parameters(VAE, WAN, mesh), latents, placement),
        )
    if name == "denoise_step":
        config = JOYIMAGE if layers is None else dataclasses.replace(JOYIMAGE, num_layers=layers)
        condition = [
            array(jnp.bfloat16, PASSES, TEXT, config.text_dim),
            array(integers, PASSES),
            array(floats, PASSES, REFERENCE, token),
            array(integers, PASSES, TARGET + REFERENCE, 3),
            array(integers, PASSES),
            array(integers, PASSES),
        ]

        def step(
            weights: Weights, latents: jax.Array, condition: list[jax.Array], levels: list[jax.Array]
        ) -> jax.Array:
            return denoise_step(weights, latents, Condition(*condition), *levels, channels=config.in_channels)

        weights, latents = parameters(TRANSFORMER, config, mesh), array(floats, 1, TARGET, token)
        return step, (weights, latents, condition, [*[array(floats)] * 3, array(floats, 1)])
    raise ValueError(f"stage {name!r}; there are {', '.join(STAGES)}")


def parameters(component: Component, config: Any, mesh: Mesh) -> Weights:
    """Return a network whose parameters are shapes with their shardings of an edit."""
    abstract = component.abstract(config, jnp.bfloat16)
    placed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=parameter_sharding(path, leaf.shape, leaf.axes, mesh)
        )
        for path, leaf in leaves(abstract.state).items()
    }
    return abstract.filled(placed)
