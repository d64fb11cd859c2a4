"""The user's picture is respected: fitting, and the way back into the picture, for pictures of every kind."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pictures import MODES, RGB_FORM, SCALED, decoded, encoded, exif, noise, picture
from PIL import Image

from joyjax.errors import PictureError
from joyjax.families.joyimage_buckets import buckets, nearest_bucket
from joyjax.media.framing import contain_pad, cover_crop, fit_picture, paste_back, pasted_region, unpad
from joyjax.media.image import alpha_channel, as_rgb, open_picture, rgb_profile, upright
from joyjax.media.mask import check_mask
from joyjax.options import FITS

BILINEAR = Image.Resampling.BILINEAR
SIDES = st.integers(1, 90)
PLACES = st.floats(0.35, 0.65)  # in what is left of a picture, as a share of its side
SIZES = st.sampled_from([(32, 128), (64, 48), (48, 64), (64, 64), (80, 48), (128, 32)])

ODD = {f"file: {name}": lambda make=make: decoded(make()) for name, make in RGB_FORM.items()}
ODD |= {f"16-bit grey: {name}": lambda make=make: decoded(make()) for name, (make, _) in SCALED.items()}
ODD |= {f"mode {mode}": lambda mode=mode: picture(mode, 40, 50) for mode in MODES}
ODD |= {
    f"{width} × {height}": lambda h=height, w=width: picture("RGB", h, w)
    for height, width in [
        (1, 1),
        (3, 2),
        (1, 4),
        (64, 64),
        (65, 64),
        (64, 65),
        (63, 64),
        (200, 40),
        (40, 200),
        (100, 800),
        (511, 13),
    ]
}
ODD |= {
    f"a photo transpose_kernels, EXIF {n}": lambda n=n: decoded(encoded(picture("RGB", 30, 40), "PNG", exif=exif(n)))
    for n in range(1, 9)
}


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int32)


def smooth(height: int, width: int) -> Image.Image:
    """A picture of three slow waves."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(6 * x + 2 * y), np.cos(5 * y), np.sin(4 * (x + y) + 1)], axis=-1)
    return Image.fromarray(np.round(127.5 + 100 * waves).astype(np.uint8))


def changed(image: Image.Image) -> Image.Image:
    """What an edit might return: another picture of the same size, far from this one everywhere."""
    return Image.fromarray(np.asarray(image) ^ np.uint8(128))


def too_thin(height: int, width: int, size: tuple[int, int]) -> bool:
    return min(height, width) * min(size[0] / height, size[1] / width) < 1


def halves(image: Image.Image) -> Image.Image:
    """A mask over the left half: white, with one column of grey at its right if there is room."""
    mask = np.zeros((image.height, image.width), np.uint8)
    half = (image.width + 1) // 2
    mask[:, :half] = 255
    mask[:, half : half + 1] = 100
    return Image.fromarray(mask)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_goes_there_and_back(name, fit):
    image = ODD[name]()
    original = np.asarray(as_rgb(image))
    height, width = original.shape[:2]
    size = nearest_bucket(height, width, 64)
    if fit == "pad" and too_thin(height, width, size):
        with pytest.raises(PictureError, match="too thin to be seen"):
            fit_picture(as_rgb(image), size, fit)
        return
    fitted, crop = fit_picture(as_rgb(image), size, fit)
    assert (fitted.mode, (fitted.height, fitted.width)) == ("RGB", size)
    assert (crop.source, crop.size, crop.fit) == ((height, width), size, fit)
    assert crop.lost == 0 or fit == "crop"
    assert len(str(crop).splitlines()) == 1
    mask = check_mask(halves(upright(image)), image)
    for used in (None, mask):
        if fit == "crop" and crop.box[0] > 0 and width == 2:  # a part of either
            with pytest.raises(PictureError, match="no whole pixel"):
                paste_back(changed(fitted), image, crop, used)
            continue
        left, top, right, bottom = pasted_region(crop, used)
        result = paste_back(changed(fitted), image, crop, used)
        assert result.mode == ("RGBA" if upright(image).has_transparency_data else "RGB")
        assert (result.height, result.width) == (height, width)
        may_change = np.zeros((height, width), bool)
        may_change[top:bottom, left:right] = True
        if used is not None:
            may_change &= np.asarray(used) > 0
        ours = np.asarray(result)
        assert np.array_equal(ours[..., :3][~may_change], original[~may_change])
        assert not np.array_equal(ours[..., :3][may_change], original[may_change])
        if result.mode == "RGBA":
            assert np.array_equal(ours[..., 3], np.asarray(alpha_channel(upright(image))))


