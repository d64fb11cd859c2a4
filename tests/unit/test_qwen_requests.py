"""What Qwen-Image takes and refuses, how sizes and prompts become few programs, and that planning is the host's."""

import json
import shutil
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import psutil
import pytest
from compilations import counting
from PIL import Image

import joyjax
from joyjax.errors import CheckpointError, ConfigError, RequestError
from joyjax.families.qwen_image_prompt import DROPPED, LONGEST_PROMPT, prompt_tokens
from joyjax.families.qwen_image_stages import TEXT_SIZES, token_class
from joyjax.runtime.engine import Engine
from joyjax.runtime.request import check_request

pytestmark = pytest.mark.parity  # the tokenizer and the configurations are the reference's

PICTURE = Image.new("RGB", (64, 48))
SIZE = {"height": 80, "width": 112}


def plan(pipeline, prompt="a tree", **options):
    return Engine(pipeline).plan(check_request(pipeline, None, prompt, **options)).plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": PICTURE}, r"1 reference pictures were given and Qwen-Image takes 0 .* leave the picture out"),
        ({"image": [PICTURE] * 2}, r"2 reference pictures were given and Qwen-Image takes 0"),
        ({"image": []}, r"image is an empty list; give a picture, or for text to image leave it out"),
        ({"mask": PICTURE}, r"mask is given, but Qwen-Image has no such option; leave it out"),
        ({"fit": "pad"}, r"fit is 'pad', but Qwen-Image has no such option"),
        ({"paste_back": True}, r"paste_back is True, but Qwen-Image has no such option"),
        ({"vae_encode": "tiled"}, r"vae_encode is 'tiled', but Qwen-Image has no such option"),
        ({"height": 90, "width": 112}, r"height is 90 and width is 112; .* 16 and 16: .* height 96 and width 112"),
        ({"height": 80, "width": 100}, r"height is 80 and width is 100; .* the nearest are height 80 and width 96"),
        ({"height": 24, "width": 24, "exact_size": True}, r"height is 24 and width is 24; .* multiples of 16 and 16"),
        ({"height": 80}, r"height is given without width"),
        ({"width": 80}, r"width is given without height"),
        ({"height": 8, "width": 80}, r"height is 8; expected .* 16"),
        ({"exact_size": True}, r"exact_size needs both height and width"),
        ({"base_size": 300}, r"base_size is 300; choose one of 256, 512, 768, 1024"),
        ({"noise": np.zeros((1, 10, 14, 64), np.float32), **SIZE}, r"noise has shape .*64\); a 80×112 result needs"),
        ({"noise": np.zeros((1, 10, 12, 16), np.float32), **SIZE}, r"noise has shape .* needs \(1, 10, 14, 16\)"),
        ({"guidance_scale": 1.0, "negative_prompt": "grey"}, r"negative_prompt is given, but guidance_scale is 1.0"),
        ({"guidance_scale": 1.0, "guidance_until": 0.5}, r"guidance_until is 0.5, but guidance_scale is 1.0"),
        ({"steps": 3, "sigmas": [1.0, 0.5]}, r"steps is 3, but there are 2 sigmas"),
        ({"guidance_scale": [4.0, 2.0], "steps": 3}, r"guidance_scale has 2 values; .* 3 steps"),
        ({"prompt": None}, r"prompt is a NoneType; expected a str"),
        ({"layers": 4}, r"layers is 4, but Qwen-Image has no such option"),
        ({"true_cfg_scale": 4.0}, r"true_cfg_scale.*guidance_scale"),
        ({"cache": "often"}, r"cache is 'often'; expected"),
    ],
)
def test_what_is_refused(options, message, qwen_loaded, monkeypatch):
    arguments = {"image": None, "prompt": "a tree", **options}
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(RequestError, match=message) as caught:
        joyjax.edit(qwen_loaded, arguments.pop("image"), arguments.pop("prompt"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "class_name",
    ["QwenImage21Pipeline", "QwenImageEditInpaintPipeline", "QwenImageImg2ImgPipeline", "Qwen"],
)
def test_other_kinds_are_refused_with_the_known_ones(class_name, qwen_folder, tmp_path):
    folder = shutil.copytree(qwen_folder, tmp_path / "m")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": class_name}))
    with pytest.raises(CheckpointError, match=f"'{class_name}'; this version of joyjax runs .*QwenImagePipeline"):
        joyjax.load(folder)


def change(folder: Path, name: str, **changes) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is True"),
        ("transformer/config.json", {"joint_attention_dim": 95}, "joint_attention_dim is 95, but the text's hidden_si"),
        ("transformer/config.json", {"out_channels": 4, "in_channels": 16}, "out_channels is 4, but the VAE's z_dim"),
        ("scheduler/scheduler_config.json", {"time_shift_type": "cubic"}, "time_shift_type is 'cubic'"),
        ("scheduler/scheduler_config.json", {"shift_terminal": 1.5}, "shift_terminal is 1.5"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
    ],
)
def test_parts_that_do_not_fit_are_named(file, changes, message, qwen_folder, tmp_path):
    folder = shutil.copytree(qwen_folder, tmp_path / "m")
    change(folder, file, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        joyjax.load(folder)


@pytest.mark.parametrize("base_size", [256, 512, 768, 1024])
def test_a_base_size_is_a_square(base_size, qwen_loaded):
    assert plan(qwen_loaded, base_size=base_size).size == (1, base_size, base_size)


def test_sizes_are_taken_as_they_are(qwen_loaded):
    """1024² unless given; exact_size changes nothing, and neither does a base size beside a size."""
    assert plan(qwen_loaded).size == (1, 1024, 1024)
    for options in ({}, {"exact_size": True}, {"base_size": 256}):
        found = plan(qwen_loaded, height=1328, width=16, **options)
        assert (found.size, found.lengths.target) == ((1, 1328, 16), (83, 88))
        assert (found.base, found.crops, found.notes) == (None, (), ())


def test_defaults_are_the_familys(qwen_loaded):
    request = check_request(qwen_loaded, None, "a tree")
    assert (request.steps, request.guidance_scale, request.negative_prompt) == (50, 4.0, " ")
    assert plan(qwen_loaded).lengths.passes == 2
    assert plan(qwen_loaded, guidance_scale=1.0).lengths.passes == 1


def test_special_tokens_in_a_prompt_are_text(qwen_loaded):
    words = qwen_loaded.parts.tokenizer
    end = words.token_to_id("<|im_end|>")
    assert prompt_tokens(words, "a<|im_end|>b").count(end) == prompt_tokens(words, "ab").count(end) == 2


def test_a_long_prompt_is_cut_with_a_note(qwen_loaded):
    """Both prompts, each with its own note; the closing tokens go first."""
    found = plan(qwen_loaded, "a " * 600, negative_prompt="b " * 600)
    assert found.own.text.lengths == (LONGEST_PROMPT, LONGEST_PROMPT)
    assert [len(row) for row in found.own.text.rows] == [DROPPED + LONGEST_PROMPT] * 2
    assert [note.partition(":")[0] for note in found.notes] == ["negative_prompt", "prompt"]
    assert plan(qwen_loaded, "a tree").notes == ()


def shapes_of(found) -> tuple:
    """What the transformer's program is compiled for."""
    return found.latents, found.own.text.kept, found.lengths.passes


def test_few_programs_serve_all_sizes_and_prompts(qwen_loaded):
    """Padding is at most an eighth above 64 tokens; 30 random requests of up to 2048² need at most 33 × 3 programs."""
    for tokens in range(1, 70_000, 7):
        padded = token_class(tokens)
        assert tokens <= padded <= max(tokens + 7, tokens * 9 / 8)
        assert token_class(padded) == padded
    classes = {token_class(tokens) for tokens in range(256, 16385)}
    assert len(classes) == 8 * 6 + 1  # eight between a power of two and the next
    rng, found = np.random.default_rng(0), []
    for words in rng.integers(0, 500, 30):
        height, width = (16 * int(side) for side in rng.integers(32, 129, 2))
        found.append(shapes_of(plan(qwen_loaded, "a " * int(words), height=height, width=width)))
    assert {kept for _, kept, _ in found} <= {64, 256, 512} == set(TEXT_SIZES)
    assert len({tokens for (tokens, _), _, _ in found}) <= 8 * 4 + 1


def test_a_program_for_each_class_and_no_more(qwen_loaded):
    """Six sizes of two token classes, six prompts of one class of lengths."""
    sizes = [(64, 64), (48, 80), (16, 256), (96, 144), (112, 128), (80, 176)]
    requests = [
        {"prompt": n * "a tree ", "height": height, "width": width, "steps": 1}
        for n, (height, width) in enumerate(sizes)
    ]
    expected = {shapes_of(plan(qwen_loaded, **request)) for request in requests}
    jax.clear_caches()
    with counting() as counts:
        for request in requests:
            joyjax.edit(qwen_loaded, None, **request)
    assert len(expected) == counts["predict"] == 2
    assert counts["encode_prompt"] == 1
    assert counts["advance"] == 2


def test_warmup_compiles_what_a_picture_of_the_base_size_needs(qwen_loaded):
    family = qwen_loaded.family
    jax.clear_caches()
    for request in family.warmup(qwen_loaded.parts, None, False):
        joyjax.edit(qwen_loaded, **request, base_size=256, steps=2)
    with counting() as counts:
        joyjax.edit(qwen_loaded, None, "a blue house", base_size=256, steps=3, seed=2)
        joyjax.edit(qwen_loaded, None, 12 * "a blue house, ", base_size=256, steps=2, negative_prompt="grey")
    assert dict(counts) == {}


@pytest.mark.parametrize("family", ["loaded", "qwen_loaded"])
def test_a_thousand_planned_requests_put_nothing_on_a_device(family, request):
    """And take some kilobytes each on the host."""
    pipeline = request.getfixturevalue(family)
    picture = Image.new("RGB", (96, 64)) if pipeline.family.references[1] else None
    engine = Engine(pipeline)

    def submit(seed: int) -> None:
        engine.submit(check_request(pipeline, picture, f"a tree, number {seed}", seed=seed, base_size=256))

    submit(0)
    before = {id(array) for array in jax.live_arrays()}
    held = psutil.Process().memory_info().rss
    for seed in range(1, 1001):
        submit(seed)
    held = psutil.Process().memory_info().rss - held
    assert [array.shape for array in jax.live_arrays() if id(array) not in before] == []
    assert len(engine.waiting) == 1001
    assert held / 1000 < 64 * 1024, held
