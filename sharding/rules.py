"""The one table from logical axis names to mesh axes.

Parameters and activations name their dimensions by logical axes; which mesh axes these are split over is decided here
and nowhere else. Empty: never split. An axis that a mesh lacks counts as one device.
"""

from jax.sharding import PartitionSpec

from joyjax.errors import MeshError

# In the order that `check_mesh` gives them. `ring` and `ulysses` are the two ways to split a sequence. A mesh may have
# them in place of `sequence`, whose devices a rule divides between the two (sharding/attention.py).
MESH_AXES = ("cfg", "data", "sequence", "ring", "ulysses", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("cfg", "data"),
    "sequence": ("sequence", "ring", "ulysses"),
    # parameters and activations of transformers
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vision_heads": ("tensor",),
    "head_width": (),
    "mlp": ("tensor",),
    "modulation": ("tensor",),
    "vocabulary": ("tensor",),
    "patch": (),
    "time": (),
    # the autoencoder: channels are never split, rows over all axes but that of the batch
    "picture": ("data",),
    "height": ("cfg", "sequence", "ring", "ulysses", "tensor"),
    "tile": MESH_AXES,
    "width": (),
    "conv_in": (),
    "conv_out": (),
}

# Replicated where the devices do not divide them: few key heads may serve many query heads, and the vision tower is
# small.
WHOLE_IF_UNEVEN = ("kv_heads", "vision_heads", "vocabulary")
# Split unevenly: the last devices have fewer rows.
PADDED_IF_UNEVEN = ("height",)


def mesh_axes(axis: str, present: tuple[str, ...]) -> tuple[str, ...]:
    """Return the mesh axes, of those `present`, that a logical axis is split over.

    Raises:
        MeshError: for a logical axis that the table does not have.
    """
    if axis not in RULES:
        raise MeshError(f"logical axis {axis!r} has no rule; the table in sharding/rules.py has: {', '.join(RULES)}")
    return tuple(name for name in RULES[axis] if name in present)


def partition_spec(axes: tuple[str | None, ...], present: tuple[str, ...]) -> PartitionSpec:
    """Return the partition spec of an array with these logical axes on a mesh that has the axes `present`.

    Raises:
        MeshError: for a logical axis that the table does not have.
    """
    return PartitionSpec(*(mesh_axes(axis, present) or None if axis is not None else None for axis in axes))
