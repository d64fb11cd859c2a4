"""The result of an edit: the picture, and everything that it depends on."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from joyjax.errors import RequestError
from joyjax.families.family import Media, Plan
from joyjax.files import publish_all, publish_all_free, same_file
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

    `layers` are RGBA pictures, bottom first, and `image` is then their alpha composite; empty for models without.
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
    layers: list[Image.Image] = dataclasses.field(default_factory=list)

    def save(self, path: str | os.PathLike, *, metadata: bool = True, quality: Quality = None) -> None:
        """Write the picture in the format of the suffix, with the recipe that reproduces it.

        The file appears under its name only when it is complete, and replaces one of that name. Layers are written
        beside it in the same way, under the names of `files`; the picture comes last.

        Args:
            path: ends in .png, .jpg, .jpeg, .webp, .avif, .tif or .tiff.
            metadata: whether to store the recipe in the file.
            quality: from 1 to 100, or "lossless"; None: 95 for JPEG, 90 for AVIF, lossless for the others.

        Raises:
            RequestError: for another suffix, a quality that the format does not have, or the path of an input picture.
            PictureError: if the picture cannot be written there.
        """
        form, files = format_of(path), self.files(path)
        for file in files:
            self._check_target(file)
        data = self._all_encoded(form, Path(path).parent, metadata=metadata, quality=quality)
        with writing(path):
            publish_all(dict(zip(files, data, strict=True)))

    def save_free(self, candidates: Iterable[Path], *, metadata: bool = True, quality: Quality = None) -> Path:
        """Write the picture like `save`, but under the first name that is free, with its layers; return the name.

        All candidates are in one folder and have one suffix. Nothing is replaced.
        """
        names = iter(candidates)
        first = next(names)
        data = self._all_encoded(format_of(first), first.parent, metadata=metadata, quality=quality)
        with writing(first):
            return publish_all_free(data, map(self.files, itertools.chain([first], names)))[0]

    def files(self, path: str | os.PathLike) -> list[Path]:
        """Return the names that `save` writes: the path, and for layers NAME-layer1.SUFFIX and so on, bottom first."""
        return [Path(path), *layer_files(Path(path), len(self.layers))]

    def encoded(self, form: Format, folder: Path, *, metadata: bool = True, quality: Quality = None) -> bytes:
        """Return the picture as the bytes of a file in `folder`; the recipe names other files relative to it."""
        return self._all_encoded(form, folder, metadata=metadata, quality=quality, pictures=[self.image])[0]

    def _all_encoded(
        self,
        form: Format,
        folder: Path,
        *,
        metadata: bool,
        quality: Quality,
        pictures: Iterable[Image.Image] | None = None,
    ) -> list[bytes]:
        """Return the picture and its layers as the bytes of files, each with the recipe."""
        texts = self._texts(folder) if metadata else None
        each = [self.image, *self.layers] if pictures is None else pictures
        return [encode(picture, form, texts=texts, quality=quality) for picture in each]

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
    layers = [picture(from_pixels(pixels), plan) for pixels in media.pixels] if media.kind == "layers" else []
    return Result(
        image=picture(shown(media), plan),
        layers=layers,
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


def layer_files(path: Path, layers: int) -> list[Path]:
    """Return the names of the files of layers, bottom first, beside that of their composite."""
    return [path.with_name(f"{path.stem}-layer{number}{path.suffix}") for number in range(1, layers + 1)]


def shown(media: Media) -> Image.Image:
    """Return what a viewer sees: the picture, or the alpha composite of layers, RGBA."""
    bottom, *others = map(from_pixels, media.pixels)
    return functools.reduce(Image.alpha_composite, others, bottom)


def picture(drawn: Image.Image, plan: Plan) -> Image.Image:
    """Return the final picture: without padding, or pasted back into the original."""
    request = plan.request
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
