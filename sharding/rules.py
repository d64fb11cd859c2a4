"""The one table from logical axis names to mesh axes.

A parameter or activation names its dimensions by what they mean; which mesh axis a meaning is split over is decided
here and nowhere else. None: never split.
"""

from jax.sharding import PartitionSpec

from joyjax.errors import MeshError

MESH_AXES = ("data", "cfg", "sequence", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("cfg", "data"),
    "sequence": "sequence",
    # parameters and activations of transformers
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "mlp": "tensor",
    "vocabulary": None,
    "patch": None,
    "time": None,
    # the autoencoder's channels are never split: its rows are
    "height": "sequence",
    "width": None,
    "conv_in": None,
    "conv_out": None,
}


def partition_spec(axes: tuple[str | None, ...], mesh_axes: tuple[str, ...]) -> PartitionSpec:
    """Return how an array with these logical axes lies on a mesh that has `mesh_axes`.

    Raises:
        MeshError: for a logical axis that the table does not have.
    """
    return PartitionSpec(*(_mesh_axis(axis, mesh_axes) for axis in axes))


def _mesh_axis(axis: str | None, mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if axis is None:
        return None
    if axis not in RULES:
        raise MeshError(f"logical axis {axis!r} has no rule; the table in sharding/rules.py has: {', '.join(RULES)}")
    rule = RULES[axis]
    if isinstance(rule, tuple):
        present = tuple(name for name in rule if name in mesh_axes)
        return present or None
    return rule if rule in mesh_axes else None