def test_there_are_many_odd_pictures():
    assert len(ODD) >= 80


# Fitting


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIZES)
def test_cover_crop_equals_the_reference(height, width, size):
    reference = pytest.importorskip("diffusers.pipelines.joyimage.image_processor")
    image = picture("RGB", height, width)
    theirs = reference.JoyImageEditImageProcessor().resize_center_crop(image, size)
    ours, _ = cover_crop(image, size)
    assert (ours.height, ours.width) == size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.array_equal(np.asarray(fit_picture(image, size, "crop")[0]), np.asarray(ours))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_crop_says_what_is_left(height, width, rows, columns):
    size = 16 * rows, 16 * columns
    _, crop = cover_crop(picture("L", height, width), size)
    left, top, right, bottom = crop.box
    assert (crop.source, crop.size, crop.fit) == ((height, width), size, "crop")
    assert crop.inner == (0, 0, size[1], size[0])
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


@pytest.mark.parametrize("fit", FITS)
def test_an_exact_fit_loses_nothing(fit):
    image = picture("RGB", 64, 48)
    fitted, crop = fit_picture(image, (64, 48), fit)
    assert np.array_equal(np.asarray(fitted), np.asarray(image))
    assert (crop.scale, crop.lost, crop.box, crop.inner) == (1.0, 0.0, (0.0, 0.0, 48.0, 64.0), (0, 0, 48, 64))


def test_a_hairline_is_refused_before_memory_is_taken():
    with pytest.raises(PictureError, match="30000 × 1 pixels is too thin to fill 2048 × 512"):
        cover_crop(Image.new("RGB", (30000, 1)), (512, 2048))
    with pytest.raises(PictureError, match="1 × 3000 pixels is too thin to be seen in 512 × 2048"):
        contain_pad(Image.new("RGB", (1, 3000)), (2048, 512))
    fitted, crop = contain_pad(picture("RGB", 2048, 1), (2048, 512))  # just not
    assert crop.inner == (255, 0, 256, 2048)
    assert (np.asarray(fitted) == noise(2048, 1)).all()


@pytest.mark.parametrize("fit", FITS)
def test_fitting_wants_plain_colours(fit):
    with pytest.raises(ValueError, match="mode P"):
        fit_picture(picture("P"), (16, 16), fit)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_conversion_comes_before_resizing(mode):
    """The reference resizes a palette's indices, and colours weighted by alpha; a picture should look like itself."""
    image = picture(mode, 40, 30)
    ours, _ = cover_crop(as_rgb(image), (64, 64))
    theirs, _ = cover_crop(image.convert("RGB"), (64, 64))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@given(SIDES, SIDES, SIZES, st.sampled_from(["RGB", "L"]))
