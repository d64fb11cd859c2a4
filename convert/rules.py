"""Key tables: which tensor of a checkpoint fills which parameter, and how its axes are rearranged.

A rule is a pair of templates and a transform:

    Rule("double_blocks.{i}.attn.img_attn_proj.weight", "blocks.{i}.img.out.kernel", heads_in(32))

`{i}`, `{j}`, … stand for numbers. Templates read aloud in both directions, so one table serves loading and export.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from joyjax.errors import CheckpointError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A rearrangement of a tensor's axes, with its inverse and the source shape it expects for a parameter's shape."""

    name: str
    forward: Callable[[np.ndarray, Shape], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def source_shape(self, shape: Shape) -> Shape:
        """Return the shape of the tensor that fills a parameter of `shape`."""
        return self.inverse(np.broadcast_to(np.empty((), np.int8), shape)).shape


def _transform(
    name: str, forward: Callable[[np.ndarray, Shape], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]
) -> Transform:
    return Transform(name, forward, inverse)


copy = _transform("copy", lambda x, shape: x, lambda x: x)

# Torch keeps a linear map as [out, in].
transpose = _transform("transpose", lambda x, shape: x.T, lambda x: x.T)

# [parts·N·H, D] ↔ [D, parts, N, H] and [N·H, D] ↔ [D, N, H]
split_out = _transform("split_out", lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(len(x), -1).T)

# [D, N·H] ↔ [N, H, D]
split_in = _transform("split_in", lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T)

# a bias of [parts·N·H] ↔ [parts, N, H], a norm of [c, 1, 1] ↔ [c] is another: see `squeeze`
reshape = _transform("reshape", lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))


def squeeze(ones: int) -> Transform:
    """[c, 1, …] ↔ [c] with that many ones."""
    return _transform("squeeze", lambda x, shape: x.reshape(shape), lambda x: x.reshape(*x.shape, *(1,) * ones))


# [O, I, H, W] ↔ [H, W, I, O]
conv2d = _transform("conv2d", lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def last_frame(frames: int) -> Transform:
    """[O, I, frames, H, W] ↔ [H, W, I, O]: on one frame a causal convolution reads its last temporal slice only."""

    def inverse(x: np.ndarray) -> np.ndarray:
        shape = (x.shape[3], x.shape[2], frames, *x.shape[:2])
        if x.dtype == np.int8:  # a shape query
            return np.broadcast_to(np.empty((), np.int8), shape)
        out = np.zeros(shape, x.dtype)
        out[:, :, -1] = x.transpose(3, 2, 0, 1)
        return out

    return _transform("last_frame", lambda x, shape: x[:, :, -1].transpose(2, 3, 1, 0), inverse)


def patch_in(frames: int, height: int, width: int) -> Transform:
    """[D, c, p, q, r] ↔ [(p q r c), D]: a convolution over whole patches as a linear map of channel-last patches."""

    def inverse(x: np.ndarray) -> np.ndarray:
        channels = x.shape[0] // math.prod((frames, height, width))
        return x.reshape(frames, height, width, channels, x.shape[1]).transpose(4, 3, 0, 1, 2)

    return _transform("patch_in", lambda x, shape: x.transpose(2, 3, 4, 1, 0).reshape(shape), inverse)


def flatten_in(channels: int, frames: int, height: int, width: int) -> Transform:
    """[D, c, p, q, r] ↔ [(c p q r), D]: a convolution over whole patches as a linear map of channel-first patches."""
    return _transform(
        "flatten_in",
        lambda x, shape: x.reshape(len(x), -1).T,
        lambda x: x.T.reshape(x.shape[1], channels, frames, height, width),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensor named `source` fills the parameter at `target`, rearranged by `transform`."""

    source: str
    target: str
    transform: Transform = copy


@dataclasses.dataclass(frozen=True)
class Match:
    """One parameter and where its numbers come from."""

    source: str
    target: str
    transform: Transform
    source_shape: Shape


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
        rule, numbers = _find(rules, target)
        source = rule.source.format(**numbers)
        expected = rule.transform.source_shape(shape)
        used.add(source)
        if source not in tensors:
            faults.append(f"tensor {source} {list(expected)} is missing")
        elif tuple(tensors[source]) != tuple(expected):
            faults.append(f"tensor {source} has shape {list(tensors[source])}, expected {list(expected)}")
        else:
            matches.append(Match(source, target, rule.transform, tuple(expected)))
    patterns = [_pattern(template) for template in ignored]
    for name in tensors:
        if name not in used and not any(pattern.fullmatch(name) for pattern in patterns):
            faults.append(f"tensor {name} {list(tensors[name])} is not part of this network")
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(f"{where}: the tensors are not those of its configuration:\n  {shown}")
    return matches


def _find(rules: tuple[Rule, ...], target: str) -> tuple[Rule, dict[str, str]]:
    found = [(rule, m.groupdict()) for rule in rules if (m := _pattern(rule.target).fullmatch(target))]
    if len(found) != 1:
        raise ValueError(f"parameter {target} is matched by {len(found)} rules, expected one")
    return found[0]


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    text = [re.escape(part) if n % 2 == 0 else rf"(?P<{part}>\d+)" for n, part in enumerate(parts)]
    return re.compile("".join(text))
