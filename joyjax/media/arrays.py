"""Pictures in Python: PIL pictures, and NumPy arrays with 8 bits per channel."""

import os
from typing import Any

import numpy as np
from PIL import Image

from joyjax.errors import RequestError

Picture = Image.Image | np.ndarray

EXPECTED = "expected a PIL.Image or a NumPy array, uint8 [height, width, 3]"
CHANNELS = 3, 4  # RGB and RGBA; grey has no channel axis


def as_picture(value: Any, name: str) -> Image.Image:
    """Return the picture in the argument `name`: a PIL picture unchanged, an array converted.

    Arrays are uint8 `[height, width, 3]` (RGB), `[height, width, 4]` (RGBA) or `[height, width]` (grey).

    Raises:
        RequestError: for anything else, with the conversion to use.
    """
    if isinstance(value, Image.Image):
        return value
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        _check_array(value, name)
        return Image.fromarray(np.array(value))
    if isinstance(value, str | os.PathLike):
        raise RequestError(f"{name} is a {kind}; {EXPECTED}: open the file with PIL.Image.open(path)")
    if isinstance(value, bytes | bytearray | memoryview):
        raise RequestError(f"{name} is a {kind}; {EXPECTED}: open a file in memory with PIL.Image.open(io.BytesIO(…))")
    module = type(value).__module__.partition(".")[0]
    if module == "torch":
        raise RequestError(
            f"{name} is a torch.{kind}; {EXPECTED}: convert a tensor [3, height, width] from 0 to 1 with "
            "torchvision.transforms.functional.to_pil_image(tensor.float().cpu())"
        )
    if hasattr(value, "__array__"):  # of JAX, TensorFlow and others
        raise RequestError(f"{name} is a {module} {kind}; {EXPECTED}: convert it with numpy.asarray")
    raise RequestError(f"{name} is a {kind}; {EXPECTED}: open files with PIL.Image.open(path)")


def _check_array(array: np.ndarray, name: str) -> None:
    shape = array.shape
    fault = f"{name} is an array {array.dtype} {list(shape)}; {EXPECTED}, [height, width, 4] or [height, width]"
    if array.ndim == 4:
        raise RequestError(f"{fault}: this is a batch; give its pictures one by one, as in array[0]")
    if array.ndim == 3 and shape[2] not in CHANNELS:
        if shape[0] in (1, *CHANNELS):
            raise RequestError(
                f"{fault}: channels come last; give array.transpose(1, 2, 0)" + "[..., 0]" * (shape[0] == 1)
            )
        raise RequestError(f"{fault}: " + ("give array[..., 0]" if shape[2] == 1 else "convert it to RGB"))
    if array.ndim not in (2, 3):
        raise RequestError(f"{fault}: it has {array.ndim} axes")
    if np.issubdtype(array.dtype, np.floating):
        raise RequestError(
            f"{fault}: scale its values to 0 … 255; if they are from 0 to 1, give "
            "(array * 255).round().astype(numpy.uint8)"
        )
    if array.dtype == np.bool_:
        raise RequestError(f"{fault}: give array.astype(numpy.uint8) * 255")
    if array.dtype != np.uint8:
        raise RequestError(f"{fault}: scale its values to 0 … 255 and give array.astype(numpy.uint8)")
    if not array.size:
        raise RequestError(f"{fault}: it is empty")
