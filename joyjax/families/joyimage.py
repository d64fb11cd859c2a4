"""JoyImage-Edit and JoyImage-Edit-Plus: from a request to arrays, as the reference pipelines do it.

Source: pipeline_joyimage_edit.py and pipeline_joyimage_edit_plus.py in Diffusers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from PIL import Image

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.wan_vae import VAE
from joyjax.errors import CheckpointError, ConfigError, RequestError
from joyjax.families.family import Family, Files, Inputs, Request
from joyjax.inputs.files import LONGEST_JSON, read_json
from joyjax.inputs.framing import Crop, cover_crop
from joyjax.inputs.image import nearest_bucket, to_pixels
from joyjax.inputs.text import (
    control_token,
    image_slots,
    length_bucket,
    load_tokenizer,
    multimodal_positions,
    pad_rows,
    plain_tokens,
)
from joyjax.inputs.vision import VisionProcessorConfig, vision_patches
from joyjax.models.joyimage import Condition
from joyjax.models.qwen3_vl import TextInputs
from joyjax.models.qwen3_vl_vision import VisionInputs, place_patches
from joyjax.sampling.noise import initial_noise
from joyjax.sampling.schedule import ScheduleConfig

# The backslash and the n behind the line break are two characters, by a slip in the code that the model was trained
# with. They belong to the prompt now.
SYSTEM = (
    "system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
DROPPED = 34  # the system turn, and the <|im_start|> of the user's
LONGEST_TEXT = 2048 + DROPPED  # Edit's tokenizer cuts a prompt without pictures here, from the right
LONGEST_PROMPT = 4096  # hidden states that the transformer is given; the last ones are kept

# The linear maps of the blocks, all but a hundredth of the products. Modulation, embeddings and the last map stay.
FLOAT8 = tuple(f"blocks.*.{stream}.{name}" for stream in ("img", "txt") for name in ("qkv", "out", "up", "down"))

TOKENIZERS = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")  # one class by several names
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}


def read(folder: Path, configs: Mapping[str, Any]) -> Files:
    """Open the tokenizer, the processor's numbers and the schedule, and check that all parts fit together."""
    _check_tokenizer(folder / "tokenizer")
    processor = folder / "processor" / "preprocessor_config.json"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    files = Files(
        tokenizer=load_tokenizer(folder / "tokenizer"),
        vision=VisionProcessorConfig.from_json(read_json(processor), where=str(processor)),
        schedule=ScheduleConfig.from_diffusers(read_json(scheduler), where=str(scheduler)),
        configs=configs,
    )
    _check_parts(files, folder)
    return files


