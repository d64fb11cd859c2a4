"""Placing parameters on a mesh and constraining activations to it."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from joyjax.errors import MeshError
from joyjax.sharding.rules import partition_spec


def constrain(x: Array, *axes: str | None) -> Array:
    """Say how an activation lies on the mesh that is in force (`jax.set_mesh`); without a mesh, do nothing.

    A dimension that its mesh axes do not divide stays whole: one row of a batch is not cut in two. That costs memory
    and time, never a result.

    Raises:
        ValueError: if the number of names is not the number of axes of `x`.
        MeshError: for an unknown logical axis.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, mesh.axis_names)
    if mesh.empty:
        return x
    kept = [
        names if size % _devices(names, mesh.shape) == 0 else None for names, size in zip(spec, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*kept)))


def parameter_sharding(
    path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | None
) -> NamedSharding | None:
    """Return where a parameter with these logical axes lies; None without a mesh: JAX's default device.

    Raises:
        MeshError: if a dimension does not divide by the devices that it would be split over.
    """
    if mesh is None:
        return None
    spec = partition_spec(axes, mesh.axis_names)
    for axis, size, names in zip(axes, shape, spec, strict=True):
        devices = _devices(names, mesh.shape)
        if size % devices:
            fitting = [n for n in range(1, devices) if size % n == 0]
            raise MeshError(
                f"{path} has {size} {axis}, which {devices} devices of mesh axis {names!r} do not divide; "
                f"sizes that fit: {', '.join(map(str, fitting))}"
            )
    return NamedSharding(mesh, spec)


def replicate(x: Array, mesh: Mesh | None) -> Array:
    """Put an array on every device of the mesh, or on JAX's default device, and keep it there.

    What goes into a compiled function and comes out of it to go in again must lie the same way both times: otherwise
    the function is compiled twice.
    """
    return jax.device_put(x, jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _devices(names: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    """Return how many parts a dimension is cut into."""
    if names is None:
        return 1
    return math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))
