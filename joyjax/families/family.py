"""What a model family must say, and the checked request that it is given."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from joyjax.convert.component import Component
from joyjax.media.framing import Crop, Fit
from joyjax.media.references import Source
from joyjax.models.autoencoder.tiling import Mode
from joyjax.sampling.step_cache import CacheRule


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit with every default filled in and every value checked. See `joyjax.edit`.

    `originals` are the pictures as they were given and `pictures` their RGB forms; `mask` is in mode L; `sources` and
    `mask_source` tell them for a recipe. A list of `guidance_scale` has one number for each step; `sigmas` are as the
    user gave them, before the schedule shifts them.
    """

    prompt: str
    negative_prompt: str
    pictures: tuple[Image.Image, ...]
    steps: int
    guidance_scale: float | tuple[float, ...]
    seed: int
    height: int | None
    width: int | None
    exact_size: bool
    base_size: int
    noise: np.ndarray | None = dataclasses.field(repr=False)
    sigmas: tuple[float, ...] | None = None
    fit: Fit = "crop"
    mask: Image.Image | None = None
    paste_back: bool = False
    originals: tuple[Image.Image, ...] = ()
    sources: tuple[Source, ...] = ()
    mask_source: Source | None = None
    vae_encode: Mode = "exact"
    vae_decode: Mode = "exact"
    guidance_until: float = 1.0
    cache: CacheRule | None = None

    @property
    def guidance(self) -> tuple[float, ...]:
        """The scale of each step; 1 where there is one pass only."""
        scales = self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,) * self.steps
        until = math.ceil(self.guidance_until * self.steps - 1e-9)
        return tuple(scale if scale > 1 and step < until else 1.0 for step, scale in enumerate(scales))

    @property
    def guided(self) -> bool:
        """Whether any step has an unconditional pass."""
        return max(self.guidance) > 1

    @property
    def returned(self) -> bool:
        """Whether the result is put back into the original, at its own resolution."""
        return self.paste_back or self.mask is not None


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
    transformer can be run in two parts (joyjax/sampling/step_cache.py). `float8` names the linear maps of its
    transformer that may be stored in eight bits, as paths with `*` for a number; none: it has no such form.
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
    float8: tuple[str, ...] = ()
