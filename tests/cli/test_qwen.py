"""The commands with a model that makes pictures from words alone: Qwen-Image."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from invoke import invoke, succeed
from PIL import Image

from joyjax.errors import JoyJaxError, RequestError
from joyjax.provenance.recipe import read_recipe

pytestmark = pytest.mark.parity  # the checkpoint is the reference's

FAST = ["--dtype", "float32", "--steps", 2]
SMALL = ["--height", 80, "--width", 112]


@pytest.fixture
def model(qwen_folder, tmp_path, monkeypatch) -> list:
    """An empty folder to work in, and the options that name the model."""
    monkeypatch.chdir(tmp_path)
    return ["--model", qwen_folder]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def same(one: str, other: str) -> None:
    np.testing.assert_array_equal(pixels(one), pixels(other))


@pytest.mark.nightly  # daily of an edit, in test_qwen_edit.py
def test_a_picture_and_its_recipe(model):
    """The same pixels from the PNG alone, with previews, times and every option that the family has."""
    done = succeed("edit", "a tree", *model, *FAST, *SMALL, "--preview-dir", "previews", "--timings")
    assert done.stdout == "edit.png\n"
    assert pixels("edit.png").shape == (80, 112, 3)
    assert len(os.listdir("previews")) == 2
    assert "denoise" in done.stderr
    settings = read_recipe("edit.png")["settings"]
    assert (settings["negative_prompt"], settings["guidance_scale"], settings["fit"]) == (" ", 4.0, "crop")
    for number, more in enumerate(([], ["--exact-size"], ["--base-size", 512]), 2):  # beside a size neither acts
        assert succeed("edit", "--from", "edit.png", *more).stdout == f"edit-{number}.png\n"
        same("edit.png", f"edit-{number}.png")

    options = ["--cache", "0.3", "--guidance-until", "0.5", "--vae-decode", "tiled", "--negative-prompt", "grey"]
    succeed("edit", "a tree", *model, *FAST, *SMALL, *options, "--steps", 4, "-o", "all.png")
    succeed("edit", "--from", "all.png", "-o", "all-again.png")
    same("all.png", "all-again.png")
    assert read_recipe("all-again.png")["settings"] == read_recipe("all.png")["settings"]
    succeed("edit", "--from", "edit.png", "--guidance-scale", 1, "-o", "one.png")
    succeed("edit", "--from", "one.png", "-o", "one-again.png")
    same("one.png", "one-again.png")
    assert np.abs(pixels("one.png") - pixels("edit.png")).max() > 2


def test_what_it_does_not_take(model, qwen_folder):
    Image.new("RGB", (32, 32)).save("photo.png")
    for options, says in (
        (["--image", "photo.png"], "Qwen-Image takes 0 at most; this model makes pictures from words; leave the"),
        (["--mask", "photo.png"], "mask is given, but Qwen-Image has no such option"),
        (["--paste-back"], "paste_back is True, but Qwen-Image has no such option"),
        (["--fit", "pad"], "fit is 'pad', but Qwen-Image has no such option"),
        (["--height", 100, "--width", 112], "the nearest are height 96 and width 112"),
    ):
        done = invoke("edit", "a tree", *model, *FAST, *options)
        assert isinstance(done.exception, RequestError), done.stderr
        assert says in str(done.exception)
    assert os.listdir() == ["photo.png"]


def test_batch(model):
    rows = [
        {"id": "one", "prompt": "a tree", "steps": 2, "height": 80, "width": 112},
        {"id": "two", "prompt": "a tree", "steps": 2, "height": 112, "width": 80, "seed": 3},
        {"id": "picture", "prompt": "a tree", "image": "one.png"},
    ]
    Image.new("RGB", (32, 32)).save("one.png")
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke("batch", "r.jsonl", "--output", "out", *model, "--dtype", "float32", "--batch-size", 2)
    assert isinstance(done.exception, JoyJaxError)
    assert done.stdout.split() == ["out/one.png", "out/two.png"]
    assert "Qwen-Image takes 0" in json.loads(Path("out/picture.json").read_text())["error"]
    succeed("edit", "a tree", *model, *FAST, *SMALL)
    assert np.abs(pixels("edit.png") - pixels("out/one.png")).max() <= 1


@pytest.mark.nightly
def test_a_converted_folder_gives_the_same_pixels(model, qwen_folder):
    done = succeed("convert", qwen_folder, "converted")
    assert 'next: joyjax edit "a red fox in the snow" --model converted' in done.stderr
    succeed("edit", "a tree", *model, *FAST, *SMALL, "-o", "diffusers.png")
    succeed("edit", "a tree", "--model", "converted", *FAST, *SMALL, "-o", "converted.png")
    same("diffusers.png", "converted.png")
    for folder, kind in ((qwen_folder, "diffusers"), ("converted", "converted")):
        assert f"Qwen-Image (QwenImagePipeline), {kind} folder, complete" in succeed("info", folder, "--verify").stdout


def test_info_on_a_mesh(qwen_folder):
    told = json.loads(succeed("info", qwen_folder, "--json", "--mesh", "cfg=2,sequence=4").stdout)
    assert (told["family"], told["state"]) == ("Qwen-Image", "runs")
    assert {held["dtype"]: (held["devices"], held["heads"]) for held in told["mesh"]} == {
        "bfloat16": (8, 4),
        "float32": (8, 4),
    }


@pytest.mark.nightly
def test_warmup(qwen_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    done = succeed("warmup", qwen_folder, "--dtype", "float32", "--base-size", 256)
    assert done.stdout == f"{tmp_path}\n"
    refused = invoke("warmup", qwen_folder, "--dtype", "float32", "--references", 1)
    assert "Qwen-Image takes 0 at most" in str(refused.exception)


def test_bench_takes_no_picture(model):
    told = json.loads(
        succeed("bench", *model, "--dtype", "float32", "--steps", 1, "--base-size", 256, "-n", 1, "--json").stdout
    )
    assert (told["settings"]["family"], told["settings"]["height"], told["settings"]["width"]) == (
        "Qwen-Image",
        256,
        256,
    )
    assert told["step_seconds"] > 0
