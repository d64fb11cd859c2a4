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
LINES_ACROSS = 256  # a line is 1/256 of √(width·height)
ARTICLES = ("the", "a", "an")


def move(image: Image.Image, object: str, box: Sequence[int]) -> tuple[Image.Image, str]:
    """Return the picture with a red box at an object's target position, and the prompt that moves it there.

    The box is (left, top, right, bottom) in whole pixels of the upright picture, with exclusive right and bottom, as in
    `Image.crop`. The returned picture is a copy, upright and in RGB.

    The box is drawn as a frame of pure red, inside of its bounds. The authors publish no code for it; the frames in
    their figures are 0.3 to 0.5 % of the picture's width (assets/spatial-editing-showcase.png in JoyAI-Image,
    assets/visual_compare1.png in SpatialEdit). Here they are 1/256, which is 4 pixels in a picture of 1024 × 1024.

    Raises:
        RequestError: for an invalid description of an object (see `rotate`), or an invalid box.
        PictureError: for a picture that cannot be used.
    """
    prompt = f"Move the {_object(object)} into the red box and finally remove the red box."
    picture = as_rgb(image)
    width = max(1, round(math.sqrt(picture.width * picture.height) / LINES_ACROSS))
    left, top, right, bottom = _box(box, picture.width, picture.height, 2 * width + 1)
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=RED, width=width)
    return picture, prompt


def rotate(object: str, view: View) -> str:
    """Return the prompt that rotates an object to one of eight views.

    `object` describes it in one line, without the article, which the prompt adds: "red car". Surrounding spaces are
    removed.

    Raises:
        RequestError: for an invalid description, or an unknown view.
    """
    views = get_args(View)
    if view not in views:
        raise RequestError(f"view is {quoted(view)}; choose one of: {', '.join(views)}")
    return f"Rotate the {_object(object)} to show the {view} side view."


def camera(yaw: float = 0, pitch: float = 0, zoom: Zoom = "unchanged") -> str:
    """Return the prompt that moves the camera around a static scene.

    `yaw` is from -180 to 180 degrees and `pitch` from -90 to 90. Integers are written without a decimal point, as in
    the model's examples, which have multiples of 45 and 15 degrees.

    Raises:
        RequestError: for an angle out of range, or an unknown zoom.
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
    """Check a box in a picture of this size; it must be at least `least` pixels wide and high to have an interior."""
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
    if not number or not -most <= angle <= most:  # NaN fails too
        raise RequestError(f"{name} is {quoted(angle)}; expected degrees from -{most} to {most}")
    return np.format_float_positional(angle + 0, trim="-")  # -0 + 0 is 0
