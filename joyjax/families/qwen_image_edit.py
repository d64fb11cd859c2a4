"""Qwen-Image-Edit and Qwen-Image-Edit-Plus, whose published models are named 2509 and 2511.

Source: pipeline_qwenimage_edit.py and pipeline_qwenimage_edit_plus.py in Diffusers.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from joyjax.convert.qwen2_5_vl import WITH_TOWER
from joyjax.convert.qwen_image import TRANSFORMER
from joyjax.convert.wan_vae import VAE
from joyjax.families import qwen_image, qwen_image_lengths
from joyjax.families import qwen_image_edit_stages as stages
from joyjax.families.checks import check_equal, vision_pairs
from joyjax.families.family import Configs, Family, Lengths, Parts, Published
from joyjax.families.pictures import cost, finish
from joyjax.families.qwen_image_prompt import edit_prompt_tokens
from joyjax.families.qwen_image_stages import geometry, guidance
from joyjax.processors.text import prompts_of_sizes
from joyjax.processors.vision import VisionProcessorConfig
from joyjax.reading import read_json

# Working memory of a step with guidance at 1024 × 1024 with one reference, in bfloat16, compiled for an H100 with four
# blocks, to which the others add next to nothing (docs/parallel.md).
STEP_BYTES = int(1.11 * 2**30)
STEP_TOKENS = 2 * 4096  # image tokens of that step, in each of two passes

PICTURES = ((64, 64), (80, 60))  # width and height: their natural sizes are in different classes
PROMPTS = (64, 384, 1024)  # tokens of prompts; between two of these is each class of texts


def read(folder: Path, configs: Configs) -> Parts:
    """Open tokenizer, processor and schedule, and check that all parts belong to one model."""
    parts = qwen_image.read(folder, configs, lambda tokenizer: edit_prompt_tokens(tokenizer, "", [1], numbered=True))
    file = folder / "processor" / "preprocessor_config.json"
    processor = VisionProcessorConfig.from_json(read_json(file), where=str(file))
    check_equal(folder, vision_pairs(parts.tokenizer, processor, configs["text_encoder"]))
    return Parts(parts.tokenizer, processor, parts.solver, configs)


def usual(configs: Configs, base_size: int, *, plus: bool) -> Lengths:
    """Return the lengths of an edit of one square reference at a base size, with guidance and a short prompt."""
    tokens = geometry(configs).tokens((base_size, base_size))
    vision = configs["text_encoder"].vision
    states = (
        round(stages.read_side(base_size, plus=plus) / (vision.patch_size * vision.spatial_merge_size)) ** 2
        + PROMPTS[0]
    )
    padded = qwen_image_lengths.text(states, 1, natural=True)
    return Lengths(text=(padded, padded), target=(tokens, tokens), references=(tokens, tokens), passes=2)


def warmup(
    parts: Parts, references: Sequence[int] | None, long_prompts: bool, *, most: int
) -> Iterator[Mapping[str, Any]]:
    """Yield the arguments of requests that compile the programs of a base size: its square, and a longer picture."""
    prompts = prompts_of_sizes(parts.tokenizer, PROMPTS, PROMPTS[-1] if long_prompts else PROMPTS[1])
    for count in range(1, most + 1) if references is None else references:
        for size in PICTURES:
            for prompt in prompts:
                yield {"image": [Image.new("RGB", size)] * count or None, "prompt": prompt}


def _family(name: str, class_name: str, *, steps: int, plus: bool) -> Family:
    return Family(
        name=name,
        class_names=(class_name,),
        components=(WITH_TOWER, TRANSFORMER, VAE),
        tasks=frozenset({"edit"}),
        references=(1, None if plus else 1),
        defaults={"steps": steps, "guidance_scale": 4.0, "negative_prompt": " ", "base_size": 1024},
        without=frozenset({"fit"}),
        hints={
            "fit": "this model takes pictures whole, scaled to about base_size² pixels; leave it out",
            "image": "this model edits pictures" + ("" if plus else "; Edit-Plus weights take several"),
        },
        published=Published(name, 56_464_799_462, 40_881_261_696, STEP_BYTES),
        read=read,
        plan=functools.partial(stages.plan, plus=plus),
        prepare=stages.prepare,
        encode=stages.encode,
        guidance=guidance,
        finish=finish,
        natural_size=stages.natural_size,
        cost=functools.partial(cost, step_bytes=STEP_BYTES, step_tokens=STEP_TOKENS),
        usual=functools.partial(usual, plus=plus),
        warmup=functools.partial(warmup, most=2 if plus else 1),
    )


EDIT = _family("Qwen-Image-Edit", "QwenImageEditPipeline", steps=50, plus=False)
EDIT_PLUS = _family("Qwen-Image-Edit-Plus", "QwenImageEditPlusPipeline", steps=40, plus=True)
