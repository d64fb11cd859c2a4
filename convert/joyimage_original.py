"""The layout of the model's own repository, read as a Diffusers folder.

    transformer/transformer.pth     pickled; see pickled.py
    vae/Wan2.1_VAE.pth              pickled
    JoyAI-Image-Und/                Qwen3-VL in Transformers' format, with tokenizer and processor
    infer_config.py                 never run: its values are the constants below

Tensors differ from Diffusers' in their names only. Source: github.com/jd-opensource/JoyAI-Image, src/, and
scripts/convert_joyimage_edit_to_diffusers.py in Diffusers, which also has the schedule's shift, 1.5.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from joyjax.convert.pickled import read_pickled
from joyjax.convert.safetensors import Tensor, Tensors, read_header
from joyjax.convert.source.identity import ENCODER
from joyjax.errors import CheckpointError
from joyjax.reading import quoted, write_json

SMALL = (".json", ".txt", ".jinja")  # suffixes of tokenizer and processor in the encoder's folder
WEIGHTS = (".pth", ".safetensors")
INDEX = {
    "_class_name": "JoyImageEditPipeline",
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "text_token_max_length": 2048,
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "JoyImageEditTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.5}
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 40,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 4096,
    "mlp_width_ratio": 4.0,
    "rope_dim_list": [16, 56, 56],
    "rope_type": "rope",
    "theta": 10000,
}
VAE: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
}


def write_skeleton(folder: Path, target: Path) -> None:
    """Write everything of the Diffusers folder but the weights."""
    write_json(target / "model_index.json", INDEX)
    write_json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(target / "transformer" / "config.json", TRANSFORMER)
    write_json(target / "vae" / "config.json", VAE)
    for name in ("tokenizer", "processor", "text_encoder"):
        (target / name).mkdir()
    shutil.copy(folder / ENCODER / "config.json", target / "text_encoder")
    for file in (folder / ENCODER).iterdir():
        if file.suffix in SMALL and file.name != "config.json" and not file.name.endswith(".index.json"):
            for name in ("tokenizer", "processor"):
                shutil.copy(file, target / name)


def open_tensors(folder: Path, name: str) -> Tensors:
    """Return the tensors of one component under Diffusers' names.

    Raises:
        CheckpointError: if the file is missing, damaged, or has other contents than tensors.
    """
    if name == "text_encoder":
        return Tensors.open(folder / ENCODER)
    rename: Callable[[str], str] = {"transformer": transformer_name, "vae": vae_name}[name]
    part = folder / name
    files = sorted(file for file in part.glob("*") if file.suffix in WEIGHTS)
    if len(files) != 1:
        raise CheckpointError(f"{part} holds {len(files)} files of weights; expected one, {' or '.join(WEIGHTS)}")
    headers = read_header(files[0]) if files[0].suffix == ".safetensors" else read_pickled(files[0])
    renamed: dict[str, Tensor] = {}
    for original, tensor in headers.items():
        name = rename(original)
        if name in renamed:
            raise CheckpointError(f"{files[0]}: two tensors are {quoted(name)}, one of them as {quoted(original)}")
        renamed[name] = tensor
    return Tensors(str(files[0]), renamed)


def transformer_name(name: str) -> str:
    """Return Diffusers' name of a tensor of the transformer, where attention is a submodule."""
    return re.sub(r"^(double_blocks\.[0-9]+\.)((?:img|txt)_attn_)", r"\1attn.\2", name)


RESIDUAL = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2": "conv1",
    "residual.3.gamma": "norm2.gamma",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def vae_name(name: str) -> str:
    """Return Diffusers' name of an autoencoder tensor. The original counts the decoder's blocks over all levels."""
    name = re.sub(r"^conv1\.", "quant_conv.", name)
    name = re.sub(r"^conv2\.", "post_quant_conv.", name)
    name = re.sub(r"coder\.conv1\.", "coder.conv_in.", name)
    name = re.sub(r"coder\.head\.0\.", "coder.norm_out.", name)
    name = re.sub(r"coder\.head\.2\.", "coder.conv_out.", name)
    name = re.sub(r"coder\.middle\.1\.", "coder.mid_block.attentions.0.", name)
    name = re.sub(r"coder\.middle\.([02])\.", lambda m: f"coder.mid_block.resnets.{int(m[1]) // 2}.", name)
    name = name.replace("encoder.downsamples.", "encoder.down_blocks.")
    level = re.match(r"decoder\.upsamples\.([0-9]+)\.", name)
    if level:
        up, number = divmod(int(level[1]), VAE["num_res_blocks"] + 2)
        inside = "upsamplers.0" if re.match(r"(resample|time_conv)\.", name[level.end() :]) else f"resnets.{number}"
        name = f"decoder.up_blocks.{up}.{inside}.{name[level.end() :]}"
    for old, new in RESIDUAL.items():
        name = re.sub(rf"\.{re.escape(old)}(?=\.|$)", f".{new}", name)
    return name
