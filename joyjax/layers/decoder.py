"""The decoder of a vision language model: its layer, its inputs, and the pass through all layers.

Rows with a common prefix may be packed: the model is causal, so the prefix is computed once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from joyjax.layers.activation import swiglu
from joyjax.layers.linear import Embedding, Linear
from joyjax.layers.norm import RMSNorm, rms_norm
from joyjax.layers.parameter import parameter
from joyjax.layers.rope import Rotation, rotate_half_split, rotation_by_frequency
from joyjax.sharding.attention import partitioned_attention
from joyjax.sharding.place import constrain, devices_along

# Queries `[B L N H]`, keys and values `[B L K H]` to the attention's output `[B L N H]`.
Attend = Callable[[Array, Array, Array], Array]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids", "positions", "image_token_index"], meta_fields=["shared"]
)
@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Prompts as tokens, padded at the end to one length.

    `positions` are (time, row, column). `image_token_index` is the index of an image position's token among the tokens
    of all pictures, picture after picture with their padding; -1 for text and padding. Rows may share a picture.
    `shared` is the length of the prefix that all rows have in common, such as everything before the text in the two
    prompts of an edit. It is computed once.
    """

    ids: Int[Any, "B L"]
    positions: Int[Any, "B L 3"]
    image_token_index: Int[Any, "B L"]
    shared: int = 0


class DecoderLayer(nnx.Module):
    """A pre-norm decoder layer: rotated attention with grouped queries, and a gated MLP.

    `qk_norm`: queries and keys are RMS-normalised by head before they are rotated. `qkv_bias`: the maps to queries,
    keys and values have a bias; all others have none.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        mlp_dim: int,
        eps: float,
        qk_norm: bool,
        qkv_bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        def linear(inputs: dict[str, int], outputs: dict[str, int], *, bias: bool = False) -> Linear:
            return Linear(
                tuple(inputs.values()),
                tuple(outputs.values()),
                axes_in=tuple(inputs),
                axes_out=tuple(outputs),
                bias=bias,
                dtype=dtype,
                rngs=rngs,
            )

        embed, hidden = {"embed": width}, {"mlp": mlp_dim}
        q_heads = {"heads": heads, "head_width": head_dim}
        shared_heads = {"kv_heads": kv_heads, "head_width": head_dim}
        self.attention_norm = RMSNorm(width, eps=eps, axis="embed", dtype=dtype, rngs=rngs)
        self.q = linear(embed, q_heads, bias=qkv_bias)
        self.k = linear(embed, shared_heads, bias=qkv_bias)
        self.v = linear(embed, shared_heads, bias=qkv_bias)
        self.q_norm = parameter(rngs, (head_dim,), ("head_width",), dtype) if qk_norm else None
        self.k_norm = parameter(rngs, (head_dim,), ("head_width",), dtype) if qk_norm else None
        self.o = linear(q_heads, embed)
        self.mlp_norm = RMSNorm(width, eps=eps, axis="embed", dtype=dtype, rngs=rngs)
        self.gate, self.up, self.down = linear(embed, hidden), linear(embed, hidden), linear(hidden, embed)
        self.eps = eps

    def __call__(self, x: Float[Array, "B L D"], rotation: Rotation, attend: Attend) -> Float[Array, "B L D"]:
        """Return the updated tokens. `attend` decides which keys a query sees."""
        x = x + self.attention(self.attention_norm(x), rotation, attend)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", "embed")

    @jax.named_scope("attention")
    def attention(self, x: Float[Array, "B L D"], rotation: Rotation, attend: Attend) -> Float[Array, "B L D"]:
        """Attend from every token to those that `attend` shows it."""
        query, key = self.q(x), self.k(x)
        if self.q_norm is not None and self.k_norm is not None:
            query = rms_norm(query, self.q_norm[...], self.eps)
            key = rms_norm(key, self.k_norm[...], self.eps)
        query, key = (rotate_half_split(heads, rotation).astype(x.dtype) for heads in (query, key))
        return self.o(attend(query, key, self.v(x)))

    @jax.named_scope("mlp")
    def mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """A linear map and a gate's SiLU, multiplied, and a linear map back."""
        return self.down(swiglu(self.gate(x), self.up(x)))


def decode(
    embed: Embedding,
    layers: Iterable[DecoderLayer],
    text: TextInputs,
    features: Float[Array, "I M D"] | None = None,
    deepstack: tuple[Float[Array, "I M D"], ...] = (),
    *,
    axis_of_frequency: Sequence[int],
    theta: float,
) -> Float[Array, "B L D"]:
    """Return the output of the last layer, undefined at padding.

    At image positions `features` replace the word embeddings, and `deepstack[n]` is added to the output of layer n.
    Frequency i of the rotation uses the position on axis `axis_of_frequency[i]`.
    """
    rows = text.ids.shape[0]
    # Sharded rows and tokens are not packed: packing would move them between devices.
    shared = text.shared if devices_along("batch") == devices_along("sequence") == 1 else 0
    ids, positions, image_token_index = (
        pack_rows(x, shared) for x in (text.ids, text.positions, text.image_token_index)
    )
    x = embed(ids)
    if features is not None:
        x = jnp.where(image_token_index[..., None] >= 0, _pick(features, image_token_index), x)
    x = constrain(x, "batch", "sequence", "embed")
    rotation = rotation_by_frequency(positions, axis_of_frequency, theta)
    attend = packed_attention(shared, rows)
    for index, layer in enumerate(layers):
        if 0 < index <= len(deepstack):
            x = x + _pick(deepstack[index - 1], image_token_index)
        with jax.named_scope(f"layer_{index}"):
            x = layer(x, rotation, attend)
    return unpack_rows(x, shared, rows)


def pack_rows(x: Shaped[Array, "B L *rest"], shared: int) -> Shaped[Array, "_ _ *rest"]:
    """Concatenate rows, with their common first `shared` tokens once in front: `[1, shared + B·(L - shared)]`."""
    if not shared:
        return x
    return jnp.concatenate([x[:1, :shared], x[:, shared:].reshape(1, -1, *x.shape[2:])], axis=1)


def unpack_rows(x: Shaped[Array, "_ _ *rest"], shared: int, rows: int) -> Shaped[Array, "B L *rest"]:
    """Undo `pack_rows`."""
    if not shared:
        return x
    own = x[:, shared:].reshape(rows, -1, *x.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(x[:, :shared], (rows, shared, *x.shape[2:])), own], axis=1)


def packed_attention(shared: int, rows: int) -> Attend:
    """Return causal attention for a sequence of `pack_rows`: every row attends to the shared tokens and to itself."""

    def attend(
        query: Float[Array, "B L N H"], key: Float[Array, "B L K H"], value: Float[Array, "B L K H"]
    ) -> Float[Array, "B L N H"]:
        if not shared:
            return partitioned_attention(query, key, value, causal=True)
        first = partitioned_attention(query[:, :shared], key[:, :shared], value[:, :shared], causal=True)
        own = query[:, shared:].reshape(rows, -1, *query.shape[2:])
        own = partitioned_attention(own, unpack_rows(key, shared, rows), unpack_rows(value, shared, rows), causal=True)
        return jnp.concatenate([first, own.reshape(1, -1, *own.shape[2:])], axis=1)

    return attend


def _pick(tokens: Float[Array, "I M D"], image_token_index: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Return the picture's token at every image position, zero at all others."""
    picked = jnp.take(tokens.reshape(-1, tokens.shape[-1]), jnp.maximum(image_token_index, 0), axis=0)
    return jnp.where(image_token_index[..., None] >= 0, picked, 0)
