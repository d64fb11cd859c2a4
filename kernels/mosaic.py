"""What the kernels in Mosaic GPU share: the form that JAX 0.10.2 and the newest both take.

Mosaic GPU is imported by what needs it and not before. One Pallas thread is a warpgroup, 128 threads of CUDA; layouts
say which of them holds which numbers. Kernels load straight from global memory, 16 bytes a thread where they can, touch
no number twice, and leave it to several blocks on a multiprocessor to hide the latency.
"""

import inspect
from typing import Any

from joyjax.kernels.dispatch import interpreted

THREADS = 128
LOAD_BYTES = 16  # of the widest load of a thread


def call(body: Any, out_type: Any, grid: dict[str, int], *arguments: Any) -> Any:
    """Run a body over a grid of named axes, on refs of the arguments and of the results."""
    from jax.experimental.pallas import mosaic_gpu

    # Barriers around every store are for regions that are read and written; here none is.
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
    # Before it took a ref alone, JAX loaded tiled layouts from global memory only when told that it is not shared.
    if "idx" in inspect.signature(mosaic_gpu.load).parameters:
        return mosaic_gpu.load(ref, (), layout=layout, optimized=False)
    return mosaic_gpu.layout_cast(ref[...], layout)


def strided(width: int, itemsize: int) -> Any:
    """Return the layout of one vector over all threads, by the widest loads that its width divides into."""
    from jax.experimental.pallas import mosaic_gpu

    widest = LOAD_BYTES // itemsize
    vector = next(n for n in (8, 4, 2, 1) if n <= widest and width % (THREADS * n) == 0)
    return mosaic_gpu.Layout.WG_STRIDED((width,), vec_size=vector)


def _interpreter() -> Any:
    """Return what lets JAX run such a kernel on a CPU."""
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        return mosaic_gpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not public in 0.10.2

    return InterpretGPUParams()
