"""A quantized checkpoint from the command line: converted, described, and run by every command without an option."""

import json
from pathlib import Path

import pytest
from invoke import invoke, succeed
from PIL import Image

import joyjax
from joyjax.convert.source.model import model_folder
from joyjax.provenance.recipe import read_recipe

pytestmark = [pytest.mark.jax, pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")]

EDIT = ("make the red circle blue", "--steps", 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The demo, converted in float8."""
    target = tmp_path_factory.mktemp("small") / "demo8"
    done = succeed("convert", model_folder(None), target, "--quantize", "float8")
    assert done.stdout == f"{target}\n"
    assert "bfloat16, float32, float8_e4m3fn" in done.stderr
    return target


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "white.png"
    Image.new("RGB", (128, 128), "white").save(path)
    return path


def test_info_counts_it(small):
    exact = json.loads(succeed("info", model_folder(None), "--json").stdout)
    found = json.loads(succeed("info", small, "--json", "--verify").stdout)
    transformer = found["components"][1]
    assert transformer["dtypes"] == ["bfloat16", "float32", "float8_e4m3fn"]
    assert transformer["parameters"] == exact["components"][1]["parameters"]
    assert transformer["bytes"] < 0.6 * exact["components"][1]["bytes"]
    # what the source needs with the option is what this one needs without
    assert found["needs"] == exact["needs_quantized"]
    assert [need["linear"] for need in found["needs"]] == ["float8", "float8"]
    assert found["needs_quantized"] == []
    assert exact["needs"][0]["resident_bytes"] > 1.5 * found["needs"][0]["resident_bytes"]
    said = succeed("info", small, "--mesh", "sequence=2").stdout
    assert said.count("float8 as stored") == 4
    assert succeed("info", model_folder(None)).stdout.count("with --quantize float8") == 2


def test_an_edit_is_that_of_the_source_with_the_option(small, picture, tmp_path):
    arguments = ("edit", *EDIT, "--image", picture)
    succeed(*arguments, "--model", small, "--output", tmp_path / "stored.png")
    for option in ("--quantize", "--linear"):
        succeed(*arguments, option, "float8", "--output", tmp_path / "asked.png")
        with Image.open(tmp_path / "stored.png") as one, Image.open(tmp_path / "asked.png") as other:
            assert one.tobytes() == other.tobytes()
    assert read_recipe(tmp_path / "stored.png")["model"]["linear"] == "float8"
    succeed("edit", "--from", tmp_path / "stored.png", "--output", tmp_path / "again.png")
    assert (tmp_path / "stored.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    done = invoke(*arguments, "--model", small, "--quantize", "exact", "--output", tmp_path / "none.png")
    assert isinstance(done.exception, joyjax.RequestError)
    assert f"{small} holds its kernels as float8, from which the exact ones cannot be recovered" in str(done.exception)
    assert not (tmp_path / "none.png").exists()


def test_a_batch_goes_on_with_it(small, picture, tmp_path):
    """The form that the folder has is known before it is loaded: rows that are done stay done."""
    requests = tmp_path / "rows.jsonl"
    requests.write_text(json.dumps({"id": "one", "image": str(picture), "prompt": EDIT[0], "steps": 1}) + "\n")
    for expected in ("one.png", ""):
        done = succeed("batch", requests, "--output", tmp_path / "out", "--model", small)
        assert done.stdout.strip().endswith(expected)
    note = json.loads((tmp_path / "out" / "one.json").read_text())
    assert note["model"]["linear"] == "float8"


def test_python_is_told_alike(small):
    with pytest.raises(joyjax.RequestError, match="linear is 'exact', but .* holds its kernels as float8"):
        joyjax.load(small, linear="exact")
    pipeline = joyjax.load(small)
    assert " parameters, bfloat16, linear float8, mesh None, from " in repr(pipeline)


def test_what_cannot_be_converted(small, tmp_path):
    done = invoke("convert", small, tmp_path / "again", "--quantize", "float8")
    assert "is a converted checkpoint already" in str(done.exception)
    done = invoke("convert", model_folder(None), tmp_path / "vae", "--quantize", "float8", "--component", "vae")
    assert "vae has no kernels that may be stored so" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
