"""Measurements that ship with joyjax, for devices where kernels were checked and timed at a model's own shapes.

An entry has the fields of `joyjax.runtime.kernel_cache.Key`, without driver and version of joyjax, and the rows of the
measurement. docs/kernels.md has the figures of other shapes.
"""

from collections.abc import Mapping
from typing import Any


def _chosen(operation: str, xla_us: float, kernel_us: float) -> dict[str, Any]:
    row = {"operation": operation, "kernel": "mosaic", "chosen": True, "reason": ""}
    return row | {"xla_us": xla_us, "kernel_us": kernel_us}


MEASURED: tuple[Mapping[str, Any], ...] = (
    {  # an edit by JoyImage at 1024 × 1024 with one reference, with guidance
        "device": "NVIDIA H100 80GB HBM3",
        "jax": "0.11.2",
        "dtype": "bfloat16",
        "kernel": "mosaic",
        "shape": {
            "rows": 2,
            "images": 8192,
            "texts": 1088,
            "heads": 32,
            "width": 128,
            "channels": 4096,
            "modulations": 1,
        },
        "rows": (
            _chosen("layer_norm_scale_shift", 132.4, 115.3),
            _chosen("residual_gate_layer_norm_scale_shift", 346.1, 252.1),
            _chosen("qk_norm_rope", 830.7, 380.1),
        ),
    },
)
