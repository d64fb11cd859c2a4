"""The device mesh that a user asks for, checked."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from joyjax.errors import MeshError
from joyjax.sharding.rules import MESH_AXES


def parse_mesh(text: str) -> Mesh:
    """Return the mesh that `tensor=4,sequence=2` describes, over the first devices of this machine.

    Raises:
        MeshError: for an unknown axis, a size that is no positive number, or more devices than there are.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise MeshError(
                f"mesh {text!r}: cannot read {part.strip()!r}; expected axes such as tensor=4,sequence=2, each once, "
                f"from: {', '.join(MESH_AXES)}"
            )
        sizes[name] = int(size)
    wanted, devices = math.prod(sizes.values()), jax.devices()
    if wanted > len(devices):
        raise MeshError(f"mesh {text!r} needs {wanted} devices and {len(devices)} are here; their product must fit")
    return Mesh(np.asarray(devices[:wanted]).reshape(tuple(sizes.values())), tuple(sizes))


def check_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh with automatic axes, which is what the networks are written for.

    `jax.make_mesh` makes explicit ones, where a product over a split axis is an error.

    Raises:
        MeshError: if it is no mesh, or has an axis that joyjax does not know.
    """
    if not isinstance(mesh, Mesh):
        raise MeshError(f"mesh is {mesh!r}; expected a jax.sharding.Mesh, as joyjax.sharding.mesh.parse_mesh makes")
    unknown = [name for name in mesh.axis_names if name not in MESH_AXES]
    if unknown:
        raise MeshError(f"the mesh has axes {mesh.axis_names}; joyjax knows {', '.join(MESH_AXES)}")
    return Mesh(mesh.devices, mesh.axis_names)
