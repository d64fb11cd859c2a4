"""Qwen3-VL (Bai et al., 2025) as a text encoder: a prompt with pictures in it becomes one vector per token.

The output is that of the last decoder layer, before the final norm. Final norm and LM head are not part of this
network.
Source: Qwen3VLModel in Transformers' modeling_qwen3_vl.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.config import read_config
from joyjax.errors import ConfigError
from joyjax.layers.decoder import DecoderLayer, TextInputs, decode
from joyjax.layers.linear import Embedding
from joyjax.models.qwen3_vl_vision import VisionConfig, VisionInputs, VisionTower, check_positive, flatten_rope


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
        """The position axis of each frequency: time (0), row (1), column (2), time, row, column, … and time.

        Rows and columns take every third frequency up to their share of `mrope_section`; time takes the rest.
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


class LanguageModel(nnx.Module):
    """The decoder, without its final norm and the LM head."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, axes=("vocabulary", "embed"), dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([_layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self,
        text: TextInputs,
        features: Float[Array, "I M D"] | None = None,
        deepstack: tuple[Float[Array, "I M D"], ...] = (),
    ) -> Float[Array, "B L D"]:
        """Return the output of the last layer, undefined at padding.

        At image positions `features` replace the word embeddings, and `deepstack[n]` is added to the output of layer n.
        """
        config = self.config
        return decode(
            self.embed,
            self.layers,
            text,
            features,
            deepstack,
            axis_of_frequency=config.axis_of_frequency,
            theta=config.rope_theta,
        )


def _layer(config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> DecoderLayer:
    return DecoderLayer(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp_dim=config.intermediate_size,
        eps=config.rms_norm_eps,
        qk_norm=True,
        qkv_bias=False,
        dtype=dtype,
        rngs=rngs,
    )


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
