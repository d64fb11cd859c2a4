"""Qwen-Image-Layered: what it takes and refuses, sizes, layers and their composite, files, and folders of batches."""

import dataclasses
import json
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from compilations import counting
from layered_pairs import cutout
from PIL import Image

import joyjax
from joyjax.convert.qwen2_5_vl import TEXT_ENCODER
from joyjax.errors import CheckpointError, PictureError, RequestError
from joyjax.families.family import Media
from joyjax.families.qwen_image_layered import LAYERED, STEP_TOKENS
from joyjax.families.qwen_image_layered_stages import natural_size
from joyjax.layers.weights import leaves
from joyjax.media.image import as_rgba
from joyjax.runtime.engine import Engine
from joyjax.runtime.request import check_request
from joyjax.runtime.result import layer_files, shown

pytestmark = pytest.mark.parity  # the checkpoint is the reference's

PICTURE = cutout(41, 60)
FAST = {"steps": 1, "layers": 2}


def plan(pipeline, picture=PICTURE, prompt="a tree", **options):
    return Engine(pipeline).plan(check_request(pipeline, picture, prompt, **options)).plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, r"prompt is ''; describe what is in the picture: .* writes no captions"),
        ({"prompt": " \n"}, r"prompt is ' \\n'; describe what is in the picture"),
        ({"image": None}, r"0 reference pictures were given and Qwen-Image-Layered needs 1; this model takes one"),
        ({"image": [PICTURE] * 2}, r"2 reference pictures were given and Qwen-Image-Layered takes 1 .* one picture"),
        ({"height": 80, "width": 112}, r"height is 80, but Qwen-Image-Layered has no such option; .* base_size sets"),
        ({"height": 80, "width": 112, "exact_size": True}, r"has no such option; the layers have the picture's shape"),
        ({"mask": Image.new("L", (60, 41), 255)}, r"mask is given, but Qwen-Image-Layered has no such option"),
        ({"paste_back": True}, r"paste_back is True, but Qwen-Image-Layered has no such option"),
        ({"fit": "pad"}, r"fit is 'pad', but Qwen-Image-Layered has no such option"),
        ({"layers": 0}, r"layers is 0; expected a number from 1 to 64"),
        ({"layers": 65}, r"layers is 65; expected a number from 1 to 64"),
        ({"layers": 2.0}, r"layers is 2.0; expected a whole number"),
        ({"layers": True}, r"layers is True; expected a whole number"),
        ({"cfg_normalize": 1}, r"cfg_normalize is 1; expected True or False"),
        ({"base_size": 512}, r"base_size is 512; choose one of 96, 640, 1024"),
        ({"noise": np.zeros((1, 8, 16, 16), np.float32)}, r"noise has shape .*; 4 layers .* need \(1, 5, 8, 16, 16\)"),
        ({"noise": np.zeros((1, 4, 12, 16, 16), np.float32)}, r"4 layers of this picture need \(1, 5, 8, 16, 16\)"),
        ({"noise": np.zeros((8, 16), np.float32)}, r"noise has shape \(8, 16\)"),
        ({"guidance_scale": 1.0, "negative_prompt": "grey"}, r"negative_prompt is given, but guidance_scale is 1.0"),
    ],
)
def test_what_is_refused(options, message, layered_loaded, monkeypatch):
    arguments = {"image": PICTURE, "prompt": "a tree", **options}
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(RequestError, match=message) as caught:
        joyjax.edit(layered_loaded, arguments.pop("image"), arguments.pop("prompt"), **arguments)
    assert "\n" not in str(caught.value)


def test_other_families_have_none_of_its_options(qwen_loaded, layered_loaded):
    for name, value in (("layers", 4), ("cfg_normalize", False), ("cfg_normalize", True)):
        with pytest.raises(RequestError, match=f"{name} is {value}, but Qwen-Image has no such option"):
            joyjax.edit(qwen_loaded, None, "a tree", **{name: value})
    with pytest.raises(RequestError, match="base_size is 640; choose one of 256, 512, 768, 1024"):
        joyjax.edit(qwen_loaded, None, "a tree", base_size=640)


