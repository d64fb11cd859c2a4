"""JoyImage-Edit and JoyImage-Edit-Plus: from a request to arrays, as the reference pipelines do it.

Source: pipeline_joyimage_edit.py and pipeline_joyimage_edit_plus.py in Diffusers.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.wan_vae import VAE
from joyjax.errors import CheckpointError, ConfigError, RequestError
from joyjax.families.family import Family, Inputs, Parts
from joyjax.families.request import Request
from joyjax.media.framing import Crop, fit_picture
from joyjax.media.image import Size, buckets, nearest_bucket, to_pixels
from joyjax.models.joyimage import Condition
from joyjax.processors.qwen_vl import merged_tokens, text_inputs, vision_inputs
from joyjax.processors.text import control_token, load_tokenizer, plain_tokens
from joyjax.processors.tokenizer import check_tokenizer
from joyjax.processors.vision import VisionProcessorConfig
from joyjax.reading import read_json
from joyjax.sampling.euler import ScheduleConfig
from joyjax.sampling.noise import initial_noise

# The backslash and the n behind the line break are two characters, by a slip in the code that the model was trained
# with. They belong to the prompt now.
SYSTEM = (
    "system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
DROPPED = 34  # the system turn, and the <|im_start|> of the user's
LONGEST_TEXT = 2048 + DROPPED  # without pictures; where the reference cuts a prompt, joyjax refuses it
LONGEST_PROMPT = 4096  # hidden states that the transformer is given; the last ones are kept


def read(folder: Path, configs: Mapping[str, Any]) -> Parts:
    """Open the tokenizer, the processor's numbers and the schedule, and check that all parts fit together."""
    check_tokenizer(folder / "tokenizer")
    processor = folder / "processor" / "preprocessor_config.json"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    files = Parts(
        tokenizer=load_tokenizer(folder / "tokenizer"),
        vision=VisionProcessorConfig.from_json(read_json(processor), where=str(processor)),
        schedule=ScheduleConfig.from_diffusers(read_json(scheduler), where=str(scheduler)),
        configs=configs,
    )
    _check_parts(files, folder)
    return files


def _check_parts(files: Parts, folder: Path) -> None:
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
    """Fit the references: Edit to the target's size, Edit-Plus each to its own bucket."""
    fitted = []
    for picture in request.pictures:
        width, height = picture.size
        own = own_sizes and not request.exact_size
        goal = nearest_bucket(height, width, request.base_size) if own else size
        fitted.append(fit_picture(picture, goal, request.fit))
    return fitted


