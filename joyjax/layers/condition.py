"""The condition of a double-stream transformer, and the layout of its tokens on devices.

Tokens are patches of latent pixels; those of the target, which is being denoised, come first, then those of each
reference.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

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
    """The inputs of a prediction besides the noisy latents and the time.

    A row is one pass of one edit. Sequences are padded at the end to a common size; `*_lengths` are the valid lengths
    of each row, None where all of it is valid. `positions` are (item, row, column) of the target's tokens, then of the
    references', padded likewise with any valid position. `txt_start` is the position of a row's first text token on all
    three axes, for networks that rotate text from a given position; None for the others.
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
    select: bool = False,
) -> tuple[Layout, Float[Array, "B I P"]]:
    """Shard all tokens over the devices; return their layout, and the joined tokens of target and references.

    `widths` are the channels of each head that item, row and column rotate. Text positions count up from `txt_start` on
    all three axes; None: text is not rotated. `select`: image tokens select one of two modulations, the target's 0 and
    the references' 1.
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

    def joined(first: Shaped[Array, "B T P"], second: Shaped[Array, "B R P"]) -> Shaped[Array, "B I P"]:
        return join_on_devices(pad_to_devices(first, n), pad_to_devices(second, n), target_lengths, mesh)

    tokens = joined(latents, condition.references)
    # Replicated, so every device slices its own part; XLA would otherwise shard them before the split.
    positions = joined(*(constrain(part, "batch", None, None) for part in jnp.split(positions, [targets], axis=1)))
    img_select = None
    if select:
        kinds = (jnp.full((rows, size, 1), kind, jnp.int32) for kind, size in enumerate((targets, references)))
        img_select = joined(*(constrain(kind, "batch", None, None) for kind in kinds))[:, :, 0]
    layout = Layout(
        mesh,
        rotation_by_blocks(positions, widths, theta),
        txt_rotation,
        add_lengths(target_lengths, -(-targets // n), reference_lengths, -(-references // n)),
        lengths_on_devices(condition.txt_lengths, texts, rows, n),
        img_select,
    )
    return layout, tokens
