"""Products of a block's linear maps with kernels in several formats, and what the device can do at most.

    python benchmarks/products.py                                   # at JoyImage's shapes, on a GPU
    python benchmarks/products.py --rows 64 --divide 64 --calls 1   # anywhere, to try the script

One JSON line for each shape and format: the milliseconds of a product, TFLOP/s, the ratio to bfloat16 in the same run,
the working memory of the program, and the error against float32. Rows are the image tokens of both passes of guidance.
The first lines are ceilings: a copy, a large square product, and cuDNN's attention at the model's shape.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joyjax.kernels.attention import attention
from joyjax.storage.float8 import Float8

SHAPES = {"qkv": (4096, 12288), "out": (4096, 4096), "mlp up": (4096, 16384), "mlp down": (16384, 4096)}
ROWS, HEADS, TOKENS = 16384, 32, 9296
GROUP = 128  # inputs that share a scale in four bits
SUBCHANNEL = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
Product = Callable[..., jax.Array]


def int8(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a kernel `[out, in]` in eight-bit integers, and a scale for each output."""
    scale = jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=1, keepdims=True) / 127
    return jnp.round(kernel.astype(jnp.float32) / scale).astype(jnp.int8), scale


def int4(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a kernel in four-bit integers `[out, groups, GROUP]`, and a scale for each group."""
    groups = kernel.astype(jnp.float32).reshape(kernel.shape[0], -1, GROUP)
    scale = jnp.max(jnp.abs(groups), axis=2, keepdims=True) / 7
    return jnp.round(groups / scale).astype(jnp.int4), scale.astype(jnp.bfloat16)


def last(x: jax.Array, kernel: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Return x·kernelᵀ."""
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def w8a16(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply with the integers in bfloat16; the scale is applied after the product."""
    return (last(x, q.astype(x.dtype), jnp.float32) * scale[:, 0]).astype(x.dtype)


def w8a8(x: jax.Array, q: jax.Array, scale: jax.Array, *, parts: int = 1) -> jax.Array:
    """Quantize the rows of `x` too and multiply integers, in so many parts of the outputs."""
    row = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True) / 127
    rounded = jnp.round(x.astype(jnp.float32) / row).astype(jnp.int8)
    size = q.shape[0] // parts
    found = []
    for start in range(0, q.shape[0], size):
        product = last(rounded, q[start : start + size], jnp.int32).astype(jnp.float32)
        found.append((product * row * scale[start : start + size, 0]).astype(x.dtype))
    return jnp.concatenate(found, axis=1)


def w4a16(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply with the dequantized groups."""
    return last(x, (q.astype(x.dtype) * scale).reshape(q.shape[0], -1))


def formats(kernel: jax.Array) -> Iterator[tuple[str, Product, tuple[Any, ...], dict[str, Any]]]:
    """Yield each format of a kernel `[out, in]`: name, product, arrays, and compiler options."""
    out, inputs = kernel.shape
    yield "bfloat16", last, (kernel,), {}
    yield "bfloat16, inputs first", jnp.matmul, (kernel.T.copy(),), {}
    float8 = Float8(**Float8.quantize(kernel, 1), shape=(inputs, out), dtype="bfloat16")
    yield "float8", lambda x, leaf: leaf.contract(x, 1, 0, None), (float8,), {}
    eight, four = int8(kernel), int4(kernel)
    yield "int8, W8A16", w8a16, eight, {}
    yield "int8, W8A8", w8a8, eight, {}
    yield "int8, W8A8 in 4 parts", functools.partial(w8a8, parts=4), eight, {}
    yield "int4, W4A16", w4a16, four, {}
    if jax.default_backend() == "gpu":
        yield "int4, W4A16, subchannel fusion", w4a16, four, SUBCHANNEL


def timed(call: Callable[[], Any], calls: int) -> float:
    """Return the median seconds of a call, of five rounds of `calls`."""
    jax.block_until_ready([call() for _ in range(2)])
    rounds = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)


def ceilings(rows: int, divide: int, calls: int) -> Iterator[dict[str, Any]]:
    """Measure a copy, a large product and attention."""
    size, tokens = 8192 // divide, max(16, TOKENS // divide)
    block = jax.random.normal(jax.random.key(0), (4 * rows, size), jnp.bfloat16)
    seconds = timed(functools.partial(jax.jit(lambda x: x + 1), block), calls)
    yield {"ceiling": "copy", "ms": 1e3 * seconds, "tbyte_s": 2 * block.nbytes / seconds / 1e12}
    square = jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16)
    seconds = timed(functools.partial(jax.jit(jnp.matmul), square, square), calls)
    yield {"ceiling": f"product of {size}³", "ms": 1e3 * seconds, "tflop_s": 2 * size**3 / seconds / 1e12}
    qkv = jax.random.normal(jax.random.key(2), (3, 2, tokens, HEADS, 128), jnp.bfloat16)
    lengths = jnp.full((2,), tokens, jnp.int32)
    for name, given in (("attention", None), ("attention by lengths", lengths)):
        run = jax.jit(functools.partial(attention, lengths=given))
        seconds = timed(functools.partial(run, *qkv), calls)
        tflop = 4 * 2 * HEADS * 128 * tokens**2 / 1e12
        yield {"ceiling": name, "ms": 1e3 * seconds, "tflop_s": tflop / seconds}


def measure(name: str, rows: int, divide: int, calls: int) -> Iterator[dict[str, Any]]:
    """Measure all formats of one linear map."""
    inputs, out = (max(GROUP, size // divide) for size in SHAPES[name])
    keys = jax.random.split(jax.random.key(3))
    x = jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (out, inputs), jnp.bfloat16) * jnp.bfloat16(inputs**-0.5)
    few = x[:64].astype(jnp.float32)
    exact = np.asarray(jnp.matmul(few, kernel.T.astype(jnp.float32), precision="highest"))
    base = None
    for label, product, arrays, options in formats(kernel):
        row: dict[str, Any] = {"map": name, "shape": (rows, inputs, out), "format": label}
        try:
            compiled = jax.jit(product).lower(x, *arrays).compile(compiler_options=options or None)
            seconds = timed(functools.partial(compiled, x, *arrays), calls)
            off = np.asarray(compiled(x, *arrays)[:64].astype(jnp.float32)) - exact
        except Exception as error:  # a format that the compiler refuses must not hide the others
            yield row | {"failed": str(error).splitlines()[0][:300]}
            continue
        base = base or seconds
        row |= {"ms": 1e3 * seconds, "tflop_s": 2 * rows * inputs * out / seconds / 1e12, "ratio": base / seconds}
        row |= {"working_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}
        yield row | {"error": float(np.linalg.norm(off) / np.linalg.norm(exact))}


def main() -> None:
    """Print one JSON line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--divide", type=int, default=1, help="divide all other sizes by this")
    parser.add_argument("--calls", type=int, default=10)
    arguments = parser.parse_args()
    sizes = arguments.rows, arguments.divide, arguments.calls
    rows = [ceilings(*sizes), *(measure(name, *sizes) for name in arguments.maps)]
    for row in (row for group in rows for row in group):
        short = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(short), flush=True)


if __name__ == "__main__":
    main()
