"""Key tables: each transform against its formula and its inverse, and every fault of a checkpoint named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joyjax.convert import rules
from joyjax.convert.rules import Rule, match, numbers_in
from joyjax.errors import CheckpointError

SIZE = st.integers(1, 4)
KERNEL = st.tuples(SIZE, SIZE, SIZE, SIZE)
# A transform and the shape of a parameter that it may fill.
CASES = st.one_of(
    st.tuples(st.just(rules.copy), st.lists(SIZE, max_size=3)),
    st.tuples(st.just(rules.transpose), st.tuples(SIZE, SIZE)),
    st.tuples(st.just(rules.conv2d), KERNEL),
    st.tuples(st.just(rules.split_out), st.one_of(st.tuples(SIZE, SIZE, SIZE), KERNEL)),
    st.tuples(st.just(rules.split_in), st.tuples(SIZE, SIZE, SIZE)),
    st.tuples(st.just(rules.reshape), st.lists(SIZE, min_size=1, max_size=3)),
    st.tuples(st.just(rules.squeeze_front), st.lists(SIZE, min_size=1, max_size=3)),
    st.tuples(st.builds(rules.squeeze, st.integers(0, 3)), st.lists(SIZE, min_size=1, max_size=2)),
    st.tuples(st.builds(rules.last_frame, SIZE), KERNEL),
    st.builds(lambda c, p, q, r, d: (rules.patch_in(p, q, r), (p * q * r * c, d)), SIZE, SIZE, SIZE, SIZE, SIZE),
    st.builds(lambda c, p, q, r, d: (rules.flatten_in(c, p, q, r), (c * p * q * r, d)), SIZE, SIZE, SIZE, SIZE, SIZE),
)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@given(CASES)
def test_the_inverse_of_a_transform_leads_back(case):
    transform, shape = case[0], tuple(case[1])
    parameter = numbered(*shape)
    tensor = transform.inverse(parameter)
    assert tensor.shape == transform.source_shape(shape)
    np.testing.assert_array_equal(transform.forward(tensor, shape), parameter)
    if transform.name != "last_frame":  # which drops the other frames
        other = numbered(*tensor.shape)
        np.testing.assert_array_equal(transform.inverse(transform.forward(other, shape)), other)


@given(CASES, st.data())
def test_a_part_of_a_parameter_is_found_in_its_tensor(case, data):
    transform, shape = case[0], tuple(case[1])
    index = [slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape]
    tensor = numbered(*transform.source_shape(shape))
    part = transform.part(shape, index)
    if part is None:
        assert transform.name == "patch_in"  # which merges axes
        return
    seen = tensor.reshape(transform.view(shape))[(*part, ...)]
    small = tuple(len(range(size)[each]) for size, each in zip(shape, index, strict=True))
    axes = transform.axes(shape)
    kept = seen.transpose(*axes, *(axis for axis in range(seen.ndim) if axis not in axes)).reshape(small)
    np.testing.assert_array_equal(kept, transform.forward(tensor, shape)[(*index, ...)])


def test_split_out_puts_part_head_and_channel_in_this_order():
    tensor = numbered(3 * 4 * 5, 2)
    kernel = rules.split_out.forward(tensor, (2, 3, 4, 5))
    assert kernel[1, 2, 3, 4] == tensor[(2 * 4 + 3) * 5 + 4, 1]
    assert kernel[0, 1, 0, 3] == tensor[(1 * 4 + 0) * 5 + 3, 0]


def test_split_in_puts_head_before_channel():
    tensor = numbered(2, 4 * 5)
    assert rules.split_in.forward(tensor, (4, 5, 2))[3, 1, 0] == tensor[0, 3 * 5 + 1]


def test_convolutions_end_with_channels_in_and_out():
    tensor = numbered(2, 3, 4, 5)
    assert rules.conv2d.forward(tensor, (4, 5, 3, 2))[3, 1, 2, 0] == tensor[0, 2, 3, 1]
    causal = numbered(2, 3, 3, 4, 5)
    assert rules.last_frame(3).forward(causal, (4, 5, 3, 2))[3, 1, 2, 0] == causal[0, 2, -1, 3, 1]


def test_patches_are_channel_last_or_channel_first():
    tensor = numbered(2, 3, 1, 4, 5)
    shape = (3 * 4 * 5, 2)
    assert rules.patch_in(1, 4, 5).forward(tensor, shape)[(3 * 5 + 1) * 3 + 2, 1] == tensor[1, 2, 0, 3, 1]
    assert rules.flatten_in(3, 1, 4, 5).forward(tensor, shape)[(2 * 4 + 3) * 5 + 1, 1] == tensor[1, 2, 0, 3, 1]


TABLE = (
    Rule("layers.{i}.weight", "blocks.{i}.kernel", rules.transpose),
    Rule("layers.{i}.parts.{j}.bias", "blocks.{i}.parts.{j}"),
    Rule("proj.weight", "out.kernel", rules.transpose),
)
PARAMETERS = {"out.kernel": (2, 3), "blocks.10.kernel": (4, 5), "blocks.10.parts.2": (6,)}
TENSORS = {"layers.10.weight": (5, 4), "layers.10.parts.2.bias": (6,), "proj.weight": (3, 2)}


def matched(tensors, ignored=()):
    return match(TABLE, dict.fromkeys(ignored, "not read"), tensors, PARAMETERS, where="folder")


def test_every_parameter_finds_its_tensor_in_its_own_order():
    found = matched(TENSORS)
    assert [(m.source, m.target, m.shape) for m in found] == [
        ("proj.weight", "out.kernel", (2, 3)),
        ("layers.10.weight", "blocks.10.kernel", (4, 5)),
        ("layers.10.parts.2.bias", "blocks.10.parts.2", (6,)),
    ]
    np.testing.assert_array_equal(found[0].parameter(numbered(3, 2)), numbered(3, 2).T)


def test_ignored_tensors_may_be_there_or_not():
    assert matched(TENSORS, ignored=("head.{i}",)) == matched({**TENSORS, "head.0": (9,)}, ignored=("head.{i}",))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**TENSORS, "proj.weight": (2, 3)}, r"tensor proj.weight has shape \[2, 3\], expected \[3, 2\]"),
        ({**TENSORS, "proj.weight": (3, 2, 1)}, r"tensor proj.weight has shape \[3, 2, 1\], expected \[3, 2\]"),
        ({k: v for k, v in TENSORS.items() if k != "proj.weight"}, r"tensor proj.weight \[3, 2\] is missing"),
        ({**TENSORS, "proj.bias": (3,)}, r"tensor proj.bias \[3\] is not part of this network"),
        ({**TENSORS, "layers.11.weight": (5, 4)}, r"tensor layers.11.weight \[5, 4\] is not part"),
        ({**TENSORS, "head.x": (9,)}, r"tensor head.x \[9\] is not part"),
    ],
)
def test_a_fault_is_named(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        matched(tensors, ignored=("head.{i}",))


def test_all_faults_come_at_once():
    with pytest.raises(CheckpointError) as raised:
        matched({"proj.weight": (7,), "layers.10.weight": (5, 4), "extra": ()})
    message = str(raised.value)
    assert message.startswith("folder:")
    assert all(name in message for name in ("proj.weight", "layers.10.parts.2.bias", "extra"))
    assert "layers.10.weight" not in message


def test_a_long_list_of_faults_is_cut():
    with pytest.raises(CheckpointError, match="and 5 more"):
        matched({**TENSORS, **{f"extra.{n}": () for n in range(25)}})


def test_a_parameter_without_a_rule_is_our_own_mistake():
    with pytest.raises(ValueError, match="matched by 0 rules"):
        match(TABLE, {}, TENSORS, {"nowhere": (1,)}, where="folder")


@pytest.mark.parametrize(
    ("template", "name", "numbers"),
    [
        ("blocks.{i}.out.kernel", "blocks.12.out.kernel", {"i": "12"}),
        ("a.{i}.b.{j}", "a.0.b.7", {"i": "0", "j": "7"}),
        ("net.0.proj", "net.0.proj", {}),
        ("net.0.proj", "net.1.proj", None),
        ("blocks.{i}.out", "blocks.x.out", None),
        ("blocks.{i}.out", "blocks.-1.out", None),
        ("blocks.{i}.out", "blocks.².out", None),
        ("blocks.{i}.out", "blocks.١.out", None),  # a digit, not of ASCII
        ("blocks.{i}.out", "blocks..out", None),
        ("blocks.{i}.out", "blocks.1.out.kernel", None),
        ("blocks.{i}.out", "blocks.1", None),
    ],
)
def test_the_numbers_in_a_name(template, name, numbers):
    assert numbers_in(template, name) == numbers


@given(CASES)
def test_spreading_a_parameter_is_the_inverse_of_arranging_a_view(case):
    transform, shape = case[0], tuple(case[1])
    view, axes = transform.view(shape), transform.axes(shape)
    seen = np.arange(np.prod(view, dtype=int)).reshape(view)
    kept = seen[tuple(slice(None) if axis in axes else slice(-1, None) for axis in range(len(view)))]
    spread = transform.spread(transform.arrange(seen, shape), shape)
    np.testing.assert_array_equal(spread, kept)
    assert np.shares_memory(spread, seen) or not seen.size
