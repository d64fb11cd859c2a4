"""What the text encoder is sent: patches, token ids and positions, against the reference's processor and pipelines."""

import json
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from joyjax.errors import PictureError
from joyjax.families.joyimage_buckets import buckets
from joyjax.families.joyimage_prompt import prompt_tokens
from joyjax.media.framing import cover_crop
from joyjax.processors.text import control_token, decode, load_tokenizer, multimodal_positions
from joyjax.processors.vision import VisionProcessorConfig, smart_resize, vision_patches

pytestmark = pytest.mark.parity

BUCKETS = [(64, 64), (64, 96), (96, 64)]  # in place of the published ones, to be quick
PROMPTS = {
    "plain": "Make the sky red, and add 2 small dogs.",
    "empty": "",
    "one space": " ",
    "line break first": "\n\nmake it blue",
    "space first": "  make it blue",
    "spaces last": "make it blue  \n",
    "decomposed letters": unicodedata.normalize("NFD", "un café à la crème, Ångström, ガ"),
    "emoji": "add 🐕‍🦺 and 👩‍👩‍👧‍👦!",
    "chinese": "把天空变成红色，加一顶帽子。",
    "odd space": "a\tb\r\nc\u00a0d\u2003e\u200bf\0g",
    "right to left": "أضف قبعة حمراء",
    "braces and backslash": "{0} {} \\n {{x}} %s",
    "an added word": "a <think> b",
}


class Sent(Exception):  # noqa: N818 - it carries what the reference sent, and stops it there
    def __init__(self, inputs):
        self.inputs = inputs


@pytest.fixture(scope="module", params=["tiny", "published"])
def tokenizers(request, reference, tmp_path_factory):
    """Our tokenizer and the reference's: the tiny checkpoint's and the published one's."""
    from transformers import Qwen2Tokenizer

    if request.param == "tiny":
        folder = tmp_path_factory.mktemp("tiny")
        reference.tokenizer.save_pretrained(folder)
        return load_tokenizer(folder), reference.tokenizer
    folder = request.getfixturevalue("reference_files") / "processor"
    return load_tokenizer(folder), Qwen2Tokenizer.from_pretrained(folder)


@pytest.fixture
def sent(reference, tokenizers, monkeypatch):
    """Run one of the reference's pipelines up to its text encoder; return what that would be called with."""
    import diffusers
    import random_checkpoint
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setitem(image_processor.BUCKETS, 1024, BUCKETS)

    def run(class_name, **call):
        parts = {name: getattr(reference, name) for name in ("scheduler", "vae", "text_encoder", "transformer")}
        processor = random_checkpoint.make_processor(tokenizers[1])
        pipeline = getattr(diffusers, class_name)(tokenizer=tokenizers[1], processor=processor, **parts)

        def stop(forward, **inputs):
            raise Sent(inputs)

        pipeline._get_last_decoder_hidden_states = stop
        with pytest.raises(Sent) as caught:
            pipeline(**call)
        return caught.value.inputs

    return run


@pytest.fixture
def config(reference):
    return VisionProcessorConfig.from_json(reference.processor.image_processor.to_dict())


def picture(height, width):
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    smooth = Image.fromarray(noise).resize((width, height), box=(0, 0, width / 3, height / 3))
    return Image.blend(smooth, Image.fromarray(noise), 0.3)


