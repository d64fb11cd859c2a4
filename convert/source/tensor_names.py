"""Recognition of adapters, networks and quantisation by the names, dtypes and shapes in a safetensors header.

Source of the names: files that Diffusers, PEFT, ComfyUI, kohya's sd-scripts, DiffSynth, LyCORIS and Nunchaku write.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from joyjax.reading import parse_json

ADAPTERS: tuple[tuple[str, re.Pattern[str]], ...] = (  # the first that a name matches
    ("LoKr", re.compile(r"\.lokr_(w1|w2|t2)(_[ab])?$")),
    ("LoHa", re.compile(r"\.hada_(w1|w2|t1|t2)(_[ab])?$")),
    ("OFT", re.compile(r"\.oft_(blocks|diag|r)(\.\w+)*$")),
    ("DoRA", re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.\w+)*$")),
    ("LoRA", re.compile(r"[._]lora(_[AB]|_up|_down|_mid|\.up|\.down|_linear_layer\.(up|down))(\.\w+)?(\.weight)?$")),
    ("full difference", re.compile(r"\.(diff|diff_b|set_weight)$")),
)
BESIDE = re.compile(r"\.(alpha|reshape_weight|w_norm|b_norm)$")
DOWN = re.compile(r"(lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.\w+)?(\.weight)?$")

STYLES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "kohya"),
    ("lora_te", "kohya"),
    ("lycoris_", "LyCORIS"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "Diffusers"),
)

# patterns of a network's tensor names, dotted or flattened as kohya does; the first that matches counts
NETWORKS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    (
        "JoyImage",
        "transformer",
        re.compile(
            r"double_blocks\.\d+\.(attn\.)?(img|txt)_attn_(qkv|proj)\b|_attn_(img|txt)_attn_(qkv|proj)"
            r"|double_blocks[._]\d+[._](img|txt)_mlp[._]net[._]"
        ),
    ),
    ("Qwen-Image", "transformer", re.compile(r"(?<!single_)transformer_blocks[._]\d+[._](img|txt)_(mod|mlp)[._]")),
    ("FLUX", "transformer", re.compile(r"single_(transformer_)?blocks[._]\d|double_blocks[._]\d+[._]img_attn")),
    ("Stable Diffusion 3", "transformer", re.compile(r"joint_blocks[._]\d")),
    ("Stable Diffusion", "UNet", re.compile(r"(input|output)_blocks[._]\d|(up|down)_blocks[._]\d+[._](attentions)")),
    ("Wan", "transformer", re.compile(r"(?<!\w)blocks[._]\d+[._](self|cross)_attn[._]")),
    ("Wan", "VAE", re.compile(r"^(vae\.)?(en|de)coder\.(down|up)samples\.\d")),
    ("", "VAE", re.compile(r"^(first_stage_model\.|vae\.)?(en|de)coder\.(conv_in|mid_block|mid|up_blocks|down)\b")),
    ("Qwen-VL", "text encoder", re.compile(r"^(model\.)?visual\.(blocks|patch_embed|merger)")),
    ("T5", "text encoder", re.compile(r"^encoder\.block\.\d+\.layer\.")),
    ("CLIP", "text encoder", re.compile(r"text_model\.encoder\.layers\.")),
    ("", "text encoder", re.compile(r"^(model\.)?(language_model\.)?(layers|embed_tokens)\b")),
)
WHOLE = ("first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "vae.", "text_encoders.")
# dtypes of few bits by the format's names; a file is quantised if most of its values have one
LOW = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E4M3FNUZ": "fp8", "F8_E5M2FNUZ": "fp8", "F4": "fp4", "F6_E2M3": "fp6"}
LONGEST_METADATA = 2**22


def dtypes(entries: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of tensors of each dtype, under the format's names."""
    named = (entry.get("dtype") for entry in entries.values() if isinstance(entry, dict))
    return dict(Counter(dtype for dtype in named if isinstance(dtype, str) and dtype.isidentifier()).most_common(20))


