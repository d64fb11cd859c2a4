"""Key tables: which tensor of a checkpoint fills which parameter, and how its axes are rearranged.

A rule is a pair of templates and a transform:

    Rule("double_blocks.{i}.attn.img_attn_proj.weight", "blocks.{i}.img.out.kernel", split_in)

`{i}`, `{j}`, … stand for numbers. Templates read aloud in both directions, so one table serves loading and export.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from joyjax.errors import CheckpointError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A rearrangement of a tensor's axes, and its inverse for export.

    `source_shape` gives the shape of the tensor that fills a parameter of a given shape. `forward` takes a tensor and
    the shape of its parameter; wherever NumPy can, it returns a view.
    """

    name: str
    source_shape: Callable[[Shape], Shape]
    forward: Callable[[np.ndarray, Shape], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _permute(name: str, *axes: int) -> Transform:
    back = tuple(axes.index(axis) for axis in range(len(axes)))
    return Transform(
        name,
        source_shape=lambda shape: tuple(shape[axis] for axis in back),
        forward=lambda x, shape: x.transpose(axes),
        inverse=lambda x: x.transpose(back),
    )


copy = Transform("copy", source_shape=lambda shape: shape, forward=lambda x, shape: x, inverse=lambda x: x)

# Torch keeps a linear map as [out, in].
transpose = _permute("transpose", 1, 0)

# [O, I, H, W] ↔ [H, W, I, O]
conv2d = _permute("conv2d", 2, 3, 1, 0)

# [N·H, D] ↔ [D, N, H], [parts·N·H, D] ↔ [D, parts, N, H]
split_out = Transform(
    "split_out",
    source_shape=lambda shape: (math.prod(shape[1:]), shape[0]),
    forward=lambda x, shape: x.T.reshape(shape),
    inverse=lambda x: x.reshape(len(x), -1).T,
)

# [D, N·H] ↔ [N, H, D]
split_in = Transform(
    "split_in",
    source_shape=lambda shape: (shape[-1], math.prod(shape[:-1])),
    forward=lambda x, shape: x.T.reshape(shape),
    inverse=lambda x: x.reshape(-1, x.shape[-1]).T,
)

# the bias of a split map: [N·H] ↔ [N, H], [parts·N·H] ↔ [parts, N, H]
reshape = Transform(
    "reshape",
    source_shape=lambda shape: (math.prod(shape),),
    forward=lambda x, shape: x.reshape(shape),
    inverse=lambda x: x.reshape(-1),
)

# [1, …] ↔ […]
squeeze_front = Transform(
    "squeeze_front", source_shape=lambda shape: (1, *shape), forward=lambda x, shape: x[0], inverse=lambda x: x[None]
)


def squeeze(ones: int) -> Transform:
    """[c, 1, …] ↔ [c] with that many ones."""
    return Transform(
        "squeeze",
        source_shape=lambda shape: (*shape, *(1,) * ones),
        forward=lambda x, shape: x.reshape(shape),
        inverse=lambda x: x.reshape(*x.shape, *(1,) * ones),
    )


def last_frame(frames: int) -> Transform:
    """[O, I, frames, H, W] ↔ [H, W, I, O]: on one frame a causal convolution reads its last temporal slice only.

    The inverse fills the other slices with zeros.
    """

    def source_shape(shape: Shape) -> Shape:
        height, width, features_in, features_out = shape
        return features_out, features_in, frames, height, width

    def inverse(x: np.ndarray) -> np.ndarray:
        out = np.zeros(source_shape(x.shape), x.dtype)
        out[:, :, -1] = x.transpose(3, 2, 0, 1)
        return out

    return Transform("last_frame", source_shape, lambda x, shape: x[:, :, -1].transpose(2, 3, 1, 0), inverse)


def patch_in(frames: int, height: int, width: int) -> Transform:
    """[D, c, p, q, r] ↔ [(p q r c), D]: a convolution over whole patches as a linear map of channel-last patches."""

    def source_shape(shape: Shape) -> Shape:
        return shape[1], shape[0] // (frames * height * width), frames, height, width

    def inverse(x: np.ndarray) -> np.ndarray:
        return x.reshape(frames, height, width, -1, x.shape[1]).transpose(4, 3, 0, 1, 2)

    return Transform("patch_in", source_shape, lambda x, shape: x.transpose(2, 3, 4, 1, 0).reshape(shape), inverse)


def flatten_in(channels: int, frames: int, height: int, width: int) -> Transform:
    """[D, c, p, q, r] ↔ [(c p q r), D]: a convolution over whole patches as a linear map of channel-first patches."""

    def source_shape(shape: Shape) -> Shape:
        return shape[1], channels, frames, height, width

    return Transform(
        "flatten_in",
        source_shape,
        forward=lambda x, shape: x.reshape(len(x), -1).T,
        inverse=lambda x: x.T.reshape(source_shape(x.shape)),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensor named `source` fills the parameter at `target`, rearranged by `transform`."""

    source: str
    target: str
    transform: Transform = copy


@dataclasses.dataclass(frozen=True)
class Match:
    """The tensor `source` fills the parameter `target` of `shape`."""

    source: str
    target: str
    transform: Transform
    shape: Shape

    def parameter(self, tensor: np.ndarray) -> np.ndarray:
        """Return the parameter made of its tensor."""
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
        source = rule.source.format(**numbers)
        expected = tuple(rule.transform.source_shape(shape))
        used.add(source)
        if source not in tensors:
            faults.append(f"tensor {source} {list(expected)} is missing")
        elif tuple(tensors[source]) != expected:
            faults.append(f"tensor {source} has shape {list(tensors[source])}, expected {list(expected)}")
        else:
            matches.append(Match(source, target, rule.transform, shape))
    patterns = [_pattern(template) for template in ignored]
    for name in tensors:
        if name not in used and not any(pattern.fullmatch(name) for pattern in patterns):
            faults.append(f"tensor {name} {list(tensors[name])} is not part of this network")
    raise_faults(f"{where}: the tensors are not those of its configuration", faults)
    return matches


def raise_faults(what: str, faults: Sequence[str]) -> None:
    """Raise one CheckpointError that lists all faults, the first twenty of them in words; nothing if there are none."""
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(f"{what}:\n  {shown}")


def find_rule(rules: Iterable[Rule], target: str) -> tuple[Rule, dict[str, str]]:
    """Return the one rule that fills a parameter, and the numbers in its templates."""
    found = [(rule, m.groupdict()) for rule in rules if (m := _pattern(rule.target).fullmatch(target))]
    if len(found) != 1:
        raise ValueError(f"parameter {target} is matched by {len(found)} rules, expected one")
    return found[0]


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    text = [re.escape(part) if n % 2 == 0 else rf"(?P<{part}>[0-9]+)" for n, part in enumerate(parts)]
    return re.compile("".join(text))
