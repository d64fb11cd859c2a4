"""Compares float8 scaling granularities on the demo model's held-out edits.

    python benchmarks/float8.py --count 16

PSNR of the pictures against the exact ones. joyjax has a scale for each output channel of a weight and for each token
(joyjax/storage/float8.py). The others are one scale for a weight and one for a batch of inputs, and both with the image
stream's second MLP map kept exact. One JSON line for each; docs/speed.md has the decision.
"""

import argparse
import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tradeoffs import psnr

import joyjax
from joyjax.dtypes import FLOAT32
from joyjax.layers.stored import quantized, storable
from joyjax.layers.weights import Weights, leaves
from joyjax.score import tasks
from joyjax.shapes.draw import render
from joyjax.storage.float8 import quantize
from joyjax.storage.product import contract_last

DOWN = "blocks.*.img.down.kernel"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=["shape", "dtype"])
@dataclasses.dataclass(frozen=True)
class Whole:
    """A float8 kernel with one static scale, and one dynamic scale for all inputs."""

    q: Any
    scale: Any
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of parameters."""
        return math.prod(self.shape)

    def array_axes(self, axes: tuple[str | None, ...], inputs: int) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of each array."""
        return {"q": (*axes[inputs:], *axes[:inputs]), "scale": ()}

    def contract(self, x: jax.Array, count: int, start: int, stop: int | None) -> jax.Array:
        """Multiply, as `joyjax.storage.forms.contract` does."""
        rounded, scale = quantize(x, x.ndim)
        product = contract_last(rounded, self.q[start:stop], count, self.dtype).astype(FLOAT32)
        return (product * scale.reshape(()) * self.scale).astype(self.dtype)


def whole(weights: Weights, paths: Iterable[str]) -> Weights:
    """Return a network whose kernels at `paths` have one scale each."""
    found = {}
    for path, leaf in leaves(weights.state).items():
        value = leaf.get_value()
        if path in paths:
            count = leaf.inputs
            turned = jnp.transpose(value, (*range(count, value.ndim), *range(count)))
            q, scale = quantize(turned, turned.ndim)
            value = Whole(q, scale.reshape(()), value.shape, jnp.dtype(value.dtype).name)
        found[path] = value
    return weights.filled(found)


def variants(weights: Weights) -> dict[str, Weights]:
    """Return the transformer in each form, the exact one first."""
    paths = storable(weights.state)
    kept = [path for path in paths if not fnmatch.fnmatchcase(path, DOWN)]
    return {
        "exact": weights,
        "by channel and token": quantized(weights, "float8"),
        "by channel and token, image down exact": quantized(weights, dict.fromkeys(kept, "float8")),
        "by tensor": whole(weights, paths),
        "by tensor, image down exact": whole(weights, kept),
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
