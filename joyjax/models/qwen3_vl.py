"""Qwen3-VL (Bai et al., 2025) as a text encoder: a prompt with pictures in it becomes one vector per token.

What conditions the diffusion is the output of the last decoder layer. The final norm and the vocabulary head, which
would make words of it, are not part of this network.
Source: Qwen3VLModel in Transformers' modeling_qwen3_vl.py.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from joyjax.config import read_config
from joyjax.dtypes import FLOAT32
from joyjax.errors import ConfigError
from joyjax.layers.linear import Embedding, Linear
from joyjax.layers.norm import RMSNorm, rms_norm
from joyjax.layers.parameter import parameter
from joyjax.layers.rope import Rotation, rotate_half_split, rotation_by_frequency
from joyjax.models.qwen3_vl_vision import VisionConfig, VisionInputs, VisionTower, check_positive, flatten_rope
from joyjax.sharding.attention import partitioned_attention
from joyjax.sharding.place import constrain, devices_along


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The `text_config` of the text encoder's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any], where: str = "text_config") -> "TextConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        config = read_config(
            cls,
            flatten_rope(raw),
            where=where,
            fixed={
                "hidden_act": ("silu",),
                "attention_bias": (False,),
                "model_type": ("qwen3_vl_text",),
                "rope_type": ("default",),
                "mrope_interleaved": (True,),
            },
            ignored=(
                *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"),
                *("initializer_range", "max_position_embeddings", "tie_word_embeddings", "use_cache"),
            ),
        )
        check_positive(config, where)
        if config.num_attention_heads % config.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {config.num_attention_heads} is not divisible by "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        section, frequencies = config.mrope_section, config.head_dim // 2
        if len(section) != 3 or section != tuple(map(config.axis_of_frequency.count, range(3))):
            raise ConfigError(
                f"{where}: mrope_section {list(section)} does not share out the {frequencies} frequencies of a head of "
                f"width {config.head_dim} to time, row and column"
            )
        return config

    @property
    def axis_of_frequency(self) -> tuple[int, ...]:
        """The axis whose position turns each frequency: time (0), row (1), column (2), time, row, column, … and time.

        Rows and columns take every third until each has had its share; the rest is time's.
        """
        axes = np.zeros(self.head_dim // 2, int)
        for axis in (1, 2):
            axes[axis : 3 * self.mrope_section[axis] : 3] = axis
        return tuple(axes.tolist())


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """The text encoder's config.json."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any], where: str = "text_encoder/config.json") -> "Qwen3VLConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        text, vision = (_section(raw, name, where) for name in ("text_config", "vision_config"))
        sections = {
            "text_config": TextConfig.from_transformers(text, f"{where}: text_config"),
            "vision_config": VisionConfig.from_transformers(vision, f"{where}: vision_config"),
        }
        config = read_config(
            cls,
            {**raw, **sections},
            where=where,
            fixed={"model_type": ("qwen3_vl",)},
            ignored=(
                *("architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings"),
                "video_token_id",
            ),
            renamed={"text": "text_config", "vision": "vision_config"},
        )
        if config.vision.out_hidden_size != config.text.hidden_size:
            raise ConfigError(
                f"{where}: the vision tower's out_hidden_size {config.vision.out_hidden_size} is not the text's "
                f"hidden_size {config.text.hidden_size}"
            )
        if len(config.vision.deepstack_visual_indexes) > config.text.num_hidden_layers:
            raise ConfigError(
                f"{where}: deepstack_visual_indexes {list(config.vision.deepstack_visual_indexes)} are more than the "
                f"text's {config.text.num_hidden_layers} layers"
            )
        return config


def _section(raw: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = raw.get(name) if isinstance(raw, Mapping) else None
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: {name} is {section!r}; expected a json object")
    return section


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids", "positions", "image_token_index"], meta_fields=["shared"]
)
@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Prompts as tokens, padded at the end to one length.

    `positions` are (time, row, column). `image_token_index` is, at an image place, the number of its token among
    all pictures' tokens, padding counted, picture after picture; -1 for text and padding. Rows may share a picture.
    `shared`: so many first tokens are the same in all rows, as those of both prompts of an edit are up to their text.
    They see nothing behind them, so they are computed once.
    """

    ids: Int[Any, "B L"]
    positions: Int[Any, "B L 3"]
    image_token_index: Int[Any, "B L"]
    shared: int = 0


class DecoderLayer(nnx.Module):
    """A pre-norm decoder layer: causal attention with grouped queries, normalised and rotated by head; a gated MLP."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def linear(inputs: dict[str, int], outputs: dict[str, int]) -> Linear:
            return Linear(
                tuple(inputs.values()),
                tuple(outputs.values()),
                axes_in=tuple(inputs),
                axes_out=tuple(outputs),
                bias=False,
                dtype=dtype,
                rngs=rngs,
            )

        width, hidden = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        heads = {"heads": config.num_attention_heads, "head_width": config.head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, "head_width": config.head_dim}
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, axis="embed", dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = linear(width, heads), linear(width, kv_heads), linear(width, kv_heads)
        self.q_norm = parameter(rngs, (config.head_dim,), ("head_width",), dtype)
        self.k_norm = parameter(rngs, (config.head_dim,), ("head_width",), dtype)
        self.o = linear(heads, width)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, axis="embed", dtype=dtype, rngs=rngs)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)
        self.eps = config.rms_norm_eps

    def __call__(
        self, x: Float[Array, "B L D"], rotation: Rotation, shared: int = 0, rows: int = 1
    ) -> Float[Array, "B L D"]:
        """Return the tokens, updated; in the order of `pack_rows` where they are those of `rows` rows."""
        y = self.attention_norm(x)
        query = rotate_half_split(rms_norm(self.q(y), self.q_norm[...], self.eps), rotation).astype(x.dtype)
        key = rotate_half_split(rms_norm(self.k(y), self.k_norm[...], self.eps), rotation).astype(x.dtype)
        x = x + self.o(_attend(query, key, self.v(y), shared, rows))
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", "embed")

    def mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """SwiGLU (Shazeer, 2020): the gate's SiLU times a second map, and back; the activation is float32."""
        hidden = jax.nn.silu(self.gate(x).astype(FLOAT32)) * self.up(x).astype(FLOAT32)
        return self.down(hidden.astype(x.dtype))


