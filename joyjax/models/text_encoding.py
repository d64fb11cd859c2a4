"""The compiled stage from a prompt, with its pictures, to the hidden states for the transformer."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joyjax.layers.weights import Weights
from joyjax.programs.stage import stage


@stage(static=["length"])
def encode_prompt(
    text_encoder: Weights, text: Any, vision: Any, first: Int[Array, " B"], *, length: int
) -> Float[Array, "B J C"]:
    """Return `length` hidden states of each row, from token `first` on; padding follows a row's end.

    `text` and `vision` are the text encoder's own inputs; `vision` is None for a prompt without pictures.
    """
    hidden = text_encoder.module()(text, vision)
    index = jnp.minimum(first[:, None] + jnp.arange(length, dtype=first.dtype), hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1)
