"""The stages of Qwen-Image-Edit and Edit-Plus: from a request to a condition.

Source: pipeline_qwenimage_edit.py and pipeline_qwenimage_edit_plus.py in Diffusers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from joyjax.errors import PictureError
from joyjax.families import qwen_image_lengths
from joyjax.families.checks import check_sides
from joyjax.families.encoding import assemble, encode_group, padded_positions
from joyjax.families.family import Arrays, Events, Lengths, Networks, Parts, Plan
from joyjax.families.pictures import area_size, check_noise, noise_tokens
from joyjax.families.qwen_image_prompt import EDIT_DROPPED, edit_prompt_tokens
from joyjax.families.qwen_image_stages import geometry
from joyjax.families.request import Request
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.media.framing import plan_stretch, stretch
from joyjax.media.image import Size, to_pixels
from joyjax.models.autoencoder.pictures import Geometry, check_mode
from joyjax.models.qwen2_5_vl_vision import WindowedInputs
from joyjax.models.qwen_image import image_positions, text_start
from joyjax.processors.qwen_vl import TextPlan, merged_grid, plan_text, text_inputs, windowed_inputs
from joyjax.processors.text import control_token
from joyjax.processors.vision import MAX_RATIO

MULTIPLE = 32  # of the sides of pictures, in pixels


@dataclasses.dataclass(frozen=True)
class QwenImageEditPlan:
    """The family's part of a plan.

    `pictures` are the references' sizes for the autoencoder and `read` those for the text encoder, in pixels; `grids`
    are rows and columns of tokens of the target and of each reference. `windows` is the padded number of windows of a
    picture in the vision tower.
    """

    pictures: tuple[Size, ...]
    read: tuple[Size, ...]
    grids: tuple[Size, ...]
    windows: int
    text: TextPlan
    geometry: Geometry


@dataclasses.dataclass(frozen=True)
class QwenImageEditArrays:
    """The inputs of text encoder and autoencoder, and the positions of the image tokens."""

    text: TextInputs
    vision: WindowedInputs
    pictures: tuple[np.ndarray, ...]
    positions: np.ndarray


def read_side(base_size: int, *, plus: bool) -> int:
    """Return the side of a square of the area that the text encoder sees: of Edit-Plus 384 for results of 1024²."""
    return 3 * base_size // 8 if plus else base_size


def size_of_area(picture: Size, side: int) -> Size:
    """Return the size of about `side`² pixels, in multiples of 32, for a picture of this shape.

    Raises:
        PictureError: if a side would be 0, or the text encoder would refuse the scaled picture.
    """
    size = area_size(picture, side, MULTIPLE)
    if max(size) > MAX_RATIO * min(size):
        raise PictureError(
            f"a picture of {picture[1]} × {picture[0]} pixels is too thin: scaled to {side}² pixels it would have "
            f"{size[1]} × {size[0]}; crop it first"
        )
    return size


def natural_size(reference: Size | None, base_size: int) -> Size:
    """Return the size of the result from that of the last reference: about `base_size`² pixels."""
    return size_of_area(reference or (1, 1), base_size)


def plan(request: Request, parts: Parts, *, plus: bool) -> Plan:
    """Decide all sizes of a request.

    `plus`: the text encoder sees the pictures smaller than the autoencoder does, and with their numbers.
    """
    own, channels, base = geometry(parts.configs), parts.configs["vae"].z_dim, request.base_size
    originals = [(picture.height, picture.width) for picture in request.pictures]
    size = natural = natural_size(originals[-1], base)
    if request.height is not None and request.width is not None:
        size = request.height, request.width
    check_sides(size, own.sides, "the model")
    check_noise(request, size, own, channels)
    check_mode(request.vae_decode, size, own, decode=True)
    pictures = tuple(size_of_area(picture, base) for picture in originals)
    for picture in pictures:
        check_mode(request.vae_encode, picture, own, decode=False)
    read = tuple(size_of_area(picture, read_side(base, plus=plus)) for picture in originals)
    text, windows = _plan_text(request, parts, read, plus=plus, natural=size == natural)
    lengths = _plan_lengths(own, size, pictures, text, own.tokens((base, base)), natural=size == natural)
    return Plan(
        request=request,
        size=(1, *size),
        latents=(lengths.target[1], parts.configs["transformer"].in_channels),
        lengths=lengths,
        shift=parts.solver.shift(lengths.target[0]),
        batch_key=(lengths.target[1], request.passes, request.cache),
        encode_key=request.encode_key,
        base=len(pictures) - 1,
        crops=tuple(map(plan_stretch, originals, pictures)),
        notes=(),
        own=QwenImageEditPlan(
            pictures=pictures,
            read=read,
            grids=tuple((height // own.sides[0], width // own.sides[1]) for height, width in (size, *pictures)),
            windows=windows,
            text=text,
            geometry=own,
        ),
    )


def _plan_text(
    request: Request, parts: Parts, read: Sequence[Size], *, plus: bool, natural: bool
) -> tuple[TextPlan, int]:
    """Plan the text encoder's run for pictures of these sizes; return it, and the padded windows of each picture."""
    processor, window = parts.processor, parts.configs["text_encoder"].vision.window
    grids = [merged_grid(picture, processor) for picture in read]
    counts = [rows * columns for rows, columns in grids]
    windows = qwen_image_lengths.windows(grids, window)
    prompts = request.prompts.values()
    rows = [edit_prompt_tokens(parts.tokenizer, prompt, counts, numbered=plus) for prompt in prompts]
    side, token = read_side(request.base_size, plus=plus), processor.patch_size * processor.merge_size
    planned = plan_text(
        rows,
        grids,
        dropped=EDIT_DROPPED,
        picture_tokens=(qwen_image_lengths.fewest(side, token), windows * window**2),
        kept=qwen_image_lengths.text(max(map(len, rows)) - EDIT_DROPPED, len(read), natural=natural),
    )
    return planned, windows


