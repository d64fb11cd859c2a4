"""The description of one component of a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from joyjax.convert.rules import Rule, Shape
from joyjax.convert.source.weights import NOT_QUANTISED, quantisation_method
from joyjax.errors import CheckpointError, ConfigError
from joyjax.layers.stored import Storage, with_storage
from joyjax.layers.weights import Weights
from joyjax.reading import quoted, read_json


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its folder, its configuration, its constructor and its key table.

    `class_names` are the accepted names in model_index.json. `configure` reads the folder's config.json and raises
    ConfigError for what the network does not implement. `rules` and `ignored` (template → reason) are the key table.
    `unused` are the ignored tensors that the reference's classes require, with their shape and the value that export
    writes.
    """

    folder: str
    class_names: tuple[str, ...]
    configure: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., nnx.Module]
    rules: Callable[[Any], tuple[Rule, ...]]
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: Callable[[Any], Mapping[str, tuple[Shape, float]]] = lambda config: {}

    def abstract(self, config: Any, dtype: DTypeLike, storage: Storage = None) -> Weights:
        """Return the network with shapes in place of arrays, which takes no memory.

        `storage` is the form of all storable kernels, or of some by path; None: arrays.
        """
        return with_storage(Weights.of(self.build(config, dtype=dtype, rngs=None)), storage)

    def read_config(self, folder: Path) -> Any:
        """Return the component's configuration in the checkpoint `folder`.

        Raises:
            CheckpointError: if the checkpoint has another class for this component, or config.json cannot be read.
            ConfigError: for a value that the network does not implement.
        """
        self.class_name(folder)
        file = folder / self.folder / "config.json"
        config = read_json(file)
        if method := quantisation_method(config):
            raise ConfigError(f"{file}: quantization_config: the weights are quantised ({method}); {NOT_QUANTISED}")
        return self.configure(config)

    def class_name(self, folder: Path) -> str:
        """Return the class that the checkpoint's model_index.json names for this component, one of `class_names`."""
        index = folder / "model_index.json"
        entry = read_json(index).get(self.folder)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if name not in self.class_names:
            raise CheckpointError(f"{index}: {self.folder} is {quoted(name)}; expected {' or '.join(self.class_names)}")
        return name
