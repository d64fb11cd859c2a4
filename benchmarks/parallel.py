"""What the transformer's step costs on several GPUs, by compiling it for them; no GPU is needed, and none is timed.

    python benchmarks/parallel.py tensor=8 sequence=8 cfg=2,sequence=4

For each mesh: collectives of one block and of the rest of the step, bytes of parameters and of working memory on each
device, all from the compiled program at full size; and a prediction of the step's time from arithmetic, bytes and link
speed (`predict`). Without a mesh, one device. tests/gpu_compile.py names the packages that this needs.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
from collectives import count_collectives, gathered_shapes
from gpu_compile import OPTIONS, cudnn_assumed, gpu_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.layers.weights import Weights, leaves
from joyjax.models.joyimage import Condition, JoyImageConfig
from joyjax.sampling.steps import denoise_step
from joyjax.sharding.attention import share_out
from joyjax.sharding.mesh import parse_axes
from joyjax.sharding.place import parameter_sharding

FULL = JoyImageConfig(
    hidden_size=4096,
    num_attention_heads=32,
    num_layers=40,
    in_channels=16,
    out_channels=16,
    patch_size=(1, 2, 2),
    text_dim=4096,
    mlp_width_ratio=4.0,
    rope_dim_list=(16, 56, 56),
    rope_type="rope",
    theta=10000.0,
)
TARGET, REFERENCE, TEXT, PASSES = 4096, 4096, 1104, 2  # tokens of an edit of 1024² with one reference, and guidance

# An H200 of eight on one board. The rate is what dense bfloat16 products reach, the link what large transfers do.
FLOPS = 750e12
LINK = 315e9  # bytes a second in one direction: 0.7 of NVLink's 450
LATENCY = 15e-6  # seconds of one collective


def compile_step(config: JoyImageConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Compile one step with guidance."""

    def array(shape: tuple[int, ...], dtype: object, place: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place or NamedSharding(mesh, PartitionSpec()))

    abstract = TRANSFORMER.abstract(config, jnp.bfloat16)
    parameters = {
        path: array(leaf.shape, leaf.dtype, parameter_sharding(path, leaf.shape, leaf.axes, mesh))
        for path, leaf in leaves(abstract.state).items()
    }
    weights: Weights = abstract.filled(parameters)  # type: ignore[arg-type]
    token = config.in_channels * config.patch_area
    condition = Condition(
        txt=array((PASSES, TEXT, config.text_dim), jnp.bfloat16),
        txt_lengths=array((PASSES,), jnp.int32),
        references=array((PASSES, REFERENCE, token), jnp.float32),
        positions=array((PASSES, TARGET + REFERENCE, 3), jnp.int32),
    )
    numbers = [array((), jnp.float32)] * 4
    with cudnn_assumed(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = denoise_step.trace(
            weights, array((1, TARGET, token), jnp.float32), condition, *numbers, channels=config.in_channels
        )
        return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=OPTIONS)


def predict(sizes: Mapping[str, int], config: JoyImageConfig = FULL) -> dict[str, float]:
    """Return the predicted milliseconds of a step: arithmetic, transfers, and both where nothing overlaps.

    Arithmetic is that of `FULL` split over all devices but `data`; transfers are those of the rule in
    sharding/attention.py and of tensor parallelism, in rings; a ring of attention hides behind its products.
    """
    width, layers, tokens = config.hidden_size, config.num_layers, TARGET + REFERENCE + TEXT
    flop = PASSES * layers * (24 * width**2 * tokens + 4 * width * tokens**2)
    shared = share_out(sizes, config.num_attention_heads)
    cfg, tensor, rows = sizes.get("cfg", 1), sizes.get("tensor", 1), PASSES / sizes.get("cfg", 1)
    arithmetic = flop / FLOPS / (cfg * tensor * shared.devices)
    own = rows * tokens / shared.devices * width * 2  # bytes of one vector a token on one device
    heads = own / tensor
    exposed = 4 * heads * (shared.ulysses - 1) / shared.ulysses  # all-to-alls of queries, keys, values, results
    exposed += 2 * 2 * own * (tensor - 1) / tensor  # two all-reduces of each stream
    count = 4 * (shared.ulysses > 1) + 4 * (tensor > 1)
    ring = 2 * heads * (shared.ring - 1) / LINK * layers
    attention = PASSES * layers * 4 * width * tokens**2 / FLOPS / (cfg * tensor * shared.devices)
    transfers = layers * (exposed / LINK + count * LATENCY) + max(0.0, ring - attention)
    return {"arithmetic_ms": 1e3 * arithmetic, "transfers_ms": 1e3 * transfers, "ms": 1e3 * (arithmetic + transfers)}


def measure(sizes: Mapping[str, int], layers: int) -> dict[str, object]:
    """Return what was compiled for one mesh."""
    mesh = gpu_mesh(sizes, "H200")
    counts = [
        count_collectives(compile_step(dataclasses.replace(FULL, num_layers=blocks), mesh).as_text())
        for blocks in (2, 3)
    ]
    started = time.perf_counter()
    compiled = compile_step(dataclasses.replace(FULL, num_layers=layers), mesh)
    memory = compiled.memory_analysis()
    return {
        "mesh": dict(sizes),
        "jax": jax.__version__,
        "block": dict(counts[1] - counts[0]),
        "rest": dict(counts[0] - (counts[1] - counts[0])),
        "gathered": sorted(set(gathered_shapes(compiled.as_text()))),
        "layers": layers,
        "parameters_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "working_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "compile_s": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Print one JSON line for each mesh."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("meshes", nargs="*", help="such as tensor=4,sequence=2")
    parser.add_argument("--layers", type=int, default=FULL.num_layers)
    parser.add_argument("--predict", action="store_true", help="only predict; compile nothing")
    arguments = parser.parse_args()
    alone = predict({})["ms"]
    for text in arguments.meshes or ["tensor=1"]:
        sizes = parse_axes(text)
        predicted = predict(sizes)
        row: dict[str, object] = {} if arguments.predict else measure(sizes, arguments.layers)
        row |= {"mesh": text} | {name: round(value, 1) for name, value in predicted.items()}
        print(json.dumps(row | {"speedup": round(alone / predicted["ms"], 2)}), flush=True)


if __name__ == "__main__":
    main()
