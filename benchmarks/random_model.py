"""Writes a JoyImage-Edit of any size in Diffusers format: `python benchmarks/random_model.py FOLDER --size-gb 6`.

Names, shapes and shards are those of the real model, in bfloat16, with fewer layers: four of the language model, and
as many of the transformer as give the size. The values are one repeated block of finite noise, so the results mean
nothing. It is written tensor by tensor, in 20 MB of memory besides the interpreter's. tests/random_checkpoint.py makes
small models for comparisons of results.

The LM head is tied to the word embedding. The real model has a separate one, which no edit uses: Diffusers reads it and
joyjax does not, which should not affect the times.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

import joyjax
from joyjax.convert.component import Component
from joyjax.convert.export import FILE, FILES
from joyjax.convert.rules import Shape, find_rule
from joyjax.families.joyimage import EDIT
from joyjax.layers.weights import leaves
from joyjax.reading import read_json, write_json

DEMO = Path(joyjax.__file__).parent / "demo"  # for its tokenizer, processor and scheduler
DTYPE, ITEM = ml_dtypes.bfloat16, 2
WIDTH, VOCABULARY = 4096, 151936
SHARD_BYTES = 2 * 10**9
BLOCK = 2**23  # values


def configs(width: int, layers: int, embedding: bool) -> dict[str, dict[str, Any]]:
    """Return config.json of each component: the demo's with the real sizes, scaled to `width`."""
    given = {component.folder: read_json(DEMO / component.folder / "config.json") for component in EDIT.components}
    encoder = given["text_encoder"]

    def narrow(size: int) -> int:
        return size * width // WIDTH

    transformer = {
        "hidden_size": width,
        "num_attention_heads": narrow(32),
        "num_layers": layers,
        "text_dim": width,
        "rope_dim_list": [16, 56, 56],
        "theta": 10000,
    }
    text = {
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": narrow(32),
        "num_key_value_heads": narrow(8),
        "head_dim": 128,
        "intermediate_size": narrow(12288),
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    if embedding:
        text["vocab_size"] = narrow(VOCABULARY)
    vision = {
        "depth": 27,
        "hidden_size": narrow(1152),
        "num_heads": narrow(16),
        "intermediate_size": narrow(4304),
        "out_hidden_size": width,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return {
        "transformer": {**given["transformer"], **transformer},
        "text_encoder": {
            **encoder,
            "text_config": {**encoder["text_config"], **text},
            "vision_config": {**encoder["vision_config"], **vision},
        },
        "vae": {**given["vae"], "base_dim": narrow(96), "num_res_blocks": 2},
    }


def tensors(component: Component, raw: dict[str, Any]) -> dict[str, Shape]:
    """Return Diffusers' tensors of a component, by inverting joyjax's key table."""
    config = component.configure(raw)
    rules, found = component.rules(config), {}
    for path, leaf in leaves(component.abstract(config, DTYPE).state).items():
        rule, numbers = find_rule(rules, path)
        found[rule.source.format(**numbers)] = tuple(rule.transform.source_shape(leaf.shape))
    return found | {name: shape for name, (shape, _) in component.unused(config).items()}


def all_tensors(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Shape]]:
    """Return the tensors of all components."""
    return {component.folder: tensors(component, parts[component.folder]) for component in EDIT.components}


def nbytes(shape: Shape) -> int:
    """Return the bytes of a tensor."""
    return ITEM * math.prod(shape)


def total(found: dict[str, dict[str, Shape]]) -> int:
    """Return the bytes of all tensors."""
    return sum(nbytes(shape) for shapes in found.values() for shape in shapes.values())


def in_shards(shapes: dict[str, Shape]) -> list[dict[str, Shape]]:
    """Distribute tensors over files, in order."""
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + nbytes(shape) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes(shape)
    return shards


def write_shard(file: BinaryIO, shapes: dict[str, Shape], block: memoryview) -> None:
    """Write one safetensors file, with only the block in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
        for start in range(0, nbytes(shape), len(block)):
            file.write(block[: nbytes(shape) - start])


def write_weights(folder: Path, file: str, shapes: dict[str, Shape], block: memoryview) -> None:
    """Write a component's tensors: one file, or shards with an index."""
    shards = in_shards(shapes)
    stem, suffix = file.split(".")
    names = [f"{stem}-{n:05}-of-{len(shards):05}.{suffix}" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [file]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as opened:
            write_shard(opened, shard, block)
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(map(nbytes, shapes.values()))
        write_json(folder / f"{file}.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def write_model(folder: Path, size: float, width: int = WIDTH, embedding: bool = True) -> int:
    """Write a model of `size` bytes or up to one layer more; return the number of its transformer's layers.

    Raises:
        ValueError: for an unsupported width, or a size below that of a one-layer transformer.
    """
    if width < 512 or width % 512:
        raise ValueError(f"width is {width}; expected a multiple of 512, so that the heads stay whole")
    one, two = (total(all_tensors(configs(width, layers, embedding))) for layers in (1, 2))
    if one > size:
        raise ValueError(f"a model of width {width} takes at least {one / 1e9:.2f} GB: give more, or a smaller width")
    layers = 1 + math.ceil((size - one) / (two - one))
    parts = configs(width, layers, embedding)
    rng = np.random.default_rng(0)
    block = memoryview((rng.standard_normal(BLOCK, np.float32) / 64).astype(DTYPE).view(np.uint8))
    for name in ("tokenizer", "processor", "scheduler"):
        shutil.copytree(DEMO / name, folder / name)
    for name, shapes in all_tensors(parts).items():
        write_json(folder / name / "config.json", parts[name])
        write_weights(folder / name, FILES.get(name, FILE), shapes, block)
    shutil.copyfile(DEMO / "model_index.json", folder / "model_index.json")
    return layers


def main() -> None:
    """Write a model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--size-gb", type=float, default=6.0)
    parser.add_argument("--width", type=int, default=WIDTH, help="smaller for a trial; scales the vocabulary too")
    parser.add_argument("--no-embedding", action="store_true", help="a vocabulary of 640, not 151,936")
    arguments = parser.parse_args()
    try:
        layers = write_model(
            arguments.folder, arguments.size_gb * 1e9, arguments.width, embedding=not arguments.no_embedding
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(layers)


if __name__ == "__main__":
    main()
