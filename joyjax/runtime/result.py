"""The result of an edit: the picture, and everything that it depends on."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from joyjax.errors import RequestError
from joyjax.families.family import Media, Plan
from joyjax.files import publish, publish_free, same_file
from joyjax.kernels.choice import XLA
from joyjax.media.formats import Format, Quality, encode, format_of, writing
from joyjax.media.framing import Crop, paste_back, unpad
from joyjax.media.image import from_pixels, rgb_profile
from joyjax.media.metadata import Texts
from joyjax.media.references import Source
from joyjax.options import EDIT
from joyjax.provenance.fingerprint import fingerprint
from joyjax.provenance.recipe import make_recipe, recipe_texts
from joyjax.runtime.load import Pipeline
from joyjax.sampling.noise import NOISE_RULE


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished edit.

    `crop` is the fit of the last reference, which decides the size; None without references. `crops` has the fit of
    each. `settings` has every value that the picture depends on. `timings` are the seconds of each stage; edits of one
    batch share them. `computed_steps` is the number of steps that ran the whole transformer: all, unless there is a
    step cache. `references` and `mask` describe the input pictures. `notes` are lines for the user: advice, and parts
    of the pictures that were not used. `fingerprint` is that of the model.
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
    fingerprint: str = ""

    def save(self, path: str | os.PathLike, *, metadata: bool = True, quality: Quality = None) -> None:
        """Write the picture in the format of the suffix, with the recipe that reproduces it.

        The file appears under its name only when it is complete, and replaces one of that name.

        Args:
            path: ends in .png, .jpg, .jpeg, .webp, .avif, .tif or .tiff.
            metadata: whether to store the recipe in the file.
            quality: from 1 to 100, or "lossless"; None: 95 for JPEG, 90 for AVIF, lossless for the others.

        Raises:
            RequestError: for another suffix, a quality that the format does not have, or the path of an input picture.
            PictureError: if the picture cannot be written there.
        """
        form = format_of(path)
        self._check_target(path)
        data = self.encoded(form, Path(path).parent, metadata=metadata, quality=quality)
        with writing(path):
            publish(data, Path(path))

    def save_free(self, candidates: Iterable[Path], *, metadata: bool = True, quality: Quality = None) -> Path:
        """Write the picture like `save`, but under the first free name; return the name.

        All candidates are in one folder and have one suffix. Nothing is replaced.
        """
        names = iter(candidates)
        first = next(names)
        data = self.encoded(format_of(first), first.parent, metadata=metadata, quality=quality)
        with writing(first):
            return publish_free(data, itertools.chain([first], names))

    def encoded(self, form: Format, folder: Path, *, metadata: bool = True, quality: Quality = None) -> bytes:
        """Return the picture as the bytes of a file in `folder`; the recipe names other files relative to it."""
        return encode(self.image, form, texts=self._texts(folder) if metadata else None, quality=quality)

    def _check_target(self, path: str | os.PathLike) -> None:
        """Raise RequestError if a file is one of the input pictures."""
        for source in (*self.references, *([] if self.mask is None else [self.mask])):
            if source.file is not None and same_file(path, source.file):
                raise RequestError(
                    f"{path} is {source.file}, a picture that this edit was made from, and would be replaced; "
                    "name another file"
                )

    def _texts(self, folder: Path) -> Texts:
        recipe = make_recipe(
            self.settings,
            fingerprint=self.fingerprint or fingerprint(Path(self.settings["model"])),
            jax=jax.__version__,
            device=self.device,
            references=self.references,
            mask=self.mask,
        )
        return recipe_texts(recipe, folder)


def settings(pipeline: Pipeline, plan: Plan, kernels: str = XLA) -> dict[str, Any]:
    """Return every value that the picture depends on, as plain data; `kernels` are those that ran.

    An option that the family does not have has its neutral default.
    """
    family, request, kept = pipeline.family, plan.request, {}
    for name, option in EDIT.items():
        if option.in_recipe and (option.every_family or family.has(option)):
            value = getattr(request, name) if option.every_family else request.own[name]
            kept[name] = option.type.plain(value if family.has(option) else option.default)
    kept |= {"height": plan.size[1], "width": plan.size[2]}  # after rounding
    kept["noise"] = f"rule {NOISE_RULE}" if request.noise is None else "given"
    return {
        "model": pipeline.source,
        "family": family.name,
        "dtype": pipeline.dtype,
        "linear": pipeline.linear,
        "kernels": kernels,
        **kept,
    }


def make_result(
    pipeline: Pipeline,
    plan: Plan,
    media: Media,
    seconds: Mapping[str, float],
    steps: int,
    notes: tuple[str, ...],
    kernels: str,
) -> Result:
    """Build the result of a finished edit; `steps` is the number of steps that ran the whole transformer."""
    return Result(
        image=picture(media.pixels[0], plan),
        crop=None if plan.base is None else plan.crops[plan.base],
        seed=plan.request.seed,
        settings=settings(pipeline, plan, kernels),
        timings=dict(seconds),
        computed_steps=steps,
        device=pipeline.device_kind,
        crops=plan.crops,
        references=plan.request.sources,
        mask=plan.request.mask_source,
        notes=notes,
        fingerprint=pipeline.fingerprint,
    )


def picture(pixels: UInt8[np.ndarray, "h w c"], plan: Plan) -> Image.Image:
    """Return the final picture: without padding, or pasted back into the original."""
    drawn, request = from_pixels(pixels), plan.request
    if plan.base is None:
        return drawn
    crop, original = plan.crops[plan.base], request.originals[plan.base]
    if request.returned:
        return paste_back(drawn, original, crop, request.mask)
    shown = unpad(drawn, crop) if crop.size == plan.size[1:] else drawn
    profile = rgb_profile(original)
    if profile is not None:
        shown.info["icc_profile"] = profile
    return shown
