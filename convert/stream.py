"""From the tensors of a Diffusers folder to the parameters of a network, one at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from joyjax.convert.component import Component
from joyjax.convert.rules import Match, match, raise_faults
from joyjax.convert.safetensors import Tensors
from joyjax.dtypes import STORED
from joyjax.layers.weights import Weights, leaves
from joyjax.sharding.place import parameter_sharding

Progress = Callable[[int, int], None]  # is told the bytes done and the bytes in all


@dataclasses.dataclass(frozen=True)
class Plan:
    """How `tensors` fill the parameters of the network `abstract`. They are known to fit; nothing has been read."""

    tensors: Tensors
    abstract: Weights
    matches: tuple[Match, ...]

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return sum(self.tensors.headers[found.source].nbytes for found in self.matches)

    def read(self, found: Match, dtype: DTypeLike) -> np.ndarray:
        """Return one parameter in `dtype`: a view of what was read where that is possible, so seldom contiguous."""
        return found.parameter(self.tensors.read(found.source)).astype(dtype, copy=False)

    def fill(self, mesh: Mesh | None = None, progress: Progress | None = None) -> Weights:
        """Read the network: see the function `fill`."""
        parameters = leaves(self.abstract.state)
        places = {path: parameter_sharding(path, leaf.shape, leaf.axes, mesh) for path, leaf in parameters.items()}
        arrays, done, total = {}, 0, self.nbytes
        for found in self.matches:
            value = self.read(found, parameters[found.target].dtype)
            # Waiting keeps one tensor in the host's memory, not all those that a device has yet to take.
            arrays[found.target] = jax.block_until_ready(jax.device_put(value, places[found.target]))
            done += self.tensors.headers[found.source].nbytes
            if progress:
                progress(done, total)
        return self.abstract.filled(arrays)


def plan(component: Component, config: Any, tensors: Tensors, dtype: DTypeLike) -> Plan:
    """Find the tensor of every parameter.

    Raises:
        CheckpointError: listing all tensors that are missing, left over, of another shape or not of floating point.
    """
    abstract = component.abstract(config, dtype)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract.state).items()}
    found = match(component.rules(config), component.ignored, tensors.shapes, shapes, where=str(tensors.folder))
    stored = {m.source: tensors.headers[m.source].dtype for m in found}
    raise_faults(
        f"{tensors.folder}: parameters are stored as {', '.join(STORED)}",
        [f"tensor {name} is {kind}" for name, kind in stored.items() if kind not in STORED],
    )
    return Plan(tensors, abstract, tuple(found))


def fill(
    component: Component,
    config: Any,
    tensors: Tensors,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Read a network, each parameter in the dtype that the network gives it and where the mesh wants it.

    Raises:
        CheckpointError: if tensors and network do not fit; nothing is read then.
        MeshError: if a parameter cannot be split over the mesh.
    """
    return plan(component, config, tensors, dtype).fill(mesh, progress)
