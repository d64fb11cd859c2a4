"""Text to image by Qwen-Image against Diffusers' pipeline, live: same checkpoint and noise, strong random weights."""

import dataclasses

import jax
import numpy as np
import pytest
from compilations import counting
from pairs import LEVELS, assert_same, draw

pytest.importorskip("torch")
import torch
from parity.test_qwen_image import STATES_TOLERANCE, VELOCITY_TOLERANCE
from qwen_pairs import load_reference, our_picture, our_stages, their_picture, their_stages

import joyjax
from joyjax.families.qwen_image_prompt import DROPPED, LONGEST_PROMPT
from joyjax.families.qwen_image_stages import token_class

pytestmark = [pytest.mark.jax, pytest.mark.parity]
nightly = pytest.mark.nightly  # three pictures run daily: one stage by stage and a batch of two

LATENTS_TOLERANCE = 4e-5  # measured: 1.1e-5
TOLERANCES = {
    "token ids": 0.0,
    "hidden states": STATES_TOLERANCE,
    "first velocity": VELOCITY_TOLERANCE,
    "latents after step": LATENTS_TOLERANCE,
}
LONG = 40 * "a red fox in the snow beside a small blue house, oil painting; "
SIGMAS = [1.0, 0.8, 0.35, 0.1]
ONE_PASS = {"negative": None, "scale": 1.0}


def test_stages(qwen_reference, qwen_loaded, error):
    """Sides of 5 and 9 tokens, a negative prompt, and a prompt that is cut after 512 tokens."""
    noise = draw(80, 144, seed=1)
    theirs = their_stages(qwen_reference, LONG, noise, negative="blurry, low quality")
    with pytest.warns(joyjax.AdviceWarning, match=r"prompt: the model reads 512 tokens; the last \d+ are not read"):
        ours = our_stages(qwen_loaded, LONG, noise, negative_prompt="blurry, low quality")
    assert theirs["hidden states, prompt"].shape[1] == LONGEST_PROMPT
    longer = theirs["token ids, prompt"]
    assert longer.shape[1] > DROPPED + LONGEST_PROMPT
    theirs["token ids, prompt"] = longer[:, : DROPPED + LONGEST_PROMPT]  # what is cut later changes nothing before it
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        for kind, tolerance in TOLERANCES.items():
            if name.startswith(kind):
                found = error(ours[name], expected)
                print(f"{name}: {found:.2g}")
                assert found <= tolerance, name
    assert_same(ours["picture"], theirs["picture"])


@pytest.fixture
def steep(qwen_reference, qwen_loaded, monkeypatch):
    """Both sides with a schedule whose shift changes much from 50 tokens to 54."""
    changes = {"base_image_seq_len": 50, "max_image_seq_len": 54, "base_shift": 0.2, "max_shift": 2.0}
    scheduler = type(qwen_reference.scheduler).from_config(qwen_reference.scheduler.config, **changes)
    monkeypatch.setattr(qwen_reference, "scheduler", scheduler)
    solver = qwen_loaded.parts.solver
    solver = dataclasses.replace(solver, schedule=dataclasses.replace(solver.schedule, **changes))
    return dataclasses.replace(qwen_loaded, parts=dataclasses.replace(qwen_loaded.parts, solver=solver))


