"""Pictures: what can be read, what is refused, and buckets."""

import functools
import os
import re
import struct
import sys
import warnings
import zlib
from io import BytesIO

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pictures import (
    COLOUR16,
    FLOAT_AS_TEXT,
    MODES,
    RGB_FORM,
    SCALED,
    decoded,
    encoded,
    exif,
    frames,
    noise,
    picture,
    png,
    png_chunk,
    png_that_claims,
    tiff,
)
from PIL import Image, ImageCms, PngImagePlugin

from joyjax.errors import PictureError, RequestError
from joyjax.families.joyimage_buckets import buckets, nearest_bucket
from joyjax.layers.patch import pixels_to_unit
from joyjax.media.dropped import dropped
from joyjax.media.frames import frames_note
from joyjax.media.image import (
    MAX_PIXELS,
    alpha_channel,
    as_rgb,
    decode_picture,
    from_pixels,
    open_picture,
    rgb_profile,
    to_pixels,
    upright,
)

BROKEN = {  # files that are refused, and a word of the reason
    "empty": (lambda: b"", "is empty"),
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
    "png, a profile that unpacks to 100 MB": (
        lambda: png(8, 2, 1, [bytes(3)], (b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "cannot be read",
    ),
    "png, text behind the picture that unpacks to 100 MB": (
        lambda: png(8, 2, 1, [bytes(3)])[:-12] + png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(10**8))),
        "broken",
    ),
    "tiff, grey of 12 bits": (lambda: tiff(2, 1, 12, 1, b"\xff\xf8\0"), "other than 16 bits"),
    "tiff, grey of 16 bits whose 0 is white": (lambda: tiff(2, 1, 16, 0, bytes(4)), "white as 0"),
    "eps, which is a program": (lambda: encoded(picture(), "EPS"), "EPS"),
}


def claiming(data: bytes, *places: tuple[bytes, int, str]) -> bytes:
    """The file with a width and height put in: behind a mark, so many bytes on, in a format."""
    for mark, further, numbers in places:
        count = struct.calcsize(numbers) // struct.calcsize(numbers[0] + numbers[-1])
        at = data.index(mark) + further
        side = {"H": 65_000, "I": 100_000, "i": 100_000}[numbers[-1]]
        packed = struct.pack(numbers, *[side] * count)
        data = data[:at] + packed + data[at + len(packed) :]
    return data


CLAIMS = {  # small files of every format that say they are huge
    "png": lambda: png_that_claims(100_000, 100_000),
    "png, the most it can say": lambda: png_that_claims(2**31 - 1, 2**31 - 1),
    "jpeg": lambda: claiming(encoded(picture(), "JPEG"), (b"\xff\xc0", 5, ">HH")),
    "tiff": lambda: tiff(100_000, 100_000, 8, 1, bytes(9)),
    "gif": lambda: claiming(encoded(picture("P"), "GIF"), (b"GIF8", 6, "<HH")),
    "gif, a frame beyond the screen": lambda: claiming(encoded(picture("P"), "GIF"), (b",\0\0\0\0", 5, "<HH")),
    "webp": lambda: encoded(picture("RGBA"), "WEBP", exif=exif(1)).replace(
        (6).to_bytes(3, "little") + (4).to_bytes(3, "little"), b"\xff\x3f\0" * 2
    ),
    "bmp": lambda: claiming(encoded(picture(), "BMP"), (b"BM", 18, "<ii")),
    "ppm": lambda: b"P6\n100000 100000\n255\n",
    "tga": lambda: claiming(encoded(picture(), "TGA"), (b"", 12, "<HH")),
    "jpeg 2000": lambda: claiming(encoded(picture(), "JPEG2000"), (b"ihdr", 4, ">II"), (b"\xff\x4f\xff\x51", 8, ">II")),
    "ico, a png inside": lambda: (
        struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, 99, 22) + png_that_claims(20_000, 20_000)
    ),
}


def iso(brand: bytes, *compatible: bytes) -> bytes:
    """The start of an ISO media file: HEIC, AVIF, MP4 and others."""
    brands = brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100)


def tiff_with(**tags: object) -> bytes:
    return encoded(picture(), "TIFF", tiffinfo={int(name.removeprefix("t")): value for name, value in tags.items()})


