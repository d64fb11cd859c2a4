"""Draws examples/shapes.png, and docs/demo.png: held-out edits by the demo model, the first of each kind.

    python examples/make_pictures.py

Nothing is picked: `--seed` draws other edits.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import joyjax
from joyjax.score import tasks
from joyjax.shapes.draw import render
from joyjax.shapes.edits import KINDS
from joyjax.shapes.scene import EXAMPLE

ROOT = Path(__file__).parents[1]
COLUMNS, GAP, LINE = 4, 12, 30


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2, help="edits of each kind")
    arguments = parser.parse_args()
    Image.fromarray(render(EXAMPLE)).save(ROOT / "examples" / "shapes.png")

    pipeline = joyjax.load()
    drawn = list(tasks(arguments.rounds * len(KINDS), arguments.seed))
    side = render(EXAMPLE).shape[0]
    width, height = 2 * side + 2, side + LINE
    rows = -(-len(drawn) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, (_, task) in enumerate(drawn):
        source = Image.fromarray(render(task.pair.source))
        result = joyjax.edit(pipeline, source, task.prompt, seed=task.seed).image
        x = GAP + (number % COLUMNS) * (width + GAP)
        y = GAP + (number // COLUMNS) * (height + GAP)
        sheet.paste(source, (x, y + LINE))
        sheet.paste(result, (x + side + 2, y + LINE))
        draw.multiline_text((x, y + LINE - 3), wrapped(task.prompt, width, font), fill="black", font=font, anchor="ld")
    sheet.save(ROOT / "docs" / "demo.png", optimize=True)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break a prompt into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
