"""Prompts of the three spatial edits that the model was trained on, word for word.

    picture, prompt = joyjax.spatial.move(photo, "apple", (600, 380, 760, 540))
    result = joyjax.edit(pipeline, picture, prompt)

Source: "Spatial Editing Reference" in the README of jd-opensource/JoyAI-Image.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from joyjax.errors import RequestError
from joyjax.media.image import as_rgb
from joyjax.reading import quoted

View = Literal["front", "right", "left", "rear", "front right", "front left", "rear right", "rear left"]
Zoom = Literal["in", "out", "unchanged"]

RED = 255, 0, 0
LINES_ACROSS = 256  # a line is this part of a picture's side, or of the side of the square that has its area
ARTICLES = ("the", "a", "an")


def move(image: Image.Image, object: str, box: Sequence[int]) -> tuple[Image.Image, str]:
    """Return the picture with a red box where an object is to go, and the prompt that moves it there.

    The box is (left, top, right, bottom) in whole pixels of the upright picture, right and bottom being the first
    column and row behind it, as in `Image.crop`. What is returned is a copy, upright and in RGB.

    The box is drawn as a frame of pure red, inside of its bounds. The authors publish no code for theirs; the frames in
    their figures are 0.3 to 0.5 % of the picture's width (assets/spatial-editing-showcase.png in JoyAI-Image,
    assets/visual_compare1.png in SpatialEdit). These are 1/256, which is 4 pixels in a picture of 1024 × 1024.

    Raises:
        RequestError: for an object that is no description (see `rotate`), or a box that is not one inside the picture.
        PictureError: for a picture that cannot be used.
    """
    prompt = f"Move the {_object(object)} into the red box and finally remove the red box."
    picture = as_rgb(image)
    width = max(1, round(math.sqrt(picture.width * picture.height) / LINES_ACROSS))
    left, top, right, bottom = _box(box, picture.width, picture.height, 2 * width + 1)
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=RED, width=width)
    return picture, prompt


def rotate(object: str, view: View) -> str:
    """Return the prompt that turns an object until it shows one of its eight sides.

    `object` describes it in one line, without an article, which the prompt has: "red car". Spaces around it are
    dropped.

    Raises:
        RequestError: for an object that is no such description, or an unknown view.
    """
    views = get_args(View)
    if view not in views:
        raise RequestError(f"view is {quoted(view)}; choose one of: {', '.join(views)}")
    return f"Rotate the {_object(object)} to show the {view} side view."


def camera(yaw: float = 0, pitch: float = 0, zoom: Zoom = "unchanged") -> str:
    """Return the prompt that moves the camera around a scene that stays as it is.

    `yaw` is from -180 to 180 degrees and `pitch` from -90 to 90. They are written as the model's own examples are,
    whole numbers without a point: the examples have multiples of 45 and 15 degrees.

    Raises:
        RequestError: for an angle beyond these, or an unknown zoom.
    """
    if zoom not in get_args(Zoom):
        raise RequestError(f"zoom is {quoted(zoom)}; choose one of: {', '.join(get_args(Zoom))}")
    return (
        "Move the camera.\n"
        f"- Camera rotation: Yaw {_degrees('yaw', yaw, 180)}°, Pitch {_degrees('pitch', pitch, 90)}°.\n"
        f"- Camera zoom: {zoom}.\n"
        "- Keep the 3D scene static; only change the viewpoint."
    )


def _object(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"object is {quoted(text)}; expected a description of what is meant, such as 'red car'")
    text = text.strip()
    if len(text.splitlines()) > 1:
        raise RequestError(f"object is {quoted(text)}; expected a description in one line")
    article, _, rest = text.partition(" ")
    if article.lower() in ARTICLES:
        raise RequestError(
            f"object is {quoted(text)}; leave out {article!r}, since the prompt says 'the': {quoted(rest.strip())}"
        )
    return text


def _box(box: Any, width: int, height: int, least: int) -> tuple[int, ...]:
    """Check a box in a picture of this size; it must be `least` pixels wide and high for its frame to have a hole."""
    expected = "expected (left, top, right, bottom) in whole pixels"
    sides = list(box) if isinstance(box, Sequence | np.ndarray) and not isinstance(box, str) else []
    if len(sides) != 4 or any(isinstance(n, bool | np.bool_) or not isinstance(n, int | np.integer) for n in sides):
        raise RequestError(f"box is {quoted(box)}; {expected}")
    left, top, right, bottom = (int(side) for side in sides)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise RequestError(
            f"box is {quoted(box)}; {expected}, with left < right <= {width} and top < bottom <= {height}, the "
            "picture's width and height"
        )
    if min(right - left, bottom - top) < least:
        raise RequestError(
            f"box is {quoted(box)}, {right - left} × {bottom - top} pixels; in a picture of {width} × {height} it "
            f"needs {least} × {least} at least"
        )
    return left, top, right, bottom


def _degrees(name: str, angle: Any, most: int) -> str:
    number = isinstance(angle, int | float | np.integer | np.floating) and not isinstance(angle, bool)
    if not number or not -most <= angle <= most:  # not so for NaN either
        raise RequestError(f"{name} is {quoted(angle)}; expected degrees from -{most} to {most}")
    return np.format_float_positional(angle + 0, trim="-")  # -0 + 0 is 0
