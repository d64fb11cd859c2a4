"""The prompts of spatial edits, letter by letter, and the red box."""

import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
from PIL import Image

import joyjax
from joyjax.errors import PictureError, RequestError
from joyjax.spatial import camera, move, rotate

VIEWS = ["front", "right", "left", "rear", "front right", "front left", "rear right", "rear left"]


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Without the type checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (120, 200, 3), np.uint8))


def test_it_is_loaded_on_first_use():
    code = "import sys, joyjax; assert 'joyjax.spatial' not in sys.modules; print(joyjax.spatial.rotate('car', 'rear'))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "Rotate the car to show the rear side view.\n", done.stderr
    assert joyjax.spatial.move is move


def test_the_prompts(photo):
    # the examples of the model's own page
    _, prompt = move(photo, "apple", (10, 10, 90, 60))
    assert prompt == "Move the apple into the red box and finally remove the red box."
    assert rotate("chair", "front") == "Rotate the chair to show the front side view."
    assert rotate("car", "rear left") == "Rotate the car to show the rear left side view."
    assert camera(45, 0, "in") == (
        "Move the camera.\n"
        "- Camera rotation: Yaw 45°, Pitch 0°.\n"
        "- Camera zoom: in.\n"
        "- Keep the 3D scene static; only change the viewpoint."
    )
    assert camera(yaw=-90, pitch=20) == (
        "Move the camera.\n"
        "- Camera rotation: Yaw -90°, Pitch 20°.\n"
        "- Camera zoom: unchanged.\n"
        "- Keep the 3D scene static; only change the viewpoint."
    )
    assert camera(zoom="out").splitlines()[2] == "- Camera zoom: out."
    for view in VIEWS:
        assert rotate("cup", view) == f"Rotate the cup to show the {view} side view."


@pytest.mark.parametrize(
    ("angle", "written"),
    [
        (0, "0"),
        (-0.0, "0"),
        (180, "180"),
        (-180.0, "-180"),
        (100, "100"),
        (45.0, "45"),
        (22.5, "22.5"),
        (-0.25, "-0.25"),
        (1e-7, "0.0000001"),
        (np.float32(12.1), "12.1"),
        (np.int64(-30), "-30"),
    ],
)
def test_angles(angle, written):
    assert f"Yaw {written}°, Pitch 0°." in camera(angle)


@pytest.mark.parametrize("angle", [181, -180.5, float("nan"), float("inf"), "45", None, True, np.float32(1e9), 1j])
def test_invalid_angles_are_refused(angle):
    with pytest.raises(RequestError, match="yaw is .*; expected degrees from -180 to 180"):
        camera(angle)
    with pytest.raises(RequestError, match="pitch is .*; expected degrees from -90 to 90"):
        camera(0, angle)


def test_the_pitch_ends_at_90():
    assert "Pitch -90°" in camera(0, -90)
    with pytest.raises(RequestError, match="pitch is 90.5"):
        camera(0, 90.5)


@pytest.mark.parametrize("zoom", ["", "In", "in/out/unchanged", None, 1, ["in"]])
def test_an_invalid_zoom_is_refused(zoom):
    with pytest.raises(RequestError, match="zoom is .*; choose one of: in, out, unchanged"):
        camera(zoom=zoom)


@pytest.mark.parametrize("view", ["", "back", "front-right", "Front", None, ["front"]])
def test_an_invalid_view_is_refused(view):
    with pytest.raises(RequestError, match="view is .*; choose one of: front, right, left, rear, front right"):
        rotate("car", view)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "such as 'red car'"),
        (" \n\t", "such as 'red car'"),
        (None, "object is None"),
        (3, "object is 3"),
        ("car\nMove the camera", "in one line"),
        ("car\u2028bus", "in one line"),
        ("the car", "leave out 'the', since the prompt says 'the': 'car'"),
        ("The  car", "leave out 'The', .*: 'car'"),
        ("an apple", "leave out 'an'"),
        ("A", "leave out 'A'"),
    ],
)
def test_an_invalid_object_is_refused(photo, text, says):
    with pytest.raises(RequestError, match=says):
        rotate(text, "front")
    with pytest.raises(RequestError, match=says):
        move(photo, text, (10, 10, 90, 60))


def test_an_object_as_it_is():
    assert rotate("  theatre mask ", "left") == "Rotate the theatre mask to show the left side view."
    assert rotate("A-frame “sign” 看板", "left") == "Rotate the A-frame “sign” 看板 to show the left side view."


def test_the_red_box(photo):
    before = photo.tobytes()
    marked, _ = move(photo, "apple", (10, 20, 90, 60))
    assert photo.tobytes() == before
    pixels, whole = np.asarray(marked), np.asarray(photo)
    drawn = (pixels != whole).any(-1)
    expected = np.zeros((120, 200), bool)
    expected[20:60, 10:90] = True
    expected[21:59, 11:89] = False  # one pixel in so small a picture
    np.testing.assert_array_equal(drawn, expected)
    assert (pixels[expected] == (255, 0, 0)).all()


@pytest.mark.parametrize(("size", "width"), [((64, 64), 1), ((512, 512), 2), ((1024, 1024), 4), ((2048, 512), 4)])
def test_the_line_scales_with_the_picture(size, width):
    marked, _ = move(Image.new("RGB", size), "apple", (0, 0, *size))  # all of it is inside
    red = np.asarray(marked)[..., 0] == 255
    middle = red[size[1] // 2]
    assert middle[:width].all()
    assert middle[-width:].all()
    assert middle.sum() == 2 * width == red[:, size[0] // 2].sum()


def test_the_picture_is_made_upright_and_rgb():
    rotated = Image.new("L", (100, 40))
    rotated.getexif()[0x0112] = 6  # a quarter turn
    marked, _ = move(rotated, "apple", (0, 0, 40, 100))
    assert (marked.mode, marked.size) == ("RGB", (40, 100))
    clear, _ = move(Image.new("RGBA", (50, 50), (0, 0, 255, 0)), "apple", [10, 10, 20, 20])
    assert clear.mode == "RGB"
    with pytest.raises(PictureError, match="expected a PIL.Image"):
        move("photo.jpg", "apple", (0, 0, 9, 9))


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((0, 0, 201, 50), "left < right <= 200 and top < bottom <= 120"),
        ((0, 0, 50, 121), "top < bottom <= 120"),
        ((-1, 0, 50, 50), "in whole pixels, with"),
        ((50, 0, 50, 50), "in whole pixels, with"),
        ((60, 50, 50, 60), "in whole pixels, with"),
        ((0, 50, 50, 40), "in whole pixels, with"),
        ((0, 0, 2, 50), "2 × 50 pixels; in a picture of 200 × 120 it needs 3 × 3 at least"),
        ((0.0, 0.0, 0.5, 0.5), "in whole pixels"),
        ((0, 0, 50.0, 50), "in whole pixels"),
        ((0, 0, True, 50), "in whole pixels"),
        ((0, 0, 50), "in whole pixels"),
        ("0,0,5,5", "in whole pixels"),
        ("0055", "in whole pixels"),
        (None, "box is None"),
        (("0", "0", "9", "9"), "in whole pixels"),
    ],
)
def test_an_invalid_box_is_refused(photo, box, says):
    with pytest.raises(RequestError, match=says):
        move(photo, "apple", box)


def test_a_box_of_numpy(photo):
    ours, _ = move(photo, "apple", np.array([10, 20, 90, 60]))
    assert ours.tobytes() == move(photo, "apple", (10, 20, 90, 60))[0].tobytes()
