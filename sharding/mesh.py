"""The device mesh that a user asks for, checked."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from joyjax.errors import MeshError
from joyjax.sharding.devices import devices as all_devices
from joyjax.sharding.rules import MESH_AXES

PASSES = 2  # of guidance, which the axis `cfg` splits


def parse_axes(text: str) -> dict[str, int]:
    """Return the sizes of the axes that `tensor=4,sequence=2` names.

    Raises:
        MeshError: for an unknown axis, a size that is not a positive integer, or incompatible axes.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or not 1 <= int(size) < 2**31:
            raise MeshError(
                f"mesh {text!r}: cannot read {part.strip()!r}; expected axes such as tensor=4,sequence=2, each once, "
                f"from: {', '.join(MESH_AXES)}"
            )
        sizes[name] = int(size)
    _check_sizes(sizes)
    return sizes


def parse_mesh(text: str) -> Mesh:
    """Return the mesh that `tensor=4,sequence=2` describes, over the first devices.

    Raises:
        MeshError: as `parse_axes`, and where there are too few devices.
    """
    sizes, devices = parse_axes(text), all_devices()
    wanted = math.prod(sizes.values())
    if wanted < len(devices) and jax.process_count() > 1:
        raise MeshError(
            f"mesh {text!r} takes {wanted} devices; {jax.process_count()} processes run together and have "
            f"{len(devices)}: give axes whose product is that"
        )
    if wanted > len(devices):
        fitting = ",".join(f"{name}={size}" for name, size in fit_sizes(sizes, len(devices)).items())
        raise MeshError(
            f"mesh {text!r} needs {wanted} devices and {len(devices)} are here; what fits: "
            + (fitting or "no mesh at all, one device")
        )
    names = [name for name in MESH_AXES if name in sizes]  # neighbours along the last axis are on one host
    return Mesh(np.asarray(devices[:wanted]).reshape([sizes[name] for name in names]), names)


def fit_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Divide the largest size until the product is at most `devices`; leave out axes of size 1."""
    fitting = dict(sizes)
    while math.prod(fitting.values()) > devices:
        name = max(fitting, key=lambda name: fitting[name])
        fitting[name] //= next(n for n in range(2, fitting[name] + 1) if fitting[name] % n == 0)
    return {name: size for name, size in fitting.items() if size > 1}


def check_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh with automatic axes, in the order of `MESH_AXES`, as the networks expect it.

    `jax.make_mesh` makes explicit axes, where a product over a sharded axis is an error. Reordering keeps every
    device's index along every axis.

    Raises:
        MeshError: if it is not a mesh, or has an unknown axis or incompatible axes.
    """
    if not isinstance(mesh, Mesh):
        raise MeshError(f"mesh is {mesh!r}; expected a jax.sharding.Mesh, as joyjax.sharding.mesh.parse_mesh makes")
    unknown = [name for name in mesh.axis_names if name not in MESH_AXES]
    if unknown:
        raise MeshError(f"the mesh has axes {mesh.axis_names}; joyjax knows {', '.join(MESH_AXES)}")
    _check_sizes(dict(mesh.shape))
    names = tuple(name for name in MESH_AXES if name in mesh.axis_names)
    return Mesh(mesh.devices.transpose([mesh.axis_names.index(name) for name in names]), names)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if sizes.get("cfg", 1) > PASSES:
        raise MeshError(
            f"cfg={sizes['cfg']}: guidance makes {PASSES} passes, so that cfg is 1 or {PASSES}; use data for more edits"
        )
    by_hand = [name for name in ("ring", "ulysses") if name in sizes]
    if "sequence" in sizes and by_hand:
        raise MeshError(
            f"sequence and {by_hand[0]} do not go together: sequence shares its devices out to ring and ulysses by a "
            "rule, ring and ulysses do so by hand; give one or the other"
        )
