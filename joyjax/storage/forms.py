"""Forms of a stored kernel, each a type of leaf, and the one product that takes them all.

A kernel is the value of its `nnx.Param`: an array `[*in, *out]`, or a frozen dataclass that stands for one. JAX takes
such a dataclass apart, so a network with other forms is another argument of the same function, compiled once a form.

A form of few bits is a class with the methods of `Form` and a line in `FORMS`; Linear, loading, conversion, placement
and `joyjax info` need no change. Its arrays begin with the output axes, and each row of outputs is quantized by
itself, so that a kernel is read and quantized a few rows at a time. LoRA is a leaf too, around another one
(adapted.py): no form of a file, so it has no line in `FORMS`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.storage.float8 import Axes, Float8
from joyjax.storage.product import contract_first

EXACT = "exact"  # an array


@runtime_checkable
class Leaf(Protocol):
    """What stands for a kernel in place of an array. Every field that JAX sees is an array or again such a leaf."""

    def contract(self, x: Float[Array, "..."], count: int, start: int, stop: int | None) -> Float[Array, "..."]:
        """See the function `contract`."""

    def array_axes(self, axes: Axes, inputs: int) -> dict[str, Axes]:
        """Return the logical axes of each array by its name, given the kernel's."""


class Form(Protocol):
    """What a form of stored kernels must have besides; `shape`, `dtype` and `size` are the kernel's.

    `dtypes` are those of its arrays.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]

    @classmethod
    def abstract(cls, shape: tuple[int, ...], inputs: int, dtype: DTypeLike) -> Any:
        """Return the leaf of a kernel whose first `inputs` axes are contracted, with shapes in place of arrays."""

    @classmethod
    def quantize(cls, rows: Float[Array, "..."], inputs: int) -> dict[str, Array]:
        """Return the arrays, by name, of some rows of a kernel `[*out, *in]`."""

    @classmethod
    def array_axes(cls, axes: Axes, inputs: int) -> dict[str, Axes]:
        """Return the logical axes of each array by its name, given the kernel's."""

    @staticmethod
    def check_device(device: Any, cause: str) -> None:
        """Raise JoyJaxError, beginning with `cause`, for a device that cannot multiply it."""


FORMS: Mapping[str, type[Form]] = {form.name: form for form in (Float8,)}


def contract(x: Float[Array, "..."], leaf: Any, count: int, start: int = 0, stop: int | None = None) -> Array:
    """Contract the last `count` axes of `x` with the inputs of a kernel, an array or another leaf.

    `start` and `stop` choose a part of the first output axis. The result has the kernel's dtype. The gradient in `x` is
    that of the product with the kernel which the leaf stands for.
    """
    if isinstance(leaf, Leaf):
        return leaf.contract(x, count, start, stop)
    kernel = leaf[(slice(None),) * count + (slice(start, stop),)]
    return contract_first(x.astype(kernel.dtype), kernel, count)


def arrays(leaf: Any) -> dict[str, Any]:
    """Return the arrays of a leaf by name, such as `q` and `scale`; an array is its only one, without a name."""
    return {".".join(key.name for key in path): array for path, array in jax.tree_util.tree_flatten_with_path(leaf)[0]}


def with_arrays(leaf: Any, found: Mapping[str, Any]) -> Any:
    """Return the leaf with other arrays, given by the names that `arrays` has."""
    return jax.tree.unflatten(jax.tree.structure(leaf), [found[name] for name in arrays(leaf)])


def array_axes(leaf: Any, axes: Axes, inputs: int) -> dict[str, Axes]:
    """Return the logical axes of each array of a leaf, by the names that `arrays` has."""
    return leaf.array_axes(axes, inputs) if isinstance(leaf, Leaf) else {"": axes}


def form_name(leaf: Any) -> str | None:
    """Return the name of a leaf's form; None for an array, or what no file holds."""
    return next((name for name, form in FORMS.items() if isinstance(leaf, form)), None)


def array_path(path: str, name: str) -> str:
    """Return how an array of the parameter at `path` is called in a file and in messages."""
    return f"{path}.{name}" if name else path