@example(64, 64, (64, 64), "RGB")
@settings(deadline=None)
def test_padding_loses_nothing(height, width, size, mode):
    assume(not too_thin(height, width, size))
    image = picture(mode, height, width)
    fitted, crop = contain_pad(image, size)
    left, top, right, bottom = crop.inner
    # The whole picture is there, as plain resizing gives it, ...
    inside = unpad(fitted, crop)
    assert (inside.width, inside.height) == (right - left, bottom - top)
    assert np.array_equal(np.asarray(inside), np.asarray(image.resize(inside.size, BILINEAR)))
    assert (crop.box, crop.lost) == ((0, 0, width, height), 0)
    # ... as large as it can be in its own proportions, up to the rounding of a side, ...
    assert inside.height == size[0] or inside.width == size[1]
    assert abs(inside.height - height * crop.scale) <= 0.5 + 1e-9
    assert abs(inside.width - width * crop.scale) <= 0.5 + 1e-9
    # ... in the middle, with its border repeated outwards.
    assert size[1] - right - left in (0, 1)
    assert size[0] - bottom - top in (0, 1)
    rows = np.clip(np.arange(size[0]) - top, 0, inside.height - 1)
    columns = np.clip(np.arange(size[1]) - left, 0, inside.width - 1)
    assert np.array_equal(np.asarray(fitted), np.asarray(inside)[rows][:, columns])


def test_unpad_wants_the_fitted_size():
    _, crop = contain_pad(picture("RGB", 30, 90), (64, 64))
    with pytest.raises(ValueError, match=r"64 × 65 \(height × width\)"):
        unpad(Image.new("RGB", (65, 64)), crop)


