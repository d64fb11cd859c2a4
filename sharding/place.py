"""Shardings of parameters, sharding constraints of activations, and functions that run on each device's shard."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from joyjax.errors import MeshError
from joyjax.sharding.devices import devices
from joyjax.sharding.rules import PADDED_IF_UNEVEN, WHOLE_IF_UNEVEN, mesh_axes, partition_spec


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrain the sharding of an activation on the mesh in force (`jax.set_mesh`); without a mesh, do nothing.

    A dimension that its mesh axes do not divide is replicated, which costs memory and time but never changes a result.
    Rows of a picture are split nevertheless; the last devices then have fewer of them.

    Raises:
        ValueError: if the number of names is not the number of axes of `x`.
        MeshError: for an unknown logical axis.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, mesh.axis_names)
    if mesh.empty or mesh.manual_axes:  # within `on_shards` an array is one device's own
        return x
    kept = []
    for axis, names, size in zip(axes, spec, x.shape, strict=True):
        devices = _devices(names, mesh.shape)
        fits = size % devices == 0 or (axis in PADDED_IF_UNEVEN and size > devices)
        kept.append(names if fits else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*kept)))


def devices_along(axis: str) -> int:
    """Return over how many devices of the mesh in force a logical axis is split; without a mesh, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in mesh_axes(axis, mesh.axis_names))


def on_shards(function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """Return the function as one that every device runs on its own shard; without a mesh, the function itself.

    `inputs` and `outputs` are pytrees of tuples of logical axes, one for each array; the devices must divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def spec(axes: Any) -> Any:
        return jax.tree.map(lambda names: partition_spec(names, mesh.axis_names), axes, is_leaf=_is_names)

    # Results are checked by tests against one device, not by JAX's varying-axes types.
    return jax.shard_map(function, in_specs=spec(inputs), out_specs=spec(outputs), check_vma=False)


def _is_names(axes: Any) -> bool:
    return isinstance(axes, tuple) and all(name is None or isinstance(name, str) for name in axes)


def parameter_sharding(
    path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh | None
) -> NamedSharding | None:
    """Return the sharding of a parameter with these logical axes; None without a mesh (JAX's default device).

    Raises:
        MeshError: if a dimension does not divide by the devices that it would be split over.
    """
    if mesh is None:
        return None
    kept = []
    for axis, size, names in zip(axes, shape, partition_spec(axes, mesh.axis_names), strict=True):
        devices = _devices(names, mesh.shape)
        if size % devices and axis not in WHOLE_IF_UNEVEN:
            fitting = [n for n in range(1, devices) if size % n == 0]
            raise MeshError(
                f"{path} has {size} {axis}, which {devices} devices of mesh axis {names!r} do not divide; "
                f"sizes that fit: {', '.join(map(str, fitting))}"
            )
        kept.append(None if size % devices else names)
    return NamedSharding(mesh, PartitionSpec(*kept))


def replicate(arrays: Any, mesh: Mesh | None) -> Any:
    """Put arrays on every device of the mesh, or on JAX's default device, and keep them there.

    An array that a compiled function takes and returns must have the same sharding both times, or the function is
    compiled twice. With several processes, each passes the same arrays and fills its own devices.
    """
    if mesh is None:
        return jax.device_put(arrays, devices()[0])
    replicated = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> Array:
        if replicated.is_fully_addressable or (isinstance(x, Array) and not x.is_fully_addressable):
            return jax.device_put(x, replicated)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, replicated, lambda part: host[part])

    return jax.tree.map(put, arrays)


def _devices(names: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    """Return into how many parts a dimension is split."""
    if names is None:
        return 1
    return math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))
