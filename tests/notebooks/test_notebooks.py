"""The notebooks run from the first cell to the last on the demo model, and give what they promise.

A folder stands in for the browser's upload and another for Google Drive. The nightly test does so in an environment
that begins with the JAX that Colab has, through the notebooks' own installing cell.
"""

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

from joyjax.convert.source.model import DEMO
from joyjax.errors import CheckpointError
from joyjax.provenance.recipe import read_recipe
from joyjax.reading import unfinished
from joyjax.runtime import info
from joyjax.runtime.convert import convert_model
from joyjax.shapes.draw import render
from joyjax.shapes.edits import Edit, Pair, apply
from joyjax.shapes.judge import judge
from joyjax.shapes.scene import EXAMPLE, Ground, Scene, Thing

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("run_notebooks", ROOT / "notebooks" / "run.py")
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)

COLAB = {"jax": "0.7.2", "jaxlib": "0.7.2", "flax": "0.11.2"}
BLUE = Pair(EXAMPLE, Edit("recolor", 0, value="blue"), apply(EXAMPLE, Edit("recolor", 0, value="blue")))
PATHS = re.compile(r"/(root|home|tmp|work|usr|opt|Users|content)/")


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def printed(book, title: str) -> str:
    """What the cell with this in its first line printed."""
    (cell,) = [cell for cell in code_cells(book) if title in cell.source.splitlines()[0]]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(book, title: str = "") -> list[np.ndarray]:
    """The pictures that the cells with this in their first lines show."""
    found = []
    for cell in code_cells(book):
        if title in cell.source.splitlines()[0]:
            for output in cell.outputs:
                data = output.get("data", {})
                for kind in ("image/png", "image/jpeg"):
                    if kind in data:
                        opened = Image.open(io.BytesIO(base64.b64decode(data[kind])))
                        found.append(np.asarray(opened.convert("RGB")))
                        break  # the same picture in another form
    return found


def check_quiet(book):
    """No cell gave an error, a warning, or anything else on standard error."""
    for cell in code_cells(book):
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", f"{cell.source.splitlines()[0]}: {output.text}"
            assert "warning" not in str(output.get("text", "")).lower()


def check_slider(book):
    (cell,) = [cell for cell in code_cells(book) if "Slide between" in cell.source]
    page = cell.outputs[0].data["text/html"]
    before, after = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert before != after
    assert 'type="range"' in page


def check_edit(book, pair: Pair, made: Path, prompt: str):
    """The edit notebook gave the picture that the prompt asks for, showed it and its recipe, and saved it."""
    check_quiet(book)
    check_slider(book)
    assert judge(pair, np.asarray(Image.open(made))).pixel
    recipe = read_recipe(made)
    assert (recipe["settings"]["prompt"], recipe["settings"]["seed"]) == (prompt, 0)
    assert f"prompt           {prompt!r}" in printed(book, "recipe")
    assert "the demo model in bfloat16 needs" in printed(book, "what fits")
    assert "JoyAI-Image-Edit in bfloat16 needs 45.6 GiB" in printed(book, "what fits")
    assert "steps" in next(o for o in code_cells(book)[3].outputs if "data" in o).data["text/html"]
    (shown,) = pictures(book, "Type an instruction")
    half = shown.shape[1] // 2
    assert np.abs(shown[:, : half - 4].astype(int) - shown[:, half + 4 :]).max() > 100  # before and after differ
    (others,) = pictures(book, "other seeds")
    assert others.shape[1] >= 4 * 192
    (several,) = pictures(book, "several pictures")
    assert several.shape[1] >= 3 * 192


def check_convert(book, drive: Path):
    check_quiet(book)
    check_slider(book)
    info.verify(drive / "joy")
    assert not unfinished(drive / "joy").exists()
    assert "all verified" in printed(book, "Read every weight back")
    assert judge(BLUE, np.asarray(Image.open(drive / "edit.png"))).pixel
    assert Path(read_recipe(drive / "edit.png")["model"]["source"]) == drive / "joy"


