"""The cost of an edit on several GPUs, by compiling its stages for them. No GPU is needed and nothing is timed.

    python benchmarks/parallel.py tensor=8 sequence=8 cfg=2,sequence=4

For each mesh, at the real size (tests/full_size.py): the collectives of one block of the transformer and of the rest of
a step, and bytes of parameters and working memory on each device for each stage, from programs compiled for H100s; and
a prediction of the step's time on H200s from arithmetic, bytes and link speed (`predict`). Without a mesh, one device.
tests/gpu_compile.py lists the required packages.
"""

import argparse
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
from collectives import count_collectives, gathered_shapes
from full_size import JOYIMAGE, PASSES, REFERENCE, STAGES, TARGET, TEXT, stage
from gpu_compile import compile_for_gpu, gpu_mesh
from jax.sharding import Mesh

from joyjax.models.joyimage import JoyImageConfig
from joyjax.sharding.attention import share_out
from joyjax.sharding.mesh import parse_axes

# One H200 of eight on a board: measured rates of dense bfloat16 products and of large transfers.
FLOPS = 750e12
LINK = 315e9  # bytes a second in one direction: 0.7 of NVLink's 450
LATENCY = 15e-6  # seconds of one collective


def compile_stage(name: str, mesh: Mesh, layers: int | None = None) -> jax.stages.Compiled:
    """Compile one stage of an edit for the devices of a mesh."""
    function, arguments = stage(name, mesh, layers=layers)
    return compile_for_gpu(function, *arguments, mesh=mesh)


def predict(sizes: Mapping[str, int], config: JoyImageConfig = JOYIMAGE) -> dict[str, float]:
    """Return the predicted milliseconds of a step: arithmetic, transfers, and their sum.

    Arithmetic is that of `config` split over all axes but `data`. Transfers are those of the rule in
    sharding/attention.py and of tensor parallelism, as rings; those of ring attention overlap with its products.
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


def count(sizes: Mapping[str, int]) -> dict[str, object]:
    """Return the collectives of one block and of the rest of a step, and the shapes of all-gathers."""
    mesh = gpu_mesh(sizes)
    two, three = (compile_stage("denoise_step", mesh, layers).as_text() for layers in (2, 3))
    block = count_collectives(three) - count_collectives(two)
    return {
        "block": dict(block),
        "rest": dict(count_collectives(two) - block),
        "gathered": sorted(set(gathered_shapes(three))),
    }


def measure(sizes: Mapping[str, int], name: str) -> dict[str, float]:
    """Return the memory of one stage on each device, in GiB, and the seconds to compile it."""
    started = time.perf_counter()
    memory = compile_stage(name, gpu_mesh(sizes)).memory_analysis()
    return {
        "parameters_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "working_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "compile_s": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Print JSON lines: for each mesh the prediction, the collectives, and each stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("meshes", nargs="*", help="such as tensor=8; none: one device")
    parser.add_argument("--predict", action="store_true", help="only predict; compile nothing")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="stages to report memory of")
    arguments = parser.parse_args()
    alone = predict({})["ms"]
    for text in arguments.meshes or ["tensor=1"]:
        sizes = parse_axes(text)
        predicted = predict(sizes)
        rounded = {name: round(value, 1) for name, value in predicted.items()}
        print(json.dumps({"mesh": text, **rounded, "speedup": round(alone / predicted["ms"], 2)}), flush=True)
        if arguments.predict:
            continue
        print(json.dumps({"mesh": text, "jax": jax.__version__, **count(sizes)}), flush=True)
        for name in arguments.stages:
            print(json.dumps({"mesh": text, "stage": name, **measure(sizes, name)}), flush=True)


if __name__ == "__main__":
    main()
