"""What other ways to scale eight-bit numbers cost, against joyjax's own, on the demo model's held-out edits.

    python benchmarks/float8.py --count 16

PSNR of the pictures against the exact ones. joyjax has a scale for each output channel of a weight and for each token
(joyjax/storage/float8.py); here it stands beside one scale for a whole weight and a whole batch of inputs, and beside
leaving the image stream's last map of each MLP exact. One JSON line for each; docs/speed.md has the decision.
"""

import argparse
import dataclasses
import fnmatch
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tradeoffs import psnr

import joyjax
from joyjax.dtypes import FLOAT32
from joyjax.families.joyimage import FLOAT8
from joyjax.layers.linear import Linear
from joyjax.layers.weights import Weights
from joyjax.score import tasks
from joyjax.shapes.draw import render
from joyjax.storage.float8 import contract_last, quantize, quantize_linears

DOWN = "blocks.*.img.down"


class WholeLinear(nnx.Module):
    """A linear map in eight bits with one scale for its weight, and one for all of its inputs, found as they come."""

    def __init__(self, linear: Linear):
        kernel, count = linear.kernel[...], linear.contracted
        turned = jnp.transpose(kernel, (*range(count, kernel.ndim), *range(count)))
        numbers, scale = quantize(turned, turned.ndim)
        self.kernel, self.scale = nnx.Param(numbers), nnx.Param(scale.reshape(()))
        self.bias, self.contracted, self.dtype = linear.bias, count, jnp.dtype(kernel.dtype).name

    def __call__(self, x: jax.Array, start: int = 0, stop: int | None = None) -> jax.Array:
        numbers, scale = quantize(x, x.ndim)
        product = contract_last(numbers, self.kernel[...][start:stop], self.contracted, self.dtype).astype(FLOAT32)
        y = (product * scale.reshape(()) * self.scale[...]).astype(self.dtype)
        return y if self.bias is None else y + self.bias[...][start:stop]


def whole_linears(weights: Weights, paths: tuple[str, ...]) -> Weights:
    """Return a network whose linear maps at `paths` have one scale for each tensor."""
    module = weights.module()
    for path, found in list(nnx.iter_modules(module)):
        for name, linear in list(vars(found).items()):
            whole = ".".join(map(str, (*path, name)))
            if isinstance(linear, Linear) and any(fnmatch.fnmatchcase(whole, pattern) for pattern in paths):
                setattr(found, name, WholeLinear(linear))
    return Weights.of(module)


def variants(weights: Weights) -> dict[str, Weights]:
    """Return the transformer in each form, the exact one first."""
    kept = tuple(path for path in FLOAT8 if path != DOWN)
    return {
        "exact": weights,
        "by channel and token": quantize_linears(weights, FLOAT8, None),
        "by channel and token, image down exact": quantize_linears(weights, kept, None),
        "by tensor": whole_linears(weights, FLOAT8),
        "by tensor, image down exact": whole_linears(weights, kept),
    }


def measure(count: int, steps: int) -> list[dict[str, Any]]:
    """Return the mean and the lowest PSNR of each form over the same edits."""
    pipeline = joyjax.load(dtype="float32")
    exact: list[np.ndarray] = []
    rows = []
    for name, transformer in variants(pipeline.weights["transformer"]).items():
        form = dataclasses.replace(pipeline, weights={**pipeline.weights, "transformer": transformer})
        quality = []
        for number, (_, task) in enumerate(tasks(count)):
            source = Image.fromarray(render(task.pair.source))
            result = joyjax.edit(form, source, task.prompt, seed=task.seed, steps=steps, guidance_scale=1.0)
            picture = np.asarray(result.image)
            exact += [picture] if name == "exact" else []
            quality.append(psnr(picture, exact[number]))
        error = 10 ** (-np.asarray(quality) / 10)  # the mean of errors, which no single good picture hides
        row = {"form": name, "edits": count, "steps": steps, "psnr": round(float(np.mean(quality)), 1)}
        row |= {"lowest": round(min(quality), 1), "psnr of mean error": round(-10 * math.log10(error.mean()), 1)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16, help="held-out edits; a multiple of 8")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    measure(arguments.count, arguments.steps)


if __name__ == "__main__":
    main()
