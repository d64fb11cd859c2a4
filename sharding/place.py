"""Placing parameters on a mesh and constraining activations to it."""

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from joyjax.sharding.rules import partition_spec


def constrain(x: Array, *axes: str | None) -> Array:
    """Say how an activation lies on the mesh that is in force (`jax.set_mesh`); without a mesh, do nothing.

    Raises:
        ValueError: if the number of names is not the number of axes of `x`.
        MeshError: for an unknown logical axis.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, mesh.axis_names)
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def parameter_sharding(axes: tuple[str | None, ...], mesh: Mesh | None) -> NamedSharding | None:
    """Return where a parameter with these logical axes lies; None without a mesh: JAX's default device."""
    return None if mesh is None else NamedSharding(mesh, partition_spec(axes, mesh.axis_names))
