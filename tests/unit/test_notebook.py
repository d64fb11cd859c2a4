"""What a notebook shows, as HTML and as pictures."""

import base64
import io
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from joyjax import notebook
from joyjax.errors import AdviceWarning
from joyjax.runtime.engine import StepEvent


def plain(width, height, color):
    return Image.new("RGB", (width, height), color)


def held(url):
    kind, _, data = url.removeprefix("data:image/").partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_slider_lays_the_picture_under_its_edit():
    before, after = plain(300, 100, "red"), plain(128, 128, "blue")
    before.paste("green", (0, 0, 20, 100))  # is cut off, as an edit does it
    page = notebook.slider(before, after)._repr_html_()
    shown = [held(url) for url in re.findall(r'src="([^"]+)"', page)]
    assert [kind for kind, _ in shown] == ["png", "png"]
    assert [picture.size for _, picture in shown] == [(128, 128)] * 2
    assert [picture.getpixel((2, 64)) for _, picture in shown] == [(0, 0, 255), (255, 0, 0)]
    assert page.count('type="range"') == 1
    assert "<script" not in page


def test_the_slider_is_no_wider_than_a_page():
    wide = plain(2000, 1000, "red")
    assert "width:640px" in notebook.slider(wide, wide)._repr_html_()
    kind, picture = held(notebook.data_url(wide))
    assert kind == "jpeg"
    assert picture.size == (2000, 1000)


def test_side_by_side():
    sheet = notebook.side_by_side({"a": plain(128, 128, "red"), "b": plain(64, 32, "blue")})
    assert sheet.size == (256 + 8 + 512, 256 + notebook.CAPTION)
    assert sheet.getpixel((128, 200)) == (255, 0, 0)
    assert sheet.getpixel((256 + 8 + 256, 200)) == (0, 0, 255)
    assert sheet.getpixel((260, 200)) == (255, 255, 255)
    assert np.asarray(sheet)[: notebook.CAPTION].min() < 100  # captions
    many = notebook.side_by_side({str(n): plain(10, 10, "red") for n in range(5)}, columns=2, height=50)
    assert many.size == (108, 3 * (50 + notebook.CAPTION))


@pytest.mark.parametrize("caption", ["a very long instruction, longer than the picture is wide " * 3, "", "ü 猫"])
def test_captions_fit(caption):
    notebook.side_by_side({caption: plain(10, 10, "red"), "other": plain(10, 10, "red")}, height=20)


def test_progress():
    event = StepEvent(3, 4, 1.234, np.zeros((1, 2, 3), np.float32), lambda: plain(8, 8, "red"))
    page = notebook.progress(event)._repr_html_()
    assert '<progress max="4" value="3"' in page
    assert "3 of 4 steps, 1.23 s per step" in page
    assert "<img" in page
    assert "<img" not in notebook.progress(event, preview=False)._repr_html_()
    assert "&lt;b&gt;" in notebook.Progress(0, 1, "<b>")._repr_html_()


def test_advice_is_shown_and_warnings_stay():
    def edit():
        warnings.warn("try this", AdviceWarning, stacklevel=1)
        warnings.warn("other", UserWarning, stacklevel=1)
        return "edited"

    with warnings.catch_warnings(record=True) as caught, notebook.advice() as notes:
        warnings.simplefilter("always")
        assert edit() == "edited"
    assert notes == ["try this"]
    assert str(caught[0].message) == "other"
    assert len(caught) == 1