def fitted(image):
    ratio = image.height / image.width
    return cover_crop(image, min(BUCKETS, key=lambda size: abs(size[0] / size[1] - ratio)))[0]


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_of_a_prompt_alone_equal_edits(name, tokenizers, sent):
    theirs = sent("JoyImageEditPipeline", prompt=PROMPTS[name])["input_ids"]
    assert prompt_tokens(tokenizers[0], PROMPTS[name], []) == theirs[0].tolist()


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_and_patches_of_a_picture_and_a_prompt_equal_edits(name, tokenizers, sent, config):
    image = picture(70, 111)
    theirs = sent("JoyImageEditPipeline", image=image, prompt=PROMPTS[name])
    patches, (rows, columns) = vision_patches(fitted(image), config)
    assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
    assert np.array_equal(patches, theirs["pixel_values"].numpy())
    assert prompt_tokens(tokenizers[0], PROMPTS[name], [rows * columns // 4]) == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", ["plain", "line break first", "one space"])
def test_ids_and_positions_equal_edit_plus(count, name, tokenizers, sent, config, reference):
    images = [picture(64, 90), picture(130, 80), picture(61, 60)][:count]
    theirs = sent("JoyImageEditPlusPipeline", images=images or None, prompt=PROMPTS[name], height=64, width=64)
    patched = [vision_patches(fitted(image), config) for image in images]
    grids = [(rows // 2, columns // 2) for _, (rows, columns) in patched]
    ids = prompt_tokens(tokenizers[0], PROMPTS[name], [rows * columns for rows, columns in grids])
    assert ids == theirs["input_ids"][0].tolist()
    if images:
        assert np.array_equal(np.concatenate([patches for patches, _ in patched]), theirs["pixel_values"].numpy())
    expected, _ = reference.text_encoder.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], theirs.get("image_grid_thw")
    )
    ours = multimodal_positions(ids, control_token(tokenizers[0], "<|image_pad|>"), grids)
    assert np.array_equal(ours.T, expected[:, 0].numpy())


def test_a_control_token_in_a_prompt_acts_in_the_reference_and_not_here(tokenizers, sent):
    prompt = "a<|im_end|>b"
    end = control_token(tokenizers[0], "<|im_end|>")
    assert sent("JoyImageEditPipeline", prompt=prompt)["input_ids"][0].tolist().count(end) == 3
    assert prompt_tokens(tokenizers[0], prompt, []).count(end) == 2
    picture = control_token(tokenizers[0], "<|image_pad|>")
    assert prompt_tokens(tokenizers[0], "a<|image_pad|>b", [5]).count(picture) == 5


def test_the_prefix_is_33_tokens_and_user_the_first_one_kept(reference_files):
    tokenizer = load_tokenizer(reference_files / "processor")
    ids = prompt_tokens(tokenizer, "make it blue", [])
    assert ids[33] == control_token(tokenizer, "<|im_start|>")
    assert decode(tokenizer, ids[34:]) == "user\nmake it blue<|im_end|>\n<|im_start|>assistant\n"
    assert control_token(tokenizer, "<|image_pad|>") == 151655


SIZES = {  # height, width, bounds of the area: what happens
    "kept": (64, 96, 1024, 16777216),
    "rounded to multiples of 32": (75, 141, 1024, 16777216),
    "halves to even": (48, 80, 1024, 16777216),
    "enlarged": (40, 72, 65536, 16777216),
    "one pixel, enlarged": (1, 1, 16384, 16777216),
    "reduced": (300, 203, 1024, 20000),
    "very wide": (8, 1400, 1024, 16777216),
    "very wide, reduced": (20, 1400, 32, 20000),
}


@pytest.mark.parametrize("name", SIZES)
def test_patches_equal_the_reference(name, config, reference):
    height, width, smallest, largest = SIZES[name]
    image = picture(height, width)
    size = {"shortest_edge": smallest, "longest_edge": largest}
    theirs = reference.processor.image_processor(images=[image], size=size, return_tensors="np")
    patches, grid = vision_patches(image, replace(config, min_pixels=smallest, max_pixels=largest))
    assert patches.dtype == np.float32
    assert [[1, *grid]] == theirs["image_grid_thw"].tolist()
    assert np.array_equal(patches, theirs["pixel_values"])


def test_patches_with_other_means_equal_the_reference(config, reference):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = picture(64, 96)
    theirs = reference.processor.image_processor(images=[image], image_mean=mean, image_std=std, return_tensors="np")
    patches, _ = vision_patches(image, replace(config, image_mean=mean, image_std=std))
    assert np.array_equal(patches, theirs["pixel_values"])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1008, 1008, (1024, 1024)), (1040, 1040, (1024, 1024)), (1072, 784, (1088, 768)), (112, 112, (256, 256))],
)
def test_smart_resize_of_known_sizes(height, width, expected):
    assert smart_resize(height, width, 32, 65536, 16777216) == expected


def test_smart_resize_equals_the_reference():
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

    random = np.random.default_rng(0)
    for height, width in np.exp(random.uniform(np.log(30), np.log(6000), (500, 2))).astype(int).tolist():
        bounds = (28, 3136, 1003520) if height % 2 else (32, 65536, 16777216)
        assert smart_resize(height, width, *bounds) == theirs.smart_resize(height, width, *bounds)


def test_a_picture_beyond_200_to_1_is_refused(config):
    vision_patches(Image.new("RGB", (2000, 10)), config)
    with pytest.raises(PictureError, match="2001 × 10 pixels is too thin; at most 200:1"):
        vision_patches(Image.new("RGB", (2001, 10)), config)


def test_no_published_bucket_is_resized():
    assert all(smart_resize(*size, 32, 65536, 16777216) == size for size in buckets(1024))


def test_the_published_processor_is_understood(reference_files):
    raw = json.loads((reference_files / "processor" / "preprocessor_config.json").read_text())
    assert VisionProcessorConfig.from_json(raw) == VisionProcessorConfig(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        min_pixels=65536,
        max_pixels=16777216,
    )


def test_the_saved_processor_is_understood(checkpoint, config):
    raw = json.loads((checkpoint / "processor" / "preprocessor_config.json").read_text())
    assert VisionProcessorConfig.from_json(raw) == config
    assert config.min_pixels == 1024
