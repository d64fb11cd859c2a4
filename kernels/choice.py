"""The implementation of each operation that a network runs: data in the network, and so in the key of its programs."""

import dataclasses
from typing import Literal

XLA = "xla"
Kernel = Literal["mosaic", "triton"] | None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernel that each operation runs, by the operation's name; None: the plain form, which is left to XLA."""

    layer_norm_scale_shift: Kernel = None
    residual_gate_layer_norm_scale_shift: Kernel = None
    qk_norm_rope: Kernel = None
    layer_norm_scale_shift_select01: Kernel = None
    residual_gate_layer_norm_scale_shift_select01: Kernel = None

    def __str__(self) -> str:
        """Return the choice as text: "xla", or the operations with a kernel, as in "qk_norm_rope=mosaic"."""
        chosen = dataclasses.asdict(self)
        return ", ".join(f"{name}={kernel}" for name, kernel in chosen.items() if kernel is not None) or XLA


# Of a step with one modulation for all image tokens, and of one whose image tokens select one of two.
OPERATIONS = ("layer_norm_scale_shift", "residual_gate_layer_norm_scale_shift", "qk_norm_rope")
SELECTING = ("layer_norm_scale_shift_select01", "residual_gate_layer_norm_scale_shift_select01", "qk_norm_rope")
PLAIN = Kernels()
