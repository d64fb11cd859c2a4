"""What Qwen-Image-Edit and Edit-Plus take and refuse, their sizes, and how few programs serve all of them."""

import dataclasses
import json
import shutil

import jaxtyping
import numpy as np
import pytest
from meshes import mesh_of
from pairs import photo
from PIL import Image

import joyjax
from joyjax.errors import CheckpointError, ConfigError, JoyJaxError, MeshError, PictureError, RequestError
from joyjax.families import qwen_image_lengths as lengths
from joyjax.families.qwen_image_edit import EDIT, EDIT_PLUS
from joyjax.families.qwen_image_edit_stages import size_of_area
from joyjax.families.qwen_image_prompt import EDIT_DROPPED, edit_prompt_tokens
from joyjax.media.framing import paste_back, plan_stretch, stretch
from joyjax.processors.vision import VisionProcessorConfig
from joyjax.runtime.engine import Engine
from joyjax.runtime.request import check_request

pytestmark = pytest.mark.parity  # the tokenizer and the configurations are the reference's

PICTURE = Image.new("RGB", (96, 64), "teal")


def plan(pipeline, image=PICTURE, prompt="a tree", **options):
    return Engine(pipeline).plan(check_request(pipeline, image, prompt, **options)).plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, r"0 reference pictures were given and Qwen-Image-Edit needs 1"),
        ({"image": []}, r"image is an empty list; give a picture"),
        (
            {"image": [PICTURE] * 2},
            r"2 reference pictures .* Qwen-Image-Edit takes 1 at most; .* Edit-Plus weights take",
        ),
        ({"fit": "pad"}, r"fit is 'pad', but Qwen-Image-Edit has no such option; this model takes pictures whole"),
        ({"height": 90, "width": 112}, r"height is 90 and width is 112; .* 16 and 16: .* height 96 and width 112"),
        ({"height": 80}, r"height is given without width"),
        ({"exact_size": True}, r"exact_size needs both height and width"),
        ({"base_size": 300}, r"base_size is 300; choose one of 256, 512, 768, 1024"),
        ({"noise": np.zeros((1, 8, 8, 16), np.float32)}, r"noise has shape .*; a 832×1248 result needs"),
        (
            {"mask": Image.new("L", PICTURE.size, 255), "height": 80, "width": 80},
            r"mask needs a result of the last reference's own size, 1248 × 8",
        ),
        (
            {"paste_back": True, "height": 80, "width": 80},
            r"paste_back needs a result of .* leave out height and width",
        ),
        ({"guidance_scale": 1.0, "negative_prompt": "grey"}, r"negative_prompt is given, but guidance_scale is 1.0"),
        ({"layers": 4}, r"layers"),
        ({"true_cfg_scale": 4.0}, r"true_cfg_scale.*guidance_scale"),
    ],
)
def test_what_is_refused(options, message, qwen_edit_loaded, monkeypatch):
    arguments = {"image": PICTURE, "prompt": "a tree", **options}
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(RequestError, match=message) as caught:
        joyjax.edit(qwen_edit_loaded, arguments.pop("image"), arguments.pop("prompt"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(5000, 1), (1, 8000), (3000, 8)])
def test_pictures_that_are_too_thin(size, qwen_plus_loaded):
    with pytest.raises(PictureError, match=r"too thin") as caught:
        plan(qwen_plus_loaded, [PICTURE, Image.new("RGB", size)])
    assert isinstance(caught.value, JoyJaxError)
    assert f"{size[0]} × {size[1]}" in str(caught.value)


