"""Qwen-Image: text to image.

Source: pipeline_qwenimage.py in Diffusers. The edit kinds, Edit, Edit-Plus and Layered, have pipelines of their own.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from joyjax.convert.qwen2_5_vl import TEXT_ENCODER
from joyjax.convert.qwen_image import TRANSFORMER
from joyjax.convert.wan_vae import VAE
from joyjax.families import qwen_image_stages as stages
from joyjax.families.checks import check_equal, open_tokenizer
from joyjax.families.family import Configs, Family, Lengths, Parts, Published
from joyjax.families.pictures import cost, finish
from joyjax.families.qwen_image_prompt import prompt_tokens
from joyjax.models.autoencoder.wan import COLORS, WITH_ALPHA
from joyjax.processors.text import prompts_of_sizes
from joyjax.reading import read_json
from joyjax.sampling.euler import Euler
from joyjax.sampling.schedule import ScheduleConfig

# Working memory of a step with guidance at 1024 × 1024, in bfloat16, compiled for an H100 (docs/parallel.md). Text
# encoder and autoencoder need less.
STEP_BYTES = int(0.59 * 2**30)
STEP_TOKENS = 4096  # image tokens of that step, in each of two passes


def _template(tokenizer: Any) -> object:
    return prompt_tokens(tokenizer, "")


def read(
    folder: Path, configs: Configs, template: Callable[[Any], object] = _template, *, layered: bool = False
) -> Parts:
    """Open the tokenizer and the schedule, and check that all parts belong to one model.

    `template`: a prompt in the model's template. `layered`: the model is Qwen-Image-Layered.
    """
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = ScheduleConfig.from_diffusers(read_json(scheduler), where=str(scheduler), dynamic=True)
    transformer, vae, text = configs["transformer"], configs["vae"], configs["text_encoder"].text
    parts = Parts(
        tokenizer=open_tokenizer(folder / "tokenizer", text.vocab_size, template),
        processor=None,
        solver=Euler(schedule, time="sigma", even=True),
        configs=configs,
    )
    config, kind = "transformer/config.json", "that of this pipeline's transformer"
    channels = "the channels of this pipeline's pictures"
    text_width = ("the text's hidden_size", text.hidden_size)
    check_equal(
        folder,
        (
            (config, "out_channels", transformer.out_channels, "the VAE's z_dim", vae.z_dim),
            (config, "joint_attention_dim", transformer.joint_attention_dim, *text_width),
            (config, "use_layer3d_rope", transformer.layered, kind, layered),
            ("vae/config.json", "input_channels", vae.input_channels, channels, WITH_ALPHA if layered else COLORS),
        ),
    )
    return parts


def usual(configs: Configs, base_size: int) -> Lengths:
    """Return the lengths of text to image at a base size, with guidance."""
    tokens = stages.geometry(configs).tokens((base_size, base_size))
    text = stages.TEXT_SIZES[1]
    return Lengths(text=(text, text), target=(tokens, stages.token_class(tokens)), references=(0, 0), passes=2)


def warmup(parts: Parts, references: Sequence[int] | None, long_prompts: bool) -> Iterator[Mapping[str, Any]]:
    """Yield the arguments of requests that compile every program of the square of a base size once."""
    sizes = stages.TEXT_SIZES
    prompts = prompts_of_sizes(parts.tokenizer, sizes, sizes[-1] if long_prompts else sizes[1])
    for count in (0,) if references is None else references:
        for prompt in prompts:
            yield {"image": [Image.new("RGB", (64, 64))] * count or None, "prompt": prompt}


TEXT_TO_IMAGE = Family(
    name="Qwen-Image",
    class_names=("QwenImagePipeline",),
    components=(TEXT_ENCODER, TRANSFORMER, VAE),
    tasks=frozenset({"text-to-image"}),
    references=(0, 0),
    defaults={"steps": 50, "guidance_scale": 4.0, "negative_prompt": " ", "base_size": 1024},
    without=frozenset({"fit", "mask", "paste_back", "vae_encode"}),
    hints={"image": "this model makes pictures from words; leave the picture out"},
    published=Published("Qwen-Image", 55_111_699_174, 40_881_261_696, STEP_BYTES),
    read=read,
    plan=stages.plan,
    prepare=stages.prepare,
    encode=stages.encode,
    guidance=stages.guidance,
    finish=finish,
    natural_size=stages.natural_size,
    cost=functools.partial(cost, step_bytes=STEP_BYTES, step_tokens=STEP_TOKENS, references=False),
    usual=usual,
    warmup=warmup,
)