def _check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError unless a tokenizer is of Qwen's kind, before Transformers reads it.

    Transformers follows the names of classes and files in it, and its Rust core ends the process, takes all memory or
    goes on for ever over parts of other kinds.
    """
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > LONGEST_JSON:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; a tokenizer's has {LONGEST_JSON} at most")
    settings, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    named = read_json(settings) if settings.exists() else {}
    if named.get("tokenizer_class") not in TOKENIZERS:
        raise ConfigError(f"{settings}: tokenizer_class is {named['tokenizer_class']!r:.200}; expected {TOKENIZERS[1]}")
    for key, value in named.items():
        if value is not None and (key == "auto_map" or key.endswith(("_file", "_files"))):
            raise ConfigError(f"{settings}: {key:.200} is {value!r:.200}; joyjax reads and runs nothing else by name")
    if whole.exists() and not _is_qwens(read_json(whole)):
        raise ConfigError(f"{whole} is not of the kind that {TOKENIZERS[1]} is; joyjax implements no other")


def _is_qwens(raw: Mapping[str, Any]) -> bool:
    """Say whether a tokenizer.json has the parts of Qwen's: NFC, Qwen's way to cut words, BPE of bytes."""
    try:
        model, (split, in_bytes) = raw["model"], raw["pre_tokenizer"]["pretokenizers"]
        affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        kinds = model["type"], in_bytes["type"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return (
        kinds == ("BPE", "ByteLevel")
        and not any(affixes)
        and split == SPLIT
        and raw.get("normalizer") in (None, {"type": "NFC"})
    )


def _check_parts(files: Files, folder: Path) -> None:
    """Raise CheckpointError where two parts, each good by itself, are not of one model."""
    transformer, vae, encoder = (files.configs[name] for name in ("transformer", "vae", "text_encoder"))
    words, vision, text, tower = folder / "tokenizer", files.vision, encoder.text, encoder.vision
    index = folder / "model_index.json"
    longest = read_json(index).get("text_token_max_length", LONGEST_TEXT - DROPPED)
    if longest != LONGEST_TEXT - DROPPED:
        raise ConfigError(
            f"{index}: text_token_max_length is {longest!r:.200}; joyjax implements {LONGEST_TEXT - DROPPED}"
        )
    try:
        prompt_tokens(files.tokenizer, "", [1])  # takes every control token
    except CheckpointError as error:
        raise CheckpointError(f"{words}: {error}") from None
    tokens = 1 + max(files.tokenizer.get_vocab().values())  # there may be gaps
    if tokens > text.vocab_size:
        raise CheckpointError(f"{words} has {tokens} tokens; the text encoder {text.vocab_size}")
    image = control_token(files.tokenizer, "<|image_pad|>")
    processor = "processor/preprocessor_config.json"
    for file, key, value, other, expected in (
        ("transformer/config.json", "in_channels", transformer.in_channels, "the VAE's z_dim", vae.z_dim),
        ("transformer/config.json", "text_dim", transformer.text_dim, "the text's hidden_size", text.hidden_size),
        ("text_encoder/config.json", "image_token_id", encoder.image_token_id, "the tokenizer's <|image_pad|>", image),
        (processor, "patch_size", vision.patch_size, "the vision tower's", tower.patch_size),
        (processor, "temporal_patch_size", vision.temporal_patch_size, "the vision tower's", tower.temporal_patch_size),
        (processor, "merge_size", vision.merge_size, "the vision tower's spatial_merge_size", tower.spatial_merge_size),
    ):
        if value != expected:
            raise CheckpointError(f"{folder / file}: {key} is {value}, but {other} is {expected}; is this one model?")


def prompt_tokens(tokenizer: Any, prompt: str, image_tokens: Sequence[int]) -> list[int]:
    """Return the chat turn of a prompt with pictures of `image_tokens` tokens each before it.

    Control tokens are placed by number; the prompt is text whatever it contains.
    """
    start, end = control_token(tokenizer, "<|im_start|>"), control_token(tokenizer, "<|im_end|>")
    line = plain_tokens(tokenizer, "\n")
    ids = [start, *plain_tokens(tokenizer, SYSTEM), end, *line, start]
    if image_tokens:
        before, after = control_token(tokenizer, "<|vision_start|>"), control_token(tokenizer, "<|vision_end|>")
        image = control_token(tokenizer, "<|image_pad|>")
        ids += plain_tokens(tokenizer, "user\n")
        for count in image_tokens:
            ids += [before, *[image] * count, after]
        ids += plain_tokens(tokenizer, prompt)
    else:
        ids += plain_tokens(tokenizer, "user\n" + prompt)  # one piece of text to the tokenizer
    return [*ids, end, *line, start, *plain_tokens(tokenizer, "assistant\n")]


def target_size(request: Request) -> tuple[int, int]:
    """Return height and width of the result: as asked, or of the bucket nearest to what was asked or to the picture."""
    if request.exact_size:
        if request.height is None or request.width is None:
            raise RequestError("exact_size needs both height and width")
        return request.height, request.width
    if request.height is not None and request.width is not None:
        return nearest_bucket(request.height, request.width, request.base_size)
    if request.pictures:
        width, height = request.pictures[-1].size
        return nearest_bucket(height, width, request.base_size)
    return nearest_bucket(1, 1, request.base_size)


def fit_pictures(request: Request, size: tuple[int, int], own_sizes: bool) -> list[tuple[Image.Image, Crop]]:
    """Scale and crop the references: Edit to the target's size, Edit-Plus each to its own bucket."""
    fitted = []
    for picture in request.pictures:
        width, height = picture.size
        own = own_sizes and not request.exact_size
        fitted.append(cover_crop(picture, nearest_bucket(height, width, request.base_size) if own else size))
    return fitted


