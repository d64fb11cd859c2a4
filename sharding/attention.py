"""Sequence-parallel attention: tokens are sharded over devices; exact for any lengths.

Two methods, which combine. Ulysses (Jacobs et al., 2023): an all-to-all gives every device all tokens and a part of the
heads, and another brings the result back. Ring attention (Liu et al., 2023): keys and values circulate, and every
device attends to the block it holds while the next one arrives. Combined (Fang and Zhao, 2024), neighbours exchange
heads and their groups form the ring.

The rule: Ulysses over the greatest common divisor of devices and heads, the ring over the rest. Per token and block
Ulysses moves four vectors over 1/n of the width each, the ring two over the whole width n - 1 times. The mesh axes
`ring` and `ulysses` set the split by hand.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joyjax.errors import MeshError
from joyjax.kernels.attention import Implementation, attention, attention_and_sum, merge
from joyjax.sharding.place import devices_along
from joyjax.sharding.rules import MESH_AXES, mesh_axes


@dataclasses.dataclass(frozen=True)
class SequenceMesh:
    """The devices that share a sequence: `ring` groups of `ulysses` neighbours each."""

    axes: tuple[str, ...]
    ring: int
    ulysses: int

    @property
    def devices(self) -> int:
        """The number of devices that share a sequence."""
        return self.ring * self.ulysses

    def index(self) -> Int[Array, ""] | int:
        """Return this device's index among them; inside `on_shards`."""
        return jax.lax.axis_index(self.axes) if self.devices > 1 else 0


def sequence_mesh(heads: int) -> SequenceMesh:
    """Return the sequence mesh of the mesh in force, for a network with so many heads.

    Raises:
        MeshError: if the axis `ulysses` does not divide the heads.
    """
    names = jax.sharding.get_abstract_mesh().axis_names
    if list(names) != sorted(names, key=MESH_AXES.index):  # a collective over two axes would go wrong silently
        raise ValueError(f"mesh axes {names} are not in order; joyjax.sharding.mesh.check_mesh puts them so")
    return share_out(dict(jax.sharding.get_abstract_mesh().shape), heads)


def share_out(sizes: Mapping[str, int], heads: int) -> SequenceMesh:
    """Apply the rule to a mesh with axes of these sizes.

    Raises:
        MeshError: if the axis `ulysses` does not divide the heads.
    """
    axes = mesh_axes("sequence", tuple(sizes))
    devices = math.prod(sizes[name] for name in axes)
    own = heads // math.prod(sizes[name] for name in mesh_axes("heads", tuple(sizes)))
    ulysses = math.gcd(devices, own) if "sequence" in sizes else sizes.get("ulysses", 1)
    if own % ulysses:
        fitting = ", ".join(str(n) for n in range(1, own + 1) if own % n == 0)
        raise MeshError(
            f"ulysses={ulysses} does not divide the {own} heads of a device; what fits: {fitting}; the axis ring takes "
            "any size"
        )
    return SequenceMesh(axes, devices // ulysses, ulysses)


def sequence_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    lengths: Int[Array, "B n"] | None,
    mesh: SequenceMesh,
) -> Float[Array, "B T N H"]:
    """Attend from this device's queries to the keys of all devices; called by each inside `on_shards`.

    `lengths[b, k]`: device k's valid keys in row b, which come first among its S; None: all of them.
    """
    if mesh.devices == 1:
        return attention(query, key, value, lengths=None if lengths is None else lengths[:, 0])
    query, key, value = (_to_heads(x, mesh) for x in (query, key, value))
    group = mesh.index() // mesh.ulysses
    totals = None
    if lengths is not None:
        grouped = lengths.reshape(-1, mesh.ring, mesh.ulysses)
        totals = jnp.sum(grouped, axis=-1, dtype=jnp.int32)
        if mesh.ulysses > 1:
            key, value = _compact((key, value), _of(grouped, group))
    if mesh.ring == 1:
        out = attention(query, key, value, lengths=None if totals is None else totals[:, 0])
        return _to_tokens(out, mesh)
    merged = attention_and_sum(query, key, value, lengths=None if totals is None else _of(totals, group))
    to_next_group = [(k, (k + mesh.ulysses) % mesh.devices) for k in range(mesh.devices)]
    for step in range(1, mesh.ring):
        # Independent of the products before it, so XLA overlaps the transfer with them.
        key, value = (jax.lax.ppermute(x, mesh.axes, to_next_group) for x in (key, value))
        count = None if totals is None else _of(totals, (group - step) % mesh.ring)
        merged = merge(merged, attention_and_sum(query, key, value, lengths=count))
    return _to_tokens(merged[0].astype(value.dtype), mesh)


def partitioned_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """Attend as `attention` does, partitioned by XLA; for networks that run once per edit.

    cuDNN supports neither a sharded sequence nor replicated key heads with sharded query heads.
    """
    uneven = key.shape[2] % devices_along("kv_heads") > 0
    unsupported = devices_along("sequence") > 1 or uneven
    implementation: Implementation = "reference" if unsupported else None
    return attention(query, key, value, lengths=lengths, causal=causal, implementation=implementation)


def _of(lengths: Int[Array, "B r ..."], group: Int[Array, ""] | int) -> Int[Array, "B ..."]:
    """Return the lengths of one group of the ring."""
    return jnp.take(lengths, jnp.asarray(group), axis=1)


def _to_heads(x: Float[Array, "B T N H"], mesh: SequenceMesh) -> Float[Array, "B _ _ H"]:
    """Give this device all tokens of its group and a part of the heads."""
    return _exchange(x, mesh, split=2, joined=1)


def _to_tokens(x: Float[Array, "B _ _ H"], mesh: SequenceMesh) -> Float[Array, "B T N H"]:
    return _exchange(x, mesh, split=1, joined=2)


def _exchange(x: Float[Array, "B T N H"], mesh: SequenceMesh, *, split: int, joined: int) -> Float[Array, "B _ _ H"]:
    if mesh.ulysses == 1:
        return x
    groups = [list(range(first, first + mesh.ulysses)) for first in range(0, mesh.devices, mesh.ulysses)]
    return jax.lax.all_to_all(
        x, mesh.axes, split, joined, axis_index_groups=groups if mesh.ring > 1 else None, tiled=True
    )


def _compact(arrays: tuple[Array, ...], lengths: Int[Array, "B u"]) -> tuple[Array, ...]:
    """Move the valid tokens of `u` equal pieces, which come first in each piece, to the front of each row."""
    rows, pieces = lengths.shape
    position = jnp.arange(arrays[0].shape[1] // pieces)
    padding = (position >= lengths[:, :, None]).reshape(rows, -1)
    order = jnp.argsort(padding, axis=1, stable=True)
    return tuple(jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in arrays)
