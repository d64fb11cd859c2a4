"""Forms of a stored kernel, each a type of leaf, and the one product that takes them all.

A kernel is the value of its `nnx.Param`: an array `[*in, *out]`, or a frozen dataclass in its place. The dataclass is a
pytree, so a network in another form is another argument of the same function, compiled once for each form.

A quantized form is a class with the methods of `Form` and an entry in `FORMS`; Linear, loading, conversion, placement
and `joyjax info` need no change. The output axes of its arrays come first, and each output row is quantized
independently, so that a kernel is read and quantized a few rows at a time. LoRA is a leaf that wraps another
(adapted.py); no file holds it, so it has no entry in `FORMS`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.storage.float8 import Axes, Float8
from joyjax.storage.product import contract_first


@runtime_checkable
class Leaf(Protocol):
    """A kernel in another form than an array. Its pytree children are arrays or again leaves."""

    def contract(self, x: Float[Array, "..."], count: int, start: int, stop: int | None) -> Float[Array, "..."]:
        """See the function `contract`."""

    def array_axes(self, axes: Axes, inputs: int) -> dict[str, Axes]:
        """Return the logical axes of each array by its name, given the kernel's."""


class Form(Protocol):
    """The class of a quantized leaf. Its instances have the kernel's `shape`, `dtype` and `size`.

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

    `start` and `stop` select a part of the first output axis. The result has the kernel's dtype. The gradient in `x` is
    that of the product with the dequantized kernel.
    """
    if isinstance(leaf, Leaf):
        return leaf.contract(x, count, start, stop)
    kernel = leaf[(slice(None),) * count + (slice(start, stop),)]
    return contract_first(x.astype(kernel.dtype), kernel, count)


def arrays(leaf: Any) -> dict[str, Any]:
    """Return the arrays of a leaf by name, such as `q` and `scale`; the name of a plain array is empty."""
    return {".".join(key.name for key in path): array for path, array in jax.tree_util.tree_flatten_with_path(leaf)[0]}


def with_arrays(leaf: Any, found: Mapping[str, Any]) -> Any:
    """Return the leaf with other arrays, named as `arrays` names them."""
    return jax.tree.unflatten(jax.tree.structure(leaf), [found[name] for name in arrays(leaf)])


def array_axes(leaf: Any, axes: Axes, inputs: int) -> dict[str, Axes]:
    """Return the logical axes of each array of a leaf, named as `arrays` names them."""
    return leaf.array_axes(axes, inputs) if isinstance(leaf, Leaf) else {"": axes}


def form_name(leaf: Any) -> str | None:
    """Return the name of a leaf's form; None for an array, and for a leaf that is not a form of `FORMS`."""
    return next((name for name, form in FORMS.items() if isinstance(leaf, form)), None)


def array_path(path: str, name: str) -> str:
    """Return the path of an array of the parameter at `path`, in files and in messages."""
    return f"{path}.{name}" if name else path
