"""Qwen-Image-Edit and Edit-Plus against Diffusers' pipelines, live: same checkpoint and noise, strong random weights.

Both sides have pictures of about 256² pixels, and the reference is told which tokens are pictures'.
"""

import jax
import numpy as np
import pytest
from compilations import counting
from pairs import assert_same, draw, photo

pytest.importorskip("torch")
import torch
from parity.test_qwen2_5_vl_vision import ENCODER_TOLERANCE
from parity.test_qwen_edit import LATENTS_TOLERANCE, ONE_PASS
from parity.test_qwen_image import VELOCITY_TOLERANCE
from parity.test_wan_vae import ENCODE_TOLERANCE
from qwen_pairs import load_reference, our_picture, our_stages, small_areas, their_picture, their_stages

import joyjax
from joyjax.families.qwen_image_prompt import EDIT_DROPPED
from joyjax.runtime.engine import Engine
from joyjax.runtime.request import check_request

pytestmark = [pytest.mark.jax, pytest.mark.parity]
nightly = pytest.mark.nightly  # three pictures run daily: one stage by stage and a batch of two

TOLERANCES = {
    "token ids": 0.0,
    "hidden states": ENCODER_TOLERANCE,
    "reference latents": ENCODE_TOLERANCE,
    "first velocity": VELOCITY_TOLERANCE,
    "latents after step": LATENTS_TOLERANCE,
}
WIDE, TALL, SMALL = photo(150, 240), photo(310, 200, seed=1), photo(33, 47, seed=2)
NATURAL = (192, 320)  # of WIDE, at a base size of 256
PROMPT = "make the sky red, put a small blue house beside the tree"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_areas(monkeypatch)


def natural(pipeline, image) -> tuple[int, int]:
    last = image[-1] if isinstance(image, list) else image
    return pipeline.family.natural_size((last.height, last.width), 256)


def check_stages(theirs: dict, ours: dict, error) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        for kind, tolerance in TOLERANCES.items():
            if name.startswith(kind):
                found = error(ours[name], expected)
                print(f"{name}: {found:.2g}")
                assert found <= tolerance, name
    assert_same(ours["picture"], theirs["picture"])


@pytest.mark.parametrize("version", ["qwen_2511", pytest.param("qwen_plus", marks=nightly)])
def test_stages_of_edit_plus(version, request, error):
    """Two references of unlike shapes, a result of the last one's, and a negative prompt.

    The version 2511 has `zero_cond_t`: its references are at time 0.
    """
    reference, loaded = (request.getfixturevalue(f"{version}_{side}") for side in ("reference", "loaded"))
    images, noise = [TALL, WIDE], draw(*NATURAL, seed=1)
    assert natural(loaded, images) == NATURAL
    assert loaded.parts.configs["transformer"].zero_cond_t == (version == "qwen_2511")
    theirs = their_stages(reference, PROMPT, noise, negative="blurry, low quality", image=images)
    ours = our_stages(loaded, PROMPT, noise, negative_prompt="blurry, low quality", image=images, base_size=256)
    check_stages(theirs, ours, error)


@nightly
def test_a_ragged_batch_of_2511(qwen_2511_reference, qwen_2511_loaded):
    """Rows with one and with two references, each token at its own time."""
    requests = [(WIDE, NATURAL, 1), ([SMALL, WIDE], NATURAL, 2)]
    noises = [draw(*size, seed=seed) for _, size, seed in requests]
    expected = [
        their_picture(qwen_2511_reference, PROMPT, noise, image=image)
        for (image, _, _), noise in zip(requests, noises, strict=True)
    ]
    engine = Engine(qwen_2511_loaded)
    for (image, size, _), noise in zip(requests, noises, strict=True):
        options = {"steps": 4, "base_size": 256, "noise": noise, "height": size[0], "width": size[1]}
        given = {"negative_prompt": None, "guidance_scale": None, "seed": 0, **options}
        engine.submit(check_request(qwen_2511_loaded, image, PROMPT, **given))
    for job, theirs in zip(engine.run(), expected, strict=True):
        assert_same(np.asarray(job.result.image), theirs)


