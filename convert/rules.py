"""Key tables: which tensor of a checkpoint fills which parameter, and how its axes are permuted.

A rule is a pair of templates and a transform:

    Rule("double_blocks.{i}.attn.img_attn_proj.weight", "blocks.{i}.img.out.kernel", split_in)

`{i}`, `{j}`, … between dots match numbers. Templates are invertible, so one table serves loading and export.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from joyjax.errors import CheckpointError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A permutation of a tensor's axes as data, so that it can be inverted and applied to any part.

    The tensor, of `source_shape`, is reshaped to `view`, in the order of the file. `axes` are the view's axes in the
    order of the parameter's; of an axis that is missing there, only the last index is used. All three are functions of
    the parameter's shape. The result has that shape, or is reshaped to it.
    """

    name: str
    source_shape: Callable[[Shape], Shape]
    view: Callable[[Shape], Shape]
    axes: Callable[[Shape], tuple[int, ...]]

    def forward(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Return the parameter of `shape`, a view of the tensor wherever NumPy can."""
        return self.arrange(tensor.reshape(self.view(shape)), shape).reshape(shape)

    def arrange(self, seen: np.ndarray, shape: Shape) -> np.ndarray:
        """Permute the axes of a tensor's view, or of a part of it, to those of a parameter of `shape`."""
        axes = self.axes(shape)
        kept = seen[(*(slice(None) if axis in axes else -1 for axis in range(seen.ndim)), ...)]
        return kept.transpose(_ranks(axes))

    def spread(self, parameter: np.ndarray, shape: Shape) -> np.ndarray:
        """Return the view's axes of a parameter of `shape`, or of a part of it: the inverse of `arrange`, not a copy.

        An axis of the view that the parameter lacks has the length 1.
        """
        axes, view = self.axes(shape), self.view(shape)
        dropped = tuple(axis for axis in range(len(view)) if axis not in axes)
        found: np.ndarray = np.expand_dims(parameter.transpose(np.argsort(_ranks(axes))), dropped)
        return found

    def inverse(self, parameter: np.ndarray) -> np.ndarray:
        """Return the tensor of a parameter, with zeros where the parameter has no values."""
        view, axes = self.view(parameter.shape), self.axes(parameter.shape)
        seen = parameter.reshape([view[axis] for axis in axes]).transpose(np.argsort(_ranks(axes)))
        if len(axes) < len(view):
            whole = np.zeros(view, parameter.dtype)
            whole[tuple(slice(None) if axis in axes else -1 for axis in range(len(view)))] = seen
            seen = whole
        return seen.reshape(self.source_shape(parameter.shape))

    def part(self, shape: Shape, index: Sequence[slice]) -> tuple[slice, ...] | None:
        """Return the slices of the view for the part `index` of the parameter; None where axes are merged."""
        view, axes = self.view(shape), self.axes(shape)
        if tuple(view[axis] for axis in axes) != tuple(shape):
            return None
        found = [slice(size - 1, size) for size in view]
        for axis, part in zip(axes, index, strict=True):
            found[axis] = part
        return tuple(found)


def _ranks(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation among the axes that are kept."""
    return tuple(sorted(axes).index(axis) for axis in axes)


def _in_order(shape: Shape) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _permute(name: str, *axes: int) -> Transform:
    back = tuple(axes.index(axis) for axis in range(len(axes)))

    def source_shape(shape: Shape) -> Shape:
        return tuple(shape[axis] for axis in back)

    return Transform(name, source_shape, source_shape, lambda shape: axes)


copy = Transform("copy", lambda shape: shape, lambda shape: shape, _in_order)

# Torch stores a linear map as [out, in].
transpose = _permute("transpose", 1, 0)

# [O, I, H, W] ↔ [H, W, I, O]
conv2d = _permute("conv2d", 2, 3, 1, 0)

# [N·H, D] ↔ [D, N, H], [parts·N·H, D] ↔ [D, parts, N, H]
split_out = Transform(
    "split_out",
    source_shape=lambda shape: (math.prod(shape[1:]), shape[0]),
    view=lambda shape: (*shape[1:], shape[0]),
    axes=lambda shape: (len(shape) - 1, *range(len(shape) - 1)),
)

# [D, N·H] ↔ [N, H, D]
split_in = Transform(
    "split_in",
    source_shape=lambda shape: (shape[-1], math.prod(shape[:-1])),
    view=lambda shape: (shape[-1], *shape[:-1]),
    axes=lambda shape: (*range(1, len(shape)), 0),
)

# the bias of a split map: [N·H] ↔ [N, H], [parts·N·H] ↔ [parts, N, H]
reshape = Transform("reshape", lambda shape: (math.prod(shape),), lambda shape: shape, _in_order)

# [1, …] ↔ […]
squeeze_front = Transform("squeeze_front", lambda shape: (1, *shape), lambda shape: shape, _in_order)


def squeeze(ones: int) -> Transform:
    """[c, 1, …] ↔ [c] with that many ones."""
    return Transform("squeeze", lambda shape: (*shape, *(1,) * ones), lambda shape: shape, _in_order)


def last_frame(frames: int) -> Transform:
    """[O, I, frames, H, W] ↔ [H, W, I, O]: for one frame a causal convolution uses only its last temporal slice."""

    def source_shape(shape: Shape) -> Shape:
        height, width, features_in, features_out = shape
        return features_out, features_in, frames, height, width

    return Transform("last_frame", source_shape, source_shape, lambda shape: (3, 4, 1, 0))


def patch_in(frames: int, height: int, width: int) -> Transform:
    """[D, c, p, q, r] ↔ [(p q r c), D]: a convolution over whole patches as a linear map of channel-last patches."""

    def source_shape(shape: Shape) -> Shape:
        return shape[1], shape[0] // (frames * height * width), frames, height, width

    return Transform("patch_in", source_shape, source_shape, lambda shape: (2, 3, 4, 1, 0))


def flatten_in(channels: int, frames: int, height: int, width: int) -> Transform:
    """[D, c, p, q, r] ↔ [(c p q r), D]: a convolution over whole patches as a linear map of channel-first patches."""

    def source_shape(shape: Shape) -> Shape:
        return shape[1], channels, frames, height, width

    return Transform("flatten_in", source_shape, lambda shape: (shape[1], shape[0]), lambda shape: (1, 0))


def token_in(height: int, width: int) -> Transform:
    """[D, (c q r)] ↔ [(q r c), D]: a linear map of channel-first patches as one of channel-last patches."""

    def view(shape: Shape) -> Shape:
        return shape[1], shape[0] // (height * width), height, width

    return Transform("token_in", lambda shape: (shape[1], shape[0]), view, lambda shape: (2, 3, 1, 0))


def token_out(height: int, width: int) -> Transform:
    """[(c q r), D] ↔ [D, (q r c)] and, of the bias, [(c q r)] ↔ [(q r c)]: the same for a map to patches."""

    def view(shape: Shape) -> Shape:
        return shape[-1] // (height * width), height, width, *shape[:-1]

    return Transform(
        "token_out", lambda shape: shape[::-1], view, lambda shape: (3, 1, 2, 0) if len(shape) > 1 else (1, 2, 0)
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensor named `source` fills the parameter at `target`, rearranged by `transform`.

    `also`: other names of the tensor, in files of other programs or versions.
    """

    source: str
    target: str
    transform: Transform = copy
    also: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Match:
    """The tensor `source` fills the parameter `target` of `shape`."""

    source: str
    target: str
    transform: Transform
    shape: Shape

    @property
    def file_order(self) -> tuple[int, ...] | None:
        """The parameter's axes in the order of the file; None where that is their own order, or axes are merged."""
        view, axes = self.transform.view(self.shape), self.transform.axes(self.shape)
        order = tuple(int(n) for n in np.argsort(axes))
        merged = tuple(view[axis] for axis in axes) != tuple(self.shape)
        return None if merged or order == tuple(range(len(order))) else order

    @property
    def rows(self) -> int:
        """The axis of the parameter along which parts are contiguous in the file; 0 where there is none."""
        axes = self.transform.axes(self.shape)
        return axes.index(0) if 0 in axes[: len(self.shape)] else 0

    def parameter(self, tensor: np.ndarray) -> np.ndarray:
        """Return the parameter of a tensor."""
        return self.transform.forward(tensor, self.shape)


def match(
    rules: Iterable[Rule],
    ignored: Mapping[str, str],
    tensors: Mapping[str, Shape],
    parameters: Mapping[str, Shape],
    *,
    where: str,
) -> list[Match]:
    """Pair every parameter with its tensor, in the order of the parameters.

    `tensors` and `parameters` are names with shapes; `ignored` maps source templates to the reason why they are not
    read. All faults are collected and raised at once.

    Raises:
        CheckpointError: if a parameter has no tensor, a tensor no parameter, or a shape differs.
    """
    rules = tuple(rules)
    faults, matches = [], []
    used = set()
    for target, shape in parameters.items():
        rule, numbers = find_rule(rules, target)
        names = [template.format(**numbers) for template in (rule.source, *rule.also)]
        source = next((name for name in names if name in tensors), names[0])
        expected = tuple(rule.transform.source_shape(shape))
        used.add(source)
        if source not in tensors:
            faults.append(f"tensor {source} {list(expected)} is missing")
        elif tuple(tensors[source]) != expected:
            faults.append(f"tensor {source} has shape {list(tensors[source])}, expected {list(expected)}")
        else:
            matches.append(Match(source, target, rule.transform, shape))
    for name in tensors:
        if name not in used and all(numbers_in(template, name) is None for template in ignored):
            faults.append(f"tensor {name} {list(tensors[name])} is not part of this network")
    raise_faults(f"{where}: the tensors are not those of its configuration", faults)
    return matches


def raise_faults(what: str, faults: Sequence[str]) -> None:
    """Raise one CheckpointError for all faults, with the first twenty of them; do nothing if there are none."""
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(f"{what}:\n  {shown}")


def find_rule(rules: Iterable[Rule], target: str) -> tuple[Rule, dict[str, str]]:
    """Return the one rule that fills a parameter, and the numbers in its templates."""
    found = [(rule, numbers) for rule in rules if (numbers := numbers_in(rule.target, target)) is not None]
    if len(found) != 1:
        raise ValueError(f"parameter {target} is matched by {len(found)} rules, expected one")
    return found[0]


def numbers_in(template: str, name: str) -> dict[str, str] | None:
    """Return the numbers of a name that a template matches; None if it does not."""
    parts, given = _parts(template), name.split(".")
    if len(parts) != len(given):
        return None
    numbers = {}
    for part, each in zip(parts, given, strict=True):
        if part.startswith("{"):
            if not (each.isascii() and each.isdecimal()):
                return None
            numbers[part[1:-1]] = each
        elif part != each:
            return None
    return numbers


@functools.cache
def _parts(template: str) -> tuple[str, ...]:
    return tuple(template.split("."))
