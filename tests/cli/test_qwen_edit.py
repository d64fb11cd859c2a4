"""The commands with Qwen-Image's edits: Edit with one picture, Edit-Plus with several."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from invoke import invoke, succeed
from pairs import photo
from PIL import Image

from joyjax.errors import JoyJaxError, RequestError
from joyjax.provenance.recipe import read_recipe

pytestmark = pytest.mark.parity  # the checkpoints are the reference's
nightly = pytest.mark.nightly

FAST = ["--dtype", "float32", "--steps", 2, "--base-size", 256]


@pytest.fixture
def model(qwen_edit_folder, tmp_path, monkeypatch) -> list:
    """A folder to work in with pictures, and the options that name the model."""
    monkeypatch.chdir(tmp_path)
    photo(60, 90).save("photo.png")
    photo(90, 50, seed=1).save("tall.png")
    return ["--model", qwen_edit_folder]


@pytest.fixture
def plus(model, qwen_plus_folder) -> list:
    return ["--model", qwen_plus_folder]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def same(one: str, other: str) -> None:
    np.testing.assert_array_equal(pixels(one), pixels(other))


def test_an_edit_and_its_recipe(model):
    """The size of the picture's shape, previews, and the same pixels from the PNG alone."""
    done = succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, "--preview-dir", "previews", "--timings")
    assert done.stdout == "edit.png\n"
    assert "picture 90 × 60 → 320 × 224, enlarged 3.64 times; nothing cropped; made 5.0 % taller" in done.stderr
    assert pixels("edit.png").shape == (224, 320, 3)
    assert len(os.listdir("previews")) == 2
    recipe = read_recipe("edit.png")
    settings = recipe["settings"]
    assert (settings["negative_prompt"], settings["guidance_scale"]) == (" ", 4.0)
    assert recipe["model"]["family"] == "Qwen-Image-Edit"
    assert succeed("edit", "--from", "edit.png").stdout == "edit-2.png\n"
    same("edit.png", "edit-2.png")
    assert read_recipe("edit-2.png")["settings"] == settings


@nightly
def test_every_option_and_its_recipe(model):
    options = ["--cache", "0.3", "--guidance-until", "0.5", "--vae-decode", "tiled", "--vae-encode", "tiled"]
    more = ["--negative-prompt", "grey", "--height", 112, "--width", 320]
    succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, *options, *more, "--steps", 4, "-o", "all.png")
    succeed("edit", "--from", "all.png", "-o", "again.png")
    same("all.png", "again.png")
    assert read_recipe("again.png")["settings"] == read_recipe("all.png")["settings"]
    succeed(
        "edit",
        "--from",
        "all.png",
        "--guidance-scale",
        1,
        "--negative-prompt",
        " ",
        "-o",
        "one.png",
        *["--guidance-until", 1],
    )
    assert np.abs(pixels("one.png") - pixels("all.png")).max() > 2


@nightly
def test_a_mask_and_pasting_back(model):
    """Outside the mask every pixel is the picture's own, at its own size."""
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 30:70] = 255
    Image.fromarray(mask).save("mask.png")
    succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, "--mask", "mask.png", "-o", "masked.png")
    found, original = pixels("masked.png"), pixels("photo.png")
    np.testing.assert_array_equal(found[mask == 0], original[mask == 0])
    assert np.abs(found[mask > 0] - original[mask > 0]).mean() > 5
    succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, "--paste-back", "-o", "pasted.png")
    whole = pixels("pasted.png")
    assert whole.shape == original.shape
    np.testing.assert_array_equal(whole[mask > 0], found[mask > 0])


@nightly
def test_what_it_does_not_take(model):
    for options, says in (
        ([], "0 reference pictures were given and Qwen-Image-Edit needs 1"),
        (["-i", "photo.png", "-i", "tall.png"], "Qwen-Image-Edit takes 1 at most"),
        (["-i", "photo.png", "--fit", "pad"], "fit is 'pad', but Qwen-Image-Edit has no such option; this model takes"),
        (["-i", "photo.png", "--height", 100, "--width", 112], "the nearest are height 96 and width 112"),
    ):
        done = invoke("edit", "make it red", *model, *FAST, *options)
        assert isinstance(done.exception, RequestError), done.stderr
        assert says in str(done.exception)
    assert not Path("edit.png").exists()


