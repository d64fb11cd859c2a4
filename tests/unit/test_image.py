"""Pictures: what can be read, what is refused, buckets and fitting."""

import io
import os
import re
import struct
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from joyjax.errors import PictureError, RequestError
from joyjax.inputs.image import (
    MAX_PIXELS,
    as_rgb,
    buckets,
    cover_crop,
    from_pixels,
    nearest_bucket,
    open_picture,
    save_png,
    to_pixels,
)
from joyjax.layers.patch import pixels_to_unit

GREY16 = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], np.uint16)
GREY16_AS_8 = np.array([[0, 0, 1, 1], [127, 128, 254, 255]], np.uint8)


def noise(height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)


def picture(mode: str = "RGB", height: int = 5, width: int = 7) -> Image.Image:
    if mode in ("RGBA", "LA", "PA", "CMYK", "LAB", "HSV", "YCbCr"):
        channels = noise(height, width, len(Image.new(mode, (1, 1)).getbands()))
        return Image.merge(mode, [Image.fromarray(channels[..., c]) for c in range(channels.shape[-1])])
    return Image.fromarray(noise(height, width)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def palette_with_alpha_table() -> bytes:
    return encoded(picture("P"), "PNG", transparency=bytes(range(256)))


def animation() -> bytes:
    return encoded(picture("P"), "GIF", save_all=True, append_images=[Image.new("P", (7, 5))])


def pgm(highest: int, values: np.ndarray) -> bytes:
    return b"P5\n%d %d\n%d\n" % (*values.shape[::-1], highest) + values.astype(">u2").tobytes()


RGB_FORM = {  # files that give what Pillow's RGB form of them gives
    "png": lambda: encoded(picture(), "PNG"),
    "png with alpha": lambda: encoded(picture("RGBA"), "PNG"),
    "png, grey with alpha": lambda: encoded(picture("LA"), "PNG"),
    "png, palette": lambda: encoded(picture("P"), "PNG"),
    "png, palette with one transparent colour": lambda: encoded(picture("P"), "PNG", transparency=3),
    "png, palette with an alpha table": palette_with_alpha_table,
    "png, rgb with a transparent colour": lambda: encoded(picture(), "PNG", transparency=(1, 2, 3)),
    "png, 1 bit": lambda: encoded(picture("1"), "PNG"),
    "png, grey": lambda: encoded(picture("L"), "PNG"),
    "png, exif is garbage": lambda: encoded(picture(), "PNG", exif=b"Exif\0\0garbage"),
    "jpeg": lambda: encoded(picture(), "JPEG"),
    "jpeg, grey": lambda: encoded(picture("L"), "JPEG"),
    "jpeg, cmyk": lambda: encoded(picture("CMYK"), "JPEG"),
    "tiff, cmyk": lambda: encoded(picture("CMYK"), "TIFF"),
    "tiff, lab": lambda: encoded(picture("LAB"), "TIFF"),
    "tiff, 1 bit": lambda: encoded(picture("1"), "TIFF"),
    "gif": lambda: encoded(picture("P"), "GIF"),
    "gif, two frames": animation,
    "webp with alpha": lambda: encoded(picture("RGBA"), "WEBP", lossless=True),
    "bmp": lambda: encoded(picture(), "BMP"),
    "ppm, 16 bits a colour": lambda: b"P6\n2 1\n65535\n" + np.arange(6, dtype=">u2").tobytes(),
    "one pixel": lambda: encoded(picture("RGB", 1, 1), "PNG"),
    "one row": lambda: encoded(picture("RGB", 1, 300), "PNG"),
}

SCALED = {  # files of 16-bit grey, and what they are in 8 bits
    "png": (lambda: encoded(Image.fromarray(GREY16), "PNG"), GREY16_AS_8),
    "tiff": (lambda: encoded(Image.fromarray(GREY16), "TIFF"), GREY16_AS_8),
    "tiff, big endian": (lambda: encoded(Image.fromarray(GREY16.astype(">u2")), "TIFF"), GREY16_AS_8),
    "tiff, 32 bits that use 16": (lambda: encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), GREY16_AS_8),
    "pgm": (lambda: pgm(65535, GREY16), GREY16_AS_8),
    "pgm up to 1000": (lambda: pgm(1000, np.array([[0, 500, 1000]])), np.array([[0, 128, 255]], np.uint8)),
}

