"""A user's mask: white where the picture may change, black where it must not."""

import numpy as np
from PIL import Image, ImageChops

from joyjax.errors import PictureError, RequestError
from joyjax.media.image import alpha_channel, as_rgb, upright

COLOURFUL = 32  # difference between a pixel's channels, larger than JPEG's error on grey
MEANING = "in a mask white is where the picture may change and black where it must not"


def check_mask(mask: object, picture: Image.Image) -> Image.Image:
    """Return a mask for a picture as grey: 255 where the picture may change, 0 where it must not; values between blend.

    Both are made upright first, and must then have equal sizes. Any mode with black, white and grey only is accepted.

    Raises:
        RequestError: if it is not such a picture: transparent, coloured, all black, or of another size.
        PictureError: if the picture itself cannot be used.
    """
    if not isinstance(mask, Image.Image):
        raise RequestError(f"mask is a {type(mask).__name__}; expected a PIL.Image: open files with PIL.Image.open")
    size = upright(picture).size
    try:
        mask = upright(mask)
        rgb = as_rgb(mask)
        alpha = alpha_channel(mask)
    except PictureError as error:
        raise RequestError(f"the mask cannot be used: {error}") from error
    if mask.size != size:
        mask_size, picture_size = (f"{width} × {height}" for width, height in (mask.size, size))
        turned = " as it is seen, upright" if mask.size == size[::-1] else ""
        raise RequestError(f"the mask is {mask_size} and the picture {picture_size}; draw it over the picture{turned}")
    if alpha is not None and np.asarray(alpha).min() < 255:
        raise RequestError(
            f"the mask is partly transparent, which has no meaning here: {MEANING}; save it in black and white, opaque"
        )
    red, green, blue = rgb.split()
    high = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    low = ImageChops.darker(ImageChops.darker(red, green), blue)
    if np.asarray(ImageChops.subtract(high, low)).max() > COLOURFUL:
        raise RequestError(f"the mask has colours; {MEANING}: save it in black, white and grey")
    grey = rgb.convert("L")
    brightest = int(np.asarray(grey).max())
    if not brightest:
        raise RequestError(f"the mask is black all over, so nothing may change; {MEANING}")
    if brightest == 1:
        raise RequestError(f"the brightest value of the mask is 1 of 255, which is black; {MEANING}: use 255")
    return grey