@nightly
def test_stages_of_edit(qwen_edit_reference, qwen_edit_loaded, error):
    """A given size of 5 × 9 tokens, unlike the picture's."""
    noise = draw(80, 144, seed=1)
    theirs = their_stages(qwen_edit_reference, PROMPT, noise, image=TALL)
    ours = our_stages(qwen_edit_loaded, PROMPT, noise, image=TALL, base_size=256)
    check_stages(theirs, ours, error)


@pytest.mark.parametrize("scale", [1.0, pytest.param(4.0, marks=nightly)])
def test_a_batch_of_unlike_rows(scale, qwen_edit_reference, qwen_edit_loaded):
    """Pictures and prompts of unlike sizes: one program predicts for both."""
    images, prompts = [photo(250, 260), photo(60, 77)], ("red", PROMPT)
    noises = [draw(*natural(qwen_edit_loaded, image), seed=n) for n, image in enumerate(images)]
    assert noises[0].shape != noises[1].shape
    given = ONE_PASS if scale == 1 else {"scale": scale}
    theirs = [
        their_picture(qwen_edit_reference, prompt, noise, image=image, steps=2, **given)
        for prompt, noise, image in zip(prompts, noises, images, strict=True)
    ]
    rows = [
        {"image": image, "prompt": prompt, "noise": noise, "steps": 2, "guidance_scale": scale, "base_size": 256}
        for prompt, noise, image in zip(prompts, noises, images, strict=True)
    ]
    jax.clear_caches()
    with counting() as compiled:
        ours = joyjax.edit_batch(qwen_edit_loaded, rows)
    assert (compiled["predict"], compiled["advance"]) == (1, 1)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(np.asarray(mine.image), other)


@nightly
@pytest.mark.parametrize(
    ("image", "size", "prompt", "theirs", "ours"),
    [
        pytest.param(WIDE, None, PROMPT, {}, {}, id="landscape"),
        pytest.param(TALL, None, "ein Hügel in Öl 画 🎨\n\n  and more", {}, {}, id="portrait"),
        pytest.param(SMALL, None, "", {}, {}, id="small, empty prompt"),
        pytest.param(photo(40, 390), None, "a tree", {}, {}, id="thin"),
        pytest.param(WIDE, (112, 80), "a tree", {}, {}, id="a size of its own, 7 × 5 tokens"),
        pytest.param(WIDE, (16, 144), "a tree", {}, {}, id="one row of tokens"),
        pytest.param(WIDE, None, "a tree", ONE_PASS, {"guidance_scale": 1.0}, id="one pass"),
        pytest.param(WIDE, None, "a tree", {"negative": ""}, {"negative_prompt": ""}, id="empty negative prompt"),
        pytest.param(
            WIDE, None, "a", {"negative": 9 * PROMPT}, {"negative_prompt": 9 * PROMPT}, id="long negative prompt"
        ),
        pytest.param(
            WIDE, None, 60 * PROMPT, ONE_PASS, {"guidance_scale": 1.0}, id="a prompt that text to image would cut"
        ),
    ],
)
def test_edit(qwen_edit_reference, qwen_edit_loaded, image, size, prompt, theirs, ours):
    noise = draw(*(size or natural(qwen_edit_loaded, image)))
    expected = their_picture(qwen_edit_reference, prompt, noise, image=image, **theirs)
    assert_same(our_picture(qwen_edit_loaded, prompt, noise, image=image, base_size=256, **ours), expected)


@nightly
@pytest.mark.parametrize(
    ("images", "size", "theirs", "ours"),
    [
        pytest.param([WIDE], None, {}, {}, id="one"),
        pytest.param([WIDE, TALL], None, {}, {}, id="two, the size of the last"),
        pytest.param([TALL, SMALL, WIDE], None, {}, {}, id="three"),
        pytest.param([TALL, SMALL, WIDE], (80, 112), {}, {}, id="three, a size of its own"),
        pytest.param([WIDE, WIDE], None, ONE_PASS, {"guidance_scale": 1.0}, id="one pass"),
        pytest.param([TALL], None, {"negative": PROMPT}, {"negative_prompt": PROMPT}, id="negative prompt"),
    ],
)
def test_edit_plus(qwen_plus_reference, qwen_plus_loaded, images, size, theirs, ours):
    noise = draw(*(size or natural(qwen_plus_loaded, images)))
    expected = their_picture(qwen_plus_reference, PROMPT, noise, image=images, **theirs)
    assert_same(our_picture(qwen_plus_loaded, PROMPT, noise, image=images, base_size=256, **ours), expected)


