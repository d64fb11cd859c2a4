"""Pictures for the vision tower of Qwen3-VL or Qwen2.5-VL: resized, normalised and cut into patches.

Source: Qwen2VLImageProcessorPil in Transformers' image_processing_pil_qwen2_vl.py, which resizes with Pillow. The
torchvision variant differs from it by up to 25/255.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import einops
import numpy as np
from jaxtyping import Float32
from PIL import Image

from joyjax.config import read_config
from joyjax.errors import ConfigError, PictureError
from joyjax.media.image import Size, to_pixels

MAX_RATIO = 200  # of the sides of a picture; fixed in the reference, not in the config


@dataclasses.dataclass(frozen=True)
class VisionProcessorConfig:
    """The processor's preprocessor_config.json; `min_pixels` and `max_pixels` bound the resized picture's area."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_pixels: int
    max_pixels: int

    @property
    def patch_values(self) -> int:
        """Values in one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Any], where: str = "processor/preprocessor_config.json"
    ) -> "VisionProcessorConfig":
        """Read the json object; raises ConfigError for what `vision_patches` does not implement."""
        config = read_config(
            cls,
            _with_pixel_bounds(raw, where),
            where=where,
            fixed={
                "image_processor_type": tuple(f"Qwen2VLImageProcessor{backend}" for backend in ("", "Fast", "Pil")),
                "do_convert_rgb": (True,),
                "do_resize": (True,),
                "resample": (int(Image.Resampling.BICUBIC),),
                "do_center_crop": (None, False),
                "do_rescale": (True,),
                "rescale_factor": (1 / 255,),
                "do_normalize": (True,),
                "do_pad": (None, False),
                "data_format": (None, "channels_first"),
            },
            ignored=(
                *("crop_size", "pad_size"),  # sizes of steps that are off
                *("default_to_square", "device", "disable_grouping", "feature_extractor_type", "input_data_format"),
                *("processor_class", "return_tensors"),
            ),
        )
        if min(config.patch_size, config.temporal_patch_size, config.merge_size) < 1:
            raise ConfigError(f"{where}: sizes must be positive")
        if not 0 < config.min_pixels <= config.max_pixels:
            raise ConfigError(f"{where}: a picture of {config.min_pixels} to {config.max_pixels} pixels is impossible")
        if len(config.image_mean) != 3 or len(config.image_std) != 3 or not all(config.image_std):
            raise ConfigError(f"{where}: image_mean and image_std must be three numbers each, and image_std not zero")
        return config


def _with_pixel_bounds(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Replace `size`, whose "edges" are numbers of pixels, by `min_pixels` and `max_pixels`.

    Where a file has both, `min_pixels` and `max_pixels` win, as in the reference.
    """
    flat = {"min_pixels": None, "max_pixels": None, **raw}
    size = flat.pop("size", None) or {}
    if not isinstance(size, Mapping) or not set(size) <= {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
        raise ConfigError(f"{where}: size is {size!r}; expected shortest_edge and longest_edge, in pixels")
    for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if flat[bound] is None:
            flat[bound] = size.get(edge, size.get(bound))
    return flat


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Return the multiples of `factor` nearest to a picture's sides whose product lies within the bounds.

    Halves round to the even multiple. A picture with too many pixels is scaled and rounded down, one with too few up.

    Raises:
        PictureError: if one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise PictureError(f"a picture of {width} × {height} pixels is too thin; at most {MAX_RATIO}:1 is understood")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def vision_patches(image: Image.Image, config: VisionProcessorConfig) -> tuple[Float32[np.ndarray, "n P"], Size]:
    """Return the patches of an RGB picture and their grid, (rows, columns).

    A patch is 3 · `temporal_patch_size` · `patch_size`² values in the order (channel, frame, y, x), the one frame
    repeated. Patches are in block order: those that the tower merges, `merge_size` by `merge_size`, are neighbours.

    Raises:
        PictureError: for a picture that `smart_resize` refuses.
    """
    patch, merge = config.patch_size, config.merge_size
    height, width = smart_resize(image.height, image.width, patch * merge, config.min_pixels, config.max_pixels)
    pixels = to_pixels(image.resize((width, height), Image.Resampling.BICUBIC))
    mean, std = np.array([config.image_mean, config.image_std], np.float32)
    unit = (pixels / np.float32(255) - mean) / std
    patches = einops.repeat(
        unit,
        "(row m y) (column k x) c -> (row column m k) (c frame y x)",
        **{"m": merge, "k": merge, "y": patch, "x": patch, "frame": config.temporal_patch_size},
    )
    return patches, (height // patch, width // patch)
