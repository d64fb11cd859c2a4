"""Loads a toy model as one process of two, each with two devices, and prints the bytes that it read and holds.

python processes.py RANK PORT SOURCE CONVERTED
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import toy
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from joyjax.convert import checkpoint, stream
from joyjax.convert.blocks import Source
from joyjax.convert.safetensors import Tensors
from joyjax.layers.stored import array_leaves
from joyjax.layers.weights import Weights


def digest(weights: Weights) -> str:
    """Return the SHA-256 of all arrays, gathered."""
    found = hashlib.sha256()
    for array in array_leaves(weights.state).values():
        found.update(np.asarray(multihost_utils.process_allgather(array.value, tiled=True)).tobytes())
    return found.hexdigest()


def main() -> None:
    rank, port, source, converted = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    read, plain = [0], Source.fill

    def counted(self, target, ranges, **options):
        read[0] += target.size * self.dtype.itemsize
        return plain(self, target, ranges, **options)

    Source.fill = counted
    config = toy.ToyConfig()
    streamed = stream.fill(toy.TOY, config, Tensors.open(source / "toy"), jnp.float32, mesh)
    restored = checkpoint.restore(converted, toy.TOY, config, jnp.float32, mesh)
    arrays, exact = [array.value for array in array_leaves(streamed.state).values()], read[0]
    row = {
        "devices": len(jax.devices()),
        "read": exact,
        "held": sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards[:1]) * 2,
        "all": sum(array.nbytes for array in arrays),
        "streamed": digest(streamed),
        "restored": digest(restored),
        "streamed float8": digest(
            stream.fill(toy.TOY, config, Tensors.open(source / "toy"), jnp.float32, mesh, storage="float8")
        ),
        "restored float8": digest(checkpoint.restore(converted, toy.TOY, config, jnp.float32, mesh, storage="float8")),
        "read float8": read[0] - exact,
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
