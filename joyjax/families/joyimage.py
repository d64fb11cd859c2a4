"""JoyImage-Edit and JoyImage-Edit-Plus.

Source: pipeline_joyimage_edit.py and pipeline_joyimage_edit_plus.py in Diffusers.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from joyjax.convert import joyimage_original
from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.source.identity import is_own_layout
from joyjax.convert.wan_vae import VAE
from joyjax.errors import ConfigError
from joyjax.families import joyimage_stages as stages
from joyjax.families.checks import check_equal, open_tokenizer, vision_pairs
from joyjax.families.family import Configs, Family, Layout, Lengths, Parts, Published
from joyjax.families.joyimage_prompt import DROPPED, LONGEST_TEXT, prompt_tokens
from joyjax.families.pictures import cost, finish
from joyjax.models.autoencoder.wan import COLORS
from joyjax.processors.qwen_vl import TEXT_SIZES
from joyjax.processors.text import prompts_of_sizes
from joyjax.processors.vision import VisionProcessorConfig
from joyjax.reading import read_json
from joyjax.sampling.euler import Euler
from joyjax.sampling.schedule import ScheduleConfig

# Working memory of a step with guidance at 1024 × 1024 with one reference, in bfloat16, compiled for an H100
# (docs/parallel.md). Text encoder and autoencoder need less.
STEP_BYTES = int(1.61 * 2**30)
STEP_TOKENS = 2 * 4096  # image tokens of that step

SIDES = ((64, 64), (256, 64))  # one size for each padded bucket of the autoencoder, for every table
USUAL, LONGEST = 256, 1500  # tokens of a prompt


def read(folder: Path, configs: Configs) -> Parts:
    """Open tokenizer, processor and schedule, and check that all parts belong to one model."""
    processor = folder / "processor" / "preprocessor_config.json"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    parts = Parts(
        tokenizer=open_tokenizer(
            folder / "tokenizer",
            configs["text_encoder"].text.vocab_size,
            lambda tokenizer: prompt_tokens(tokenizer, "", [1]),
        ),
        processor=VisionProcessorConfig.from_json(read_json(processor), where=str(processor)),
        solver=Euler(ScheduleConfig.from_diffusers(read_json(scheduler), where=str(scheduler))),
        configs=configs,
    )
    _check_parts(parts, folder)
    return parts


def _check_parts(parts: Parts, folder: Path) -> None:
    """Raise CheckpointError if two valid parts do not belong to one model."""
    transformer, vae, encoder = (parts.configs[name] for name in ("transformer", "vae", "text_encoder"))
    index = folder / "model_index.json"
    longest = read_json(index).get("text_token_max_length", LONGEST_TEXT - DROPPED)
    if longest != LONGEST_TEXT - DROPPED:
        raise ConfigError(
            f"{index}: text_token_max_length is {longest!r:.200}; joyjax implements {LONGEST_TEXT - DROPPED}"
        )
    config, text = "transformer/config.json", encoder.text.hidden_size
    check_equal(
        folder,
        (
            (config, "in_channels", transformer.in_channels, "the VAE's z_dim", vae.z_dim),
            ("vae/config.json", "input_channels", vae.input_channels, "the pipeline's channels", COLORS),
            (config, "text_dim", transformer.text_dim, "the text's hidden_size", text),
            *vision_pairs(parts.tokenizer, parts.processor, encoder),
        ),
    )


def usual(configs: Configs, base_size: int) -> Lengths:
    """Return the lengths of an edit of one reference at a base size, with guidance."""
    tokens = stages.geometry(configs, None).tokens((base_size, base_size))
    return Lengths(text=(USUAL, USUAL), target=(tokens, tokens), references=(tokens, tokens), passes=2)


def warmup(
    parts: Parts, references: Sequence[int] | None, long_prompts: bool, *, most: int
) -> Iterator[Mapping[str, Any]]:
    """Yield the arguments of requests that compile every program of a bucket table once."""
    counts = tuple(range(min(most, 2) + 1)) if references is None else references
    prompts = prompts_of_sizes(parts.tokenizer, TEXT_SIZES, LONGEST if long_prompts else USUAL)
    # sizes and prompts in pairs: no program depends on both
    pairs = list(zip(itertools.cycle(SIDES), prompts, strict=False))
    for count, ((height, width), prompt) in itertools.product(dict.fromkeys(counts), pairs):
        picture = Image.new("RGB", (width, height))
        yield {"image": [picture] * count or None, "prompt": prompt, "height": height, "width": width}


LAYOUT = Layout(is_own_layout, joyimage_original.write_skeleton, joyimage_original.open_tensors)


def _family(name: str, class_name: str, *, steps: int, negative_prompt: str, references: int, plus: bool) -> Family:
    return Family(
        name=name,
        class_names=(class_name,),
        components=(TEXT_ENCODER, TRANSFORMER, VAE),
        tasks=frozenset({"edit", "text-to-image"}),
        references=(0, references),
        defaults={"steps": steps, "guidance_scale": 4.0, "negative_prompt": negative_prompt, "base_size": 1024},
        published=Published("JoyAI-Image-Edit", 48_941_798_598, 32_563_019_904, STEP_BYTES),
        read=read,
        plan=functools.partial(stages.plan, plus=plus),
        prepare=stages.prepare,
        encode=stages.encode,
        guidance=stages.guidance,
        finish=finish,
        natural_size=stages.natural_size,
        cost=functools.partial(cost, step_bytes=STEP_BYTES, step_tokens=STEP_TOKENS),
        usual=usual,
        warmup=functools.partial(warmup, most=references),
        layouts=(LAYOUT,),
        hints={} if plus else {"image": "Edit-Plus weights take several"},
    )


EDIT = _family("JoyImage-Edit", "JoyImageEditPipeline", steps=40, negative_prompt="", references=1, plus=False)
EDIT_PLUS = _family(
    "JoyImage-Edit-Plus", "JoyImageEditPlusPipeline", steps=30, negative_prompt=" ", references=5, plus=True
)