@pytest.mark.parametrize("scale", [1.0, pytest.param(4.0, marks=nightly)])
def test_a_batch_of_two_sizes(scale, qwen_reference, steep):
    """Two sizes of one token class, each with its own levels: one program predicts for both."""
    noises, prompts = [draw(96, 144, seed=2), draw(160, 80, seed=3)], ("a red fox in the snow", "a tree")
    counts = [noise.shape[1] * noise.shape[2] // 4 for noise in noises]
    assert token_class(counts[0]) == token_class(counts[1])
    solver = steep.parts.solver
    levels = [solver.levels(4, None, solver.shift(count)).sigma for count in counts]
    assert np.abs(levels[0] - levels[1]).max() > 0.2
    given = ONE_PASS if scale == 1 else {"scale": scale}
    theirs = [
        their_picture(qwen_reference, prompt, noise, **given) for prompt, noise in zip(prompts, noises, strict=True)
    ]
    rows = [
        {
            "prompt": prompt,
            "noise": noise,
            "height": 8 * noise.shape[1],
            "width": 8 * noise.shape[2],
            "steps": 4,
            "guidance_scale": scale,
        }
        for prompt, noise in zip(prompts, noises, strict=True)
    ]
    jax.clear_caches()
    with counting() as compiled:
        ours = joyjax.edit_batch(steep, rows)
    assert (compiled["predict"], compiled["advance"]) == (1, 1)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(np.asarray(mine.image), other)


@nightly
@pytest.mark.parametrize(
    ("size", "prompt", "theirs", "ours"),
    [
        pytest.param((96, 144), "a red fox in the snow", {}, {}, id="landscape"),
        pytest.param((144, 96), "ein Hügel in Öl 画 🎨\n\n  and more", {}, {}, id="portrait"),
        pytest.param((64, 64), "", {}, {}, id="empty"),
        pytest.param((16, 176), "a tree", {}, {}, id="one row of tokens"),
        pytest.param((80, 112), "a tree", ONE_PASS, {"guidance_scale": 1.0}, id="one pass"),
        pytest.param((80, 112), "a tree", ONE_PASS, {"guidance_scale": 0.0}, id="scale 0 is one pass, too"),
        pytest.param((80, 112), "a tree", {"negative": ""}, {"negative_prompt": ""}, id="empty negative prompt"),
        pytest.param((80, 112), "a tree", {"negative": LONG}, {"negative_prompt": LONG}, id="long negative prompt"),
        pytest.param((80, 112), LONG, ONE_PASS, {"guidance_scale": 1.0}, id="long, one pass"),
        pytest.param(
            (80, 112), "a tree", {"scale": 7.5, "steps": 7}, {"guidance_scale": 7.5, "steps": 7}, id="seven steps"
        ),
        pytest.param((80, 112), "a tree", {"sigmas": SIGMAS}, {"sigmas": SIGMAS, "steps": None}, id="given levels"),
    ],
)
@pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")
def test_picture(qwen_reference, qwen_loaded, size, prompt, theirs, ours):
    noise = draw(*size)
    expected = their_picture(qwen_reference, prompt, noise, **theirs)
    assert_same(our_picture(qwen_loaded, prompt, noise, **ours), expected)


@nightly
def test_given_levels_are_others_than_the_schedules(qwen_loaded):
    noise = draw(80, 112)
    own = our_picture(qwen_loaded, "a tree", noise).astype(int)
    assert np.abs(our_picture(qwen_loaded, "a tree", noise, sigmas=SIGMAS, steps=None) - own).max() > LEVELS


@nightly
@pytest.mark.parametrize("steps", [1, 4])
def test_distilled(steps, tmp_path):
    """No terminal level, and the shift 3 of every size: base_shift and max_shift are ln 3."""
    import qwen_checkpoint

    pipeline = qwen_checkpoint.make_pipeline(seed=5, distilled=True)
    ours = joyjax.load(qwen_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    shifts = [ours.parts.solver.shift(count) for count in (1, 256, 4096, 10_000)]
    np.testing.assert_allclose(shifts, np.log(3), rtol=1e-12)
    levels = ours.parts.solver.levels(4, None, shifts[0])
    np.testing.assert_allclose(levels.sigma[:, 0], [1, 0.9, 0.75, 0.5], atol=1e-6)
    noise = draw(80, 112)
    expected = their_picture(pipeline, "a tree", noise, steps=steps, **ONE_PASS)
    assert_same(our_picture(ours, "a tree", noise, steps=steps, guidance_scale=1.0), expected)


@nightly
def test_one_step_of_a_schedule_with_a_terminal_level(qwen_reference, qwen_loaded, monkeypatch):
    """The reference divides 0 by 0; without the terminal level it goes from 1 to 0, as we do."""
    noise = draw(80, 112)
    monkeypatch.setattr(
        qwen_reference,
        "scheduler",
        type(qwen_reference.scheduler).from_config(qwen_reference.scheduler.config, shift_terminal=None),
    )
    expected = their_picture(qwen_reference, "a tree", noise, steps=1)
    assert_same(our_picture(qwen_loaded, "a tree", noise, steps=1), expected)


@nightly
def test_sharded_bfloat16_files(tmp_path):
    """Weights stored in bfloat16 in several files, computed in float32 on both sides."""
    import qwen_checkpoint

    pipeline = qwen_checkpoint.make_pipeline(seed=2)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = qwen_checkpoint.save(pipeline, tmp_path / "m", dtype=torch.bfloat16, shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    noise = draw(80, 112)
    expected = their_picture(pipeline, "a tree", noise)
    assert_same(our_picture(joyjax.load(folder, dtype="float32"), "a tree", noise), expected)


@nightly
def test_both_spellings_of_the_text_encoder_give_one_picture(qwen_reference, qwen_loaded, tmp_path):
    import qwen_checkpoint

    folder, noise = qwen_checkpoint.save(qwen_reference, tmp_path / "m", resaved=True), draw(80, 112)
    resaved = our_picture(joyjax.load(folder, dtype="float32"), "a tree", noise, steps=1)
    np.testing.assert_array_equal(resaved, our_picture(qwen_loaded, "a tree", noise, steps=1))


@nightly
def test_bfloat16_is_as_exact_as_the_reference(qwen_reference, qwen_loaded, qwen_folder):
    """The error of our bfloat16 picture is at most 1.1 times that of Diffusers', each against its own float32."""
    half, their_half = joyjax.load(qwen_folder, dtype="bfloat16"), load_reference(qwen_folder, "bfloat16")
    ratios = {}
    for seed in range(3):
        noise, prompt = draw(80, 112, seed=seed), ("a tree", "a red fox", "oil painting")[seed]
        sides = [
            [their_stages(pipeline, prompt, noise) for pipeline in (qwen_reference, their_half)],
            [our_stages(pipeline, prompt, noise) for pipeline in (qwen_loaded, half)],
        ]
        for name in sides[0][0]:
            if not name.startswith(("token", "picture")):
                theirs, ours = (np.linalg.norm(rough[name] - exact[name]) for exact, rough in sides)
                ratios.setdefault(name, []).append(ours / theirs)
    print("\n" + "\n".join(f"{name}: {np.mean(r):.2f} of the reference's error" for name, r in ratios.items()))
    assert np.mean(ratios["latents after step 4"]) <= 1.1
    assert np.mean(ratios["hidden states, prompt"]) <= 1.1