class LanguageModel(nnx.Module):
    """The decoder, without the norm and the vocabulary head at its end."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, axes=("vocabulary", "embed"), dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self,
        text: TextInputs,
        features: Float[Array, "I M D"] | None = None,
        deepstack: tuple[Float[Array, "I M D"], ...] = (),
    ) -> Float[Array, "B L D"]:
        """Return the output of the last layer; it has no meaning at padding.

        At image places `features` stand in for the word embeddings, and `deepstack[n]` is added to the output of layer
        n on its way to the next.
        """
        rows = text.ids.shape[0]
        # Rows and tokens that are spread over devices stay as they are: packed, they would have to be moved.
        shared = text.shared if devices_along("batch") == devices_along("sequence") == 1 else 0
        ids, positions, image_token_index = (
            pack_rows(x, shared) for x in (text.ids, text.positions, text.image_token_index)
        )
        x = self.embed(ids)
        if features is not None:
            x = jnp.where(image_token_index[..., None] >= 0, _pick(features, image_token_index), x)
        x = constrain(x, "batch", "sequence", "embed")
        rotation = rotation_by_frequency(positions, self.config.axis_of_frequency, self.config.rope_theta)
        for index, layer in enumerate(self.layers):
            if 0 < index <= len(deepstack):
                x = x + _pick(deepstack[index - 1], image_token_index)
            x = layer(x, rotation, shared, rows)
        return unpack_rows(x, shared, rows)


def pack_rows(x: Shaped[Array, "B L *rest"], shared: int) -> Shaped[Array, "_ _ *rest"]:
    """Put rows behind one another, their first `shared` tokens once in front: `[1, shared + B·(L - shared)]`."""
    if not shared:
        return x
    return jnp.concatenate([x[:1, :shared], x[:, shared:].reshape(1, -1, *x.shape[2:])], axis=1)


def unpack_rows(x: Shaped[Array, "_ _ *rest"], shared: int, rows: int) -> Shaped[Array, "B L *rest"]:
    """Undo `pack_rows`."""
    if not shared:
        return x
    own = x[:, shared:].reshape(rows, -1, *x.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(x[:, :shared], (rows, shared, *x.shape[2:])), own], axis=1)


def _attend(
    query: Float[Array, "B L N H"], key: Float[Array, "B L K H"], value: Float[Array, "B L K H"], shared: int, rows: int
) -> Float[Array, "B L N H"]:
    """Attend causally, every row of a packed sequence to the shared tokens and to itself."""
    if not shared:
        return partitioned_attention(query, key, value, causal=True)
    first = partitioned_attention(query[:, :shared], key[:, :shared], value[:, :shared], causal=True)
    own = query[:, shared:].reshape(rows, -1, *query.shape[2:])
    own = partitioned_attention(own, unpack_rows(key, shared, rows), unpack_rows(value, shared, rows), causal=True)
    return jnp.concatenate([first, own.reshape(1, -1, *own.shape[2:])], axis=1)


def _pick(tokens: Float[Array, "I M D"], image_token_index: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Return the picture's token at every image place, zero at all others."""
    picked = jnp.take(tokens.reshape(-1, tokens.shape[-1]), jnp.maximum(image_token_index, 0), axis=0)
    return jnp.where(image_token_index[..., None] >= 0, picked, 0)


class Qwen3VL(nnx.Module):
    """The text encoder: the vision tower and the decoder that reads its tokens."""

    def __init__(self, config: Qwen3VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.visual = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.language = LanguageModel(config.text, dtype=dtype, rngs=rngs)

    def __call__(self, text: TextInputs, vision: VisionInputs | None = None) -> Float[Array, "B L D"]:
        """Return one vector per token: the last layer's output, before the final norm."""
        if vision is None:
            return self.language(text)
        features, deepstack = self.visual(vision)
        return self.language(text, features, deepstack)
