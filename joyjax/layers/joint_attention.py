"""Joint attention of two token streams, image and text, that are sharded over devices.

Every device holds a part of the target's tokens, of the references' and of the text's, valid tokens first and padded
at the end to one size. Without a mesh there is one part.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from joyjax.kernels.choice import Kernel
from joyjax.kernels.joint import join, split
from joyjax.kernels.qk_norm_rope import Rotation, qk_norm_rope
from joyjax.sharding.attention import SequenceMesh, sequence_attention
from joyjax.sharding.place import on_shards

TOKENS = ("batch", "sequence", None)
COUNTS = ("batch", None)
HEADS = ("batch", "sequence", None, "heads", None)
Scales = tuple[Float[Array, " H"], Float[Array, " H"]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tokens of a row are distributed and rotated; the same for every block.

    `img_lengths` and `txt_lengths` are the numbers of valid tokens on each device; None: no padding. `img_select` is
    the modulation of each image token, 0 for the target's and 1 for the references'; None: all have the same.
    """

    mesh: SequenceMesh
    img_rotation: Rotation
    txt_rotation: Rotation | None
    img_lengths: Int[Array, "B n"] | None
    txt_lengths: Int[Array, "B n"] | None
    img_select: Int[Array, "B I"] | None = None


def pad_to_devices(x: Shaped[Array, "B T *rest"], devices: int) -> Shaped[Array, "B U *rest"]:
    """Pad tokens at the end to a multiple of the devices."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % devices)) + ((0, 0),) * (x.ndim - 2))


def lengths_on_devices(
    lengths: Int[Array, " B"] | None, size: int, rows: int, devices: int
) -> Int[Array, "B n"] | None:
    """Return how many of `size` tokens are valid on each device when sharded; None: no padding."""
    if lengths is None and size % devices == 0:
        return None
    each = -(-size // devices)
    valid = jnp.full((rows,), size, jnp.int32) if lengths is None else lengths
    return jnp.clip(valid[:, None] - each * jnp.arange(devices, dtype=jnp.int32), 0, each)


def add_lengths(
    first: Int[Array, "B n"] | None, size: int, second: Int[Array, "B n"] | None, second_size: int
) -> Int[Array, "B n"] | None:
    """Add the valid lengths of two kinds of tokens, of `size` and `second_size` on each device with padding."""
    if first is None and second is None:
        return None
    return (jnp.int32(size) if first is None else first) + (jnp.int32(second_size) if second is None else second)


def join_on_devices(
    first: Shaped[Array, "B T P"],
    second: Shaped[Array, "B S P"],
    first_lengths: Int[Array, "B n"] | None,
    mesh: SequenceMesh,
) -> Shaped[Array, "B I P"]:
    """Append, on every device, its part of `second` to the valid tokens of its part of `first`."""

    def local(first: Array, second: Array, lengths: Array | None) -> Array:
        return join(first, second, _own(lengths, mesh))

    return on_shards(local, (TOKENS, TOKENS, COUNTS), TOKENS)(first, second, first_lengths)


def leading_tokens(x: Float[Array, "B I *rest"], size: int, devices: int) -> Float[Array, "B T *rest"]:
    """Return the first of two joined kinds of tokens, which has `size` tokens in all."""
    parts = x.reshape(x.shape[0], devices, -1, *x.shape[2:])[:, :, : size // devices]
    return parts.reshape(x.shape[0], size, *x.shape[2:])


@jax.named_scope("attention")
def joint_attention(
    img: Float[Array, "B I C N H"],
    txt: Float[Array, "B J C N H"],
    img_scales: Scales,
    txt_scales: Scales,
    layout: Layout,
    query: Float[Array, "B T N H"] | None = None,
    implementation: Kernel = None,
) -> tuple[Float[Array, "B _ N H"], Float[Array, "B _ N H"]]:
    """Attend from both streams to both and return each stream's output; with `query`, attend from it only.

    The axis C of `img` and `txt` holds projected queries, keys and values, or only keys and values where `query` is
    given, which is normalised and rotated already. `implementation` is that of `qk_norm_rope`.
    """

    def local(
        img: Array,
        txt: Array,
        img_scales: Scales,
        txt_scales: Scales,
        img_rotation: Rotation,
        txt_rotation: Rotation | None,
        img_lengths: Array | None,
        txt_lengths: Array | None,
        query: Array | None,
    ) -> tuple[Array, Array]:
        own = _own(img_lengths, layout.mesh)
        parts = qk_norm_rope(
            img,
            txt,
            img_scales,
            txt_scales,
            img_rotation,
            txt_rotation,
            img_lengths=own,
            implementation=implementation,
        )
        *own_query, key, value = parts
        queries = own_query[0] if query is None else query
        lengths = add_lengths(img_lengths, img.shape[1], txt_lengths, txt.shape[1])
        out = sequence_attention(queries, key, value, lengths, layout.mesh)
        return split(out, img.shape[1], own) if query is None else (out, out[:, :0])

    scales, rotation, vectors = ((None,), (None,)), (TOKENS, TOKENS), ("batch", "sequence", "heads", None)
    txt_rotation = rotation if layout.txt_rotation is not None else None
    inputs = (HEADS, HEADS, scales, scales, rotation, txt_rotation, COUNTS, COUNTS, vectors)
    return on_shards(local, inputs, (vectors, vectors))(
        img,
        txt,
        img_scales,
        txt_scales,
        layout.img_rotation,
        layout.txt_rotation,
        layout.img_lengths,
        layout.txt_lengths,
        query,
    )


def _own(lengths: Int[Array, "B n"] | None, mesh: SequenceMesh) -> Int[Array, " B"] | None:
    """Return this device's lengths."""
    return None if lengths is None else jnp.take(lengths, jnp.asarray(mesh.index()), axis=1)
