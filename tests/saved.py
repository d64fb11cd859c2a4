"""Writes pictures with recipes, as a result does, for tests without an edit."""

from pathlib import Path

from PIL import Image

from joyjax.media.formats import encode, format_of
from joyjax.provenance.recipe import Recipe, recipe_texts


def save(image: Image.Image, path: Path, recipe: Recipe | None) -> None:
    texts = None if recipe is None else recipe_texts(recipe, path.parent)
    path.write_bytes(encode(image, format_of(path), texts=texts))
