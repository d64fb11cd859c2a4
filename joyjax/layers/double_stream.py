"""The double-stream block: image and text have weights of their own and meet in joint attention (Esser et al., 2024).

Modulation is an argument, since families compute it in different ways: `[B, K, 6, D]`, where the six are shift, scale
and gate of the attention, then shift, scale and gate of the MLP. K is 2 where every image token selects one of two
modulations by `Layout.img_select`; the operations select, so no vector is expanded to tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from joyjax.kernels.choice import Kernel
from joyjax.kernels.modulate import (
    layer_norm_scale_shift,
    layer_norm_scale_shift_select01,
    residual_gate,
    residual_gate_layer_norm_scale_shift,
    residual_gate_layer_norm_scale_shift_select01,
    residual_gate_select01,
)
from joyjax.kernels.qk_norm_rope import norm_rope
from joyjax.layers.activation import gelu
from joyjax.layers.joint_attention import Layout, Scales, joint_attention, leading_tokens
from joyjax.layers.linear import Linear
from joyjax.layers.parameter import parameter
from joyjax.layers.weights import TakesKernels
from joyjax.sharding.place import constrain, on_shards

MODULATIONS = 6
HEAD_AXES = ("heads", "head_width")
TOKENS, VECTOR = ("batch", "sequence", "embed"), ("batch", "embed")
VECTORS, SELECT = ("batch", None, "embed"), ("batch", "sequence")
Select = Int[Array, "B L"] | None  # the modulation of each token, 0 or 1; None: all have the same


class Projections(nnx.Module):
    """Queries, keys and values by one linear map each, stacked: for checkpoints with three separate kernels."""

    def __init__(self, width: int, heads: int, head_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def linear() -> Linear:
            return Linear(
                (width,),
                (heads, head_dim),
                axes_in=("embed",),
                axes_out=HEAD_AXES,
                dtype=dtype,
                rngs=rngs,
                storable=True,
            )

        self.q, self.k, self.v = linear(), linear(), linear()

    def __call__(self, x: Float[Array, "B L D"], start: int = 0, stop: int | None = None) -> Float[Array, "B L C N H"]:
        """Return projections `start` to `stop`, as a fused `Linear` with an output axis of three does."""
        return jnp.stack([linear(x) for linear in (self.q, self.k, self.v)[start:stop]], axis=2)


class Stream(TakesKernels):
    """One stream's half of a block: its projections to and from attention, and its MLP.

    A kernel runs on the tokens of each device; the plain forms are left to XLA's partitioner.

    `fused`: queries, keys and values have one kernel; otherwise one each.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_dim: int,
        mlp_dim: int,
        fused: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        def linear(
            inputs: tuple[int, ...],
            outputs: tuple[int, ...],
            axes_in: tuple[str | None, ...],
            axes_out: tuple[str | None, ...],
        ) -> Linear:
            return Linear(inputs, outputs, axes_in=axes_in, axes_out=axes_out, dtype=dtype, rngs=rngs, storable=True)

        if fused:
            self.qkv = linear((width,), (3, heads, head_dim), ("embed",), (None, *HEAD_AXES))
        else:
            self.qkv = Projections(width, heads, head_dim, dtype=dtype, rngs=rngs)
        self.q_norm = parameter(rngs, (head_dim,), ("head_width",), dtype)
        self.k_norm = parameter(rngs, (head_dim,), ("head_width",), dtype)
        self.out = linear((heads, head_dim), (width,), HEAD_AXES, ("embed",))
        self.up = linear((width,), (mlp_dim,), ("embed",), ("mlp",))
        self.down = linear((mlp_dim,), (width,), ("mlp",), ("embed",))

    @property
    def scales(self) -> Scales:
        """The weights of the query norm and of the key norm."""
        return self.q_norm[...], self.k_norm[...]

    @jax.named_scope("mlp")
    def mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Two linear maps with a tanh-approximated GELU between."""
        hidden = constrain(self.up(x), "batch", "sequence", "mlp")
        return self.down(gelu(hidden))

    @jax.named_scope("norm")
    def normed(
        self, x: Float[Array, "B L D"], modulation: Float[Array, "B K 6 D"], select: Select = None
    ) -> Float[Array, "B L D"]:
        """Return the modulated norm, the input of attention."""
        kernels = self.kernels
        if select is None:
            shift, scale = modulation[:, 0, 0], modulation[:, 0, 1]
            inputs: tuple[Any, ...] = TOKENS, VECTOR, VECTOR
            return _run(layer_norm_scale_shift, kernels.layer_norm_scale_shift, inputs, TOKENS)(x, scale, shift)
        shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        inputs = TOKENS, VECTORS, VECTORS, SELECT
        run = _run(layer_norm_scale_shift_select01, kernels.layer_norm_scale_shift_select01, inputs, TOKENS)
        return run(x, scale, shift, select)

    def finish(
        self,
        x: Float[Array, "B L D"],
        attended: Float[Array, "B L N H"],
        modulation: Float[Array, "B K 6 D"],
        select: Select = None,
    ) -> Float[Array, "B L D"]:
        """Add the gated attention output, then the gated MLP."""
        kernels, tokens = self.kernels, (x, self.out(attended))
        if select is None:
            gate1, shift2, scale2, gate2 = (modulation[:, 0, n] for n in range(2, MODULATIONS))
            kernel = kernels.residual_gate_layer_norm_scale_shift
            inputs: tuple[Any, ...] = TOKENS, TOKENS, VECTOR, VECTOR, VECTOR
            run = _run(residual_gate_layer_norm_scale_shift, kernel, inputs, (TOKENS, TOKENS))
            x, y = run(*tokens, gate1, scale2, shift2)
            x = residual_gate(x, self.mlp(y), gate2)
        else:
            gate1, shift2, scale2, gate2 = (modulation[:, :, n] for n in range(2, MODULATIONS))
            kernel = kernels.residual_gate_layer_norm_scale_shift_select01
            inputs = TOKENS, TOKENS, VECTORS, VECTORS, VECTORS, SELECT
            run = _run(residual_gate_layer_norm_scale_shift_select01, kernel, inputs, (TOKENS, TOKENS))
            x, y = run(*tokens, gate1, scale2, shift2, select)
            x = residual_gate_select01(x, self.mlp(y), gate2, select)
        return constrain(x, "batch", "sequence", "embed")


def _run(function: Callable[..., Any], kernel: Kernel, inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """Return an operation with its kernel on the tokens of each device; without one, it is left to the partitioner."""
    if kernel is None:
        return function
    return on_shards(functools.partial(function, implementation=kernel), inputs, outputs)


class Block(nnx.Module):
    """Modulated norms, joint attention over [image, text], gated residuals, MLPs."""

    def __init__(self, img: Stream, txt: Stream):
        self.img, self.txt = img, txt

    def __call__(
        self,
        img: Float[Array, "B I D"],
        txt: Float[Array, "B J D"],
        img_mod: Float[Array, "B K 6 D"],
        txt_mod: Float[Array, "B 1 6 D"],
        layout: Layout,
    ) -> tuple[Float[Array, "B I D"], Float[Array, "B J D"]]:
        """Return both updated streams."""
        img_qkv = self.img.qkv(self.img.normed(img, img_mod, layout.img_select))
        txt_qkv = self.txt.qkv(self.txt.normed(txt, txt_mod))
        img_found, txt_found = joint_attention(
            img_qkv, txt_qkv, self.img.scales, self.txt.scales, layout, implementation=self.img.kernels.qk_norm_rope
        )
        img = self.img.finish(img, img_found, img_mod, layout.img_select)
        return img, self.txt.finish(txt, txt_found, txt_mod)

    def last(
        self,
        img: Float[Array, "B I D"],
        txt: Float[Array, "B J D"],
        img_mod: Float[Array, "B K 6 D"],
        txt_mod: Float[Array, "B 1 6 D"],
        layout: Layout,
        targets: int,
    ) -> Float[Array, "B T D"]:
        """Return the first `targets` image tokens only; all other tokens contribute only keys and values.

        Of two modulations, the target's is the first.
        """
        img_normed, txt_normed = self.img.normed(img, img_mod, layout.img_select), self.txt.normed(txt, txt_mod)
        img_kv, txt_kv = self.img.qkv(img_normed, 1), self.txt.qkv(txt_normed, 1)
        target = functools.partial(leading_tokens, size=targets, devices=layout.mesh.devices)
        cos, sin = layout.img_rotation
        query = self.img.qkv(target(img_normed), 0, 1)[:, :, 0]
        query = norm_rope(query, self.img.scales[0], (target(cos), target(sin)))
        found, _ = joint_attention(
            img_kv, txt_kv, self.img.scales, self.txt.scales, layout, query, self.img.kernels.qk_norm_rope
        )
        return self.img.finish(target(img), found, img_mod)


@dataclasses.dataclass(frozen=True)
class FirstBlockOutput:
    """The state of a double-stream transformer after its embeddings and first block.

    `before` and `img` are the image tokens before and after that block; `targets` is the number of the target's, with
    padding. `temb` is the time embedding, which the other blocks and the head need.
    """

    before: Float[Array, "B I D"]
    img: Float[Array, "B I D"]
    txt: Float[Array, "B J D"]
    temb: Float[Array, "B ..."]
    layout: Layout
    targets: int

    def target(self) -> Float[Array, "B U D"]:
        """Return the target's tokens after the first block."""
        return leading_tokens(self.img, size=self.targets, devices=self.layout.mesh.devices)

    def target_before(self) -> Float[Array, "B U D"]:
        """Return the target's tokens before the first block."""
        return leading_tokens(self.before, size=self.targets, devices=self.layout.mesh.devices)
