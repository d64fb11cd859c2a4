"""Qwen2.5-VL (Bai et al., 2025) as a text encoder: a prompt, with or without pictures, becomes one vector per token.

The output is that of the last decoder layer after the final norm. The LM head is not part of this network. The vision
tower is, unless the configuration is read without it: for models that are given no pictures.
Source: Qwen2_5_VLModel in Transformers' modeling_qwen2_5_vl.py.
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
from joyjax.layers.norm import RMSNorm
from joyjax.models.qwen2_5_vl_vision import VisionConfig, VisionTower, WindowedInputs
from joyjax.models.qwen3_vl_vision import check_positive, flatten_rope

TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
# Keys of the text model without effect here. The window keys apply only with `use_sliding_window`, which must be off.
IGNORED = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache"),
    *("initializer_range", "max_position_embeddings", "tie_word_embeddings", "sliding_window", "max_window_layers"),
)
ROPE = ("rope_scaling", "rope_parameters")  # json objects that `flatten_rope` lifts; anything else is refused by name


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text model's part of the text encoder's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any], where: str = "text_config") -> "TextConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        config = read_config(cls, raw, where=where, fixed=FIXED, ignored=(*IGNORED, *TOKENS, "architectures", *CHECKED))
        check_positive(dataclasses.replace(config, mrope_section=()), where)
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {config.hidden_size} is not divisible by "
                f"num_attention_heads {config.num_attention_heads}"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {config.num_attention_heads} is not divisible by "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if raw.get("head_dim") not in (None, config.head_dim):
            raise ConfigError(
                f"{where}: head_dim is {raw['head_dim']!r:.200}; expected hidden_size / num_attention_heads, "
                f"{config.head_dim}"
            )
        section, frequencies = config.mrope_section, config.head_dim // 2
        if config.head_dim % 2 or len(section) != 3 or min(section) < 0 or sum(section) != frequencies:
            raise ConfigError(
                f"{where}: mrope_section {list(section)} does not share out the {frequencies} frequencies of a head of "
                f"width {config.head_dim} to time, row and column"
            )
        kinds = raw.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * config.num_hidden_layers:
            raise ConfigError(
                f"{where}: layer_types is {kinds!r:.200}; this version of joyjax implements 'full_attention', in each "
                f"of {config.num_hidden_layers} layers"
            )
        return config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def axis_of_frequency(self) -> tuple[int, ...]:
        """The position axis of each frequency: time (0) for the first chunk, then row (1), then column (2)."""
        return tuple(np.repeat(np.arange(3), self.mrope_section).tolist())


FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "model_type": ("qwen2_5_vl_text",),
    "rope_type": ("default", "mrope"),  # the second is an older name of the first
    "type": ("default", "mrope"),
    "use_sliding_window": (False, None),
}
CHECKED = ("head_dim", "layer_types")
# The text model's keys at the top level, in files that Transformers 4 wrote.
FLAT = {
    *(field.name for field in dataclasses.fields(TextConfig)),
    *FIXED.keys() - {"model_type"},
    *IGNORED,
    *CHECKED,
    *ROPE,
}


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
    """The text encoder's config.json. `vision` is None for a text encoder without the vision tower."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def with_vision(cls, raw: Mapping[str, Any], where: str = "text_encoder/config.json") -> "Qwen25VLConfig":
        """Read the json object as `from_transformers` does, with the vision tower's part of it."""
        vision = raw.get("vision_config")
        if not isinstance(vision, Mapping):
            raise ConfigError(f"{where}: vision_config is {vision!r:.200}; expected a json object")
        read = VisionConfig.from_transformers(vision, f"{where}: vision_config")
        config = dataclasses.replace(cls.from_transformers(raw, where), vision=read)
        if read.out_hidden_size != config.text.hidden_size:
            raise ConfigError(
                f"{where}: the vision tower's out_hidden_size {read.out_hidden_size} is not the text's "
                f"hidden_size {config.text.hidden_size}"
            )
        return config

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any], where: str = "text_encoder/config.json") -> "Qwen25VLConfig":
        """Read the json object without the vision tower; raises ConfigError for what this network does not implement.

        The text model's keys are at the top level, in `text_config`, or in both places with equal values.
        """
        nested = raw.get("text_config")
        if not isinstance(nested, Mapping | None):
            raise ConfigError(f"{where}: text_config is {nested!r:.200}; expected a json object")
        everything = flatten_rope(raw)
        flat = {key: value for key, value in everything.items() if key in FLAT}
        inner = flatten_rope(nested or {})
        for key in TextConfig.__dataclass_fields__:
            if key in flat and key in inner and _plain(flat[key]) != _plain(inner[key]):
                raise ConfigError(
                    f"{where}: {key} is {flat[key]!r:.200}, but {inner[key]!r:.200} in text_config; which is right?"
                )
        text = TextConfig.from_transformers({**flat, **inner}, where if nested is None else f"{where}: text_config")
        rest = {key: value for key, value in everything.items() if key not in FLAT and key != "text_config"}
        return read_config(
            cls,
            {**rest, "text_config": text},
            where=where,
            fixed={"model_type": ("qwen2_5_vl",)},
            ignored=("architectures", "transformers_version", "vision_config", "video_token_id", "vision_token_id"),
            renamed={"text": "text_config"},
            optional={"vision": None},
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class LanguageModel(nnx.Module):
    """The decoder with its final norm, without the LM head."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def layer() -> DecoderLayer:
            return DecoderLayer(
                width=config.hidden_size,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                mlp_dim=config.intermediate_size,
                eps=config.rms_norm_eps,
                qk_norm=False,
                qkv_bias=True,
                dtype=dtype,
                rngs=rngs,
            )

        self.config = config
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, axes=("vocabulary", "embed"), dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([layer() for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, axis="embed", dtype=dtype, rngs=rngs)

    def __call__(self, text: TextInputs, features: Float[Array, "I M D"] | None = None) -> Float[Array, "B L D"]:
        """Return the normalised output of the last layer, undefined at padding.

        At image positions `features` replace the word embeddings.
        """
        config = self.config
        hidden = decode(
            self.embed,
            self.layers,
            text,
            features,
            axis_of_frequency=config.axis_of_frequency,
            theta=config.rope_theta,
        )
        return self.norm(hidden)


class Qwen25VL(nnx.Module):
    """The text encoder: the decoder and, unless the configuration has none, the vision tower whose tokens it reads."""

    def __init__(self, config: Qwen25VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.visual = None if config.vision is None else VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.language = LanguageModel(config.text, dtype=dtype, rngs=rngs)

    def __call__(self, text: TextInputs, vision: WindowedInputs | None = None) -> Float[Array, "B L D"]:
        """Return one vector per token: the last layer's output after the final norm."""
        if vision is None:
            return self.language(text)
        if self.visual is None:
            raise ValueError("this text encoder was built without its vision tower")
        return self.language(text, self.visual(vision))