def prepare(request: Request, files: Files, *, plus: bool) -> Inputs:
    """Turn a request into arrays."""
    vae, transformer = files.configs["vae"], files.configs["transformer"]
    factor = vae.spatial_factor
    sides = factor * transformer.patch[0], factor * transformer.patch[1]
    height, width = target_size(request)
    _check_size(height, width, sides)
    fitted = fit_pictures(request, (height, width), own_sizes=plus)
    pictures = [picture for picture, _ in fitted]
    pixels = tuple(to_pixels(picture)[None] for picture in pictures)

    vision, grids, image_size = _vision_inputs(pictures, files)
    prompts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
    rows = [prompt_tokens(files.tokenizer, prompt, [h * w for h, w in grids]) for prompt in prompts]
    if not pictures and not plus:
        rows = [row[:LONGEST_TEXT] for row in rows]
    text, first, prompt_lengths, prompt_size = _text_inputs(rows, grids, image_size, files)

    noise_shape = (1, height // factor, width // factor, transformer.in_channels)
    if request.noise is not None and request.noise.shape != noise_shape:
        raise RequestError(
            f"noise has shape {request.noise.shape}; a {height}×{width} result needs {noise_shape}: "
            "batch, height, width, channels"
        )
    noise = initial_noise(request.seed, pixels, noise_shape) if request.noise is None else request.noise
    items = [(height // sides[0], width // sides[1])]
    items += [(picture.height // sides[0], picture.width // sides[1]) for picture in pictures]
    positions = np.concatenate([item_positions(n, *item) for n, item in enumerate(items)])
    return Inputs(
        height=height,
        width=width,
        text=text,
        vision=vision,
        first=first,
        prompt_lengths=prompt_lengths,
        prompt_size=prompt_size,
        pictures=pixels,
        positions=np.broadcast_to(positions, (len(rows), *positions.shape)),
        noise=noise,
        crops=tuple(crop for _, crop in fitted),
    )


def condition(inputs: Inputs, txt: Float[Array, "B J C"], references: Float[Array, "b R P"]) -> Condition:
    """Put together what one denoising step is told; every pass of an edit sees the same references."""
    rows = txt.shape[0]
    return Condition(
        txt=txt,
        txt_lengths=jnp.asarray(inputs.prompt_lengths),
        references=jnp.tile(references, (rows, 1, 1)),
        positions=jnp.asarray(inputs.positions),
    )


def _check_size(height: int, width: int, sides: tuple[int, int]) -> None:
    """Raise RequestError unless the size is made of whole tokens, which are `sides` pixels high and wide."""
    if height % sides[0] or width % sides[1]:
        fit = [max(1, round(size / side)) * side for size, side in zip((height, width), sides, strict=True)]
        raise RequestError(
            f"height is {height} and width is {width}; exact_size needs multiples of {sides[0]} and {sides[1]}: "
            f"the nearest are height {fit[0]} and width {fit[1]}"
        )


def _vision_inputs(pictures: list[Image.Image], files: Files) -> tuple[VisionInputs | None, list[tuple[int, int]], int]:
    """Return the vision tower's inputs, the merged grid of each picture, and the merged tokens all are padded to."""
    if not pictures:
        return None, [], 0
    config = files.configs["text_encoder"].vision
    merge = config.spatial_merge_size
    patched = [vision_patches(picture, files.vision) for picture in pictures]
    size = max(len(patches) for patches, _ in patched)
    placed = [place_patches(*grid, config) for _, grid in patched]

    def stack(arrays: Sequence[np.ndarray]) -> Array:
        return jnp.asarray(np.stack([np.pad(array, ((0, size - len(array)), (0, 0))) for array in arrays]))

    inputs = VisionInputs(
        patches=stack([patches for patches, _ in patched]),
        positions=stack([place[0] for place in placed]),
        taps=stack([place[1] for place in placed]),
        weights=stack([place[2] for place in placed]),
        lengths=jnp.asarray([len(patches) for patches, _ in patched], jnp.int32),
    )
    grids = [(grid[0] // merge, grid[1] // merge) for _, grid in patched]
    return inputs, grids, size // merge**2


def _text_inputs(
    rows: list[list[int]], grids: list[tuple[int, int]], image_size: int, files: Files
) -> tuple[TextInputs, np.ndarray, np.ndarray, int]:
    """Return the text encoder's inputs, each row's first kept token, how many are kept, and the padded number."""
    config = files.configs["text_encoder"]
    pad = control_token(files.tokenizer, "<|endoftext|>")
    ids, lengths = pad_rows(rows, pad, length_bucket(max(map(len, rows))))
    positions = np.zeros((*ids.shape, 3), np.int32)
    slots = np.full(ids.shape, -1, np.int32)
    for n, row in enumerate(rows):
        positions[n, : len(row)] = multimodal_positions(row, config.image_token_id, grids)
        slots[n, : len(row)] = image_slots(row, config.image_token_id, grids, image_size)
    first = np.maximum(DROPPED, lengths - LONGEST_PROMPT).astype(np.int32)
    kept = (lengths - first).astype(np.int32)
    text = TextInputs(jnp.asarray(ids), jnp.asarray(positions), jnp.asarray(slots), shared=shared_tokens(ids, slots))
    return text, first, kept, length_bucket(int(kept.max()))


def shared_tokens(ids: Int32[np.ndarray, "B L"], slots: Int32[np.ndarray, "B L"]) -> int:
    """Return how many first tokens all rows have in common: the template's and the pictures', whatever the prompts.

    A multiple of 32, for even products; and nothing that a user types changes it, or each prompt would make a program
    of its own.
    """
    pictures = np.flatnonzero(slots[0] >= 0)
    fixed = pictures[-1] + 1 if len(pictures) else DROPPED
    common = np.cumprod(np.all(ids == ids[:1], axis=0)).sum()
    return int(min(fixed, common)) // 32 * 32 if len(ids) > 1 else 0


def item_positions(item: int, rows: int, columns: int) -> np.ndarray:
    """Return (item, row, column) of each token of one item, row by row."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return np.stack([np.full_like(row, item), row, column], axis=-1)


def _prepare_edit(request: Request, files: Files) -> Inputs:
    return prepare(request, files, plus=False)


def _prepare_plus(request: Request, files: Files) -> Inputs:
    return prepare(request, files, plus=True)


EDIT = Family(
    name="JoyImage-Edit",
    class_name="JoyImageEditPipeline",
    components=(TEXT_ENCODER, TRANSFORMER, VAE),
    steps=40,
    guidance_scale=4.0,
    negative_prompt="",
    references=1,
    read=read,
    prepare=_prepare_edit,
    condition=condition,
    step_cache=True,
    float8=FLOAT8,
)
EDIT_PLUS = dataclasses.replace(
    EDIT,
    name="JoyImage-Edit-Plus",
    class_name="JoyImageEditPlusPipeline",
    steps=30,
    negative_prompt=" ",
    references=5,
    prepare=_prepare_plus,
)
