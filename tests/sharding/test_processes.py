"""Several processes that load one model together: each reads its own part."""

import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from two_processes import run_two

from joyjax.convert import stream
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.safetensors import Tensors
from joyjax.layers.stored import array_leaves
from joyjax.layers.weights import leaves

pytestmark = pytest.mark.jax

PROGRAM = Path(__file__).parents[1] / "processes.py"


@pytest.mark.parametrize("part_bytes", [2**20, 500], ids=["whole parameters", "parameters in pieces"])
def test_two_processes_load_one_model(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", part_bytes)
    source, converted = toy.save_model(tmp_path / "source", toy.TOY), tmp_path / "converted"
    convert_checkpoint(source, converted, (toy.TOY,))
    rows = run_two(PROGRAM, lambda rank: [str(source), str(converted)])
    alone = leaves(stream.fill(toy.TOY, toy.ToyConfig(), Tensors.open(source / "toy"), jnp.float32).state)
    whole = b"".join(np.asarray(leaf[...]).tobytes() for leaf in alone.values())
    small = hashlib.sha256()
    for array in array_leaves(
        stream.fill(toy.TOY, toy.ToyConfig(), Tensors.open(source / "toy"), jnp.float32, storage="float8").state
    ).values():
        small.update(np.asarray(array.value).tobytes())
    assert {row["devices"] for row in rows} == {4}
    for row in rows:
        assert row["streamed"] == row["restored"] == rows[0]["streamed"]
        assert row["all"] == len(whole)
        # All that is split lies in the heads' half; the rest, norms and biases among it, every process needs.
        assert row["read"] < 0.75 * row["all"]
        assert row["streamed float8"] == row["restored float8"] == small.hexdigest()
        assert row["read float8"] == row["read"]
