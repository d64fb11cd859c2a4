"""A network as data: its hashable structure and its arrays. The jitted stages take it and `load` returns it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from joyjax.kernels.choice import PLAIN, Kernels


@functools.partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["graph", "kernels"])
@dataclasses.dataclass(frozen=True, repr=False)
class Weights:
    """A split NNX module, which can be an argument of a `jax.jit` function.

    `graph` and `kernels`, the implementations of its operations, are static: two models with one configuration and one
    choice of kernels share a compiled program, and two choices never do.
    """

    graph: nnx.GraphDef
    state: nnx.State
    kernels: Kernels = PLAIN

    def __repr__(self) -> str:
        """Return one line; the leaves may be anything that JAX puts there."""
        arrays = jax.tree.leaves(self.state)
        return f"<Weights: {sum(getattr(array, 'size', 0) for array in arrays):,} parameters in {len(arrays)} arrays>"

    @classmethod
    def of(cls, module: nnx.Module) -> "Weights":
        """Split a module."""
        graph, state = nnx.split(module)
        return cls(graph, state)

    def filled(self, found: Mapping[str, Any]) -> "Weights":
        """Return the network with these parameters, by dotted path; all of them and no other.

        Each is an array, for a kernel also a stored form (joyjax/storage/forms.py), or a shape with its sharding, to
        compile for.
        """
        flat = nnx.to_flat_state(self.state)
        if found.keys() != leaves(self.state).keys():
            raise ValueError(f"not the network's parameters: {sorted(found.keys() ^ leaves(self.state).keys())}")
        state = nnx.from_flat_state([(path, leaf.replace(found[_dotted(path)])) for path, leaf in flat])
        return dataclasses.replace(self, state=state)

    def module(self) -> Any:
        """Merge the module; inside `jax.jit` this costs nothing at run time."""
        module = nnx.merge(self.graph, self.state)
        if self.kernels != PLAIN:
            for _, part in nnx.iter_graph(module):
                if isinstance(part, TakesKernels):
                    part.kernels = self.kernels
        return module


class TakesKernels(nnx.Module):
    """A module with operations that have kernels; `kernels` says which of them run."""

    kernels: Kernels = PLAIN


def leaves(state: nnx.State) -> dict[str, nnx.Variable]:
    """Return the parameters by dotted path, such as `blocks.3.img.qkv.kernel`."""
    return {_dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def count_parameters(state: nnx.State) -> int:
    """Return the number of parameters, of arrays or of shapes; the scales of stored forms are not counted."""
    return sum(leaf.get_value().size for leaf in leaves(state).values())
