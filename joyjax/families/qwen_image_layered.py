"""Qwen-Image-Layered: a picture into layers with alpha.

Source: pipeline_qwenimage_layered.py in Diffusers.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from joyjax.convert.qwen2_5_vl import TEXT_ENCODER
from joyjax.convert.qwen_image import TRANSFORMER
from joyjax.convert.wan_vae import VAE
from joyjax.families import qwen_image_layered_stages as stages
from joyjax.families.family import Configs, Family, Lengths, Parts, Published
from joyjax.families.pictures import cost
from joyjax.families.qwen_image import read
from joyjax.families.qwen_image_stages import TEXT_SIZES, geometry, token_class
from joyjax.processors.text import prompts_of_sizes

LAYERS = 4  # of the model card, as the defaults below
BASE_SIZES = (640, 1024)
# Working memory of a step with guidance at 640 × 640 with four layers, in bfloat16, compiled for an H100 from four and
# six blocks (tests/qwen_full_size.py). Text encoder and autoencoder need less.
STEP_BYTES = int(1.27 * 2**30)
STEP_TOKENS = 8192 + 1664  # padded image tokens of that step, in each of two passes


def usual(configs: Configs, base_size: int) -> Lengths:
    """Return the lengths of a square picture at a base size with the default number of layers, with guidance."""
    size = stages.natural_size(None, base_size)
    frame, text = geometry(configs).tokens(size), TEXT_SIZES[1]
    target = (LAYERS + 1) * frame
    return Lengths(
        text=(text, text), target=(target, token_class(target)), references=(frame, token_class(frame)), passes=2
    )


def warmup(parts: Parts, references: Sequence[int] | None, long_prompts: bool) -> Iterator[Mapping[str, Any]]:
    """Yield the arguments of requests that compile every program of the square of a base size once."""
    longest = TEXT_SIZES[-1] if long_prompts else TEXT_SIZES[1]
    prompts = [prompt or "a" for prompt in prompts_of_sizes(parts.tokenizer, TEXT_SIZES, longest)]
    for count in (1,) if references is None else references:
        for prompt in prompts:
            yield {"image": [Image.new("RGBA", (64, 64))] * count or None, "prompt": prompt}


LAYERED = Family(
    name="Qwen-Image-Layered",
    class_names=("QwenImageLayeredPipeline",),
    components=(TEXT_ENCODER, TRANSFORMER, VAE),
    tasks=frozenset({"layers"}),
    references=(1, 1),
    picture_mode="RGBA",
    base_sizes=BASE_SIZES,
    defaults={
        "steps": 50,
        "guidance_scale": 4.0,
        "negative_prompt": " ",
        "base_size": BASE_SIZES[0],
        "layers": LAYERS,
        "cfg_normalize": False,
    },
    without=frozenset({"height", "width", "exact_size", "fit", "mask", "paste_back"}),
    hints={
        "height": "the layers have the picture's shape; base_size sets the area",
        "width": "the layers have the picture's shape; base_size sets the area",
        "exact_size": "the layers have the picture's shape; base_size sets the area",
        "image": "this model takes one picture apart into layers",
    },
    published=Published("Qwen-Image-Layered", 55_111_727_208, 40_881_286_272, STEP_BYTES),
    read=functools.partial(read, layered=True),
    plan=stages.plan,
    prepare=stages.prepare,
    encode=stages.encode,
    guidance=stages.guidance,
    finish=stages.finish,
    natural_size=stages.natural_size,
    cost=functools.partial(cost, step_bytes=STEP_BYTES, step_tokens=STEP_TOKENS),
    usual=usual,
    warmup=warmup,
)
