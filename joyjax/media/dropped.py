"""Notes on parts of the references that an edit does not use: transparency and further frames."""

import os
from collections.abc import Sequence

from PIL import Image

from joyjax.media.frames import frames_note
from joyjax.media.image import alpha_channel, upright


def dropped(pictures: Sequence[Image.Image], *, last_keeps_alpha: bool, sees_alpha: bool = False) -> list[str]:
    """Return a line for each unused part of the references.

    `last_keeps_alpha`: the result is pasted back into the last reference, which keeps its transparency. `sees_alpha`:
    the model takes transparency.
    """
    lines = []
    for number, picture in enumerate(pictures, 1):
        name = _name(picture) or (f"reference {number}" if len(pictures) > 1 else "the picture")
        if note := frames_note(picture):
            lines.append(f"{name}: {note}")
        kept = sees_alpha or (last_keeps_alpha and number == len(pictures))
        if not kept and (share := _transparent(picture)):
            lines.append(f"{name} is {share} transparent, which models do not see: the colours beneath show")
    return lines


def _name(picture: Image.Image) -> str:
    return os.path.basename(os.fsdecode(getattr(picture, "filename", ""))) or getattr(picture, "location", "")


def _transparent(picture: Image.Image) -> str:
    """Return "partly" or "wholly" for a transparent picture; empty for an opaque one."""
    if not picture.has_transparency_data:
        return ""
    alpha = alpha_channel(upright(picture))
    low, high = (255, 255) if alpha is None else alpha.getextrema()
    return "" if low == 255 else "partly" if high else "wholly"
