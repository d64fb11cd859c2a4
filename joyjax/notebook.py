"""Displays for notebooks: pictures side by side, a slider between before and after, and the progress of an edit.

Plain HTML without widgets, so that it works in Jupyter, in Colab and on an exported page. Notebooks call the objects'
`_repr_html_`; nothing here imports IPython.
"""

import base64
import contextlib
import dataclasses
import html
import io
import warnings
from collections.abc import Iterator, Mapping

from PIL import Image, ImageDraw, ImageFont

from joyjax.errors import AdviceWarning
from joyjax.media.framing import cover_crop
from joyjax.media.image import as_rgb
from joyjax.runtime.job import StepEvent

LEGIBLE = 256  # pixels: the smallest height at which a picture is shown
CAPTION = 26  # pixels above a picture
LOSSLESS = 512 * 512  # pixels; larger pictures are shown as JPEG, a tenth of the bytes


@dataclasses.dataclass(frozen=True)
class Slider:
    """Two pictures of equal size, overlaid; `before` is visible left of the handle."""

    before: Image.Image
    after: Image.Image

    def _repr_html_(self) -> str:
        width = max(LEGIBLE, min(self.after.width, 640))
        move = "this.parentElement.children[1].style.clipPath='inset(0 '+(100-this.value)+'% 0 0)'"
        shown = "width:100%;display:block;image-rendering:auto"
        return (
            f'<div style="position:relative;width:{width}px;max-width:100%">'
            f'<img alt="after" style="{shown}" src="{data_url(self.after)}">'
            f'<img alt="before" style="{shown};position:absolute;left:0;top:0;clip-path:inset(0 50% 0 0)" '
            f'src="{data_url(self.before)}">'
            f'<input type="range" min="0" max="100" value="50" aria-label="share of the picture before the edit" '
            f'style="width:100%;margin:6px 0" oninput="{move}">'
            f'<div style="display:flex;justify-content:space-between"><span>◂ after</span>'
            "<span>before ▸</span></div></div>"
        )


@dataclasses.dataclass(frozen=True)
class Progress:
    """A progress bar of the steps, and optionally a preview."""

    done: int
    total: int
    note: str = ""
    preview: Image.Image | None = None

    def __str__(self) -> str:
        """Return the progress as text."""
        return f"{self.done} of {self.total} {self.note}".rstrip()

    def _repr_html_(self) -> str:
        picture = ""
        if self.preview is not None:
            picture = f'<br><img alt="preview" height="{LEGIBLE // 2}" src="{data_url(self.preview)}">'
        bar = f'<progress max="{self.total}" value="{self.done}" style="width:256px"></progress>'
        return f"<div>{bar} {html.escape(str(self))}{picture}</div>"


def slider(before: Image.Image, after: Image.Image) -> Slider:
    """Return a slider between a picture, cropped as in the edit, and the result."""
    fitted, _ = cover_crop(as_rgb(before), (after.height, after.width))
    return Slider(fitted, after)


def progress(event: StepEvent, *, preview: bool = True) -> Progress:
    """Return the display of a step event; a preview takes one decoding."""
    note = f"steps, {event.seconds:.2f} s per step"
    return Progress(event.step, event.steps, note, event.preview() if preview else None)


@contextlib.contextmanager
def advice() -> Iterator[list[str]]:
    """Collect the texts of AdviceWarnings in a list instead of showing them as warnings."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdviceWarning)
        show = warnings.showwarning

        def collect(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
            if issubclass(category, AdviceWarning):
                notes.append(str(message))
            else:
                show(message, category, *rest, **more)  # type: ignore[arg-type]

        warnings.showwarning = collect
        yield notes


def side_by_side(pictures: Mapping[str, Image.Image], *, columns: int = 4, height: int | None = None) -> Image.Image:
    """Return one picture that shows several in a grid, each under its caption.

    Each is scaled to `height` pixels; None: the height of the first, clamped to 256 … 512.
    """
    first = next(iter(pictures.values()))
    height = height or max(LEGIBLE, min(first.height, 2 * LEGIBLE))
    font = ImageFont.load_default(size=14)
    shown = {
        caption: as_rgb(picture).resize(
            (round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS
        )
        for caption, picture in pictures.items()
    }
    widths = [
        max(picture.width for picture in list(shown.values())[n::columns]) for n in range(min(columns, len(shown)))
    ]
    gap = 8
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), rows * (height + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, picture) in enumerate(shown.items()):
        row, column = divmod(number, columns)
        left, top = sum(widths[:column]) + gap * column, row * (height + CAPTION)
        draw.text((left, top + CAPTION - 4), _fitted(caption, widths[column], font), "black", font, anchor="ls")
        sheet.paste(picture, (left, top + CAPTION))
    return sheet


def data_url(picture: Image.Image) -> str:
    """Return a picture as a data URL: PNG if it is small, else JPEG."""
    lossless = picture.width * picture.height <= LOSSLESS
    written = io.BytesIO()
    kind = "png" if lossless else "jpeg"
    picture.convert("RGB").save(written, kind, **({} if lossless else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def _fitted(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Truncate a caption to the width of its picture."""
    if font.getlength(caption) <= width:
        return caption
    while caption and font.getlength(caption + "…") > width:
        caption = caption[:-1]
    return caption + "…"
