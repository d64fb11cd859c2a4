"""Result files of every format: the one that the suffix names, with the recipe, or refused."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from joyjax.errors import JoyJaxError, PictureError, RequestError
from joyjax.media.formats import FORMATS, SUFFIXES, check_quality, encode, format_of
from joyjax.media.metadata import MOST_IN_JPEG, Texts, read_recipe_text

SUFFIX = sorted(SUFFIXES)
KEEPS_PIXELS = (".png", ".tif", ".tiff", ".webp")
AWKWARD = json.dumps({"prompt": '赤 \x7f\x85\ufffe <&>"\' ]]> joyjax:recipe="no"', "end": 1}, ensure_ascii=False)


def noise(height: int = 24, width: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def written(folder: Path, suffix: str, recipe: str = AWKWARD, **options) -> Path:
    path = folder / f"edit{suffix}"
    path.write_bytes(encode(noise(), format_of(path), texts=Texts(recipe, "make it 赤\nSteps: 4"), **options))
    return path


@pytest.mark.parametrize("suffix", SUFFIX)
def test_a_recipe_comes_back(tmp_path, suffix):
    path = written(tmp_path, suffix)
    assert json.loads(read_recipe_text(path)) == json.loads(AWKWARD)
    with Image.open(path) as image:
        image.load()
        assert image.format == SUFFIXES[suffix].name
        assert (np.asarray(image) == np.asarray(noise())).all() == (suffix in KEEPS_PIXELS)
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(0x9286, b"")
    if SUFFIXES[suffix].name in ("JPEG", "WEBP", "AVIF"):  # as the web UIs read it
        assert comment == b"UNICODE\0" + "make it 赤\nSteps: 4".encode("utf-16-be")


@pytest.mark.parametrize("suffix", SUFFIX)
def test_a_colour_profile_stays_and_without_a_recipe_nothing_is_said(tmp_path, suffix):
    path, image = tmp_path / f"edit{suffix}", noise()
    image.info["icc_profile"] = b"a profile" * 20
    path.write_bytes(encode(image, format_of(path)))
    assert Image.open(path).info["icc_profile"] == b"a profile" * 20
    with pytest.raises(RequestError, match="holds no recipe"):
        read_recipe_text(path)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_quality_decides_the_size(tmp_path, suffix):
    sizes = [len(encode(noise(96, 96), SUFFIXES[suffix], quality=quality)) for quality in (10, 60, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_webp_is_lossless_unless_a_quality_is_given():
    plain, asked = (encode(noise(), SUFFIXES[".webp"], quality=quality) for quality in (None, "lossless"))
    assert plain == asked
    assert len(encode(noise(), SUFFIXES[".webp"], quality=90)) < len(plain)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("quality", [0, 101, -1, 3.5, True, "best", "90", "", b"90"])
def test_an_invalid_quality_is_refused(form, quality):
    with pytest.raises(RequestError, match="quality is .*; expected a whole number from 1 to 100, or 'lossless'"):
        check_quality(quality, form)


@pytest.mark.parametrize(
    ("suffix", "quality", "says"),
    [
        (".png", 80, r"quality is 80, but .png files are lossless; leave it out"),
        (".tiff", 80, r"but .tif files are lossless"),
        (".jpg", "lossless", r"but .jpg files lose detail; name a .png"),
        (".avif", "lossless", r"but .avif files lose detail"),
    ],
)
def test_a_quality_that_a_format_does_not_have(suffix, quality, says):
    with pytest.raises(RequestError, match=says):
        check_quality(quality, SUFFIXES[suffix])


@pytest.mark.parametrize("name", ["edit", "edit.", ".png", "edit.bmp", "edit.gif", "edit.png.txt", "edit.heic", "a/b"])
def test_a_suffix_that_names_no_format(name):
    with pytest.raises(RequestError, match=r"(has no suffix|ends in \.\w*); name a file that ends in .png, .jpg"):
        format_of(name)


def test_a_suffix_in_capitals():
    assert format_of("A.JPG").name == "JPEG"


def test_a_pillow_without_a_format(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(RequestError, match="this Pillow was built without AVIF"):
        format_of("a.avif")


def test_a_recipe_that_a_jpeg_cannot_hold(tmp_path):
    for length in (MOST_IN_JPEG - 500, MOST_IN_JPEG):
        recipe = json.dumps({"prompt": "x" * length})
        for suffix in (".png", ".webp", ".tiff"):
            assert read_recipe_text(written(tmp_path, suffix, recipe)) == recipe
    assert written(tmp_path, ".jpg", json.dumps({"prompt": "x" * (MOST_IN_JPEG - 1000)}))
    with pytest.raises(RequestError, match="bytes and a JPEG file holds 65,000; write a PNG file, or leave"):
        written(tmp_path, ".jpg", recipe)


@pytest.mark.parametrize(("suffix", "side"), [(".jpg", 65_501), (".webp", 16_384), (".avif", 65_501)])
def test_a_picture_that_a_format_cannot_hold(suffix, side):
    with pytest.raises(PictureError, match=f"{side} × 1 pixels and a {suffix} file at most"):
        encode(Image.new("RGB", (side, 1)), SUFFIXES[suffix])


def test_what_pillow_refuses_is_an_error_of_ours(monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(PictureError, match="cannot be written as .webp: no; name a .png"):
        encode(noise(), SUFFIXES[".webp"])


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        ('<d joyjax:recipe="{&quot;a&quot;: 1}"/>', '{"a": 1}'),
        ("<d joyjax:recipe='{&quot;a&quot;: 1}'/>", '{"a": 1}'),
        ("<joyjax:recipe>{&quot;a&quot;: 1}</joyjax:recipe>", '{"a": 1}'),  # as some programs write XMP anew
        ('<!DOCTYPE x [<!ENTITY a "b">]><d joyjax:recipe="&a;&amp;"/>', "&a;&"),  # no entity is expanded
        ('<d joyjax:recipe=""/>', ""),
        ("<d joyjax:recipe=", None),
        ("", None),
        ("<d xmlns:joyjax='x'/>", None),
        ("\0" * 1000, None),
    ],
)
def test_xmp_of_others(tmp_path, packet, found):
    noise().save(tmp_path / "a.webp", xmp=packet.encode())
    if found is None:
        with pytest.raises(RequestError, match="holds no recipe"):
            read_recipe_text(tmp_path / "a.webp")
    else:
        assert read_recipe_text(tmp_path / "a.webp") == found


@pytest.mark.parametrize("suffix", SUFFIX)
def test_a_damaged_file_is_refused_or_as_it_was(tmp_path, suffix):
    whole = written(tmp_path, suffix).read_bytes()
    damaged = tmp_path / f"damaged{suffix}"
    pieces = [whole[:length] for length in range(0, len(whole), 53)]
    pieces += [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(0, len(whole), 31)]
    said = []
    for piece in pieces:
        damaged.write_bytes(piece)
        try:
            read_recipe_text(damaged)
        except JoyJaxError as error:
            said.append(str(error))
    assert said
    assert all(str(damaged) in text for text in said)


def test_files_without_a_recipe(tmp_path):
    with pytest.raises(PictureError, match="none.jpg does not exist"):
        read_recipe_text(tmp_path / "none.jpg")
    noise().save(tmp_path / "a.bmp")
    with pytest.raises(RequestError, match="a.bmp is not a picture in a format that joyjax writes"):
        read_recipe_text(tmp_path / "a.bmp")


@pytest.fixture(scope="module")
def result():
    """An edit by the demo, of a picture in memory."""
    import warnings

    import joyjax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return joyjax.edit(joyjax.load(dtype="float32"), noise(64, 64), "make the red circle blue", steps=1)


@pytest.mark.parametrize("suffix", SUFFIX)
def test_a_result_is_saved_as_its_suffix_says(tmp_path, result, suffix):
    from joyjax.provenance.recipe import read_recipe

    path = tmp_path / f"edit{suffix}"
    result.save(path)
    with Image.open(path) as image:
        assert image.format == SUFFIXES[suffix].name
        assert image.size == result.image.size
    assert read_recipe(path)["settings"]["prompt"] == "make the red circle blue"
    result.save(path, metadata=False)
    with pytest.raises(RequestError, match="holds no recipe"):
        read_recipe(path)
    for name in ("edit", "edit.bmp"):
        with pytest.raises(RequestError, match="name a file that ends in"):
            result.save(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_result_is_never_saved_over_what_it_was_made_from(tmp_path, result):
    from joyjax.media.references import Source

    noise().save(tmp_path / "photo.png")
    (tmp_path / "link.png").symlink_to("photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    source = Source.of(Image.open(tmp_path / "photo.png"))
    for made in (
        dataclasses.replace(result, references=(source,)),
        dataclasses.replace(result, mask=source),
    ):
        for name in ("photo.png", "link.png", "../" + tmp_path.name + "/photo.png"):
            with pytest.raises(RequestError, match="a picture that this edit was made from, and would be replaced"):
                made.save(tmp_path / name)
        made.save(tmp_path / "other.png")
    assert (tmp_path / "photo.png").read_bytes() == before


def test_a_folder_that_is_full_or_missing(tmp_path, result, monkeypatch):
    with pytest.raises(PictureError, match="nowhere/edit.png cannot be written: No such file"):
        result.save(tmp_path / "nowhere" / "edit.png")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    for suffix in SUFFIX:
        with pytest.raises(PictureError, match=f"edit{suffix} cannot be written: No space left"):
            result.save(tmp_path / f"edit{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_name_holds_although_the_folder_changes(tmp_path, result, monkeypatch):
    """`os.chdir` between `Image.open`, `edit` and `save`."""
    from joyjax.media.references import Source

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        noise(8, 8 if folder == "here" else 9).save(tmp_path / folder / "shapes.png")
    monkeypatch.chdir(tmp_path / "here")
    opened = Image.open("shapes.png")
    source = Source.of(opened)
    assert source.file == tmp_path / "here" / "shapes.png"
    late = Image.open("shapes.png")
    os.chdir(tmp_path / "there")
    assert source.plain(tmp_path)["file"] == "here/shapes.png"
    assert Source.of(late).file is None  # another picture has that name here
    os.chdir(tmp_path)
    late.load()
    assert Source.of(late).file is None  # and here none has