def _plan_lengths(
    own: Geometry, size: Size, pictures: Sequence[Size], text: TextPlan, usual: int, *, natural: bool
) -> Lengths:
    """Return the numbers of tokens; `usual` are those of a square of the base size."""
    target, references = own.tokens(size), sum(map(own.tokens, pictures))
    return Lengths(
        text=(max(text.lengths), text.kept),
        target=(target, qwen_image_lengths.target(target, usual, natural=natural)),
        references=(references, qwen_image_lengths.references(references, len(pictures), usual, natural=natural)),
        passes=len(text.rows),
    )


def prepare(plan: Plan, parts: Parts) -> Arrays:
    """Read the pixels and draw the noise."""
    own, encoder = plan.own, parts.configs["text_encoder"]
    pixels = tuple(to_pixels(picture)[None] for picture in _scaled(plan, own.pictures))
    pad = control_token(parts.tokenizer, "<|endoftext|>")
    return Arrays(
        plan,
        noise_tokens(plan, parts.configs["vae"].z_dim, pixels),
        QwenImageEditArrays(
            text=text_inputs(own.text, pad, encoder.image_token_id),
            vision=windowed_inputs(_scaled(plan, own.read), parts.processor, encoder.vision.window, own.windows),
            pictures=pixels,
            positions=padded_positions(image_positions(own.grids), plan.lengths),
        ),
    )


def _scaled(plan: Plan, sizes: Sequence[Size]) -> list[Image.Image]:
    """Return the pictures, each scaled from the original to its size."""
    return [stretch(picture, size) for picture, size in zip(plan.request.pictures, sizes, strict=True)]


def encode(networks: Networks, group: Sequence[Arrays], events: Events) -> list[Condition]:
    """Encode prompts, then references."""
    texts, references = encode_group(networks, group, events)
    return [condition(*each) for each in zip(group, texts, references, strict=True)]


def condition(arrays: Arrays, txt: Float[Array, "B J C"], references: Float[Array, "b R P"]) -> Condition:
    """Assemble the condition of the denoising steps."""
    return assemble(arrays, txt, references, text_start(arrays.plan.own.grids))
