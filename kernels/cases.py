"""The shapes at which models call the operations, as data for tests, the record of compiled kernels and benchmarks."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from joyjax.dtypes import FLOAT32
from joyjax.kernels import modulate
from joyjax.kernels.choice import OPERATIONS, SELECTING
from joyjax.kernels.qk_norm_rope import qk_norm_rope


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a block: `rows` passes of `images` and `texts` tokens, and one device's `heads` of `width` channels.

    `modulations` is 2 where image tokens select one of two.
    """

    rows: int
    images: int
    texts: int
    heads: int
    width: int
    channels: int
    modulations: int = 1

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations of a step that have kernels. Where image tokens select, the text's norms are left to XLA."""
        return SELECTING if self.modulations == 2 else OPERATIONS


SHAPES = {
    # An edit of 1024² with one reference of that size, both passes of guidance in one batch.
    "joyimage": Shape(rows=2, images=8192, texts=1104, heads=32, width=128, channels=4096),
    # Eight devices with a part of the heads each.
    "joyimage, tensor=8": Shape(rows=2, images=8192, texts=1104, heads=4, width=128, channels=4096),
    # An odd number of tokens of each kind, one pass.
    "joyimage, odd": Shape(rows=1, images=4093, texts=701, heads=32, width=128, channels=4096),
    "qwen-image-edit": Shape(rows=1, images=8424, texts=300, heads=24, width=128, channels=3072),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation as a function of arrays and of `implementation`, and the shapes of its arrays."""

    operation: str
    shape: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def cases(
    shape: str,
    sizes: Shape | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    operations: Iterable[str] | None = None,
) -> list[Case]:
    """Return operations that have kernels, by default all, at one of `SHAPES` or at the sizes given."""
    s = SHAPES[shape] if sizes is None else sizes

    def array(*shape: int, dtype: DTypeLike = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    # Vectors are float32, as `JoyImageStream.modulation` makes them.
    tokens, index = array(s.rows, s.images, s.channels), array(s.rows, s.images, dtype=jnp.int32)
    one, two = array(s.rows, s.channels, dtype=FLOAT32), array(s.rows, 2, s.channels, dtype=FLOAT32)
    table = (array(s.rows, s.images, s.width // 2, dtype=FLOAT32),) * 2
    lengths = array(s.rows, dtype=jnp.int32)

    def heads(parts: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(array(s.rows, count, parts, s.heads, s.width) for count in (s.images, s.texts))

    def joint(img: Any, txt: Any, scales: Any, rotation: Any, lengths: Any, **options: Any) -> Any:
        return qk_norm_rope(img, txt, scales[0], scales[1], rotation, img_lengths=lengths, **options)

    scales = ((array(s.width), array(s.width)),) * 2
    named: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "layer_norm_scale_shift": (modulate.layer_norm_scale_shift, (tokens, one, one)),
        "layer_norm_scale_shift_select01": (modulate.layer_norm_scale_shift_select01, (tokens, two, two, index)),
        "residual_gate_layer_norm_scale_shift": (
            modulate.residual_gate_layer_norm_scale_shift,
            (tokens, tokens, one, one, one),
        ),
        "residual_gate_layer_norm_scale_shift_select01": (
            modulate.residual_gate_layer_norm_scale_shift_select01,
            (tokens, tokens, two, two, two, index),
        ),
        "qk_norm_rope": (joint, (*heads(3), scales, table, lengths)),
    }
    if operations is None:  # with heads split over devices and tokens not, the token norms are those of another case
        operations = named if s.heads * s.width == s.channels else ("qk_norm_rope",)
    return [Case(name, shape, *named[name]) for name in operations]


def draw(arguments: Any, seed: int = 0, longest: int | None = None) -> Any:
    """Return random arrays of these shapes: floats from N(1, 1), integers 0 or 1, lengths from 1 to `longest`.

    Lengths are the integer arrays of one axis.
    """
    leaves, tree = jax.tree.flatten(arguments)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int32 and len(leaf.shape) == 1:
            return jax.random.randint(key, leaf.shape, 1, (longest or 1) + 1)
        if leaf.dtype == jnp.int32:
            return jax.random.randint(key, leaf.shape, 0, 2)
        return 1 + jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(tree, [one(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])
