"""The commands with a model that makes layers: Qwen-Image-Layered."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from invoke import invoke, succeed
from layered_pairs import cutout
from PIL import Image

from joyjax.errors import RequestError
from joyjax.provenance.recipe import read_recipe

pytestmark = pytest.mark.parity  # the checkpoint is the reference's

FAST = ["--dtype", "float32", "--steps", 1, "--layers", 2]


@pytest.fixture
def model(layered_folder, tmp_path, monkeypatch) -> list:
    """A folder with a picture to work in, and the options that name picture and model."""
    monkeypatch.chdir(tmp_path)
    cutout(41, 60).save("in.png")
    return ["--model", layered_folder, "--image", "in.png"]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_layers_and_their_recipe(model):
    """The composite, the layers bottom first, and the same pixels again from the file of a layer."""
    done = succeed("edit", "a tree", *model, *FAST, "--output", "sheet.png", "--preview-dir", "previews")
    names = ["sheet.png", "sheet-layer1.png", "sheet-layer2.png"]
    assert done.stdout.split() == names
    assert sorted(os.listdir()) == sorted([*names, "in.png", "previews"])
    layers = [Image.open(name) for name in names[1:]]
    assert [layer.mode for layer in layers] == ["RGBA"] * 2
    assert np.array_equal(pixels("sheet.png"), np.asarray(Image.alpha_composite(*layers)))
    [preview] = os.listdir("previews")
    assert Image.open(Path("previews", preview)).mode == "RGBA"
    settings = read_recipe("sheet-layer2.png")["settings"]
    assert (settings["layers"], settings["cfg_normalize"], settings["base_size"]) == (2, False, 96)
    assert (settings["height"], settings["width"]) == (64, 128)
    done = succeed("edit", "--from", "sheet-layer2.png")
    assert done.stdout.split() == ["edit.png", "edit-layer1.png", "edit-layer2.png"]
    for name in names:
        assert np.array_equal(pixels(name), pixels(name.replace("sheet", "edit")))
    # a name is free if those of its layers are
    Path("edit-2-layer2.png").touch()
    done = succeed("edit", "--from", "sheet.png", "--cfg-normalize")
    assert done.stdout.split()[0] == "edit-3.png"
    assert read_recipe("edit-3.png")["settings"]["cfg_normalize"] is True
    assert Path("edit-2-layer2.png").read_bytes() == b""


def test_targets_are_checked_before_the_edit(model):
    held = Path("in.png").read_bytes()
    for options, says in (
        (["--output", "sheet.jpg"], "--output is sheet.jpg, and .jpg files have no transparency"),
        (["--height", 80, "--width", 112], "height is 80, but Qwen-Image-Layered has no such option"),
        (["--mask", "in.png"], "mask is given, but Qwen-Image-Layered has no such option"),
    ):
        done = invoke("edit", "a tree", *model, *FAST, *options)
        assert isinstance(done.exception, RequestError), done.stderr
        assert says in str(done.exception)
    os.rename("in.png", "a-layer1.png")
    done = invoke("edit", "a tree", *model[:2], "--image", "a-layer1.png", *FAST, "--output", "a.png")
    assert "its layer a-layer1.png is the picture of --image and would be replaced" in str(done.exception)
    assert os.listdir() == ["a-layer1.png"]
    assert Path("a-layer1.png").read_bytes() == held


@pytest.mark.nightly
def test_a_pipe_takes_one_picture(model):
    done = invoke("edit", "a tree", *model, *FAST, "--output", "-")
    assert "this model makes layers; name a file" in str(done.exception) or done.exit_code


@pytest.mark.nightly
def test_convert_info_warmup_bench(model, layered_folder, tmp_path, monkeypatch):
    done = succeed("convert", layered_folder, "converted")
    assert "--image fox.jpg --model converted" in done.stderr
    succeed("edit", "a tree", *model, *FAST, "-o", "one.png")
    succeed("edit", "a tree", "--model", "converted", *model[2:], *FAST, "-o", "two.png")
    assert np.array_equal(pixels("one-layer2.png"), pixels("two-layer2.png"))
    for folder, kind in ((layered_folder, "diffusers"), ("converted", "converted")):
        found = succeed("info", folder, "--verify").stdout
        assert f"Qwen-Image-Layered (QwenImageLayeredPipeline), {kind} folder, complete" in found
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    succeed("warmup", layered_folder, "--dtype", "float32")
    refused = invoke("warmup", layered_folder, "--dtype", "float32", "--references", 2)
    assert "Qwen-Image-Layered takes 1 at most" in str(refused.exception)
    found = succeed("bench", *model[:2], "--dtype", "float32", "--steps", 1, "-n", 1, "--json").stdout
    assert json.loads(found)["settings"]["layers"] == 4