BROKEN = {  # files that are refused, and a word of the reason
    "empty": (lambda: b"", "cannot be read"),
    "text": (lambda: b"this is no picture\n", "cannot be read"),
    "png, header only": (lambda: encoded(picture(), "PNG")[:20], "cannot be read"),
    "png, cut off": (lambda: encoded(picture("RGB", 40, 40), "PNG")[:-200], "cut off"),
    "jpeg, cut off": (lambda: encoded(picture("RGB", 64, 64), "JPEG")[:-400], "cut off"),
    "png, no data": (lambda: png_that_claims(30, 20), "cut off"),
    "png, 400 megapixels": (lambda: png_that_claims(20000, 20000), "178,956,970"),
    "png, no pixel": (lambda: png_that_claims(0, 20), "cannot be read|empty"),
    "png, a chunk that unpacks to 100 MB": (
        lambda: png_that_claims(3, 2)[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))),
        "cannot be read",
    ),
    "eps, which is a program": (lambda: encoded(picture(), "EPS"), "EPS"),
}

UNUSABLE = {  # what may come in place of a Pillow picture, and a word of the reason
    "floating point": (lambda: Image.new("F", (3, 2)), "floating-point"),
    "more than 16 bits": (lambda: Image.fromarray(np.array([[0, 65536]], np.int32)), "65536"),
    "negative": (lambda: Image.fromarray(np.array([[0, -1]], np.int32)), "-1"),
    "grey times alpha": (lambda: Image.new("La", (3, 2)), "La"),
    "empty": (lambda: Image.new("RGB", (0, 2)), "empty"),
    "array": (lambda: noise(), "ndarray; expected a PIL.Image"),
    "path": (lambda: "picture.png", "str; expected a PIL.Image"),
    "none": (lambda: None, "NoneType"),
}


