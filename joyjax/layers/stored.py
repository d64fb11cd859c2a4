"""The arrays of a network whose kernels may have other forms: their paths, bytes and places, and changing the form.

An array has its parameter's path, or where the parameter has another form, such as `blocks.3.img.qkv.kernel.q`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from joyjax.layers.weights import Weights, leaves
from joyjax.sharding.place import parameter_sharding
from joyjax.storage import forms
from joyjax.storage.quantize import quantize_array

Storage = str | Mapping[str, str] | None  # the form of all storable kernels, or of some by path; None: arrays


class ArrayLeaf(NamedTuple):
    """One array, or its shape, with the logical axes of it and the path of its parameter."""

    value: Any
    axes: tuple[str | None, ...]
    parameter: str

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.value.size * self.value.dtype.itemsize


def array_leaves(state: nnx.State) -> dict[str, ArrayLeaf]:
    """Return every array of a network by path."""
    found = {}
    for path, leaf in leaves(state).items():
        axes = forms.array_axes(leaf.get_value(), leaf.axes, leaf.inputs)
        for name, array in forms.arrays(leaf.get_value()).items():
            found[forms.array_path(path, name)] = ArrayLeaf(array, axes[name], path)
    return found


def nbytes(state: nnx.State) -> int:
    """Return the bytes of all arrays."""
    return sum(array.nbytes for array in array_leaves(state).values())


def shardings(state: nnx.State, mesh: Mesh | AbstractMesh | None) -> dict[str, NamedSharding | None]:
    """Return the sharding of every array by path; None without a mesh, for JAX's default device.

    Raises:
        MeshError: if a dimension does not divide by the devices that it would be split over.
    """
    return {
        path: parameter_sharding(array.parameter, array.value.shape, array.axes, mesh)
        for path, array in array_leaves(state).items()
    }


def places(state: nnx.State, mesh: Mesh | None) -> dict[str, Sharding]:
    """Return the sharding of every array by path; without a mesh, that of JAX's default device."""
    one = jax.device_put(np.zeros(())).sharding
    return {path: place or one for path, place in shardings(state, mesh).items()}


def own_places(path: str, leaf: Any, found: Mapping[str, Sharding]) -> dict[str, Sharding]:
    """Select the shardings of one leaf's arrays from a network's; return them by the arrays' names in the leaf."""
    return {name: found[forms.array_path(path, name)] for name in forms.arrays(leaf)}


def filled_with_arrays(abstract: Weights, found: Mapping[str, Any]) -> Weights:
    """Return the network with these arrays, by path; all of them and no other."""
    own = array_leaves(abstract.state)
    if found.keys() != own.keys():
        raise ValueError(f"not the network's arrays: {sorted(found.keys() ^ own.keys())}")
    filled = {}
    for path, leaf in leaves(abstract.state).items():
        value = leaf.get_value()
        named = {name: found[forms.array_path(path, name)] for name in forms.arrays(value)}
        filled[path] = forms.with_arrays(value, named)
    return abstract.filled(filled)


def storable(state: nnx.State) -> list[str]:
    """Return the paths of the kernels that may be stored in another form."""
    return [path for path, leaf in leaves(state).items() if leaf.storable]


def storage_faults(state: nnx.State, storage: Storage) -> list[str]:
    """Return messages about unknown forms in `storage`, and about paths without a kernel that may have one."""
    known = ", ".join(forms.FORMS)
    if storage is None or isinstance(storage, str):
        return [f"form {storage!r} is unknown; known: {known}"] if storage and storage not in forms.FORMS else []
    allowed = set(storable(state))
    return [
        f"parameter {path} has the form {form!r}; this joyjax knows {known}"
        if path in allowed
        else f"parameter {path} has the form {form!r}; the network has no kernel there that may be stored so"
        for path, form in storage.items()
        if path not in allowed or form not in forms.FORMS
    ]


def with_storage(abstract: Weights, storage: Storage) -> Weights:
    """Return a network of shapes with its kernels in the forms that `storage` names.

    Raises:
        ValueError: for what `storage_faults` lists.
    """
    if faults := storage_faults(abstract.state, storage):
        raise ValueError("; ".join(faults))
    chosen = dict.fromkeys(storable(abstract.state), storage) if isinstance(storage, str) else dict(storage or {})
    found = {}
    for path, leaf in leaves(abstract.state).items():
        value = leaf.get_value()
        if path in chosen:
            value = forms.FORMS[chosen[path]].abstract(tuple(leaf.shape), leaf.inputs, leaf.dtype)
        found[path] = value
    return abstract.filled(found)


def quantized(weights: Weights, storage: Storage, mesh: Mesh | None = None) -> Weights:
    """Return a loaded network with its arrays in the forms that `storage` names, one kernel after the other.

    For a network on the devices; `load` quantizes while it reads (convert/stream.py, convert/checkpoint.py).
    """
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if leaf.storable else leaf.get_value()
        for path, leaf in leaves(weights.state).items()
    }
    goal = with_storage(weights.filled(shapes), storage)
    placed, own, found = places(goal.state, mesh), leaves(weights.state), {}
    for path, leaf in leaves(goal.state).items():
        value = leaf.get_value()
        if isinstance(value, forms.Leaf) and not isinstance(own[path].get_value(), forms.Leaf):
            found[path] = quantize_array(value, leaf.inputs, own_places(path, value, placed), own[path].get_value())
        else:
            found[path] = own[path].get_value()
    return weights.filled(found)
