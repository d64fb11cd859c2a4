"""The stages of Qwen-Image, text to image: from a request to a condition.

Source: pipeline_qwenimage.py in Diffusers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from joyjax.families.checks import check_sides
from joyjax.families.encoding import assemble, encode_group, padded_positions
from joyjax.families.family import Arrays, Configs, Events, Lengths, Networks, Parts, Plan
from joyjax.families.pictures import check_noise, noise_tokens
from joyjax.families.qwen_image_prompt import DROPPED, LONGEST_PROMPT, prompt_rows
from joyjax.families.request import Request
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.media.image import Size
from joyjax.models.autoencoder.pictures import Geometry, check_mode
from joyjax.models.qwen_image import image_positions, text_start
from joyjax.processors.qwen_vl import TextPlan, plan_text, text_inputs
from joyjax.processors.text import control_token
from joyjax.sampling.guidance import Guidance

TEXT_SIZES = (64, 256, LONGEST_PROMPT)  # tokens of a prompt with the end of its template, padded to the next of these
CLASSES = 8  # padded token counts between a power of two and the next, so that few programs serve all sizes


@dataclasses.dataclass(frozen=True)
class QwenImagePlan:
    """The family's part of a plan: the rows and columns of the target's tokens, and the prompt's tokens."""

    grid: Size
    text: TextPlan
    geometry: Geometry
    pictures: tuple[Size, ...] = ()


@dataclasses.dataclass(frozen=True)
class QwenImageArrays:
    """The text encoder's inputs, and the positions of the image tokens."""

    text: TextInputs
    positions: np.ndarray
    vision: None = None
    pictures: tuple[np.ndarray, ...] = ()


def geometry(configs: Configs) -> Geometry:
    """Return how pictures become tokens."""
    return Geometry(configs["transformer"].patch, configs["vae"].spatial_factor)


def natural_size(reference: Size | None, base_size: int) -> Size:
    """Return the square of a base size: there are no references."""
    return base_size, base_size


def token_class(tokens: int, classes: int = CLASSES) -> int:
    """Return the padded number of tokens, one of `classes` between a power of two and the next."""
    step = max(8, 2 ** (tokens - 1).bit_length() // (2 * classes))
    return -(-tokens // step) * step


def plan(request: Request, parts: Parts) -> Plan:
    """Decide all sizes of a request. Sizes are taken as they are: there is no bucket table."""
    own, configs = geometry(parts.configs), parts.configs
    size = natural_size(None, request.base_size)
    if request.height is not None and request.width is not None:
        size = request.height, request.width
    check_sides(size, own.sides, "the model")
    check_noise(request, size, own, configs["vae"].z_dim)
    check_mode(request.vae_decode, size, own, decode=True)
    rows, notes = prompt_rows(request, parts.tokenizer)
    text = plan_text(rows, (), dropped=DROPPED, longest=LONGEST_PROMPT, picture_tokens=(0, 0), sizes=TEXT_SIZES)
    tokens = own.tokens(size)
    lengths = Lengths(
        text=(max(text.lengths), text.kept),
        target=(tokens, token_class(tokens)),
        references=(0, 0),
        passes=len(rows),
    )
    return Plan(
        request=request,
        size=(1, *size),
        latents=(lengths.target[1], configs["transformer"].in_channels),
        lengths=lengths,
        shift=parts.solver.shift(tokens),
        batch_key=(lengths.target[1], request.passes, request.cache),
        encode_key=request.encode_key,
        base=None,
        crops=(),
        notes=notes,
        own=QwenImagePlan((size[0] // own.sides[0], size[1] // own.sides[1]), text, own),
    )


def prepare(plan: Plan, parts: Parts) -> Arrays:
    """Draw the noise and build the text encoder's inputs."""
    own, configs = plan.own, parts.configs
    pad = control_token(parts.tokenizer, "<|endoftext|>")
    return Arrays(
        plan,
        noise_tokens(plan, configs["vae"].z_dim),
        QwenImageArrays(
            text_inputs(own.text, pad, configs["text_encoder"].image_token_id),
            padded_positions(image_positions([own.grid]), plan.lengths),
        ),
    )


def encode(networks: Networks, group: Sequence[Arrays], events: Events) -> list[Condition]:
    """Encode prompts."""
    texts, references = encode_group(networks, group, events)
    return [condition(*each) for each in zip(group, texts, references, strict=True)]


def condition(arrays: Arrays, txt: Float[Array, "B J C"], references: Float[Array, "b 0 P"]) -> Condition:
    """Assemble the condition of the denoising steps."""
    return assemble(arrays, txt, references, text_start([arrays.plan.own.grid]))


def guidance(parts: Parts, request: Request) -> Guidance:
    """Return Qwen-Image's guidance, with the norm of a whole token."""
    return Guidance(norm=parts.configs["transformer"].in_channels)
