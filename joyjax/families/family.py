"""What a model family must say, and the checked request that it is given."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from joyjax.convert.component import Component
from joyjax.inputs.framing import Crop
from joyjax.sampling.cache import CacheRule
from joyjax.sampling.tiles import Mode


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit with every default filled in and every value checked; `pictures` are RGB. See `joyjax.edit`."""

    prompt: str
    negative_prompt: str
    pictures: tuple[Image.Image, ...]
    steps: int
    guidance_scale: float
    seed: int
    height: int | None
    width: int | None
    exact_size: bool
    base_size: int
    noise: np.ndarray | None
    vae_encode: Mode = "exact"
    vae_decode: Mode = "exact"
    guidance_until: float = 1.0
    cache: CacheRule | None = None

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional pass."""
        return self.guidance_scale > 1

    @property
    def guided_steps(self) -> int:
        """How many steps, the first ones, have an unconditional pass."""
        return math.ceil(self.guidance_until * self.steps - 1e-9) if self.guided else 0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A request as arrays. Rows of `text`: the unconditional prompt if there is guidance, then the prompt."""

    height: int
    width: int
    text: Any
    vision: Any
    first: np.ndarray
    prompt_lengths: np.ndarray
    prompt_size: int
    pictures: tuple[np.ndarray, ...]
    positions: np.ndarray
    noise: np.ndarray
    crops: tuple[Crop, ...]


@dataclasses.dataclass(frozen=True)
class Files:
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
    transformer can be run in two parts (joyjax/sampling/cache.py). `float8` names the linear maps of its transformer
    that may be stored in eight bits, as paths with `*` for a number; none: it has no such form.
    """

    name: str
    class_name: str
    components: tuple[Component, ...]
    steps: int
    guidance_scale: float
    negative_prompt: str
    references: int
    read: Callable[[Path, Mapping[str, Any]], Files]
    prepare: Callable[[Request, Files], Inputs]
    condition: Callable[[Inputs, Any, Any], Any]
    step_cache: bool = False
    float8: tuple[str, ...] = ()