@nightly
def test_several_references_and_a_batch(plus):
    succeed("edit", "swap both", "-i", "photo.png", "-i", "tall.png", *plus, *FAST)
    assert pixels("edit.png").shape == (352, 192, 3)
    assert len(read_recipe("edit.png")["references"]) == 2
    succeed("edit", "--from", "edit.png", "-o", "again.png")
    same("edit.png", "again.png")
    rows = [
        {"id": "one", "prompt": "make it red", "image": "photo.png", "steps": 2, "base_size": 256},
        {"id": "two", "prompt": "swap both", "image": ["photo.png", "tall.png"], "steps": 2, "base_size": 256},
        {"id": "words", "prompt": "a tree"},
    ]
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke("batch", "r.jsonl", "--output", "out", *plus, "--dtype", "float32", "--batch-size", 2)
    assert isinstance(done.exception, JoyJaxError)
    assert sorted(done.stdout.split()) == ["out/one.png", "out/two.png"]
    assert "needs 1" in json.loads(Path("out/words.json").read_text())["error"]
    assert np.abs(pixels("edit.png") - pixels("out/two.png")).max() <= 1


@nightly
def test_a_converted_folder_gives_the_same_pixels(model, qwen_edit_folder):
    done = succeed("convert", qwen_edit_folder, "converted")
    assert "--model converted" in done.stderr
    succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, "-o", "diffusers.png")
    succeed("edit", "make it red", "-i", "photo.png", "--model", "converted", *FAST, "-o", "converted.png")
    same("diffusers.png", "converted.png")
    for folder, kind in ((qwen_edit_folder, "diffusers"), ("converted", "converted")):
        done = succeed("info", folder, "--verify")
        assert f"Qwen-Image-Edit (QwenImageEditPipeline), {kind} folder, complete" in done.stdout


@nightly
def test_float8(model, qwen_edit_folder):
    succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, "-o", "exact.png")
    succeed("edit", "make it red", "-i", "photo.png", *model, *FAST, "--quantize", "float8", "-o", "float8.png")
    assert 0 < np.abs(pixels("float8.png") - pixels("exact.png")).mean() < 60
    assert read_recipe("float8.png")["model"]["linear"] == "float8"


@nightly
def test_info(qwen_edit_folder, qwen_plus_folder):
    for folder, name, kind in (
        (qwen_edit_folder, "Qwen-Image-Edit", "QwenImageEditPipeline"),
        (qwen_plus_folder, "Qwen-Image-Edit-Plus", "QwenImageEditPlusPipeline"),
    ):
        assert f"{name} ({kind}), diffusers folder" in succeed("info", folder).stdout
        told = json.loads(succeed("info", folder, "--json", "--mesh", "cfg=2,sequence=4").stdout)
        assert (told["family"], told["state"]) == (name, "runs")
        assert {held["heads"] for held in told["mesh"]} == {4}
        assert {held["image_tokens"] for held in told["mesh"]} == {2 * 4096 // 4}


@nightly
def test_warmup(qwen_edit_folder, qwen_plus_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    for folder in (qwen_edit_folder, qwen_plus_folder):
        done = succeed("warmup", folder, "--dtype", "float32", "--base-size", 256)
        assert done.stdout == f"{tmp_path}\n"
    refused = invoke("warmup", qwen_edit_folder, "--dtype", "float32", "--references", 2)
    assert "Qwen-Image-Edit takes 1 at most" in str(refused.exception)


@nightly
def test_bench_edits_a_picture(model):
    told = json.loads(
        succeed("bench", *model, "--dtype", "float32", "--steps", 1, "--base-size", 256, "-n", 1, "--json").stdout
    )
    assert (told["settings"]["family"], told["settings"]["height"]) == ("Qwen-Image-Edit", 256)
    assert told["step_seconds"] > 0
