"""Executes the notebooks on the demo model and writes their outputs back into them: `python notebooks/run.py [NAME …]`.

Outputs are made small and the same on every machine: what depends on the machine is left out (cells with the tag
"machine", times), and pictures are told in fewer bytes.
"""

import argparse
import base64
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
NAMES = ("edit", "convert", "inside")
A_PICTURE = "<a picture>"
FIELD = re.compile(r"^(?P<name>[A-Z_]+) = .*?(?P<param>  # ?@param.*)$", re.MULTILINE)


def read(name: str) -> Any:
    """Return a notebook of this folder."""
    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def fill_in(book: Any, **fields: object) -> None:
    """Fill in form fields by name.

    Raises:
        KeyError: for a field that no cell has.
    """
    left = set(fields)

    def filled(found: re.Match) -> str:
        name = found["name"]
        if name not in fields:
            return found[0]
        left.discard(name)
        return f"{name} = {fields[name]!r}{found['param']}"

    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = FIELD.sub(filled, cell.source)
    if left:
        raise KeyError(f"no form field {', '.join(sorted(left))}")


def execute(book: Any, folder: Path, *, kernel: str = "python3") -> Any:
    """Run a notebook in a fresh kernel in `folder`; an error in a cell is raised."""
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=900, kernel_name=kernel, resources=place).execute()
    return book


def clean(book: Any) -> Any:
    """Leave what is the same on every machine, and small."""
    for count, cell in enumerate((cell for cell in book.cells if cell.cell_type == "code"), 1):
        cell.metadata.pop("execution", None)  # when it ran
        cell.execution_count = count
        if "machine" in cell.metadata.get("tags", ()):
            cell.outputs = []
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            data = output.get("data", {})
            if "image/png" in data and data["text/plain"] != A_PICTURE:
                data.pop("image/jpeg", None)
                kind, picture = small(base64.b64decode(data.pop("image/png")), plot="<Figure" in data["text/plain"])
                data[kind] = base64.b64encode(picture).decode()
                data["text/plain"] = A_PICTURE
            elif "text/html" in data:
                data["text/html"] = re.sub(r",? ?[0-9.]+ s per step", "", data["text/html"])
                data["text/plain"] = "<a page>"
    book.metadata.language_info = {"name": "python"}
    return book


def small(png: bytes, *, plot: bool) -> tuple[str, bytes]:
    """Return a picture's kind and bytes: a plot as PNG of few colours, another as JPEG."""
    picture, written = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    if plot:
        picture.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
        return "image/png", written.getvalue()
    picture.save(written, "JPEG", quality=85, subsampling=0, optimize=True)
    return "image/jpeg", written.getvalue()


def main() -> None:
    """Execute and write notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            book = clean(execute(read(name), Path(folder)))
        path = HERE / f"{name}.ipynb"
        nbformat.write(book, path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