LINES = {  # (height, width) → size, fit → the note for the user
    "a photo": (
        (800, 1200),
        (832, 1216),
        "crop",
        "picture 1200 × 800 → 1216 × 832, enlarged 1.04 times; "
        "2.6 % cropped: columns 15 to 1185 and rows 0 to 800 are left",
    ),
    "a banner": (
        (100, 800),
        (512, 2048),
        "crop",
        "picture 800 × 100 → 2048 × 512, enlarged 5.12 times; "
        "50.0 % cropped: columns 200 to 600 and rows 0 to 100 are left; --fit pad keeps all of it",
    ),
    "a banner, padded": (
        (100, 800),
        (512, 2048),
        "pad",
        "picture 800 × 100 → 2048 × 512, enlarged 2.56 times; nothing cropped; "
        "128 rows of padding above and 128 below are removed again",
    ),
    "a tower, padded": (
        (801, 100),
        (2048, 512),
        "pad",
        "picture 100 × 801 → 512 × 2048, enlarged 2.56 times; nothing cropped; "
        "128 columns of padding on the left and 128 on the right are removed again",
    ),
    "reduced": (
        (4096, 4096),
        (1024, 1024),
        "crop",
        "picture 4096 × 4096 → 1024 × 1024, reduced 4 times; nothing cropped",
    ),
    "as it is": ((64, 64), (64, 64), "pad", "picture 64 × 64, taken as it is"),
    "a border alone": (
        (64, 66),
        (64, 64),
        "crop",
        "picture 66 × 64 → 64 × 64; 3.0 % cropped: columns 1 to 65 and rows 0 to 64 are left",
    ),
    "by a hair": (
        (1023, 1024),
        (1024, 1024),
        "crop",
        "picture 1024 × 1023 → 1024 × 1024, enlarged slightly; "
        "0.2 % cropped: columns 1 to 1023 and rows 0 to 1023 are left",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_the_notes_of_a_fit(name):
    (height, width), size, fit, line = LINES[name]
    _, crop = fit_picture(Image.new("L", (width, height)), size, fit)
    assert str(crop) == line


# The way back


def centre(weights: np.ndarray) -> tuple[float, float]:
    """Row and column of the centre of gravity; the first pixel's own centre is at 0.5."""
    rows, columns = np.indices(weights.shape)
    return tuple(float((weights * (place + 0.5)).sum() / weights.sum()) for place in (rows, columns))


def blob(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / radius**2)


def to_fitted(crop, y: float, x: float) -> tuple[float, float]:
    """Where a point of the source is in the fitted picture, by what the crop says."""
    left, top, right, bottom = crop.box
    inner = crop.inner
    return (
        inner[1] + (y - top) * (inner[3] - inner[1]) / (bottom - top),
        inner[0] + (x - left) * (inner[2] - inner[0]) / (right - left),
    )


@given(
    st.integers(40, 200),
    st.integers(40, 200),
    SIZES,
    st.sampled_from(FITS),
    st.floats(0.35, 0.65),
    st.floats(0.35, 0.65),
)
@settings(deadline=None, max_examples=60)
def test_a_landmark_lands_where_the_crop_says(height, width, size, fit, down, along):
    _, crop = fit_picture(Image.new("L", (width, height)), size, fit)
    left, top, right, bottom = crop.box
    y, x = top + down * (bottom - top), left + along * (right - left)
    radius = min(bottom - top, right - left) / 10
    assume(radius * crop.scale > 1.5)  # a spot that the fitted picture can show
    source = Image.fromarray(np.round(blob(height, width, y, x, radius)).astype(np.uint8))
    fitted, _ = fit_picture(source, size, fit)
    expected = to_fitted(crop, y, x)
    assert centre(values(fitted)) == pytest.approx(expected, abs=0.5)
    # And back: a spot in the result stands in the picture where it was seen.
    spot = np.round(blob(*size, *expected, radius * crop.scale)).astype(np.uint8)
    edited = Image.fromarray(np.repeat(spot[..., None], 3, axis=-1))
    result = paste_back(edited, Image.new("RGB", (width, height)), crop)
    # Where one pixel of the result is many of the picture, half of the smaller kind.
    assert centre(values(result)[..., 0]) == pytest.approx((y, x), abs=0.5 * max(1, 1 / crop.scale) - 0.2)


@given(st.integers(1, 120), st.integers(1, 120), SIZES, st.sampled_from(FITS))
@example(105, 87, (32, 128), "crop")  # the box ends at 62.99999999999999
@example(133, 74, (32, 128), "crop")  # the box starts at 57.00000000000001
@example(87, 105, (128, 32), "crop")  # and the like in columns
@example(74, 133, (128, 32), "crop")
@settings(deadline=None)
def test_the_region_is_every_whole_pixel_that_is_left(height, width, size, fit):
    assume(fit == "crop" or not too_thin(height, width, size))
    _, crop = fit_picture(Image.new("L", (width, height)), size, fit)
    exact = [Fraction(side).limit_denominator(20_000) for side in crop.box]
    expected = [-(-exact[0] // 1), -(-exact[1] // 1), exact[2] // 1, exact[3] // 1]
    if expected[0] >= expected[2] or expected[1] >= expected[3]:
        with pytest.raises(PictureError, match="no whole pixel of a picture"):
            pasted_region(crop)
    else:
        assert list(pasted_region(crop)) == expected


@given(st.integers(64, 100), st.integers(64, 100), st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None, max_examples=40)
def test_pixels_of_one_size_are_not_resampled(height, width, seed, masked):
    """One side fits, the other is cut: scale 1, so every pixel that was edited comes back as it is."""
    image = picture("RGB", *((64, width) if seed % 2 else (height, 64)))
    _, crop = cover_crop(image, (64, 64))
    assert crop.scale == 1
    edited = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))
    left, top, right, bottom = pasted_region(crop)
    expected = np.array(image)
    mask = np.random.default_rng(seed + 1).integers(0, 256, expected.shape[:2], np.uint8)
    weights = mask if masked else np.full_like(mask, 255)
    inside = weights[top:bottom, left:right, None].astype(np.int64)
    mixed = expected[top:bottom, left:right] * (255 - inside) + np.asarray(edited) * inside
    expected[top:bottom, left:right] = np.round(mixed / 255)  # never a half: 255 is odd
    result = paste_back(edited, image, crop, Image.fromarray(mask) if masked else None)
    assert np.array_equal(np.asarray(result), expected)


@given(st.integers(20, 150), st.integers(20, 150), SIZES, st.sampled_from(FITS))
@settings(deadline=None)
def test_an_edit_that_changes_nothing_gives_the_picture_back(height, width, size, fit):
    image = smooth(height, width)
    fitted, crop = fit_picture(image, size, fit)
    assume(min(crop.inner[2] - crop.inner[0], crop.inner[3] - crop.inner[1]) >= 20)  # or else the waves are lost
    difference = np.abs(values(paste_back(fitted, image, crop)) - values(image))
    assert difference.mean() < 1.5
    assert difference.max() <= 20  # at the border, where bilinear scaling has less to go by


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_five_edits_in_a_row_leave_the_rest_untouched(fit, mode):
    image = first = picture(mode, 70, 123)
    mask = Image.new("L", first.size)
    mask.paste(255, (40, 20, 70, 50))
    mask.paste(90, (70, 20, 73, 50))
    for n in range(5):
        fitted, crop = fit_picture(as_rgb(image), nearest_bucket(image.height, image.width, 64), fit)
        edited = Image.fromarray(np.random.default_rng(n).integers(0, 256, np.asarray(fitted).shape, np.uint8))
        before, image = image, paste_back(edited, image, crop, check_mask(mask, image))
        inside = np.asarray(mask) > 0
        assert image.mode == mode
        assert np.array_equal(np.asarray(image)[~inside], np.asarray(first)[~inside])
        assert not np.array_equal(np.asarray(image)[inside], np.asarray(before)[inside])


@given(st.integers(2, 90), st.integers(2, 90), SIZES, st.sampled_from(FITS), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_nothing_outside_box_and_mask_is_touched(height, width, size, fit, seed):
    assume(not too_thin(height, width, size))
    image = picture("RGBA", height, width)
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 0, 1, 128, 255], np.uint8), (height, width))
    edited = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    _, crop = fit_picture(as_rgb(image), size, fit)
    try:
        left, top, right, bottom = pasted_region(crop, Image.fromarray(mask))
    except PictureError:
        return
    result = np.asarray(paste_back(edited, image, crop, Image.fromarray(mask)))
    whole = np.asarray(paste_back(edited, image, crop))
    weights = np.zeros((height, width, 1))
    weights[top:bottom, left:right, 0] = mask[top:bottom, left:right]
    before = np.asarray(image)
    assert np.array_equal(result[..., 3], before[..., 3])
    assert np.array_equal(result[..., :3], np.round((before * (255 - weights) + whole * weights) / 255)[..., :3])


