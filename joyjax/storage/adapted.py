"""A kernel with low-rank adapters beside it (LoRA), as they are applied without being fused.

`Adapted` wraps any other leaf, so an adapter on a quantized kernel needs no code of its own. All adapters of one kernel
are concatenated along the rank into one `a` and one `b`, padded with zeros to a rank class; `scale` repeats each
adapter's factor for each of its ranks. Other scales, or other adapters of the same rank class, are other arrays and
compile nothing. `a` and `b` are the trained parameters. Adapter files are not read yet.
"""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from joyjax.storage.float8 import Axes
from joyjax.storage.forms import array_axes, array_path, contract
from joyjax.storage.product import contract_last


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """The leaf `base` plus b · scale · a: `a` `[R, *in]`, `b` `[*out, R]`, `scale` `[R]`, all three in one dtype."""

    base: Any
    a: Any
    b: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the map's result."""
        return self.base.dtype

    @property
    def size(self) -> int:
        """The number of parameters of the kernel; those of adapters do not count."""
        return self.base.size

    def array_axes(self, axes: Axes, inputs: int) -> dict[str, Axes]:
        """Return the logical axes of each array; ranks are never split."""
        base = {array_path("base", name): own for name, own in array_axes(self.base, axes, inputs).items()}
        return base | {"a": (None, *axes[:inputs]), "b": (*axes[inputs:], None), "scale": (None,)}

    def contract(self, x: Float[Array, "..."], count: int, start: int, stop: int | None) -> Float[Array, "..."]:
        """Multiply with the base and add the adapters' product of the same `x`; see `forms.contract`."""
        y = contract(x, self.base, count, start, stop)
        low = contract_last(x.astype(self.a.dtype), self.a, count, self.a.dtype) * self.scale
        return y + contract_last(low, self.b[start:stop], 1, self.b.dtype).astype(y.dtype)