def check_inside(book, folder: Path):
    check_quiet(book)
    assert judge(BLUE, np.asarray(Image.open(folder / "by-hand.png"))).pixel
    assert re.search(
        r"differ by [01] of 255; latents agree at each step: True", printed(book, "joyjax.edit does the same")
    )
    assert "<|image_pad|> × 16" in printed(book, "The prompt as tokens")
    shown = pictures(book)
    assert len(shown) >= 14
    assert all(len(np.unique(one.reshape(-1, 3), axis=0)) > 30 for one in shown)  # nothing is empty


def test_edit(tmp_path, monkeypatch):
    """With an uploaded picture, another instruction, and the result on Drive."""
    scene = Scene(
        Ground("lavender", "striped"),
        (Thing("heart", "green", "large", 64, 64), Thing("star", "red", "medium", 24, 24)),
    )
    pair = Pair(scene, Edit("remove", 1), scene.without(1))
    for name in ("upload", "drive", "here"):
        (tmp_path / name).mkdir()
    Image.fromarray(render(scene)).save(tmp_path / "upload" / "my photo.png")
    monkeypatch.setenv("JOYJAX_UPLOAD", str(tmp_path / "upload"))
    monkeypatch.setenv("JOYJAX_DRIVE", str(tmp_path / "drive"))
    book = run.read("edit")
    run.fill_in(book, PHOTO="upload", INSTRUCTION="remove the red star", PLACE="Google Drive", NAME="mine.png")
    run.execute(book, tmp_path / "here")
    check_edit(book, pair, tmp_path / "drive" / "mine.png", "remove the red star")
    assert "my photo.png: 128 × 128" in printed(book, "Pick a photo")
    assert "on Google Drive" in printed(book, "Download the picture")


def test_convert_goes_on_after_a_disconnect(tmp_path, monkeypatch):
    """The first run is stopped in the middle; the notebook goes on and writes no part again."""
    drive, here = tmp_path / "drive", tmp_path / "here"
    drive.mkdir()
    here.mkdir()

    def disconnect(done: int, total: int) -> None:
        raise ConnectionAbortedError

    with pytest.raises(CheckpointError, match="the same command goes on from there"):
        convert_model(DEMO, drive / "joy", progress=disconnect)
    (part,) = unfinished(drive / "joy").glob("new/*/part-00000")
    before = {file.relative_to(part): file.stat().st_mtime_ns for file in part.rglob("*") if file.is_file()}
    assert before
    monkeypatch.setenv("JOYJAX_DRIVE", str(drive))
    book = run.execute(run.read("convert"), here)
    assert "going on" in printed(book, "Convert, or go on")
    check_convert(book, drive)
    after = drive / "joy" / part.parent.name / part.name
    assert {file.relative_to(after): file.stat().st_mtime_ns for file in after.rglob("*") if file.is_file()} == before


def test_inside(tmp_path):
    check_inside(run.execute(run.read("inside"), tmp_path), tmp_path)


def pythons_like_colabs() -> list[str | Path]:
    found = shutil.which("python3.13")
    return [*Path.home().glob(".pyenv/versions/3.13.*/bin/python"), *([found] if found else [])]