OTHERS = {  # files that are no picture for joyjax: what they are, and what to do
    "cr2": (lambda: tiff(2, 1, 8, 1, b"CR\2\0"), "RAW photo .Canon CR2.; develop it"),
    "cr3": (lambda: iso(b"crx "), "RAW photo .Canon CR3.; develop it"),
    "dng": (lambda: tiff_with(t50706=b"\1\4\0\0"), "RAW photo .DNG.; develop it"),
    "nef, arw": (lambda: tiff_with(t254=1), "begins with a small preview .*develop it"),
    "raf": (lambda: b"FUJIFILMCCD-RAW 0201" + bytes(99), "RAW photo .Fujifilm RAF."),
    "orf": (lambda: b"IIRO\x08\0\0\0" + bytes(99), "RAW photo .Olympus ORF."),
    "rw2": (lambda: b"IIU\0\x18\0\0\0" + bytes(99), "RAW photo .Panasonic RW2."),
    "pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3", "PDF document; save the page as PNG"),
    "pdf behind a mark": (lambda: b"\xef\xbb\xbf\n%PDF-1.7\n", "PDF document"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing; export it as PNG"),
    "svg, with a head": (
        lambda: b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- by\nme -->\n<!DOCTYPE svg>\n<svg/>',
        "SVG drawing; export it as PNG",
    ),
    "psd": (lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2, 2, 8, 3) + bytes(99), "Photoshop.*as PNG"),
    "xcf": (lambda: b"gimp xcf v011\0" + bytes(99), "GIMP document; export"),
    "mp4": (lambda: iso(b"isom", b"avc1"), "video .MP4 or QuickTime.; save one frame"),
    "mov": (lambda: iso(b"qt  "), "video .MP4 or QuickTime.; save one frame"),
    "webm": (lambda: b"\x1aE\xdf\xa3" + bytes(99), "video .Matroska or WebM.; save one frame"),
    "avi": (lambda: b"RIFF\0\0\0\0AVI LIST" + bytes(99), "video .AVI.; save one frame"),
    "mpeg": (lambda: b"\0\0\1\xb3\x14\0\xf0" + bytes(99), "video .MPEG.; save one frame"),
    "jpeg xl": (lambda: b"\xff\x0a" + bytes(99), "JPEG XL picture; save it as PNG"),
    "html": (lambda: b"\n<!-- x --><!doctype HTML><html>", "HTML page, not a picture; open it in a browser"),
    "zip": (lambda: b"PK\3\4" + bytes(99), "ZIP archive"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), "gzip; unpack it"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "macos": (lambda: b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(99), "a file of macOS metadata"),
    "nothing": (lambda: b"", "is empty$"),
}


def without_reader(monkeypatch, kind: str) -> None:
    """Pillow as it is where it has no reader of a format."""
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {name: value for name, value in Image.OPEN.items() if name != kind})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != kind])


