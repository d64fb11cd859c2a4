"""The stages of Qwen-Image-Layered: from a request to layers.

The target is layers + 1 frames of one size: frame 0, the composite, which is denoised and not returned, then the
layers, bottom first. The condition is the picture.
Source: pipeline_qwenimage_layered.py in Diffusers.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, UInt8

from joyjax.errors import PictureError, RequestError
from joyjax.families.encoding import assemble, encode_group, padded_positions
from joyjax.families.family import Arrays, Configs, Events, Lengths, Media, Networks, Parts, Plan
from joyjax.families.pictures import area_size
from joyjax.families.qwen_image_prompt import DROPPED, LONGEST_PROMPT, prompt_rows
from joyjax.families.qwen_image_stages import TEXT_SIZES, geometry, token_class
from joyjax.families.request import Request
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.layers.patch import patchify
from joyjax.media.framing import plan_stretch, stretch
from joyjax.media.image import Size
from joyjax.models.autoencoder.pictures import Geometry, check_mode, decode_picture
from joyjax.models.qwen_image import layer_positions, text_start
from joyjax.processors.qwen_vl import TextPlan, plan_text, text_inputs
from joyjax.processors.text import control_token
from joyjax.sampling.guidance import Guidance
from joyjax.sampling.noise import initial_noise

MULTIPLE = 32  # of the sides of layers, in pixels
SHIFT_TOKENS = 256  # the condition's tokens at which mu is 1


@dataclasses.dataclass(frozen=True)
class LayeredPlan:
    """The family's part of a plan: the picture's scaled size, rows and columns of a frame, and the prompt's tokens."""

    pictures: tuple[Size, ...]
    grid: Size
    layers: int
    text: TextPlan
    geometry: Geometry


@dataclasses.dataclass(frozen=True)
class LayeredArrays:
    """The inputs of text encoder and autoencoder, and the positions of the image tokens."""

    text: TextInputs
    pictures: tuple[UInt8[np.ndarray, "1 h w 4"], ...]
    positions: np.ndarray
    vision: None = None


def natural_size(reference: Size | None, base_size: int) -> Size:
    """Return height and width with the area of a base size and the picture's shape, in multiples of 32."""
    return area_size(reference or (1, 1), base_size, MULTIPLE)


def plan(request: Request, parts: Parts) -> Plan:
    """Decide all sizes of a request."""
    own, configs, layers = geometry(parts.configs), parts.configs, request.own["layers"]
    if not request.prompt.strip():
        raise RequestError(
            f"prompt is {request.prompt!r}; describe what is in the picture: this version of joyjax writes no captions"
        )
    [picture] = request.pictures
    source = picture.height, picture.width
    size = natural_size(source, request.base_size)
    if not min(size):
        raise PictureError(
            f"a picture of {source[1]} × {source[0]} pixels is too thin for layers of the area of "
            f"{request.base_size} × {request.base_size}; crop it first"
        )
    _check_noise(request, noise_shape(size, layers, configs))
    check_mode(request.vae_encode, size, own, decode=False)
    check_mode(request.vae_decode, size, own, decode=True)
    rows, notes = prompt_rows(request, parts.tokenizer)
    text = plan_text(rows, (), dropped=DROPPED, longest=LONGEST_PROMPT, picture_tokens=(0, 0), sizes=TEXT_SIZES)
    frame = own.tokens(size)
    target = (layers + 1) * frame
    lengths = Lengths(
        text=(max(text.lengths), text.kept),
        target=(target, token_class(target)),
        references=(frame, token_class(frame)),
        passes=len(rows),
    )
    return Plan(
        request=request,
        size=(layers, *size),
        latents=(lengths.target[1], configs["transformer"].in_channels),
        lengths=lengths,
        shift=None if parts.solver.shift(target) is None else math.sqrt(frame / SHIFT_TOKENS),
        batch_key=(lengths.target[1], request.passes, request.cache, request.own["cfg_normalize"]),
        encode_key=request.encode_key,
        base=0,
        crops=(plan_stretch(source, size),),
        notes=notes,
        own=LayeredPlan((size,), (size[0] // own.sides[0], size[1] // own.sides[1]), layers, text, own),
    )


def noise_shape(size: Size, layers: int, configs: Configs) -> tuple[int, int, int, int, int]:
    """Return the shape of the noise, `[1, frames, height, width, channels]`."""
    factor, channels = configs["vae"].spatial_factor, configs["vae"].z_dim
    return 1, layers + 1, size[0] // factor, size[1] // factor, channels


def _check_noise(request: Request, shape: tuple[int, ...]) -> None:
    if request.noise is not None and request.noise.shape != shape:
        raise RequestError(
            f"noise has shape {request.noise.shape}; {shape[1] - 1} layers of this picture need {shape}: batch, "
            "layers + 1, height, width, channels"
        )


def prepare(plan: Plan, parts: Parts) -> Arrays:
    """Scale the picture, draw the noise, and build the text encoder's inputs."""
    own, configs, size = plan.own, parts.configs, plan.size[1:]
    pixels = np.asarray(stretch(plan.request.pictures[0], size))[None]
    noise = plan.request.noise
    if noise is None:
        noise = initial_noise(plan.request.seed, (pixels,), noise_shape(size, own.layers, configs))
    tokens = patchify(noise[0], own.geometry.patch).reshape(1, plan.lengths.target[0], -1)
    padding = plan.lengths.target[1] - tokens.shape[1]
    pad = control_token(parts.tokenizer, "<|endoftext|>")
    return Arrays(
        plan,
        np.pad(tokens, ((0, 0), (0, padding), (0, 0))),
        LayeredArrays(
            text_inputs(own.text, pad, configs["text_encoder"].image_token_id),
            (pixels,),
            padded_positions(layer_positions(own.grid, own.layers), plan.lengths),
        ),
    )


def encode(networks: Networks, group: Sequence[Arrays], events: Events) -> list[Condition]:
    """Encode prompts, then pictures."""
    texts, pictures = encode_group(networks, group, events)
    return [condition(*each) for each in zip(group, texts, pictures, strict=True)]


def condition(arrays: Arrays, txt: Float[Array, "B J C"], picture: Float[Array, "b R P"]) -> Condition:
    """Assemble the condition of the denoising steps."""
    own = arrays.plan.own
    return assemble(arrays, txt, picture, text_start([own.grid], own.layers + 1))


def guidance(parts: Parts, request: Request) -> Guidance:
    """Return guidance, with the norm of a whole token where the request says so."""
    return Guidance(norm=parts.configs["transformer"].in_channels if request.own["cfg_normalize"] else None)


def finish(networks: Networks, latents: Float[np.ndarray, "1 T P"], plan: Plan, events: Events) -> Media:
    """Decode the layers, one after another.

    Raises:
        FloatingPointError: if the values of one are not finite.
    """
    own, frame, layers = plan.own, plan.lengths.references[0], []
    with networks.use("vae") as vae:
        for number in range(1, own.layers + 1):
            tokens = latents[:, number * frame : (number + 1) * frame]
            pixels, finite = decode_picture(
                vae, tokens, plan.size[1:], own.geometry, plan.request.vae_decode, networks.mesh
            )
            if not finite:
                raise FloatingPointError(f"the decoded pixels of layer {number}")
            layers.append(pixels)
    return Media(np.stack(layers), kind="layers")
