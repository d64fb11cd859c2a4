"""Access to the networks for all stages of an edit."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from joyjax.dtypes import full_products
from joyjax.families.family import Lengths
from joyjax.kernels.choice import PLAIN, Kernels
from joyjax.layers.weights import Weights
from joyjax.options import CacheRule
from joyjax.runtime.kernel_choice import KernelChooser, step_shape
from joyjax.runtime.load import Pipeline
from joyjax.sampling.predictor import Cached, Predictor, Whole
from joyjax.sharding.place import replicate


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a pipeline, all in memory at once."""

    weights: Mapping[str, Weights]
    configs: Mapping[str, Any]
    mesh: Mesh | None
    dtype: str
    chooser: KernelChooser | None = None

    @classmethod
    def of(cls, pipeline: Pipeline) -> "Networks":
        """Return those of a loaded pipeline."""
        return cls(pipeline.weights, pipeline.parts.configs, pipeline.mesh, pipeline.dtype, pipeline.kernels)

    @contextlib.contextmanager
    def use(self, part: str) -> Iterator[Weights]:
        """Yield a network's weights, which stay on the devices within the context.

        Within it, products have the precision of the pipeline's dtype.
        """
        with full_products(self.dtype):
            yield self.weights[part]

    def kernels(self, part: str, lengths: Sequence[Lengths]) -> Kernels:
        """Return the kernels for a step of a batch, one edit of each of these lengths."""
        if self.chooser is None or not self.chooser.chooses:
            return PLAIN
        return self.chooser.choose(step_shape(self.configs[part], lengths, len(lengths)))

    @contextlib.contextmanager
    def predictor(self, part: str, edits: int, rule: CacheRule | None, kernels: Kernels = PLAIN) -> Iterator[Predictor]:
        """Yield the velocity predictor for a batch of `edits`; with a `rule`, it has a step cache."""
        with self.use(part) as weights:
            weights = dataclasses.replace(weights, kernels=kernels)
            if rule is None:
                yield Whole(weights, edits)
            else:  # without a mesh, a new cache is not committed to a device, as the results of a step are
                yield Cached(weights, edits, rule, lambda cache: replicate(cache, None) if self.mesh is None else cache)