UNUSABLE = {  # what may come in place of a Pillow picture, and a word of the reason
    "floating point": (lambda: Image.new("F", (3, 2)), "floating-point"),
    "more than 16 bits": (lambda: Image.fromarray(np.array([[0, 65536]], np.int32)), "65536"),
    "negative": (lambda: Image.fromarray(np.array([[0, -1]], np.int32)), "-1"),
    "grey times alpha": (lambda: Image.new("La", (3, 2)), "La"),
    "empty": (lambda: Image.new("RGB", (0, 2)), "empty"),
    "palette with too many alphas": (
        lambda: decoded(png(8, 3, 2, [b"\1\2"], (b"PLTE", bytes(30)), (b"tRNS", bytes(300)))),
        "mode P has no RGB form",
    ),
    "array": (lambda: noise(), "ndarray; expected a PIL.Image"),
    "path": (lambda: "picture.png", "str; expected a PIL.Image"),
    "none": (lambda: None, "NoneType"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
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


@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_picture_says_what_it_is(name, tmp_path):
    make, says = OTHERS[name]
    path = tmp_path / "picture"
    path.write_bytes(make())
    with pytest.raises(PictureError, match=f"^{re.escape(str(path))} .*{says}") as caught:
        open_picture(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match=says):
        decode_picture(BytesIO(make()), "standard input")


def test_a_tiff_with_small_pages_behind_its_picture_is_read(tmp_path):
    pages = [picture("RGB", 40, 30), picture("RGB", 4, 3)]
    pages[0].save(tmp_path / "picture.tif", save_all=True, append_images=pages[1:], tiffinfo={254: 0})
    assert open_picture(tmp_path / "picture.tif").size == (30, 40)


def test_heic_is_read(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    sides = np.zeros((32, 64, 3), np.uint8)
    sides[:, :32] = 200
    with pytest.MonkeyPatch.context() as patch:
        Image.fromarray(sides).save(tmp_path / "photo.heic", "HEIF", quality=90, exif=exif(6))
        without_reader(patch, "HEIF")  # it is found by itself
        image = as_rgb(open_picture(tmp_path / "photo.heic"))
    assert image.size == (32, 64)  # turned once: by the format, and not by EXIF once more
    bright = np.asarray(image)[:, :, 0] > 100
    assert bright[2:30].all()
    assert not bright[34:].any()
    data = (tmp_path / "photo.heic").read_bytes()
    (tmp_path / "photo.heic").write_bytes(data[: len(data) // 2])
    with pytest.raises(PictureError, match=r"photo.heic .*(cannot be read|broken)"):
        open_picture(tmp_path / "photo.heic")


@pytest.mark.parametrize("brands", [(b"heic", b"mif1"), (b"mif1", b"heic"), (b"msf1",), (b"hevc",)])
def test_heic_without_its_extra_names_it(brands, tmp_path, monkeypatch):
    without_reader(monkeypatch, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    (tmp_path / "photo.heic").write_bytes(iso(*brands))
    with pytest.raises(PictureError, match=r"photo.heic is a HEIC picture.*`pip install 'joyjax\[heic\]'`"):
        open_picture(tmp_path / "photo.heic")


@pytest.mark.parametrize("brands", [(b"avif",), (b"mif1", b"avif", b"miaf"), (b"avis",)])
def test_avif_where_pillow_has_none_says_so(brands, tmp_path, monkeypatch):
    without_reader(monkeypatch, "AVIF")
    (tmp_path / "photo.avif").write_bytes(iso(*brands))
    with pytest.raises(PictureError, match=r"photo.avif is an AVIF picture, which Pillow [\d.]+ cannot read.*pillow>="):
        open_picture(tmp_path / "photo.avif")


FRAMES = {  # files, and the note of their frames
    "one": (lambda: encoded(picture(), "PNG"), ""),
    "one gif": (lambda: encoded(picture("P"), "GIF"), ""),
    "one page": (lambda: encoded(picture(), "TIFF"), ""),
    "gif": (lambda: frames("GIF"), "frame 1 of 2 is used"),
    "png": (lambda: frames("PNG"), "frame 1 of 2 is used"),
    "webp": (lambda: frames("WEBP", lossless=True), "frame 1 of 2 is used"),
    "tiff": (lambda: frames("TIFF"), "page 1 of 2 is used"),
    "mpo": (lambda: frames("MPO"), "picture 1 of 2 is used"),
    "mpo, a gain map": (lambda: frames("MPO", xmp=b"<x hdrgm:Version='1.0'/>"), "its HDR gain map is not used"),
    "gif, broken behind": (lambda: frames("GIF")[:-8] + b"\0" * 8, None),
}


@pytest.mark.parametrize("name", FRAMES)
def test_further_frames_are_noted(name, tmp_path, monkeypatch):
    make, note = FRAMES[name]
    (tmp_path / "picture").write_bytes(make())
    read = open_picture(tmp_path / "picture")
    assert frames_note(read) == (frames_note(read) if note is None else note)
    if note is not None:
        assert frames_note(decode_picture(BytesIO(make()), "standard input")) == note
        assert frames_note(decoded(make())) == note
        with Image.open(tmp_path / "picture") as image:
            assert frames_note(image) == note
    assert as_rgb(read).size == (7, 5)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_counting_frames_leaves_the_callers_picture_alone(kind, tmp_path):
    """It was drawn on, is at its second frame, or its file is closed: it stays so, and can still be used."""
    (tmp_path / "picture").write_bytes(frames(kind))
    for opened in (Image.open(tmp_path / "picture"), decoded(frames(kind))):
        opened.load()
        opened.paste(1, (0, 0, 3, 3))
        drawn = opened.tobytes()
        frames_note(opened)
        assert (opened.tobytes(), opened.tell()) == (drawn, 0)
        opened.seek(1)
        assert " 2 of 2 is used" in frames_note(opened)
        assert opened.tell() == 1
    with Image.open(tmp_path / "picture") as closed:
        closed.load()
    before = closed.tobytes()
    frames_note(closed)
    assert as_rgb(closed).size == (7, 5)
    assert closed.tobytes() == before


def test_many_frames_are_not_counted_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("joyjax.media.frames.MOST_PAGES", 2)
    monkeypatch.setattr("joyjax.media.frames.LARGEST_GIF", 100)
    pages = [picture(), picture(), picture()]
    (tmp_path / "a.tif").write_bytes(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert frames_note(open_picture(tmp_path / "a.tif")) == "page 1 of several is used"
    (tmp_path / "a.gif").write_bytes(frames("GIF"))
    assert frames_note(open_picture(tmp_path / "a.gif")) == "frame 1 of several is used"
    (tmp_path / "a.gif").write_bytes(encoded(picture("P"), "GIF"))
    assert frames_note(open_picture(tmp_path / "a.gif")) == ""


def opaque(mode: str) -> Image.Image:
    image = picture(mode)
    image.putalpha(255)
    return image


def test_transparency_that_is_dropped_is_noted(tmp_path):
    def lines(*pictures, keeps=False):
        return dropped(pictures, last_keeps_alpha=keeps)

    says = "transparent, which models do not see: the colours beneath show"
    picture("RGBA").save(tmp_path / "photo.png")
    read = open_picture(tmp_path / "photo.png")
    assert lines(read) == [f"photo.png is partly {says}"]
    assert lines(Image.open(tmp_path / "photo.png")) == [f"photo.png is partly {says}"]
    assert lines(picture("LA")) == [f"the picture is partly {says}"]
    assert lines(picture(), picture("RGBA")) == [f"reference 2 is partly {says}"]
    assert lines(Image.new("RGBA", (3, 2))) == [f"the picture is wholly {says}"]
    assert lines(decoded(encoded(Image.new("P", (2, 1)), "GIF", transparency=0))) == [f"the picture is wholly {says}"]
    assert lines(read, keeps=True) == []  # it is in the result again
    assert lines(read, picture(), keeps=True) == [f"photo.png is partly {says}"]
    for image in (picture(), picture("P"), opaque("L"), opaque("RGB"), Image.new("RGB", (1, 1))):
        assert lines(image) == []
    (tmp_path / "anim.gif").write_bytes(frames("GIF"))
    assert lines(open_picture(tmp_path / "anim.gif"), keeps=True) == ["anim.gif: frame 1 of 2 is used"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_huge_picture_is_refused_by_its_header(name, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(CLAIMS[name]())
    assert path.stat().st_size < 2000
    with pytest.raises(PictureError, match=f"(?s){re.escape(str(path))}.*(too large|could not create decoder)"):
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("key", ["exif", "xmp"])
def test_a_photo_is_upright_even_if_its_metadata_cannot_be_written_again(kind, key, tmp_path):
    """Pillow's own exif_transpose fails there, which left the photo on its side; nor must it be turned twice."""
    path = tmp_path / "picture"
    options = {"exif": exif(6, FLOAT_AS_TEXT)}
    if key == "xmp":
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        if kind == "PNG":
            options = {"pnginfo": PngImagePlugin.PngInfo()}
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
        else:
            options = {"xmp": xmp}
    stored = Image.fromarray(np.repeat(np.arange(0, 240, 30, np.uint8)[:, None], 16, axis=1))  # bright below
    stored.convert("RGB").save(path, kind, **options)
    if decoded(path.read_bytes()).getexif().get(0x0112) != 6:
        pytest.skip("this Pillow reads no XMP there")
    for image in (open_picture(path), as_rgb(Image.open(path)), as_rgb(open_picture(path)), upright(Image.open(path))):
        assert image.size == (8, 16)
        row = np.asarray(image.convert("L"))[8]
        assert row[0] > 190
        assert row[-1] < 20


def test_a_tiff_is_rotated_once(tmp_path):
    picture("RGB", 8, 16).save(tmp_path / "picture.tif", tiffinfo={274: 6})
    expected = np.rot90(noise(8, 16), -1)
    assert np.array_equal(to_pixels(as_rgb(open_picture(tmp_path / "picture.tif"))), expected)
    with Image.open(tmp_path / "picture.tif") as image:
        assert np.array_equal(to_pixels(as_rgb(upright(image))), expected)


def test_of_16_bits_a_colour_the_high_ones_are_read():
    image = as_rgb(decoded(png(16, 2, 2, [COLOUR16.astype(">u2").tobytes()])))
    assert np.array_equal(to_pixels(image), (COLOUR16 >> 8).astype(np.uint8))


def test_colours_are_what_they_are_called(tmp_path):
    """By name, for where Pillow on both sides of a comparison would be wrong alike."""
    cyan = Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in (255, 0, 0, 0)])
    for kind in ("JPEG", "TIFF"):  # in a JPEG it is stored inverted, as Adobe began to
        assert as_rgb(decoded(encoded(cyan, kind))).getpixel((3, 3)) == (0, 255, 255)
    assert to_pixels(as_rgb(decoded(tiff(3, 1, 8, 0, b"\0\x40\xff"))))[0, :, 0].tolist() == [255, 191, 0]
    assert to_pixels(as_rgb(decoded(png(2, 0, 4, [b"\x1b"]))))[0, :, 0].tolist() == [0, 85, 170, 255]
    gamma = png(8, 2, 2, [bytes(range(6))], (b"gAMA", struct.pack(">I", 100_000)))  # what it says changes nothing
    assert to_pixels(as_rgb(decoded(gamma))).ravel().tolist() == list(range(6))
    for kind in ("PNG", "GIF", "TIFF", "WEBP", "MPO"):
        first = as_rgb(decoded(frames(kind, **({"lossless": True} if kind == "WEBP" else {}))))
        assert len(np.unique(to_pixels(first))) > 5, "the second frame is of one colour"


def test_a_wrong_name_matters_nothing(tmp_path):
    (tmp_path / "picture.png").write_bytes(encoded(picture("RGB", 16, 16), "JPEG"))
    assert open_picture(tmp_path / "picture.png").size == (16, 16)


def test_broken_metadata_makes_no_warning(tmp_path):
    (tmp_path / "picture").write_bytes(encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_rgb(open_picture(tmp_path / "picture"))


ALPHA = {  # pictures, and their transparency
    "rgba": (lambda: picture("RGBA"), noise(channels=4)[..., 3]),
    "grey": (lambda: picture("LA"), noise(channels=2)[..., 1]),
    "palette and alpha": (lambda: picture("PA"), noise(channels=2)[..., 1]),
    "table": (lambda: decoded(encoded(picture("P"), "PNG", transparency=bytes(range(256)))), np.asarray(picture("P"))),
    "one of a palette": (
        lambda: decoded(png(8, 3, 3, [b"\0\1\2"], (b"PLTE", bytes(9)), (b"tRNS", b"\xff\0"))),
        [[255, 0, 255]],
    ),
    "gif": (lambda: decoded(encoded(Image.new("P", (2, 1)), "GIF", transparency=0)), [[0, 0]]),
    "a grey": (lambda: decoded(png(8, 0, 3, [b"\0\1\2"], (b"tRNS", b"\0\1"))), [[255, 0, 255]]),
    "a colour": (lambda: decoded(png(8, 2, 2, [bytes(range(6))], (b"tRNS", b"\0\3\0\4\0\5"))), [[255, 0]]),
    "a grey of 16 bits": (
        lambda: decoded(png(16, 0, 3, [struct.pack(">3H", 300, 301, 44)], (b"tRNS", struct.pack(">H", 300)))),
        [[0, 255, 255]],
    ),
    "a colour of 16 bits": (
        lambda: decoded(
            png(16, 2, 2, [COLOUR16.astype(">u2").tobytes()], (b"tRNS", COLOUR16[0, 1].astype(">u2").tobytes()))
        ),
        [[255, 0]],
    ),
    "times alpha": (lambda: picture("RGBA").convert("RGBa"), noise(channels=4)[..., 3]),
    "webp": (lambda: decoded(encoded(picture("RGBA"), "WEBP", lossless=True)), noise(channels=4)[..., 3]),
}


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_in_every_form(name):
    make, expected = ALPHA[name]
    assert np.array_equal(np.asarray(alpha_channel(upright(make()))), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I", "I;16"])
def test_an_opaque_picture_has_no_transparency(mode):
    assert alpha_channel(Image.new(mode, (2, 1))) is None


@functools.cache  # it holds the time that it was made at
def profile(space: bytes) -> bytes:
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[16:20] = space
    return bytes(data)


def test_only_a_profile_of_rgb_data_is_kept(tmp_path):
    image = picture()
    assert rgb_profile(image) is None
    for kind, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {"exif": exif(6)}), ("TIFF", {})):
        picture().save(tmp_path / "picture", kind, icc_profile=profile(b"RGB "), **options)
        assert rgb_profile(open_picture(tmp_path / "picture")) == profile(b"RGB ")
    for other in (profile(b"CMYK"), profile(b"GRAY"), b"", b"profile", bytes(16) + b"RGB ", "RGB ", None):
        image.info["icc_profile"] = other
        assert rgb_profile(image) is None


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


def test_to_pixels_wants_rgb():
    with pytest.raises(ValueError, match="mode L"):
        to_pixels(picture("L"))


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
