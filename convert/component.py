"""What the rest of the program must know of one component of a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from joyjax.convert.rules import Rule
from joyjax.layers.weights import Weights


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its folder, its configuration, how to build it and where its tensors go.

    `class_names` are the accepted names in model_index.json. `configure` reads the folder's config.json and raises
    ConfigError for what the network does not implement. `rules` and `ignored` (template → reason) are the key table.
    """

    folder: str
    class_names: tuple[str, ...]
    configure: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., nnx.Module]
    rules: Callable[[Any], tuple[Rule, ...]]
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def abstract(self, config: Any, dtype: DTypeLike) -> Weights:
        """Return the network with shapes in place of arrays; costs no memory at any size."""
        return Weights.of(nnx.eval_shape(lambda: self.build(config, dtype=dtype, rngs=nnx.Rngs(0))))
