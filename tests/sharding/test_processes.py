"""Several processes that load one model together: each reads its own part."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from joyjax.convert import stream
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.safetensors import Tensors
from joyjax.layers.stored import array_leaves
from joyjax.layers.weights import leaves

pytestmark = pytest.mark.jax

PROGRAM = Path(__file__).parents[1] / "processes.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("part_bytes", [2**20, 500], ids=["whole parameters", "parameters in pieces"])
def test_two_processes_load_one_model(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", part_bytes)
    source, converted = toy.save_model(tmp_path / "source", toy.TOY), tmp_path / "converted"
    convert_checkpoint(source, converted, (toy.TOY,))
    port = str(free_port())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), port, str(source), str(converted)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said[0][1] + said[1][1]
    rows = [json.loads(out.splitlines()[-1]) for out, _ in said]
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