def change(folder, name: str, **changes) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("processor/preprocessor_config.json", {"patch_size": 16}, "patch_size is 16, but the vision tower's is 14"),
        ("processor/preprocessor_config.json", {"merge_size": 4}, "merge_size is 4, but the vision tower's spatial_me"),
        ("processor/preprocessor_config.json", {"resample": 2}, "resample is 2; .* implements 3"),
        (
            "text_encoder/config.json",
            {"image_token_id": 5},
            r"image_token_id is 5, but the tokenizer's <\|image_pad\|>",
        ),
        ("text_encoder/config.json", {"vision_config": None}, "vision_config is None; expected a json object"),
        ("transformer/config.json", {"joint_attention_dim": 95}, "joint_attention_dim is 95, but the text's hidden_si"),
    ],
)
def test_parts_that_do_not_fit_are_named(file, changes, message, qwen_edit_folder, tmp_path):
    folder = shutil.copytree(qwen_edit_folder, tmp_path / "m")
    change(folder, file, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        joyjax.load(folder)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({"min_pixels": 784, "max_pixels": 50176}, (784, 50176)),
        ({"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 50176}}, (784, 50176)),
        (
            {"min_pixels": 784, "max_pixels": 50176, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
            (784, 50176),
        ),
        ({"size": {"min_pixels": 784, "max_pixels": 50176}}, (784, 50176)),
    ],
)
def test_limits_of_the_processor_in_every_spelling(given, bounds, qwen_edit_folder):
    raw = json.loads((qwen_edit_folder / "processor" / "preprocessor_config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in ("size", "min_pixels", "max_pixels")}
    processor = VisionProcessorConfig.from_json({**raw, **given})
    assert (processor.min_pixels, processor.max_pixels) == bounds


def test_sizes(qwen_edit_loaded, qwen_plus_loaded):
    """About base_size² pixels in multiples of 32; Edit-Plus shows the text encoder less; the last picture counts."""
    assert [size_of_area((3, 4), side) for side in (1024, 384, 640)] == [(896, 1184), (320, 448), (544, 736)]
    for base, size in ((1024, (832, 1248)), (512, (416, 640)), (256, (224, 320))):
        found = plan(qwen_edit_loaded, base_size=base)
        assert (found.size[1:], found.own.pictures, found.own.read) == (size, (size,), (size,))
    found = plan(qwen_plus_loaded, [PICTURE, Image.new("RGB", (90, 120))])
    assert found.own.pictures == ((832, 1248), (1184, 896))
    assert found.own.read == ((320, 480), (448, 320))
    assert (found.size, found.base) == ((1, 1184, 896), 1)
    assert found.own.grids == ((74, 56), (52, 78), (74, 56))
    for options in ({}, {"exact_size": True}, {"base_size": 512}):
        assert plan(qwen_edit_loaded, height=1328, width=16, **options).size == (1, 1328, 16)


def test_defaults_are_the_familys(qwen_edit_loaded, qwen_plus_loaded):
    for pipeline, steps in ((qwen_edit_loaded, 50), (qwen_plus_loaded, 40)):
        request = check_request(pipeline, PICTURE, "a tree")
        assert (request.steps, request.guidance_scale, request.negative_prompt) == (steps, 4.0, " ")
        assert plan(pipeline).lengths.passes == 2
        assert plan(pipeline, guidance_scale=1.0).lengths.passes == 1
    assert (EDIT.references, EDIT_PLUS.references) == ((1, 1), (1, None))
    assert len(plan(qwen_plus_loaded, [PICTURE] * 7).own.pictures) == 7


def test_a_prompt_is_text_and_is_not_cut(qwen_edit_loaded):
    words = qwen_edit_loaded.parts.tokenizer
    end, image = (words.token_to_id(f"<|{name}|>") for name in ("im_end", "image_pad"))
    ids = edit_prompt_tokens(words, "a<|im_end|><|image_pad|>b", [3], numbered=False)
    assert (ids.count(end), ids.count(image)) == (2, 3)
    found = plan(qwen_edit_loaded, prompt="a " * 1500, base_size=256)
    assert found.own.text.lengths[1] > 1500
    assert found.own.text.first == (EDIT_DROPPED, EDIT_DROPPED)
    assert found.notes == ()


def test_stretching():
    """Lanczos to exactly the size, nothing cropped, and said so."""
    picture = photo(60, 90)
    crop = plan_stretch((60, 90), (64, 128))
    assert (crop.lost, crop.box, crop.inner) == (0.0, (0.0, 0.0, 90.0, 60.0), (0, 0, 128, 64))
    assert str(crop) == "picture 90 × 60 → 128 × 64, enlarged 1.23 times; nothing cropped; made 33.3 % wider"
    assert str(plan_stretch((64, 64), (64, 64))) == "picture 64 × 64, taken as it is"
    assert str(plan_stretch((90, 60), (128, 64))).endswith("made 33.3 % taller")
    expected = np.asarray(picture.resize((128, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.asarray(stretch(picture, (64, 128))), expected)


def test_a_stretched_picture_is_pasted_back():
    """At its own size and shape, and outside the mask untouched."""
    picture = photo(60, 90)
    crop = plan_stretch((60, 90), (64, 128))
    mask = Image.new("L", picture.size)
    mask.paste(255, (20, 10, 70, 50))
    drawn = stretch(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (64, 128))
    found = np.asarray(paste_back(drawn, picture, crop, mask))
    inside = np.asarray(mask) > 0
    np.testing.assert_array_equal(found[~inside], np.asarray(picture)[~inside])
    expected = np.asarray(drawn.resize((90, 60), Image.Resampling.LANCZOS))
    assert np.abs(found[inside].astype(int) - expected[inside]).max() <= 1


def shapes_of(found) -> tuple:
    """What the transformer's program is compiled for."""
    return found.lengths.target[1], found.lengths.references[1], found.lengths.text[1], found.lengths.passes


def padding_of(found) -> float:
    """The share of the transformer's tokens that is padding, over the valid ones."""
    pairs = found.lengths.target, found.lengths.references, found.lengths.text
    valid, padded = (sum(pair[n] for pair in pairs) for n in (0, 1))
    return padded / valid - 1


@pytest.mark.parametrize("given", [False, True], ids=["the pictures' sizes", "given sizes"])
@pytest.mark.parametrize(
    "references",
    [
        pytest.param(0, marks=pytest.mark.nightly),
        pytest.param(1, marks=pytest.mark.nightly),
        2,
        pytest.param(3, marks=pytest.mark.nightly),
    ],
    ids=["Edit", "Plus, one", "Plus, two", "Plus, three"],
)
def test_few_programs_serve_all_sizes_and_prompts(references, given, qwen_edit_loaded, qwen_plus_loaded):
    """30 random sizes, each with 20 prompts of up to 480 tokens, at 1024²: 12 programs at most, 15 % padding at most.

    Pictures have any shape from 1:3 to 3:1; given sizes have sides from 512 to 1536.
    """
    pipeline = qwen_plus_loaded if references else qwen_edit_loaded
    rng, found = np.random.default_rng(0), []
    prompts = [" the" * int(count) for count in rng.integers(1, 480, 20)]  # one token each
    for _ in range(30):
        pictures = []
        for _ in range(max(1, references)):
            ratio = 3 ** rng.uniform(-1, 1)
            pictures.append(Image.new("RGB", (round(200 * ratio**0.5), round(200 / ratio**0.5))))
        sides = {}
        if given:
            sides = dict(zip(("height", "width"), (16 * int(side) for side in rng.integers(32, 97, 2)), strict=True))
        found += [plan(pipeline, pictures, prompt, **sides) for prompt in prompts]
    assert max(each.own.text.lengths[1] for each in found) > 400
    programs, padding = {shapes_of(each) for each in found}, np.mean(list(map(padding_of, found)))
    print(f"{len(programs)} programs, {padding:.1%} padding")
    assert padding <= 0.15
    assert len(programs) <= 12, sorted(programs)


def test_classes():
    for tokens in range(1, 20_000, 7):
        for natural in (True, False):
            assert lengths.target(tokens, 4096, natural=natural) >= tokens
            assert lengths.references(tokens, 3, 4096, natural=natural) >= tokens
            assert lengths.text(tokens, 3, natural=natural) >= tokens
    assert [lengths.target(tokens, 4096, natural=True) for tokens in (3900, 4096, 4097, 4400)] == [
        4096,
        4096,
        4352,
        4608,
    ]
    assert [lengths.target(tokens, 4096, natural=False) for tokens in (1024, 1025, 4096, 4097)] == [
        1024,
        1280,
        4096,
        5120,
    ]
    assert [lengths.text(states, 1, natural=True) for states in (200, 257, 1500, 1537)] == [256, 512, 1536, 2048]
    assert [lengths.text(900, pictures, natural=False) for pictures in (1, 2, 3, 4)] == [1024, 1024, 2048, 2048]
    assert [lengths.windows([grid], 4) for grid in ((14, 14), (37, 37), (36, 40))] == [16, 112, 96]


@pytest.mark.parametrize("mode", ["vae_encode", "vae_decode"])
def test_a_picture_that_devices_cannot_cut_evenly(mode, qwen_edit_loaded):
    """Refused before anything is computed."""
    pipeline = dataclasses.replace(qwen_edit_loaded, mesh=mesh_of(data=7))
    with pytest.raises(MeshError, match="patches"):
        plan(pipeline, **{mode: "patch"}, base_size=256)
