"""Who runs where: names, devices, and what a device cannot run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from joyjax.kernels import attention, dispatch, modulate, qk_norm_rope

pytestmark = pytest.mark.jax

CPU, VOLTA, AMPERE, HOPPER = (
    dispatch.Target("cpu", None),
    dispatch.Target("Tesla V100", (7, 0)),
    dispatch.Target("NVIDIA A100", (8, 0)),
    dispatch.Target("NVIDIA H100", (9, 0)),
)


def on(monkeypatch, device):
    for module in (dispatch, attention):
        monkeypatch.setattr(module, "target", lambda: device)


def test_the_device_is_that_of_the_mesh_or_the_default():
    assert dispatch.target() == CPU
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert dispatch.target() == CPU
    assert dispatch.interpreted()


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "expected"),
    [
        ("gpu", "NVIDIA H100", "9.0", (9, 0)),
        ("gpu", "NVIDIA GeForce RTX 5090", "12.0", (12, 0)),
        ("gpu", "AMD Instinct MI300X", "gfx942", None),
        ("tpu", "TPU v6 lite", None, None),
    ],
)
def test_the_capability_of_a_device(platform, kind, capability, expected):
    device = type("Device", (), {"compute_capability": capability})()
    assert dispatch._target(platform, kind, device).capability == expected


def test_a_kernel_is_never_chosen_without_a_measurement(monkeypatch):
    for device in (CPU, AMPERE, HOPPER):
        on(monkeypatch, device)
        assert dispatch.pallas("norm", None) is None
        assert dispatch.pallas("norm", "reference") is None


def test_a_kernel_that_needs_a_newer_device_is_refused(monkeypatch):
    on(monkeypatch, AMPERE)
    assert dispatch.pallas("norm", "triton") == "triton"
    with pytest.raises(ValueError, match=r"norm: 'mosaic' needs compute capability 9.0; NVIDIA A100 has 8.0"):
        dispatch.pallas("norm", "mosaic")


def test_an_unknown_implementation_is_refused_with_the_known_names():
    x, vector, pair = jnp.ones((1, 2, 8)), jnp.ones((1, 8)), jnp.ones((1, 2, 8))
    heads = jnp.ones((1, 2, 3, 1, 8))
    scales, rotation, index = (jnp.ones(8),) * 2, (jnp.ones((1, 2, 4)),) * 2, jnp.zeros((1, 2), jnp.int32)
    both, one = "'reference', 'mosaic', 'triton'", "'reference'"
    for function, arguments, known in (
        (modulate.layer_norm_scale_shift, (x, vector, vector), both),
        (modulate.layer_norm_scale_shift_select01, (x, pair, pair, index), both),
        (modulate.residual_gate_layer_norm_scale_shift, (x, x, vector, vector, vector), both),
        (modulate.residual_gate_layer_norm_scale_shift_select01, (x, x, pair, pair, pair, index), both),
        (modulate.residual_gate, (x, x, vector), one),
        (modulate.residual_gate_select01, (x, x, pair, index), one),
        (qk_norm_rope.qk_norm_rope, (heads, heads, scales, scales, rotation), both),
        (attention.attention, (heads[:, :, 0],) * 3, "'reference', 'cudnn'"),
        (attention.attention_and_sum, (heads[:, :, 0],) * 3, one),
    ):
        bare = function.__wrapped__  # without the types that tests check, which name the implementations too
        with pytest.raises(
            ValueError, match=f"{function.__name__} has no implementation 'pallas'; there are: {known}$"
        ):
            bare(*arguments, implementation="pallas")


def chosen(monkeypatch, dtype="bfloat16", width=128, implementation=None, **options):
    """Return which implementation attention takes, with what cuDNN is given replaced by nothing."""
    monkeypatch.setattr(attention, "_cudnn", lambda query, *rest: query)
    array = jax.ShapeDtypeStruct((1, 4, 2, width), dtype)
    call = functools.partial(attention.attention, implementation=implementation, **options)
    return "reference" if jax.make_jaxpr(call)(array, array, array).eqns else "cudnn"


def test_attention_takes_cudnn_where_it_can(monkeypatch):
    assert chosen(monkeypatch) == "reference"
    on(monkeypatch, HOPPER)
    assert chosen(monkeypatch) == "cudnn"
    assert chosen(monkeypatch, "float16", causal=True) == "cudnn"
    assert chosen(monkeypatch, width=256) == "cudnn"
    assert chosen(monkeypatch, implementation="reference") == "reference"
    assert chosen(monkeypatch, "float32") == "reference"
    assert chosen(monkeypatch, width=384) == "reference"
    on(monkeypatch, AMPERE)
    assert chosen(monkeypatch) == "cudnn"
    assert chosen(monkeypatch, width=256) == "reference"
    on(monkeypatch, VOLTA)
    assert chosen(monkeypatch) == "reference"


@pytest.mark.parametrize(
    ("device", "dtype", "width", "said"),
    [
        (CPU, "bfloat16", 128, "needs an NVIDIA GPU of compute capability 8.0 or more; the device is cpu"),
        (VOLTA, "bfloat16", 128, "needs an NVIDIA GPU of compute capability 8.0 or more; the device is Tesla V100"),
        (HOPPER, "float32", 128, "takes bfloat16 or float16, all alike; these are float32, float32 and float32"),
        (HOPPER, "bfloat16", 384, "takes heads of a multiple of 8 channels, up to 256; these have 384"),
        (AMPERE, "bfloat16", 132, "takes heads of a multiple of 8 channels, up to 128; these have 132"),
    ],
)
def test_cudnn_is_refused_with_the_reason(monkeypatch, device, dtype, width, said):
    on(monkeypatch, device)
    with pytest.raises(ValueError, match=f"attention: 'cudnn' {said}"):
        chosen(monkeypatch, dtype, width, "cudnn")


def test_a_kernel_is_traced_once_for_equal_calls_and_again_for_another_target(monkeypatch):
    traced = []

    @dispatch.lowered_once
    def kernel(x, *, backend):
        traced.append((x.shape, backend, dispatch.target().kind))
        return 2 * x

    def twice(x, backend):
        return jax.jit(lambda x: kernel(x, backend=backend) + kernel(x, backend=backend))(x)

    here = dispatch.target().kind
    assert twice(jnp.ones(3), "a").tolist() == [4, 4, 4]
    assert traced == [((3,), "a", here)]
    twice(jnp.ones(3), "b")
    twice(jnp.ones(4), "a")
    assert traced[1:] == [((3,), "b", here), ((4,), "a", here)]
    on(monkeypatch, HOPPER)
    twice(jnp.ones(3), "a")
    assert traced[3:] == [((3,), "a", HOPPER.kind)]
