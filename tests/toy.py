"""A small network with a key table, and Diffusers folders of models made of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import joyjax.dtypes
from joyjax.convert.component import Component
from joyjax.convert.rules import Rule, last_frame, reshape, split_in, split_out, transpose
from joyjax.layers.conv import Conv
from joyjax.layers.linear import Linear
from joyjax.layers.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 12
    heads: int = 8
    head_width: int = 2
    layers: int = 2


class Block(nnx.Module):
    def __init__(self, config: ToyConfig, *, dtype, rngs):
        heads, head_axes = (config.heads, config.head_width), ("heads", "head_width")
        inner = {"axes_in": ("embed",), "axes_out": (None, *head_axes), "dtype": dtype, "rngs": rngs, "storable": True}
        self.qkv = Linear((config.width,), (3, *heads), **inner)
        outer = {"axes_in": head_axes, "axes_out": ("embed",), "dtype": dtype, "rngs": rngs, "storable": True}
        self.out = Linear(heads, (config.width,), **outer)
        self.norm = RMSNorm(config.width, eps=1e-6, axis="embed", dtype=joyjax.dtypes.FLOAT32, rngs=rngs)


class Toy(nnx.Module):
    def __init__(self, config: ToyConfig, *, dtype, rngs):
        self.first = Linear((5,), (config.width,), axes_in=("patch",), axes_out=("embed",), dtype=dtype, rngs=rngs)
        self.conv = Conv(2, 3, 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])


def rules(config: ToyConfig) -> tuple[Rule, ...]:
    return (
        Rule("first.weight", "first.kernel", transpose),
        Rule("first.bias", "first.bias"),
        Rule("conv.weight", "conv.kernel", last_frame(3)),
        Rule("conv.bias", "conv.bias"),
        Rule("layers.{i}.qkv.weight", "blocks.{i}.qkv.kernel", split_out),
        Rule("layers.{i}.qkv.bias", "blocks.{i}.qkv.bias", reshape),
        Rule("layers.{i}.out.weight", "blocks.{i}.out.kernel", split_in),
        Rule("layers.{i}.out.bias", "blocks.{i}.out.bias"),
        Rule("layers.{i}.norm.weight", "blocks.{i}.norm.scale"),
    )


TOY = Component(
    folder="toy",
    class_names=("ToyModel",),
    configure=lambda raw: ToyConfig(**raw),
    build=Toy,
    rules=rules,
    ignored={"unused.{i}": "the test says so"},
)
OTHER = dataclasses.replace(TOY, folder="other")


def tensors(config: ToyConfig = ToyConfig(), dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors under the names of the Diffusers model."""
    inner = config.heads * config.head_width
    shapes = {"first.weight": (config.width, 5), "first.bias": (config.width,)}
    shapes |= {"conv.weight": (3, 2, 3, 3, 3), "conv.bias": (3,), "unused.7": (4,)}
    for i in range(config.layers):
        shapes |= {f"layers.{i}.qkv.weight": (3 * inner, config.width), f"layers.{i}.qkv.bias": (3 * inner,)}
        shapes |= {f"layers.{i}.out.weight": (config.width, inner), f"layers.{i}.out.bias": (config.width,)}
        shapes |= {f"layers.{i}.norm.weight": (config.width,)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def save_sharded(folder: Path, named: dict[str, np.ndarray], shards: int, stem: str = "model") -> None:
    """Write safetensors files with their index, as Transformers names them."""
    files = [f"{stem}-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    where = {name: files[n % shards] for n, name in enumerate(named)}
    for file in files:
        save_file({name: named[name] for name in named if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in named.values())}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def save_model(folder: Path, *components: Component, dtype: str = "float32") -> Path:
    """Write a Diffusers folder of these components, a scheduler and a tokenizer."""
    config = ToyConfig()
    for n, component in enumerate(components):
        (folder / component.folder).mkdir(parents=True)
        (folder / component.folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        save_file(tensors(config, dtype, seed=n), folder / component.folder / "diffusion_pytorch_model.safetensors")
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir()
        (folder / name / f"{name}_config.json").write_text(f'{{"name": "{name}"}}')
    index: dict = {component.folder: ["diffusers", "ToyModel"] for component in components}
    index |= {"_class_name": "ToyPipeline", "scheduler": ["diffusers", "Euler"], "tokenizer": ["transformers", "Words"]}
    (folder / "model_index.json").write_text(json.dumps({**index, "image_encoder": [None, None], "text_length": 12}))
    return folder
