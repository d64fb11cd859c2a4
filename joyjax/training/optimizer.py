"""The optimiser: Muon for the matrices inside the networks, Adam for everything else.

Muon (Jordan et al., 2024) updates a matrix along its orthogonalised momentum. On these networks it needed minutes where
Adam needed hours. First and last layers, norms, biases and tables use Adam.
"""

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, muon

Parameters = dict[str, Array]  # by dotted path, such as `blocks.3.img.qkv.kernel`

# The input and output axes of a kernel, by the suffix of its path; other axes enumerate separate matrices.
MATRICES = {
    ".qkv.kernel": MuonDimensionNumbers(0, (2, 3)),  # [D, 3, N, H]: queries, keys and values apart
    ".q.kernel": MuonDimensionNumbers(0, (1, 2)),
    ".k.kernel": MuonDimensionNumbers(0, (1, 2)),
    ".v.kernel": MuonDimensionNumbers(0, (1, 2)),
    ".o.kernel": MuonDimensionNumbers((0, 1), 2),
    ".out.kernel": MuonDimensionNumbers((0, 1), 2),
    ".up.kernel": MuonDimensionNumbers(0, 1),
    ".gate.kernel": MuonDimensionNumbers(0, 1),
    ".down.kernel": MuonDimensionNumbers(0, 1),
}
CONVOLUTION = MuonDimensionNumbers((0, 1, 2), 3)  # [h, w, in, out]
INSIDE = ("blocks.", "layers.", "middle.", "encoder.", "decoder.", "merger.", "deepstack.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Rates are peaks: linear warm-up over `warmup` steps, constant, linear decay to 0 over the last `decay` share."""

    steps: int
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    warmup: int = 50
    decay: float = 0.5
    weight_decay: float = 0.01
    clip: float = 1.0


def matrix_axes(path: str, shape: tuple[int, ...]) -> MuonDimensionNumbers | None:
    """Return the matrix axes of a parameter for Muon; None for Adam."""
    if not any(part in path for part in INSIDE):
        return None
    for ending, numbers in MATRICES.items():
        if path.endswith(ending) and len(shape) == len(_axes(numbers)) + (ending == ".qkv.kernel"):
            return numbers
    return CONVOLUTION if path.endswith(".kernel") and len(shape) == 4 else None


def _axes(numbers: MuonDimensionNumbers) -> tuple[int, ...]:
    both = (numbers.reduction_axis, numbers.output_axis)
    return tuple(axis for part in both for axis in ((part,) if isinstance(part, int) else part))


def schedule(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Return the rate by step: warm-up, constant, linear decay to 0."""
    falling = max(1, round(config.decay * config.steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, falling),
        ],
        [config.warmup, max(config.warmup, config.steps - falling)],
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the optimiser of flat parameters."""

    def axes(parameters: dict[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
        # Optax calls this again with the parameters of the other optimiser masked.
        masked = optax.MaskedNode
        return {
            p: None if isinstance(value, masked) else matrix_axes(p, value.shape) for p, value in parameters.items()
        }

    chain = optax.chain(
        optax.clip_by_global_norm(config.clip),
        muon(
            schedule(config, config.muon_rate),
            weight_decay=config.weight_decay,
            adam_learning_rate=schedule(config, config.adam_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=axes,
        ),
    )
    # Optax relies on promotion, such as a Python float to the power of an int32 array.
    standard = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformation(standard(chain.init), standard(chain.update))


def average(mean: Parameters, parameters: Parameters, decay: Array) -> Parameters:
    """Return the updated exponential moving average of the parameters."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), mean, parameters)
