"""A checked request: what a family is given."""

import dataclasses
import math

import numpy as np
from PIL import Image

from joyjax.media.framing import Fit
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