def test_the_original_is_not_changed():
    image = picture("RGBA", 40, 50)
    image.info["transparency"] = b""
    before = image.copy()
    fitted, crop = contain_pad(as_rgb(image), (64, 64))
    paste_back(changed(fitted), image, crop)
    assert np.array_equal(np.asarray(image), np.asarray(before))
    assert image.info == before.info


def test_padding_does_not_bleed_into_the_picture():
    """What the network draws in the padding is cut off before the result is scaled."""
    image = smooth(30, 90)
    fitted, crop = contain_pad(image, (64, 64))
    black = Image.new("RGB", fitted.size)
    black.paste(unpad(fitted, crop), crop.inner)
    assert np.array_equal(np.asarray(paste_back(black, image, crop)), np.asarray(paste_back(fitted, image, crop)))


def test_the_result_carries_a_profile_of_rgb_data_and_no_other_metadata(tmp_path):
    path = tmp_path / "photo.jpg"
    profile = bytes(16) + b"RGB " + bytes(16) + b"acsp" + bytes(88)
    picture("RGB", 40, 60).save(path, icc_profile=profile, exif=exif(6), dpi=(300, 300))
    image = open_picture(path)
    fitted, crop = cover_crop(as_rgb(image), (64, 48))
    result = paste_back(fitted, image, crop)
    assert result.size == (40, 60)
    assert result.info == {"icc_profile": profile}
    result.save(tmp_path / "result.png")
    assert rgb_profile(open_picture(tmp_path / "result.png")) == profile
    image.info["icc_profile"] = profile.replace(b"RGB ", b"CMYK")
    assert paste_back(fitted, image, crop).info == {}
    assert np.array_equal(np.asarray(paste_back(fitted, Image.open(path), crop)), np.asarray(result))  # not yet upright


