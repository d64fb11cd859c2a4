"""Helpers of the Mosaic GPU kernels, for the interfaces of both JAX 0.10.2 and the newest version.

Mosaic GPU is imported only where it is used. One Pallas thread is a warpgroup, 128 CUDA threads; layouts map values to
these. Kernels load directly from global memory, 16 bytes a thread where possible, read each value once, and rely on
several blocks per multiprocessor to hide the latency.
"""

import inspect
from typing import Any

from joyjax.kernels.dispatch import interpreted

THREADS = 128
LOAD_BYTES = 16  # the widest load of a thread


def call(body: Any, out_type: Any, grid: dict[str, int], *arguments: Any) -> Any:
    """Run a body over a grid of named axes, on refs of the arguments and of the results."""
    from jax.experimental.pallas import mosaic_gpu

    # Barriers around stores are for memory that is both read and written; there is none here.
    parameters = mosaic_gpu.CompilerParams(
        unsafe_no_auto_barriers=True, lowering_semantics=mosaic_gpu.LoweringSemantics.Warpgroup
    )
    kernel = mosaic_gpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=parameters,
        **({"interpret": _interpreter()} if interpreted() else {}),
    )
    return kernel(*arguments)


def load(ref: Any, layout: Any) -> Any:
    """Read a whole ref into registers of this layout."""
    from jax.experimental.pallas import mosaic_gpu

    if interpreted():  # 0.10.2 has no layouts there
        return ref[...]
    index = inspect.signature(mosaic_gpu.load).parameters.get("idx")  # needed in 0.10.2, deprecated in 0.11
    given = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
    return mosaic_gpu.load(ref, *given, layout=layout, optimized=False)  # not every layout has an optimized load


def strided(width: int, itemsize: int) -> Any:
    """Return the layout of one vector over all threads, by the widest loads that its width divides into."""
    from jax.experimental.pallas import mosaic_gpu

    widest = LOAD_BYTES // itemsize
    vector = next(n for n in (8, 4, 2, 1) if n <= widest and width % (THREADS * n) == 0)
    return mosaic_gpu.Layout.WG_STRIDED((width,), vec_size=vector)


def _interpreter() -> Any:
    """Return the parameters for interpreting a kernel on a CPU."""
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        return mosaic_gpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not public in 0.10.2

    return InterpretGPUParams()
