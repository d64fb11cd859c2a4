"""Prompts and pictures as the inputs of a Qwen-VL text encoder, padded so that few programs are compiled.

Planning needs only sizes and token ids; pixels are read when the inputs are made. All arrays are host arrays. Padding
never changes a result: the decoder is causal, and the vision tower attends by lengths.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from joyjax.layers.decoder import TextInputs
from joyjax.media.image import Size
from joyjax.models.qwen2_5_vl_vision import WindowedInputs, window_slots
from joyjax.models.qwen3_vl_vision import VisionConfig, VisionInputs, block_positions, patch_positions
from joyjax.processors.text import image_token_indices, length_bucket, multimodal_positions, pad_rows
from joyjax.processors.vision import VisionProcessorConfig, smart_resize, vision_patches

TEXT_SIZES = (64, 256, 1024, 4096)  # tokens of the prompt and the template around it, without the pictures'


def merged_grid(size: Size, processor: VisionProcessorConfig) -> Size:
    """Return (rows, columns) of the language model's tokens for a picture of this size."""
    factor = processor.patch_size * processor.merge_size
    height, width = smart_resize(*size, factor, processor.min_pixels, processor.max_pixels)
    return height // factor, width // factor


def merged_tokens(sizes: Sequence[Size], processor: VisionProcessorConfig) -> tuple[int, int]:
    """Return the fewest and the most tokens of the language model for pictures of these sizes."""
    counts = [rows * columns for rows, columns in (merged_grid(size, processor) for size in sizes)]
    return min(counts), max(counts)


def vision_inputs(
    pictures: Sequence[Image.Image], processor: VisionProcessorConfig, config: VisionConfig, tokens: int
) -> VisionInputs | None:
    """Return the vision tower's inputs, each picture padded to `tokens` merged tokens; None without pictures."""
    if not pictures:
        return None
    size = tokens * config.spatial_merge_size**2
    patched = [vision_patches(picture, processor) for picture in pictures]
    located = [patch_positions(*grid, config) for _, grid in patched]

    def stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(array, ((0, size - len(array)), (0, 0))) for array in arrays])

    return VisionInputs(
        patches=stack([patches for patches, _ in patched]),
        positions=stack([positions for positions, _, _ in located]),
        taps=stack([taps for _, taps, _ in located]),
        weights=stack([weights for _, _, weights in located]),
        lengths=np.array([len(patches) for patches, _ in patched], np.int32),
    )


def windowed_inputs(
    pictures: Sequence[Image.Image], processor: VisionProcessorConfig, window: int, windows: int
) -> WindowedInputs:
    """Return the inputs of a vision tower with windows of `window`² tokens, `windows` of them for each picture."""
    merged = processor.merge_size**2
    size = windows * window**2
    patches = np.zeros((len(pictures), size, merged, processor.patch_values), np.float32)
    positions = np.zeros((len(pictures), size, merged, 2), np.int32)
    lengths, slots = np.ones((len(pictures), windows), np.int32), np.zeros((len(pictures), size), np.int32)
    counts = np.zeros(len(pictures), np.int32)
    for n, picture in enumerate(pictures):
        found, grid = vision_patches(picture, processor)
        rows, columns = (side // processor.merge_size for side in grid)
        where, filled = window_slots(rows, columns, window)
        patches[n, where] = found.reshape(-1, merged, processor.patch_values)
        positions[n, where] = block_positions(*grid, processor.merge_size).reshape(-1, merged, 2)
        lengths[n, : len(filled)] = filled * merged
        slots[n, : len(where)] = where
        counts[n] = len(found)
    padded = len(pictures), size * merged, -1
    return WindowedInputs(patches.reshape(padded), positions.reshape(padded), lengths, slots, counts)


@dataclasses.dataclass(frozen=True)
class TextPlan:
    """Token ids of the rows of a prompt, and the sizes that they are padded to.

    `grids` are the pictures' merged grids, each padded to `image_tokens`. `length` is the padded length of a row. The
    hidden states that are kept start at `first` in each row; their number is `lengths`, padded to `kept`. The first
    `shared` tokens are the same in all rows.
    """

    rows: tuple[tuple[int, ...], ...]
    grids: tuple[Size, ...]
    image_tokens: int
    length: int
    first: tuple[int, ...]
    lengths: tuple[int, ...]
    kept: int
    shared: int


def plan_text(
    rows: Sequence[Sequence[int]],
    grids: Sequence[Size],
    *,
    dropped: int,
    longest: int | None = None,
    picture_tokens: tuple[int, int] | None = None,
    sizes: Sequence[int] = TEXT_SIZES,
    kept: int | None = None,
) -> TextPlan:
    """Plan the text encoder's run for the rows of one prompt.

    The first `dropped` tokens, the template's, are not kept; of more than `longest`, only the last are. With
    `picture_tokens`, the fewest and the most tokens that any picture may have, rows are padded to a length that all
    such requests share: the most for each picture, and the next of `sizes` for the text. None: no such padding. `kept`
    is the padded number of kept states, where the caller decides it.
    """
    own_pictures = sum(height * width for height, width in grids)
    needed = max(map(len, rows))
    if kept is not None:
        needed = dropped + kept
    elif picture_tokens is not None:
        own = needed - dropped - own_pictures
        needed = dropped + len(grids) * picture_tokens[1] + next((size for size in sizes if own <= size), own)
    first = [max(dropped, len(row) - longest) if longest else dropped for row in rows]
    least = len(grids) * picture_tokens[0] if picture_tokens else own_pictures
    largest = max((height * width for height, width in grids), default=0)
    return TextPlan(
        rows=tuple(map(tuple, rows)),
        grids=tuple(grids),
        image_tokens=largest if picture_tokens is None or not grids else picture_tokens[1],
        length=length_bucket(needed),
        first=tuple(first),
        lengths=tuple(len(row) - start for row, start in zip(rows, first, strict=True)),
        kept=length_bucket(min(needed - dropped, longest or needed)),
        shared=_shared_tokens(rows, dropped + least),
    )


def text_inputs(plan: TextPlan, pad_id: int, image_token_id: int) -> TextInputs:
    """Return the text encoder's inputs."""
    ids, _ = pad_rows(plan.rows, pad_id, plan.length)
    positions = np.zeros((*ids.shape, 3), np.int32)
    image_token_index = np.full(ids.shape, -1, np.int32)
    for n, row in enumerate(plan.rows):
        positions[n, : len(row)] = multimodal_positions(row, image_token_id, plan.grids)
        image_token_index[n, : len(row)] = image_token_indices(row, image_token_id, plan.grids, plan.image_tokens)
    return TextInputs(ids, positions, image_token_index, shared=plan.shared)


def _shared_tokens(rows: Sequence[Sequence[int]], fixed: int) -> int:
    """Return the length of the prefix that all rows share: template and pictures.

    A multiple of 32, for the shapes of products. Each value compiles a program, so it must not depend on the prompt,
    nor on which sizes of a table the pictures have: it is at most `fixed`, the fewest tokens of template and pictures.
    """
    if len(rows) < 2:
        return 0
    common = 0
    for tokens in zip(*rows, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        common += 1
    return min(fixed, common) // 32 * 32
