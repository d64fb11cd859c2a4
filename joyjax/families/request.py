"""A checked request, the input of a family."""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from joyjax.media.references import Source
from joyjax.options import CacheRule, Fit, VAEMode


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit with every default filled in and every value checked. See `joyjax.edit`.

    `originals` are the pictures as given and `pictures` their RGB or RGBA forms; `mask` is in mode L; `sources` and
    `mask_source` describe them in a recipe. A list of `guidance_scale` has one value for each step; `sigmas` are the
    user's, before the schedule's shift. `base_size` is 0 for a family without it. `own` has the options that only some
    families have, by name (`Option.every_family`).
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
    vae_encode: VAEMode = "exact"
    vae_decode: VAEMode = "exact"
    guidance_until: float = 1.0
    cache: CacheRule | None = None
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def guidance(self) -> tuple[float, ...]:
        """The scale of each step; 1 for a step with one pass."""
        scales = self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,) * self.steps
        until = math.ceil(self.guidance_until * self.steps - 1e-9)
        return tuple(scale if scale > 1 and step < until else 1.0 for step, scale in enumerate(scales))

    @property
    def passes(self) -> tuple[int, ...]:
        """The passes of each step: 2 with guidance."""
        return tuple(2 if scale > 1 else 1 for scale in self.guidance)

    @property
    def guided(self) -> bool:
        """Whether any step has an unconditional pass."""
        return max(self.guidance) > 1

    @property
    def prompts(self) -> dict[str, str]:
        """The prompt of each pass by its option's name; the unconditional pass, if there is one, comes first."""
        unconditional = {"negative_prompt": self.negative_prompt} if self.guided else {}
        return {**unconditional, "prompt": self.prompt}

    @property
    def encode_key(self) -> Hashable:
        """Everything that the condition depends on: prompts, the pixels of the pictures, and how they are fitted."""
        pictures = tuple(source.digest for source in self.sources)
        sizes = (self.height, self.width, self.exact_size, self.base_size)
        own = tuple(sorted(self.own.items()))
        return (*self.prompts.items(), pictures, sizes, self.fit, self.vae_encode, own)

    @property
    def returned(self) -> bool:
        """Whether the result is pasted back into the original, at its own resolution."""
        return self.paste_back or self.mask is not None
