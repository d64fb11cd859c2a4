"""Masks: what they may look like, and what is refused."""

import numpy as np
import pytest
from pictures import decoded, encoded, exif, noise, picture, png
from PIL import Image

from joyjax.errors import PictureError, RequestError
from joyjax.media.mask import check_mask

PICTURE = picture("RGB", 4, 6)
GREYS = np.array([[0, 255, 128, 1, 254, 0]] * 4, np.uint8)
BITS = np.where(GREYS > 127, 255, 0).astype(np.uint8)


def grey(values: np.ndarray = GREYS, mode: str = "L") -> Image.Image:
    return Image.fromarray(values).convert(mode)


def lying() -> Image.Image:
    return grey().transpose(Image.Transpose.ROTATE_90)


MASKS = {  # what a user may give, and the mask that it is
    "L": (lambda: grey(), GREYS),
    "RGB": (lambda: grey(mode="RGB"), GREYS),
    "1": (lambda: Image.fromarray(GREYS > 127), BITS),
    "P": (lambda: grey(BITS).convert("P"), BITS),
    "RGBA, opaque": (lambda: grey(mode="RGBA"), GREYS),
    "LA, opaque": (lambda: grey(mode="LA"), GREYS),
    "16 bits": (lambda: Image.fromarray(GREYS.astype(np.uint16) * 257), GREYS),
    "32 bits that use 16": (lambda: Image.fromarray(GREYS.astype(np.int32) * 257), GREYS),
    "CMYK": (lambda: grey(BITS, "RGB").convert("CMYK"), BITS),
    "png": (lambda: decoded(encoded(grey(), "PNG")), GREYS),
    "png of 1 bit": (lambda: decoded(png(1, 0, 6, [b"\x48"] * 4)), np.array([[0, 255, 0, 0, 255, 0]] * 4)),
    "turned by EXIF": (
        lambda: decoded(encoded(grey().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6))),
        GREYS,
    ),
    "white": (lambda: Image.new("L", (6, 4), 255), np.full((4, 6), 255)),
    "faint": (lambda: Image.new("L", (6, 4), 2), np.full((4, 6), 2)),
}

REFUSED = {  # and what is said
    "array": (lambda: GREYS, "mask is a ndarray; expected a PIL.Image"),
    "path": (lambda: "mask.png", "mask is a str; expected a PIL.Image"),
    "larger": (lambda: grey().resize((12, 8)), "the mask is 12 × 8 and the picture 6 × 4; draw it over the picture$"),
    "one row more": (lambda: grey().resize((6, 5)), "6 × 5 and the picture 6 × 4"),
    "lying": (
        lambda: grey().transpose(Image.Transpose.ROTATE_90),
        "4 × 6 .* draw it over the picture as it is seen, upright",
    ),
    "black": (lambda: Image.new("L", (6, 4)), "black all over.*white is where the picture may change"),
    "black, 1 bit": (lambda: Image.new("1", (6, 4)), "black all over"),
    "black, transparent elsewhere": (lambda: Image.new("RGBA", (6, 4), (0, 0, 0, 0)), "partly transparent"),
    "0 and 1": (lambda: grey((GREYS > 127).astype(np.uint8)), "brightest value of the mask is 1 of 255"),
    "8 bits in 16": (lambda: Image.fromarray(GREYS.astype(np.uint16)), "brightest value of the mask is 1 of 255"),
    "a hole": (lambda: Image.merge("LA", [grey(), grey(255 - BITS)]), "partly transparent.*white is where.*opaque"),
    "a palette with a hole": (
        lambda: decoded(png(8, 3, 6, [bytes(6)] * 4, (b"PLTE", bytes([255] * 3)), (b"tRNS", b"\xfe"))),
        "partly transparent",
    ),
    "red": (lambda: Image.new("RGB", (6, 4), (255, 0, 0)), "the mask has colours"),
    "green": (lambda: Image.new("RGB", (6, 4), (200, 255, 200)), "the mask has colours"),
    "blue": (lambda: Image.new("RGB", (6, 4), (0, 0, 255)), "the mask has colours"),
    "labels": (lambda: decoded(png(8, 3, 6, [bytes(range(6))] * 4, (b"PLTE", bytes([0, 0, 0, 128, 0, 0])))), "colours"),
    "the picture": (lambda: PICTURE, "the mask has colours"),
    "floats": (lambda: Image.fromarray(GREYS.astype(np.float32) / 255), "the mask cannot be used: .*floating-point"),
    "too large a number": (lambda: Image.new("I", (6, 4), 70_000), "the mask cannot be used: .*70000"),
    "empty": (lambda: Image.new("L", (0, 4)), "the mask cannot be used: the picture is empty"),
    "cut off": (lambda: decoded(encoded(picture("L", 64, 64), "JPEG")[:-400]), "the mask cannot be used: .*cut off"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_black_white_and_grey_is_taken(name):
    make, expected = MASKS[name]
    mask = check_mask(make(), PICTURE)
    assert (mask.mode, mask.size) == ("L", (6, 4))
    assert np.array_equal(np.asarray(mask), expected)


def test_a_jpeg_of_a_mask_is_nearly_the_mask():
    values = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((16, 16), np.uint8))
    mask = check_mask(decoded(encoded(grey(values, "RGB"), "JPEG")), picture("RGB", 32, 32))
    assert np.abs(np.asarray(mask).astype(int) - values).max() < 20


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_mask_cannot_mean_is_refused(name):
    make, reason = REFUSED[name]
    with pytest.raises(RequestError, match=reason):
        check_mask(make(), PICTURE)


def test_a_mask_is_held_against_the_upright_picture():
    photo = decoded(encoded(Image.fromarray(noise(4, 6)), "PNG", exif=exif(8)))
    assert photo.size == (6, 4)
    upright = Image.new("L", (4, 6), 255)
    assert check_mask(upright, photo).size == (4, 6)
    with pytest.raises(RequestError, match="6 × 4 and the picture 4 × 6; .* as it is seen, upright"):
        check_mask(grey(), photo)


def test_a_picture_that_cannot_be_used_is_no_fault_of_the_mask():
    with pytest.raises(PictureError, match="^the picture is empty"):
        check_mask(grey(), Image.new("RGB", (0, 4)))