@pytest.mark.parametrize("name", RGB_FORM)
def test_a_mode_that_rgb_can_hold_gives_its_rgb_form(name, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(RGB_FORM[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = to_pixels(as_rgb(open_picture(path)))
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        theirs = np.asarray(image.convert("RGB"))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa"])
def test_a_picture_in_memory_gives_its_rgb_form(mode):
    image = picture(mode)
    assert np.array_equal(to_pixels(as_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", SCALED)
def test_16_bit_grey_is_scaled_not_clipped(name, tmp_path):
    make, expected = SCALED[name]
    (tmp_path / "picture").write_bytes(make())
    ours = to_pixels(as_rgb(open_picture(tmp_path / "picture")))
    assert np.array_equal(ours, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(name, tmp_path):
    make, reason = BROKEN[name]
    path = tmp_path / "picture"
    path.write_bytes(make())
    with pytest.raises(PictureError, match=f"(?s){re.escape(str(path))}.*({reason})"):
        open_picture(path)


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_usable_picture_is_refused(name):
    make, reason = UNUSABLE[name]
    with pytest.raises(PictureError, match=reason):
        as_rgb(make())


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(PictureError, match="nothing.png does not exist"):
        open_picture(tmp_path / "nothing.png")
    with pytest.raises(PictureError, match="is not a file"):
        open_picture(tmp_path)
    with pytest.raises(PictureError, match="does not exist"):
        open_picture("nul\0byte")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PictureError, match="is not a file"):
        open_picture(str(tmp_path / "pipe"))


def test_the_limit_holds_where_pillow_has_none(tmp_path, monkeypatch):
    (tmp_path / "picture").write_bytes(png_that_claims(MAX_PIXELS // 100 + 1, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PictureError, match="1789570 × 100 pixels; at most 178,956,970"):
        open_picture(tmp_path / "picture")


def test_a_picture_file_that_was_closed_is_refused(tmp_path):
    picture().save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        pass
    with pytest.raises(PictureError, match="picture.png is broken"):
        as_rgb(image)


def test_a_file_keeps_its_mode_and_profile(tmp_path):
    picture("RGBA").save(tmp_path / "picture.png", icc_profile=b"profile")
    image = open_picture(tmp_path / "picture.png")
    assert image.mode == "RGBA"
    assert image.info["icc_profile"] == b"profile"
    assert np.array_equal(np.asarray(image), np.asarray(picture("RGBA")))


TURNS = {  # EXIF orientation → how a camera that stores it has turned the upright picture
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied_once(orientation, kind, tmp_path):
    upright = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))
    stored.save(path, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(to_pixels(as_rgb(open_picture(path))), upright)
    with Image.open(path) as image:  # as a user might hand it over
        assert np.array_equal(to_pixels(as_rgb(image)), upright)


def test_the_published_buckets():
    table = buckets(1024)
    assert len(table) == 49
    assert table[:2] == ((512, 1792), (512, 1856))
    assert table[-1] == (2048, 512)
    assert len({height / width for height, width in table}) == 49


@pytest.mark.parity
def test_buckets_equal_the_reference_in_order():
    reference = pytest.importorskip("diffusers.pipelines.joyimage.image_processor")
    assert list(buckets(1024)) == reference.BUCKETS[1024]


@pytest.mark.parametrize("base_size", [256, 512, 768])
def test_smaller_tables_are_the_published_one_scaled(base_size):
    assert [(h * 1024 // base_size, w * 1024 // base_size) for h, w in buckets(base_size)] == list(buckets(1024))


@given(st.integers(2, 80).map(lambda n: 16 * n))
def test_every_table_keeps_the_laws_of_the_published_one(base_size):
    table = buckets(base_size)
    assert (base_size, base_size) in table
    assert len(set(table)) == len(table)
    assert {(w, h) for h, w in table} == set(table)
    for height, width in table:
        assert height % 16 == width % 16 == 0
        assert max(height, width) <= 4 * min(height, width)
        assert height * width <= base_size**2


def test_a_small_table():
    assert buckets(64) == (
        *((32, 112), (32, 128), (32, 96), (48, 80), (48, 64), (64, 64)),
        *((64, 48), (80, 48), (96, 32), (112, 32), (128, 32)),
    )


@pytest.mark.parametrize("base_size", [0, -1024, 16, 100, 1000])
def test_an_impossible_base_size_is_refused(base_size):
    with pytest.raises(RequestError, match=f"base_size is {base_size}"):
        buckets(base_size)


@pytest.mark.parity
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([256, 512, 768, 1024]))
@example(1024, 1024, 1024)
@example(1080, 1920, 1024)
@example(768, 1024, 1024)
@example(1730, 1384, 1024)  # a tie
@example(1, 9000, 512)
def test_nearest_bucket_equals_the_reference(height, width, base_size):
    reference = pytest.importorskip("diffusers.pipelines.joyimage.image_processor")
    theirs = reference.find_best_bucket(height, width, 1024)
    assert nearest_bucket(height, width, base_size) == tuple(side * base_size // 1024 for side in theirs)


def test_nearest_bucket_by_plain_difference():
    assert nearest_bucket(1080, 1920, 1024) == (768, 1344)
    assert nearest_bucket(768, 1024, 1024) == (832, 1152)
    # Of two that are equally near, the first of the table is taken.
    ratios = [h / w for h, w in buckets(1024)]
    nearest = min(abs(ratio - 1730 / 1384) for ratio in ratios)
    equal = [size for size, ratio in zip(buckets(1024), ratios, strict=True) if abs(ratio - 1730 / 1384) == nearest]
    assert len(equal) == 2
    assert nearest_bucket(1730, 1384, 1024) == equal[0]


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([(32, 128), (64, 48), (48, 64), (64, 64), (80, 48)]))
def test_cover_crop_equals_the_reference(height, width, size):
    reference = pytest.importorskip("diffusers.pipelines.joyimage.image_processor")
    image = picture("RGB", height, width)
    theirs = reference.JoyImageEditImageProcessor().resize_center_crop(image, size)
    ours, _ = cover_crop(image, size)
    assert (ours.height, ours.width) == size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_crop_says_what_is_left(height, width, rows, columns):
    size = 16 * rows, 16 * columns
    _, crop = cover_crop(picture("L", height, width), size)
    left, top, right, bottom = crop.box
    assert crop.source == (height, width)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9
    assert crop.lost == pytest.approx(1 - (right - left) * (bottom - top) / (height * width), abs=1e-9)
    # Centred up to the one scaled pixel that an odd excess leaves over.
    assert abs(left - (width - right)) <= 1 / crop.scale + 1e-9
    assert abs(top - (height - bottom)) <= 1 / crop.scale + 1e-9


def test_crop_of_a_banner():
    _, crop = cover_crop(picture("RGB", 100, 800), (128, 512))
    assert crop.scale == 1.28
    assert crop.lost == 0.5
    assert crop.box == (200.0, 0.0, 600.0, 100.0)


def test_an_exact_fit_loses_nothing():
    image = picture("RGB", 64, 48)
    fitted, crop = cover_crop(image, (64, 48))
    assert np.array_equal(np.asarray(fitted), np.asarray(image))
    assert (crop.scale, crop.lost, crop.box) == (1.0, 0.0, (0.0, 0.0, 48.0, 64.0))


def test_a_hairline_is_refused_before_memory_is_taken():
    with pytest.raises(PictureError, match="30000 × 1 pixels is too thin to fill 2048 × 512"):
        cover_crop(Image.new("RGB", (30000, 1)), (512, 2048))


def test_cover_crop_and_to_pixels_want_plain_colours():
    with pytest.raises(ValueError, match="mode P"):
        cover_crop(picture("P"), (16, 16))
    with pytest.raises(ValueError, match="mode L"):
        to_pixels(picture("L"))


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_conversion_comes_before_resizing(mode, tmp_path):
    """The reference resizes a palette's indices, and colours weighted by alpha; a picture should look like itself."""
    image = picture(mode, 40, 30)
    ours, _ = cover_crop(as_rgb(image), (64, 64))
    theirs, _ = cover_crop(image.convert("RGB"), (64, 64))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    save_png(picture(), tmp_path / "picture.png")
    assert np.array_equal(to_pixels(open_picture(tmp_path / "picture.png")), noise())
    with pytest.raises(PictureError, match="nowhere/picture.png cannot be written"):
        save_png(picture(), tmp_path / "nowhere" / "picture.png")

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(PictureError, match="picture.png cannot be written: No space"):
        save_png(Image.new("RGB", (1, 1)), tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert np.array_equal(to_pixels(open_picture(tmp_path / "picture.png")), noise())


def test_pixels_go_there_and_back():
    assert np.array_equal(to_pixels(from_pixels(noise())), noise())


@pytest.mark.parity
def test_pixels_to_unit_equals_the_reference():
    torch = pytest.importorskip("torch")
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    ours = np.asarray(pixels_to_unit(jnp.asarray(every)))
    theirs = torch.from_numpy(every).to(torch.float32) / 127.5 - 1.0  # prepare_latents in pipeline_joyimage_edit.py
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs.numpy()).max() <= 1.2e-7  # XLA multiplies by 1/127.5
    assert ours.min() == -1
    assert ours.max() == 1