def prepare(request: Request, files: Parts, *, plus: bool) -> Inputs:
    """Turn a request into arrays.

    Sizes of the bucket table are padded to what all of them share; one that is given exactly stands for itself.
    """
    vae, transformer = files.configs["vae"], files.configs["transformer"]
    factor = vae.spatial_factor
    sides = factor * transformer.patch[0], factor * transformer.patch[1]
    height, width = target_size(request)
    _check_size(height, width, sides)
    fitted = fit_pictures(request, (height, width), own_sizes=plus)
    pictures = [picture for picture, _ in fitted]
    pixels = tuple(to_pixels(picture)[None] for picture in pictures)

    sizes = None if request.exact_size else merged_tokens(request.base_size, files.vision)
    vision, grids, image_size = vision_inputs(pictures, files, None if sizes is None else sizes[1])
    rows = _rows(request, grids, files)
    text, first, prompt_lengths, prompt_size = text_inputs(
        rows, grids, image_size, files, dropped=DROPPED, longest=LONGEST_PROMPT, sizes=sizes
    )

    noise_shape = (1, height // factor, width // factor, transformer.in_channels)
    if request.noise is not None and request.noise.shape != noise_shape:
        raise RequestError(
            f"noise has shape {request.noise.shape}; a {height}×{width} result needs {noise_shape}: "
            "batch, height, width, channels"
        )
    noise = initial_noise(request.seed, pixels, noise_shape) if request.noise is None else request.noise
    most = None if request.exact_size else most_tokens(request.base_size, sides)
    target, *references = (
        item_positions(n, *item)
        for n, item in enumerate(
            (size[0] // sides[0], size[1] // sides[1])
            for size in [(height, width), *((picture.height, picture.width) for picture in pictures)]
        )
    )
    lengths = tuple(map(len, references))
    target_tokens, reference_tokens = most or len(target), (len(lengths) * most if most else sum(lengths))
    positions = np.zeros((len(rows), target_tokens + reference_tokens, 3), np.int32)
    for place, start in zip((target, *references), (0, *(target_tokens + np.cumsum((0, *lengths)))), strict=False):
        positions[:, start : start + len(place)] = place
    return Inputs(
        height=height,
        width=width,
        base_size=None if request.exact_size else request.base_size,
        text=text,
        vision=vision,
        first=first,
        prompt_lengths=prompt_lengths,
        prompt_size=prompt_size,
        pictures=pixels,
        positions=positions,
        target_tokens=target_tokens,
        target_length=len(target),
        reference_tokens=reference_tokens,
        reference_lengths=lengths,
        noise=noise,
        crops=tuple(crop for _, crop in fitted),
        advice=_unread(int(first.max()) - DROPPED),
    )


@functools.cache
def most_tokens(base_size: int, sides: tuple[int, int]) -> int:
    """Return the most tokens that a picture of the bucket table is to the transformer."""
    return max((height // sides[0]) * (width // sides[1]) for height, width in buckets(base_size))


def condition(inputs: Inputs, txt: Float[Array, "B J C"], references: Float[Array, "b R P"]) -> Condition:
    """Put together what one denoising step is told; every pass of an edit sees the same references."""
    rows = txt.shape[0]

    def lengths(x: int | np.ndarray) -> Array:
        return jax.device_put(np.broadcast_to(np.int32(x), rows))

    return Condition(
        txt=txt,
        txt_lengths=lengths(inputs.prompt_lengths),
        references=jnp.tile(references, (rows, 1, 1)),
        positions=jax.device_put(inputs.positions),
        target_lengths=lengths(inputs.target_length),
        reference_lengths=lengths(sum(inputs.reference_lengths)),
    )


def _rows(request: Request, grids: Sequence[Size], files: Parts) -> list[list[int]]:
    """Return the tokens of the unconditional prompt, if there is guidance, and of the prompt.

    Raises:
        RequestError: for a prompt that is too long. The reference would cut it without a word.
    """
    counts = [rows * columns for rows, columns in grids]
    prompts = {"prompt": request.prompt}
    if request.guided:
        prompts = {"negative_prompt": request.negative_prompt, **prompts}
    rows = []
    for name, prompt in prompts.items():
        rows.append(prompt_tokens(files.tokenizer, prompt, counts))
        over = len(rows[-1]) - sum(counts) - LONGEST_TEXT
        if over > 0:
            raise RequestError(f"{name} is {over} tokens too long; with its template it may have {LONGEST_TEXT}")
    return rows


def _unread(tokens: int) -> tuple[str, ...]:
    """Say that the transformer is not told all that the text encoder saw, as in the reference."""
    if tokens <= 0:
        return ()
    return (
        f"several references: the first {tokens} tokens of what Qwen3-VL saw of them are not passed on, since "
        f"{LONGEST_PROMPT} is the most; the transformer sees all references whole",
    )


def _check_size(height: int, width: int, sides: tuple[int, int]) -> None:
    """Raise RequestError unless the size is made of whole tokens, which are `sides` pixels high and wide."""
    if height % sides[0] or width % sides[1]:
        fit = [max(1, round(size / side)) * side for size, side in zip((height, width), sides, strict=True)]
        raise RequestError(
            f"height is {height} and width is {width}; exact_size needs multiples of {sides[0]} and {sides[1]}: "
            f"the nearest are height {fit[0]} and width {fit[1]}"
        )


def item_positions(item: int, rows: int, columns: int) -> np.ndarray:
    """Return (item, row, column) of each token of one item, row by row."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return np.stack([np.full_like(row, item), row, column], axis=-1)


def _prepare_edit(request: Request, files: Parts) -> Inputs:
    return prepare(request, files, plus=False)


def _prepare_plus(request: Request, files: Parts) -> Inputs:
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
