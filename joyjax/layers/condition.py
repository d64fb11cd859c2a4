"""What a double-stream transformer is given besides the noisy latents and the time, and where its tokens lie.

Tokens are patches of latent pixels; those of the target, which is being denoised, come first, then those of each
reference.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joyjax.layers.joint_attention import (
    Layout,
    add_lengths,
    join_on_devices,
    lengths_on_devices,
    pad_to_devices,
)
from joyjax.layers.rope import rotation_by_blocks
from joyjax.sharding.attention import SequenceMesh
from joyjax.sharding.place import constrain


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["txt", "txt_lengths", "references", "positions", "target_lengths", "reference_lengths", "txt_start"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Condition:
    """What a prediction is made from, besides the noisy latents and the time.

    A row is one pass of one edit. Sequences are padded at the end to a common size and `*_lengths` say how much of
    each row is valid; None: all of it. `positions` are (item, row, column) of the target's tokens, then of the
    references', padded as these are, with any valid numbers. `txt_start` is the position of a row's first text token on
    all three axes, for networks that rotate text from a given position; None for the others.
    """

    txt: Float[Array, "B J C"]
    txt_lengths: Int[Array, " B"] | None
    references: Float[Array, "B R P"]
    positions: Int[Array, "B I 3"]
    target_lengths: Int[Array, " B"] | None = None
    reference_lengths: Int[Array, " B"] | None = None
    txt_start: Int[Array, " B"] | None = None


def lay_out(
    latents: Float[Array, "B T P"],
    condition: Condition,
    mesh: SequenceMesh,
    *,
    txt_start: Int[Array, " B"] | None,
    widths: Sequence[int],
    theta: float,
) -> tuple[Layout, Float[Array, "B I P"]]:
    """Spread all tokens over the devices; return where they lie, and those of target and references.

    `widths` are the channels that item, row and column rotate in each head. Text counts up from `txt_start` on all
    three axes; None: it is not rotated.
    """
    n, positions = mesh.devices, condition.positions
    rows, targets = latents.shape[:2]
    references, texts = condition.references.shape[1], condition.txt.shape[1]
    txt_rotation = None
    if txt_start is not None:
        txt_positions = (txt_start[:, None] + jnp.arange(texts, dtype=positions.dtype))[:, :, None]
        txt_positions = pad_to_devices(jnp.tile(txt_positions, 3), n)
        txt_rotation = rotation_by_blocks(txt_positions, widths, theta)
    target_lengths = lengths_on_devices(condition.target_lengths, targets, rows, n)
    reference_lengths = lengths_on_devices(condition.reference_lengths, references, rows, n)
    tokens, places = (
        join_on_devices(pad_to_devices(first, n), pad_to_devices(second, n), target_lengths, mesh)
        for first, second in (
            (latents, condition.references),
            # Every device cuts out its own part; left to itself, XLA would spread them before they are taken apart.
            [constrain(part, "batch", None, None) for part in jnp.split(positions, [targets], axis=1)],
        )
    )
    layout = Layout(
        mesh,
        rotation_by_blocks(places, widths, theta),
        txt_rotation,
        add_lengths(target_lengths, -(-targets // n), reference_lengths, -(-references // n)),
        lengths_on_devices(condition.txt_lengths, texts, rows, n),
    )
    return layout, tokens