def runs(python: str | Path) -> bool:
    """A shim may name a version that it does not have."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


@pytest.mark.nightly
def test_all_on_an_older_jax(tmp_path, monkeypatch):
    """In an environment as Colab's, with an old JAX, and nothing but what the installing cell brings."""
    python = next(python for python in (*pythons_like_colabs(), sys.executable) if runs(python))
    venv, source = tmp_path / "venv", tmp_path / "source"
    subprocess.run([python, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    old = [f"{name}=={version}" for name, version in COLAB.items()]
    installed = subprocess.run([*pip, *old, "ipykernel", "ipywidgets", "matplotlib"], capture_output=True, text=True)
    if "No matching distribution" in installed.stderr:  # of an index that has not kept it
        pytest.skip(f"an older JAX cannot be had here: {installed.stderr.splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    for name in ("joyjax", "kernels", "convert", "sharding"):  # a build writes beside what it builds
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    spec = tmp_path / "jupyter" / "kernels" / "colab" / "kernel.json"
    spec.parent.mkdir(parents=True)
    launch = [str(venv / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": launch, "display_name": "as on Colab", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JOYJAX_SOURCE", source.as_uri())
    monkeypatch.setenv("JOYJAX_DRIVE", str(tmp_path / "drive"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "drive").mkdir()

    here = {name: tmp_path / name for name in run.NAMES}
    for folder in here.values():
        folder.mkdir()
    book = run.execute(run.read("edit"), here["edit"], kernel="colab")
    output = printed(book, "Install joyjax")
    assert "JAX 0.7.2 was there" in output
    assert "No restart is needed" in output
    check_edit(book, BLUE, here["edit"] / "edit.png", "make the red circle blue")
    book = run.execute(run.read("convert"), here["convert"], kernel="colab")
    assert "installed already" in printed(book, "Install joyjax")
    check_convert(book, tmp_path / "drive")
    check_inside(run.execute(run.read("inside"), here["inside"], kernel="colab"), here["inside"])


def installing(folder: Path, before: str) -> str:
    """Run the installing cell after `before` where joyjax seems not to be installed; return what went wrong."""
    book = nbformat.v4.new_notebook(cells=[code_cells(run.read("edit"))[0]])
    hidden = "from importlib import metadata\nmetadata.distributions = lambda: ()"
    book.cells.insert(0, nbformat.v4.new_code_cell(f"{hidden}\n{before}"))
    with pytest.raises(CellExecutionError) as caught:
        run.execute(book, folder)
    return str(caught.value)


def test_an_old_jax_that_is_imported_asks_for_a_restart(tmp_path):
    assert "choose Runtime > Restart session" in installing(tmp_path, "import sys; sys.modules['jax'] = sys")


def test_a_failed_installation_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("JOYJAX_SOURCE", (tmp_path / "nothing").as_uri())
    assert "pip install" in installing(tmp_path, "")


@pytest.mark.parametrize("name", run.NAMES)
def test_what_lies_in_the_repository(name):
    file = ROOT / "notebooks" / f"{name}.ipynb"
    book = run.read(name)
    nbformat.validate(book)
    assert file.stat().st_size < 300_000
    link = rf"https://colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/notebooks/{name}\.ipynb"
    assert len(re.findall(link, book.cells[0].source)) == 1
    assert len(book.cells) < 40
    for cell in code_cells(book):
        first = cell.source.splitlines()[0]
        title = first.startswith("# @title ")
        assert title or first.startswith("# "), f"no line says what this does: {first}"
        assert 20 < len(first) < 110
        assert title == (cell.metadata.get("cellView") == "form")
        code = [line for line in cell.source.splitlines() if "# @param" not in line]
        assert max(map(len, code)) <= 120
    check_quiet(book)
    assert not PATHS.search(json.dumps([cell.outputs for cell in code_cells(book)]))
    assert all(one.size for one in pictures(book))
    assert run.clean(run.read(name)) == book, "outputs hold what differs from run to run: python notebooks/run.py"


def test_all_install_alike_and_the_readme_has_their_links():
    books = {name: run.read(name) for name in run.NAMES}
    assert len({code_cells(book)[0].source for book in books.values()}) == 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for book in books.values():
        (link,) = re.findall(r"https://colab\.research\.google\.com/github/[^)]+", book.cells[0].source)
        assert link in readme
    repository = re.search(r"github/([\w-]+/[\w-]+)/blob", link)[1]
    assert f"git+https://github.com/{repository}" in code_cells(books["edit"])[0].source


def test_a_field_that_is_not_there():
    with pytest.raises(KeyError, match="SIZE"):
        run.fill_in(run.read("edit"), SIZE=3)