def test_a_picture_too_thin(layered_loaded):
    with pytest.raises(PictureError, match="4000 × 3 pixels is too thin for layers .* 96 × 96; crop it first"):
        plan(layered_loaded, Image.new("RGB", (4000, 3)))


def test_sizes_are_those_of_the_reference():
    """Its own numbers for some pictures, and its function for many."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_layered import calculate_dimensions

    assert natural_size((768, 1024), 640) == (544, 736)
    assert natural_size((1000, 1000), 640) == (640, 640)
    assert natural_size(None, 1024) == (1024, 1024)
    rng = np.random.default_rng(0)
    for base in (96, 640, 1024):
        for height, width in rng.integers(50, 3000, (200, 2)).tolist():
            assert natural_size((height, width), base) == calculate_dimensions(base**2, width / height)[::-1]


def test_a_plan(layered_loaded):
    found = plan(layered_loaded, layers=2)
    assert (found.size, found.lengths.target, found.lengths.references) == ((2, 64, 128), (96, 96), (32, 32))
    assert found.shift == pytest.approx((32 / 256) ** 0.5)
    assert str(found.crops[0]) == "picture 60 × 41 → 128 × 64, enlarged 1.82 times; nothing cropped; made 36.7 % wider"
    fixed = dataclasses.replace(layered_loaded.parts.solver.schedule, use_dynamic_shifting=False)
    solver = dataclasses.replace(layered_loaded.parts.solver, schedule=fixed)
    other = dataclasses.replace(layered_loaded, parts=dataclasses.replace(layered_loaded.parts, solver=solver))
    assert plan(other).shift is None


def test_defaults_are_the_references(layered_loaded):
    request = check_request(layered_loaded, PICTURE, "a tree")
    assert (request.steps, request.guidance_scale, request.negative_prompt) == (50, 4.0, " ")
    assert request.own == {"layers": 4, "cfg_normalize": False}
    published = dataclasses.replace(
        layered_loaded, generation_defaults=dataclasses.replace(layered_loaded.generation_defaults, base_size=None)
    )
    assert check_request(published, PICTURE, "a tree").base_size == 640
    assert request.pictures[0].mode == "RGBA"


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgba(mode):
    picture = Image.new("I;16", (4, 3), 30000) if mode == "I;16" else PICTURE.convert(mode)
    found = as_rgba(picture)
    assert (found.mode, found.size) == ("RGBA", picture.size)
    if mode in ("LA", "RGBA"):
        assert np.array_equal(np.asarray(found)[..., 3], np.asarray(PICTURE)[..., 3])
    elif mode != "P":
        assert np.asarray(found)[..., 3].min() == 255
    if mode == "RGBA":
        assert np.array_equal(np.asarray(found), np.asarray(PICTURE))  # colours under transparency too


def test_transparency_is_seen_and_not_noted(layered_loaded):
    job = Engine(layered_loaded).plan(check_request(layered_loaded, PICTURE, "a tree"))
    assert not any("transparent" in note for note in job.notes)


def test_the_composite():
    layers = np.zeros((3, 1, 3, 4), np.uint8)
    layers[0] = [[10, 20, 30, 255], [1, 2, 3, 0], [9, 9, 9, 0]]
    layers[1] = [[200, 100, 50, 128], [4, 5, 6, 255], [7, 8, 9, 0]]
    layers[2] = [[0, 0, 0, 0], [250, 250, 250, 51], [0, 0, 0, 0]]
    whole = np.asarray(shown(Media(layers, kind="layers")))
    assert np.abs(whole[0, 0].astype(int) - [105, 60, 40, 255]).max() <= 1
    assert np.abs(whole[0, 1].astype(int) - [53, 54, 55, 255]).max() <= 1
    assert whole[0, 2].tolist() == [9, 9, 9, 0]  # the bottom's own colours
    assert np.array_equal(np.asarray(shown(Media(layers[:1], kind="layers"))), layers[0])


def test_layers_are_made_and_saved(layered_loaded, tmp_path, monkeypatch):
    """The same pixels from one seed; a preview is a composite; files of other names and other numbers of layers."""
    kept = []
    options = {**FAST, "callback": lambda event: kept.append(event.preview())}
    PICTURE.save(tmp_path / "in.png", icc_profile=None)
    picture = Image.open(tmp_path / "in.png")
    result = joyjax.edit(layered_loaded, picture, "a tree", **options)
    assert isinstance(result.layers, list)
    assert [(layer.mode, layer.size) for layer in result.layers] == [("RGBA", (128, 64))] * 2
    assert np.array_equal(np.asarray(kept[-1]), np.asarray(result.image))  # one step: its estimate is the result
    assert np.array_equal(np.asarray(Image.alpha_composite(*result.layers)), np.asarray(result.image))
    result.save(tmp_path / "a.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-layer1.png", "a-layer2.png", "a.png", "in.png"]
    for file, layer in zip(result.files(tmp_path / "a.png"), [result.image, *result.layers], strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(layer))
    for suffix in (".webp", ".tiff"):
        result.save(tmp_path / f"b{suffix}")
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"b-layer2{suffix}")), np.asarray(result.layers[1]))
    with pytest.raises(PictureError, match=r"\.jpg"):
        result.save(tmp_path / "c.jpg")
    assert not list(tmp_path.glob("c*"))
    before = (tmp_path / "in.png").read_bytes()
    (tmp_path / "in.png").rename(tmp_path / "d-layer1.png")
    moved = dataclasses.replace(
        result, references=(dataclasses.replace(result.references[0], file=tmp_path / "d-layer1.png"),)
    )
    with pytest.raises(RequestError, match=r"d-layer1\.png, a picture that this edit was made from"):
        moved.save(tmp_path / "d.png")
    assert (tmp_path / "d-layer1.png").read_bytes() == before
    assert not (tmp_path / "d.png").exists()
    candidates = [tmp_path / name for name in ("a.png", "d.png", "e.png")]
    assert result.save_free(candidates) == tmp_path / "e.png"  # d-layer1.png is taken
    assert (tmp_path / "e-layer2.png").exists()


@pytest.mark.nightly
def test_a_batch_of_unlike_rows(layered_loaded):
    """Two shapes and numbers of layers in one class of tokens share a program, and each is as alone."""
    rows = [
        {"image": PICTURE, "prompt": "a tree", "layers": 1, "steps": 2},
        {"image": cutout(60, 41), "prompt": 12 * "a red fox in the snow; ", "layers": 1, "steps": 2, "seed": 4},
    ]
    jax.clear_caches()
    with counting() as compiled:
        found = joyjax.edit_batch(layered_loaded, rows)
    assert compiled["predict"] == 1
    for row, result in zip(rows, found, strict=True):
        alone = joyjax.edit(layered_loaded, **row)
        for one, other in zip(result.layers, alone.layers, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    jobs = [
        Engine(layered_loaded).plan(check_request(layered_loaded, PICTURE, "a tree", cfg_normalize=value))
        for value in (False, True)
    ]
    assert jobs[0].plan.batch_key != jobs[1].plan.batch_key


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    [
        {"cache": 0.0},
        {"cache": "taylor:1000", "steps": 3},
        {"guidance_until": 0.5, "steps": 2},
        {"vae_decode": "tiled", "vae_encode": "tiled"},
        {"vae_decode": "auto"},
        {"sigmas": [1.0, 0.5]},
    ],
    ids=str,
)
def test_options_that_it_has(options, layered_loaded):
    exact = joyjax.edit(layered_loaded, PICTURE, "a tree", **{**FAST, "steps": 2})
    found = joyjax.edit(
        layered_loaded,
        PICTURE,
        "a tree",
        **{"layers": 2, **options},
        **({} if "sigmas" in options or "steps" in options else {"steps": 2}),
    )
    assert len(found.layers) == 2
    if options == {"cache": 0.0}:
        assert np.abs(np.asarray(found.image, int) - np.asarray(exact.image, int)).max() <= 1


def test_parts_of_other_models_are_refused(layered_folder, qwen_folder, tmp_path):
    """A transformer or an autoencoder of the other kind, in a folder of either pipeline."""
    import shutil

    for place, other, part, message in (
        (layered_folder, qwen_folder, "transformer", "use_layer3d_rope is False, but that of .* is True"),
        (layered_folder, qwen_folder, "vae", "input_channels is 3, but the channels of this pipeline's pictures is 4"),
        (qwen_folder, layered_folder, "transformer", "use_layer3d_rope is True, but that of .* is False"),
        (qwen_folder, layered_folder, "vae", "input_channels is 4, but the channels of this pipeline's pictures is 3"),
    ):
        folder = tmp_path / f"{place.name}-{part}-{other.name}"
        shutil.copytree(place, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copy(other / part / "config.json", folder / part / "config.json")
        with pytest.raises(CheckpointError, match=message):
            joyjax.load(folder)


def test_the_published_sizes():
    """Bytes of the real configuration in bfloat16, but for what is float32."""
    import qwen_full_size

    configs = qwen_full_size.configs(layered=True)
    sizes = {}
    for component in LAYERED.components:
        state = component.abstract(configs[component.folder], "bfloat16").state
        sizes[component.folder] = sum(leaf.get_value().size * leaf.dtype.itemsize for leaf in leaves(state).values())
    assert (sum(sizes.values()), max(sizes.values())) == (
        LAYERED.published.resident_bytes,
        LAYERED.published.staged_bytes,
    )
    lengths = LAYERED.usual(configs, 640)
    assert (lengths.target[0], lengths.references[0]) == (8000, 1600)
    assert lengths.target[1] + lengths.references[1] == STEP_TOKENS
    assert max(stage.working_bytes for stage in LAYERED.cost(configs, lengths)) == LAYERED.published.working_bytes
    assert TEXT_ENCODER in LAYERED.components


def test_names_of_layers():
    assert layer_files(Path("x/sheet.png"), 2) == [Path("x/sheet-layer1.png"), Path("x/sheet-layer2.png")]
    assert layer_files(Path("a.b.webp"), 1) == [Path("a.b-layer1.webp")]


def test_a_folder_of_layers(layered_loaded, tmp_path):
    """A row's layers beside its picture; no other row or input is replaced; a missing layer is made again."""
    from joyjax.batch.rows import read_rows
    from joyjax.batch.run import run_rows

    PICTURE.save(tmp_path / "in.png")
    row = {"id": "a", "image": "in.png", "prompt": "a tree", "steps": 1, "layers": 2}

    def run(*rows, folder="out", **options):
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return list(run_rows(layered_loaded, read_rows(tmp_path / "r.jsonl"), tmp_path, tmp_path / folder, **options))

    [done] = run(row)
    assert done.error is None
    names = ["a-layer1.png", "a-layer2.png", "a.json", "a.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out" / "a.json").read_text())["layers"] == names[:2]
    assert run(row)[0].skipped
    (tmp_path / "out" / "a-layer2.png").unlink()
    assert not run(row)[0].skipped
    assert (tmp_path / "out" / "a-layer2.png").exists()
    for rows in ([row, {**row, "id": "a-layer2"}], [{**row, "id": "a-layer2"}, row]):
        with pytest.raises(RequestError, match=r"a-layer2\.png is the result of line \d and a layer of 'a'"):
            run(*rows, folder="other")
    (tmp_path / "new").mkdir()
    PICTURE.save(tmp_path / "new" / "a-layer1.png")
    with pytest.raises(RequestError, match=r"a-layer1\.png, a layer of 'a' .*, exists and would be replaced"):
        run(row, folder="new")
    with pytest.raises(RequestError, match=r"a-layer1\.png, a layer of 'a' .*, exists and would be replaced"):
        run({**row, "image": "new/a-layer1.png"}, folder="new", overwrite=True)
    [failed] = run({**row, "prompt": " "}, folder="failed")
    assert "writes no captions" in failed.error
