"""Chooses kernels as one process of two, each with two devices, and prints the choice.

python kernel_processes.py RANK PORT FOLDER

The measurement of the first process finds every kernel faster, that of the second finds every kernel wrong.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from joyjax.kernels.cases import Case, Shape
from joyjax.kernels.measure import Measured
from joyjax.runtime import kernel_choice
from joyjax.runtime.kernel_choice import KernelChooser


def main() -> None:
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    measured = []

    def measure(case: Case, kernel: str) -> Measured:
        measured.append(case.operation)
        if rank == 0:
            return Measured(case.operation, kernel, True, "", 2.0, 1.0)
        return Measured(case.operation, kernel, False, "wrong")

    kernel_choice.measure = measure
    chooser = KernelChooser("auto", mesh.local_devices[0], "float32", mesh, kernel="triton", folder=folder)
    with jax.set_mesh(mesh):
        chosen = [str(chooser.choose(Shape(2, 5, 3, 4, 64, 256))) for _ in range(2)]
    print(json.dumps({"chosen": chosen, "measured": measured, "notes": chooser.take_notes()}), flush=True)


if __name__ == "__main__":
    main()