def test_a_transparent_colour_does_not_come_back_twice(tmp_path):
    """The file's mark for one colour has become an alpha channel; kept as well, it would punch new holes."""
    image = decoded(encoded(Image.new("RGB", (64, 64), (9, 9, 9)), "PNG", transparency=(9, 9, 9)))
    fitted, crop = cover_crop(as_rgb(image), (64, 64))
    result = paste_back(fitted, image, crop)
    assert (result.mode, result.info) == ("RGBA", {})
    assert np.asarray(result)[..., 3].max() == 0


def test_a_picture_of_two_pixels_has_no_whole_one_in_the_middle():
    image = picture("RGB", 1, 2)
    fitted, crop = cover_crop(image, (64, 64))
    assert crop.box == (0.5, 0, 1.5, 1)
    with pytest.raises(PictureError, match="no whole pixel of a picture of 2 × 1 .*--fit pad"):
        paste_back(fitted, image, crop)


def test_a_mask_where_the_crop_has_cut_is_refused():
    image = picture("RGB", 100, 800)
    fitted, crop = cover_crop(image, (128, 512))
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 200, 100))  # up to the box's edge
    with pytest.raises(PictureError, match="columns 200 to 600 are left; --fit pad keeps all"):
        paste_back(fitted, image, crop, mask)
    mask.putpixel((200, 99), 255)  # the first pixel inside
    assert values(paste_back(changed(fitted), image, crop, mask))[99, 200].tolist() != values(image)[99, 200].tolist()
    fitted, crop = contain_pad(image, (128, 512))
    paste_back(fitted, image, crop, mask)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (0, 0, 90, 1), (89, 0, 90, 60), (0, 59, 90, 60), (89, 59, 90, 60), (0, 0, 90, 60)]
)
def test_a_mask_at_the_border(box, fit):
    image = picture("RGB", 60, 90)
    fitted, crop = fit_picture(image, (64, 96), fit)
    assert pasted_region(crop) == (0, 0, 90, 60)
    mask = Image.new("L", image.size)
    mask.paste(255, box)
    different = (np.asarray(paste_back(changed(fitted), image, crop, mask)) != np.asarray(image)).any(axis=-1)
    assert not different[np.asarray(mask) == 0].any()
    assert different[np.asarray(mask) == 255].mean() > 0.9


def test_pictures_that_do_not_belong_together_are_a_programmers_fault():
    image = picture("RGB", 60, 90)
    fitted, crop = cover_crop(image, (64, 96))
    with pytest.raises(ValueError, match="the original is 60 × 91"):
        paste_back(fitted, picture("RGB", 60, 91), crop)
    with pytest.raises(ValueError, match="65 × 96"):
        paste_back(picture("RGB", 65, 96), image, crop)
    for mask in (Image.new("L", (60, 90), 255), Image.new("1", (90, 60), 1)):
        with pytest.raises(ValueError, match="expected L .90, 60., see check_mask"):
            paste_back(fitted, image, crop, mask)


@pytest.mark.parametrize("fit", FITS)
def test_every_bucket_takes_a_photo_there_and_back(fit):
    image = smooth(300, 400)
    for size in buckets(128):
        fitted, crop = fit_picture(image, size, fit)
        difference = np.abs(values(paste_back(fitted, image, crop)) - values(image))
        assert difference.mean() < 1.5


DOCS = Path(__file__).parents[2] / "docs" / "pictures.md"
ROWS = re.findall(
    r"^\|.*\| (\d+) × (\d+) \| (\d+) × (\d+) \| ([\d.]+) % \| ([\d.]+) % \|$", DOCS.read_text("utf-8"), re.M
)


def test_the_page_says_what_a_fit_costs():
    assert len(ROWS) >= 10
    for width, height, wide, high, cropped, padded in ROWS:
        image = Image.new("L", (int(width), int(height)))
        size = nearest_bucket(image.height, image.width, 1024)
        assert size == (int(high), int(wide))
        assert f"{100 * cover_crop(image, size)[1].lost:.1f}" == cropped
        left, top, right, bottom = contain_pad(image, size)[1].inner
        assert f"{100 - 100 * (right - left) * (bottom - top) / (size[0] * size[1]):.1f}" == padded
