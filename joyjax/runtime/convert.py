"""Conversion of any source of a known family to a converted folder, as `joyjax convert` does it."""

import functools
import os
import tempfile
from pathlib import Path

from joyjax import dtypes
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.manifest import Manifest
from joyjax.convert.source.model import model_folder
from joyjax.convert.stream import Progress
from joyjax.families.registry import family_in, layout_of
from joyjax.options import EXACT
from joyjax.runtime.storage import check_options


def convert_model(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    component: str | None = None,
    share: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Convert a Diffusers folder, a hub id, or a folder in the layout of a model's own repository.

    See `joyjax.convert.conversion.convert_checkpoint` for the options and errors, and `joyjax.load` for hub ids.
    """
    folder = model_folder(source)
    shared = None if share is None else model_folder(share)
    target_dtype = None if dtype is None else dtypes.by_name(dtype)
    form = check_options(quantize)
    with tempfile.TemporaryDirectory() as skeleton:
        diffusers, tensors = folder, None
        if (layout := layout_of(folder)) is not None:
            diffusers, tensors = Path(skeleton), functools.partial(layout.open_tensors, folder)
            layout.write_skeleton(folder, diffusers)
        components = family_in(diffusers).components
        return convert_checkpoint(
            diffusers,
            Path(target),
            components,
            dtype=target_dtype,
            quantize=None if form == EXACT else form,
            component=component,
            overwrite=overwrite,
            share=shared,
            tensors=tensors,
            progress=progress,
        )