@nightly
def test_a_ragged_batch_of_edit_plus(qwen_plus_reference, qwen_plus_loaded):
    """Rows with one, three and two references, in one batch; the reference has each alone."""
    images, prompts = [[TALL], [WIDE, SMALL, TALL], [SMALL, photo(240, 155)]], ("red", PROMPT, "swap both")
    noises = [draw(*natural(qwen_plus_loaded, several), seed=n) for n, several in enumerate(images)]
    given = list(zip(images, prompts, noises, strict=True))
    theirs = [
        their_picture(qwen_plus_reference, prompt, noise, image=several, steps=2) for several, prompt, noise in given
    ]
    rows = [
        {"image": several, "prompt": prompt, "noise": noise, "steps": 2, "base_size": 256}
        for several, prompt, noise in given
    ]
    ours = joyjax.edit_batch(qwen_plus_loaded, rows)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(np.asarray(mine.image), other)


@nightly
def test_sharded_bfloat16_files(tmp_path):
    """Weights stored in bfloat16 in several files, computed in float32 on both sides."""
    import qwen_checkpoint

    pipeline = qwen_checkpoint.make_edit_pipeline("edit-plus", seed=2)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = qwen_checkpoint.save(pipeline, tmp_path / "m", dtype=torch.bfloat16, shard_size="200KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 2
    noise = draw(*NATURAL)
    expected = their_picture(pipeline, "a tree", noise, image=[WIDE])
    ours = joyjax.load(folder, dtype="float32")
    assert_same(our_picture(ours, "a tree", noise, image=[WIDE], base_size=256), expected)


def test_the_template_takes_as_many_tokens_as_with_the_real_tokenizer(qwen_edit_reference, qwen_plus_reference):
    words = qwen_edit_reference.tokenizer
    for pipeline, first in ((qwen_edit_reference, "<|vision_start|>"), (qwen_plus_reference, "Picture")):
        text = pipeline.prompt_template_encode.format("Picture 1: <|vision_start|>")
        ids = words(text)["input_ids"]
        assert words.convert_ids_to_tokens(ids[EDIT_DROPPED : EDIT_DROPPED + 1]) == [first]


@nightly
def test_bfloat16_is_as_exact_as_the_reference(qwen_plus_reference, qwen_plus_loaded, qwen_plus_folder):
    """The error of our bfloat16 picture is at most 1.1 times that of Diffusers', each against its own float32."""
    half, their_half = joyjax.load(qwen_plus_folder, dtype="bfloat16"), load_reference(qwen_plus_folder, "bfloat16")
    ratios: dict[str, list[float]] = {}
    for seed, images in enumerate(([WIDE], [TALL, WIDE], [SMALL])):
        noise = draw(*natural(qwen_plus_loaded, images), seed=seed)
        sides = [
            [their_stages(pipeline, PROMPT, noise, image=images) for pipeline in (qwen_plus_reference, their_half)],
            [our_stages(pipeline, PROMPT, noise, image=images, base_size=256) for pipeline in (qwen_plus_loaded, half)],
        ]
        for name in sides[0][0]:
            if not name.startswith(("token", "picture")):
                theirs, ours = (np.linalg.norm(rough[name] - exact[name]) for exact, rough in sides)
                ratios.setdefault(name, []).append(ours / theirs)
    print("\n" + "\n".join(f"{name}: {np.mean(r):.2f} of the reference's error" for name, r in ratios.items()))
    for name in ("hidden states, prompt", "reference latents", "latents after step 4"):
        assert np.mean(ratios[name]) <= 1.1
