"""The stages of JoyImage-Edit and Edit-Plus: from a request to a condition.

Source: pipeline_joyimage_edit.py and pipeline_joyimage_edit_plus.py in Diffusers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from joyjax.errors import RequestError
from joyjax.families import joyimage_buckets, joyimage_prompt
from joyjax.families.checks import check_sides
from joyjax.families.encoding import assemble, encode_group, padded_positions
from joyjax.families.family import Arrays, Configs, Events, Lengths, Networks, Parts, Plan
from joyjax.families.pictures import check_noise, noise_tokens
from joyjax.families.request import Request
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.media.framing import Crop, fit_picture, plan_fit
from joyjax.media.image import Size, to_pixels
from joyjax.models.autoencoder.pictures import Geometry, check_mode
from joyjax.models.qwen3_vl_vision import VisionInputs
from joyjax.processors.qwen_vl import TextPlan, merged_grid, merged_tokens, plan_text, text_inputs, vision_inputs
from joyjax.processors.text import control_token
from joyjax.sampling.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class JoyImagePlan:
    """The family's part of a plan: the pictures' fitted sizes, and the prompt's tokens."""

    pictures: tuple[Size, ...]
    text: TextPlan
    geometry: Geometry


@dataclasses.dataclass(frozen=True)
class JoyImageArrays:
    """The inputs of text encoder and autoencoder, and the positions of the image tokens."""

    text: TextInputs
    vision: VisionInputs | None
    pictures: tuple[np.ndarray, ...]
    positions: np.ndarray


def geometry(configs: Configs, base_size: int | None) -> Geometry:
    """Return how pictures become tokens; `base_size` is that of the bucket table, None for no table."""
    table = None if base_size is None else joyimage_buckets.buckets(base_size)
    return Geometry(configs["transformer"].patch, configs["vae"].spatial_factor, table)


def target_size(request: Request) -> Size:
    """Return height and width of the result: exact, or of the bucket nearest to the given size or to the picture."""
    if request.exact_size:
        if request.height is None or request.width is None:
            raise RequestError("exact_size needs both height and width")
        return request.height, request.width
    if request.height is not None and request.width is not None:
        return joyimage_buckets.nearest_bucket(request.height, request.width, request.base_size)
    last = (request.pictures[-1].height, request.pictures[-1].width) if request.pictures else None
    return natural_size(last, request.base_size)


def natural_size(reference: Size | None, base_size: int) -> Size:
    """Return the bucket of the last reference, or without one the square bucket."""
    return joyimage_buckets.nearest_bucket(*(reference or (1, 1)), base_size)


def plan_pictures(request: Request, size: Size, own_sizes: bool) -> list[Crop]:
    """Plan the references: Edit fits them to the target's size, Edit-Plus each to its own bucket."""
    crops = []
    for picture in request.pictures:
        width, height = picture.size
        own = own_sizes and not request.exact_size
        target = joyimage_buckets.nearest_bucket(height, width, request.base_size) if own else size
        crops.append(plan_fit((height, width), target, request.fit))
    return crops


def plan(request: Request, parts: Parts, *, plus: bool) -> Plan:
    """Decide all sizes of a request.

    Sizes of the bucket table are padded to common lengths; an exact size is not padded.
    """
    own = geometry(parts.configs, None if request.exact_size else request.base_size)
    size = target_size(request)
    check_sides(size, own.sides, "exact_size")
    crops = plan_pictures(request, size, own_sizes=plus)
    pictures = tuple(crop.size for crop in crops)
    channels = parts.configs["vae"].z_dim
    check_noise(request, size, own, channels)
    check_mode(request.vae_decode, size, own, decode=True)
    for picture in pictures:
        check_mode(request.vae_encode, picture, own, decode=False)

    grids = [merged_grid(picture, parts.processor) for picture in pictures]
    rows = joyimage_prompt.prompt_rows(request, parts.tokenizer, [height * width for height, width in grids])
    shared = None if own.table is None else merged_tokens(own.table, parts.processor)
    dropped, longest = joyimage_prompt.DROPPED, joyimage_prompt.LONGEST_PROMPT
    text = plan_text(rows, grids, dropped=dropped, longest=longest, picture_tokens=shared)

    target, references = own.tokens(size), sum(map(own.tokens, pictures))
    most = own.most_tokens
    lengths = Lengths(
        text=(max(text.lengths), text.kept),
        target=(target, most or target),
        references=(references, most * len(pictures) if most else references),
        passes=len(rows),
    )
    return Plan(
        request=request,
        size=(1, *size),
        latents=(lengths.target[1], own.patch[0] * own.patch[1] * channels),
        lengths=lengths,
        shift=None,
        batch_key=(lengths.target[1], request.passes, request.cache),
        encode_key=request.encode_key,
        base=len(pictures) - 1 if pictures else None,
        crops=tuple(crops),
        notes=_truncation_note(max(text.first) - joyimage_prompt.DROPPED),
        own=JoyImagePlan(pictures, text, own),
    )


def prepare(plan: Plan, parts: Parts) -> Arrays:
    """Read the pixels and draw the noise."""
    request, own = plan.request, plan.own
    pictures = [
        fit_picture(picture, crop.size, request.fit)[0]
        for picture, crop in zip(request.pictures, plan.crops, strict=True)
    ]
    pixels = tuple(to_pixels(picture)[None] for picture in pictures)
    encoder = parts.configs["text_encoder"]
    pad = control_token(parts.tokenizer, "<|endoftext|>")
    return Arrays(
        plan,
        noise_tokens(plan, parts.configs["vae"].z_dim, pixels),
        JoyImageArrays(
            text=text_inputs(own.text, pad, encoder.image_token_id),
            vision=vision_inputs(pictures, parts.processor, encoder.vision, own.text.image_tokens),
            pictures=pixels,
            positions=padded_positions(_positions(plan), plan.lengths),
        ),
    )


def _positions(plan: Plan) -> np.ndarray:
    """Return (item, row, column) of the target's tokens, then of the references'."""
    own, sides = plan.own, plan.own.geometry.sides
    sizes = (plan.size[1:], *own.pictures)
    items = [item_positions(n, height // sides[0], width // sides[1]) for n, (height, width) in enumerate(sizes)]
    return np.concatenate(items)


def item_positions(item: int, rows: int, columns: int) -> np.ndarray:
    """Return (item, row, column) of each token of one item, row by row."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return np.stack([np.full_like(row, item), row, column], axis=-1)


def encode(networks: Networks, group: Sequence[Arrays], events: Events) -> list[Condition]:
    """Encode prompts, then references."""
    texts, references = encode_group(networks, group, events)
    return [condition(*each) for each in zip(group, texts, references, strict=True)]


def condition(arrays: Arrays, txt: Float[Array, "B J C"], references: Float[Array, "b R P"]) -> Condition:
    """Assemble the condition of the denoising steps."""
    return assemble(arrays, txt, references)


def guidance(parts: Parts, request: Request) -> Guidance:
    """Return JoyImage's guidance, with the norm of one latent pixel."""
    return Guidance(norm=parts.configs["transformer"].in_channels)


def _truncation_note(tokens: int) -> tuple[str, ...]:
    """Return the note that the first hidden states of the text encoder are dropped, as in the reference."""
    if tokens <= 0:
        return ()
    return (
        f"several references: the first {tokens} hidden states of Qwen3-VL are dropped, since the transformer takes at "
        f"most {joyimage_prompt.LONGEST_PROMPT}; it sees the latents of all references",
    )
