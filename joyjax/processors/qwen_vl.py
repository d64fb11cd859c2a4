"""Prompts and pictures as Qwen3-VL's inputs, padded so that few programs are ever compiled.

A picture is padded to the largest of the bucket table and the text behind the pictures to the next of TEXT_SIZES, so
requests of one base size that have as many references share one program for each of those sizes. Attention never sees
padding: a decoder is causal, and a vision tower attends by lengths.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int32
from PIL import Image

from joyjax.families.family import Parts
from joyjax.media.image import Size, buckets
from joyjax.models.qwen3_vl import TextInputs
from joyjax.models.qwen3_vl_vision import VisionInputs, place_patches
from joyjax.processors.text import control_token, image_token_indices, length_bucket, multimodal_positions, pad_rows
from joyjax.processors.vision import VisionProcessorConfig, smart_resize, vision_patches

TEXT_SIZES = (64, 256, 1024, 4096)  # tokens of the prompt and the template around it, without the pictures'


@functools.cache
def merged_tokens(base_size: int, processor: VisionProcessorConfig) -> tuple[int, int]:
    """Return the fewest and the most tokens that a picture of the bucket table is to the language model."""
    factor = processor.patch_size * processor.merge_size
    bounds = processor.min_pixels, processor.max_pixels
    sizes = [smart_resize(height, width, factor, *bounds) for height, width in buckets(base_size)]
    counts = [height * width // factor**2 for height, width in sizes]
    return min(counts), max(counts)


def vision_inputs(
    pictures: Sequence[Image.Image], files: Parts, most: int | None
) -> tuple[VisionInputs | None, list[Size], int]:
    """Return the vision tower's inputs, the merged grid of each picture, and the merged tokens all are padded to.

    That is `most`, or the largest of these pictures for None.
    """
    if not pictures:
        return None, [], 0
    config = files.configs["text_encoder"].vision
    merge = config.spatial_merge_size
    patched = [vision_patches(picture, files.vision) for picture in pictures]
    size = max(len(patches) for patches, _ in patched) if most is None else most * merge**2
    placed = [place_patches(*grid, config) for _, grid in patched]

    def stack(arrays: Sequence[np.ndarray]) -> Array:
        return jax.device_put(np.stack([np.pad(array, ((0, size - len(array)), (0, 0))) for array in arrays]))

    inputs = VisionInputs(
        patches=stack([patches for patches, _ in patched]),
        positions=stack([place[0] for place in placed]),
        taps=stack([place[1] for place in placed]),
        weights=stack([place[2] for place in placed]),
        lengths=jax.device_put(np.array([len(patches) for patches, _ in patched], np.int32)),
    )
    grids = [(grid[0] // merge, grid[1] // merge) for _, grid in patched]
    return inputs, grids, size // merge**2


def text_inputs(
    rows: list[list[int]],
    grids: list[Size],
    image_size: int,
    files: Parts,
    *,
    dropped: int,
    longest: int,
    sizes: tuple[int, int] | None,
) -> tuple[TextInputs, Int32[np.ndarray, " B"], Int32[np.ndarray, " B"], int]:
    """Return the text encoder's inputs, each row's first kept token, how many are kept, and the padded number.

    The first `dropped` tokens are the template's and not kept, and of what is longer than `longest` the last ones are.
    `sizes` are the fewest and the most tokens of a picture of the table; None: rows are as long as they are.
    """
    config = files.configs["text_encoder"]
    pad = control_token(files.tokenizer, "<|endoftext|>")
    needed = max(map(len, rows))
    if sizes is not None:
        own = needed - dropped - sum(height * width for height, width in grids)
        needed = dropped + len(grids) * sizes[1] + next((size for size in TEXT_SIZES if own <= size), own)
    ids, lengths = pad_rows(rows, pad, length_bucket(needed))
    positions = np.zeros((*ids.shape, 3), np.int32)
    image_token_index = np.full(ids.shape, -1, np.int32)
    for n, row in enumerate(rows):
        positions[n, : len(row)] = multimodal_positions(row, config.image_token_id, grids)
        image_token_index[n, : len(row)] = image_token_indices(row, config.image_token_id, grids, image_size)
    first = np.maximum(dropped, lengths - longest).astype(np.int32)
    least = len(grids) * sizes[0] if sizes else sum(height * width for height, width in grids)
    shared = _shared_tokens(ids, dropped + least)
    text = TextInputs(jax.device_put(ids), jax.device_put(positions), jax.device_put(image_token_index), shared=shared)
    return text, first, lengths - first, length_bucket(min(needed - dropped, longest))


def _shared_tokens(ids: Int32[np.ndarray, "B L"], fixed: int) -> int:
    """Return how many first tokens all rows have in common: the template's and the pictures', whatever the prompts.

    A multiple of 32, for even products. Each number makes a program of its own, so it may depend on nothing that a user
    types, nor on which of the table's sizes the pictures have: `fixed` is what template and pictures have at least.
    """
    common = np.cumprod(np.all(ids == ids[:1], axis=0)).sum()
    return int(min(fixed, common)) // 32 * 32 if len(ids) > 1 else 0
