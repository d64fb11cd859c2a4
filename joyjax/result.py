"""What an edit gives: the picture, and everything that it depends on."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from joyjax.families.family import Inputs, Request
from joyjax.fingerprint import fingerprint
from joyjax.inputs.framing import Crop
from joyjax.pipeline import Pipeline
from joyjax.recipe import make_recipe, save_png
from joyjax.sampling.noise import NOISE_RULE
from joyjax.sources import Source


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished edit.

    `crop` says what was kept of the picture that decided the size (the last reference; None without references) and
    `crops` of each; `settings` is every value that the picture depends on, `timings` the seconds of each stage, and
    `computed_steps` how many steps ran the whole transformer: all of them without a step cache. Edits that ran as one
    batch share timings. `references` and `mask` tell the pictures that went in. `notes` are lines for the user: advice,
    and what of the pictures was not used.
    """

    image: Image.Image
    crop: Crop | None
    seed: int
    settings: Mapping[str, Any]
    timings: Mapping[str, float]
    computed_steps: int
    device: str
    crops: tuple[Crop, ...] = ()
    references: tuple[Source, ...] = ()
    mask: Source | None = None
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike, *, metadata: bool = True) -> None:
        """Write the picture as a PNG file, with the recipe that makes it again unless `metadata` is False.

        Raises:
            PictureError: if it cannot be written there.
            CheckpointError: if the model is no longer where it was loaded from.
        """
        recipe = None
        if metadata:
            recipe = make_recipe(
                self.settings,
                fingerprint=_fingerprint(self.settings["model"]),
                jax=jax.__version__,
                device=self.device,
                references=self.references,
                mask=self.mask,
            )
        save_png(self.image, Path(path), recipe)


@functools.cache
def _fingerprint(folder: str) -> str:
    return fingerprint(Path(folder))


def settings(pipeline: Pipeline, request: Request, inputs: Inputs) -> dict[str, Any]:
    """Return every value that the picture depends on, as plain data."""
    return {
        "model": pipeline.source,
        "family": pipeline.family.name,
        "dtype": pipeline.dtype,
        "linear": pipeline.linear,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "steps": request.steps,
        "sigmas": None if request.sigmas is None else list(request.sigmas),
        "guidance_scale": list(scale) if isinstance(scale := request.guidance_scale, tuple) else scale,
        "seed": request.seed,
        "height": inputs.height,
        "width": inputs.width,
        "exact_size": request.exact_size,
        "base_size": request.base_size,
        "fit": request.fit,
        "paste_back": request.paste_back,
        "noise": f"rule {NOISE_RULE}" if request.noise is None else "given",
        "vae_encode": request.vae_encode,
        "vae_decode": request.vae_decode,
        "guidance_until": request.guidance_until,
        "cache": None if request.cache is None else str(request.cache),
    }
