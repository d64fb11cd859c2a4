"""What a model family must say."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert.component import Component
from joyjax.families.request import Request
from joyjax.media.framing import Crop


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A request as arrays. Rows of `text`: the unconditional prompt if there is guidance, then the prompt.

    Token sequences are padded to a size that many requests have in common: `target_tokens` and `reference_tokens` are
    those sizes, `target_length` and `reference_lengths` what is valid of them. `base_size` is that of
    the bucket table that the sizes are of; None: they were given exactly. `advice` is for the user.
    """

    height: int
    width: int
    base_size: int | None
    text: Any
    vision: Any
    first: np.ndarray
    prompt_lengths: np.ndarray
    prompt_size: int
    pictures: tuple[np.ndarray, ...]
    positions: np.ndarray
    target_tokens: int
    target_length: int
    reference_tokens: int
    reference_lengths: tuple[int, ...]
    noise: np.ndarray
    crops: tuple[Crop, ...]
    advice: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a family reads of a checkpoint besides its networks, and the networks' configurations by folder."""

    tokenizer: Any
    vision: Any
    schedule: Any
    configs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: plain functions and the defaults of its reference pipeline.

    `class_name` is the pipeline's in model_index.json. `references` is the largest number of reference pictures.
    `read(folder, configs)` opens tokenizer and processor. `prepare` turns a request into arrays; `condition` puts
    together what one denoising step is told, from encoded prompt rows and reference tokens. `step_cache`: its
    transformer can be run in two parts (joyjax/sampling/step_cache.py).
    """

    name: str
    class_name: str
    components: tuple[Component, ...]
    steps: int
    guidance_scale: float
    negative_prompt: str
    references: int
    read: Callable[[Path, Mapping[str, Any]], Parts]
    prepare: Callable[[Request, Parts], Inputs]
    condition: Callable[[Inputs, Any, Any], Any]
    step_cache: bool = False