def adapter(entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the facts of an adapter: method, number of modules, ranks, naming, and the model that it is for.

    A file is an adapter if most of its tensors have names of an adapter's parts; None for other files.
    """
    methods: Counter[str] = Counter()
    modules: set[str] = set()
    ranks: set[int] = set()
    beside = 0
    for name, entry in entries.items():
        method = next(((kind, found) for kind, shape in ADAPTERS if (found := shape.search(name))), None)
        beside += bool(BESIDE.search(name))
        if method is not None:
            methods[method[0]] += 1
            modules.add(name[: method[1].start()])
            size = entry.get("shape") if isinstance(entry, dict) else None
            if DOWN.search(name) and isinstance(size, list) and size and type(size[0]) is int:
                ranks.add(size[0])
    if not modules or 2 * (sum(methods.values()) + beside) < len(entries):
        return None
    kind = next(kind for kind, _ in ADAPTERS if methods[kind])
    style = next((style for prefix, style in STYLES if next(iter(entries)).startswith(prefix)), None)
    if style is None and any(".default." in name for name in entries):
        style = "DiffSynth"
    named = network(entries)
    facts = {
        "method": kind,
        "modules": len(modules),
        "ranks": sorted(ranks)[:10],
        "naming": style,
        "model": named[0] if named and named[0] else None,
    }
    return {name: value for name, value in facts.items() if value not in (None, [])}


def network(names: Iterable[str]) -> tuple[str, str] | None:
    """Return (model, component) by the names of tensors; the model is empty where only the component is known."""
    names = list(names)
    for model, component, shape in NETWORKS:
        if any(shape.search(name) for name in names):
            return model, component
    return None


def is_whole(names: Iterable[str]) -> bool:
    """Return whether tensor names are those of a single file with several components, as ComfyUI has them."""
    prefixes = {prefix for name in names for prefix in ("model.diffusion_model.", *WHOLE) if name.startswith(prefix)}
    return "model.diffusion_model." in prefixes and len(prefixes) > 1


def quantisation(entries: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    """Return how the weights of a file are quantised, in one phrase; None if they are not, or in an unknown way."""
    names, kinds = entries.keys(), dtypes(entries)
    suffixes = Counter(name.rpartition(".")[2] for name in names)
    if suffixes["qweight"] and (suffixes["wscales"] or suffixes["smooth_factor"] or suffixes["proj_down"]):
        return "Nunchaku SVDQuant, 4 bits"
    if suffixes["qweight"] and suffixes["qzeros"]:
        return "GPTQ or AWQ"
    if any("quant_state.bitsandbytes" in name for name in names):
        return "bitsandbytes, 4 bits"
    if suffixes["SCB"] and "I8" in kinds:
        return "bitsandbytes, int8"
    low = _most_are_low(entries)
    layers = metadata.get("_quantization_metadata")
    if suffixes["comfy_quant"] or layers is not None:
        formats = _formats(layers)
        return f"ComfyUI, {', '.join(formats) or low or ('int8' if 'I8' in kinds else 'of unknown format')}"
    if "scaled_fp8" in names or (low == "fp8" and (suffixes["scale_weight"] or suffixes["weight_scale"])):
        return "fp8 with scales"
    if suffixes["weight_scale"] and "I8" in kinds:
        return "int8 with scales"
    if low is not None:
        return f"{low} without scales"
    return None


def _most_are_low(entries: Mapping[str, Any]) -> str | None:
    """Return the few-bit format that most values have, if any."""
    sizes: Counter[str | None] = Counter()
    for entry in entries.values():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in shape):
            dtype = entry.get("dtype")
            sizes[LOW.get(dtype) if isinstance(dtype, str) else None] += math.prod(shape)
    most = max(sizes, key=lambda kind: sizes[kind], default=None)
    return most if sizes[most] else None


def _formats(layers: object) -> list[str]:
    """Return the formats in ComfyUI's json description of layers, from the metadata of a file."""
    if not isinstance(layers, str) or len(layers) > LONGEST_METADATA:
        return []
    try:
        described = parse_json(layers.encode()).get("layers")
    except (ValueError, TypeError):
        return []
    each = described.values() if isinstance(described, dict) else ()
    named = ((layer.get("format"), layer.get("convrot")) for layer in each if isinstance(layer, dict))
    formats = {
        f"{name[:40]}{' with ConvRot' if rotated is True else ''}"
        for name, rotated in named
        if isinstance(name, str) and name.isidentifier()
    }
    return sorted(formats)[:5]
