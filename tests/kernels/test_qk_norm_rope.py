"""Head norms, rotation and the joint buffer against float64, by every implementation; kernels are interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.kernels.dispatch import PALLAS
from joyjax.kernels.joint import join, split
from joyjax.kernels.qk_norm_rope import qk_norm_rope

pytestmark = pytest.mark.jax

B, T, J, N, H = 2, 5, 3, 2, 8
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def rotated(x, scale, angle):
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    if angle is None:
        return y
    pairs = (y[..., 0::2] + 1j * y[..., 1::2]) * np.exp(1j * angle[:, :, None])
    return np.stack([pairs.real, pairs.imag], -1).reshape(y.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotate_text", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("lengths", [None, [5, 2]])
def test_qk_norm_rope(parts, rotate_text, lengths, dtype):
    check(parts, rotate_text, lengths, dtype, N, H, None)


@pytest.mark.parametrize(
    ("implementation", "parts", "rotate_text", "lengths", "dtype", "heads", "width"),
    [
        ("mosaic", 3, False, [5, 2], "bfloat16", 8, 128),
        ("mosaic", 2, True, None, "float32", 4, 128),
        ("mosaic", 3, True, [1, 0], "bfloat16", 16, 64),
        ("triton", 3, False, [5, 2], "bfloat16", 24, 128),
        ("triton", 2, True, None, "float32", 5, 32),  # the demo's heads
        ("triton", 3, True, [1, 0], "bfloat16", 3, 24),
    ],
)
def test_kernels(implementation, parts, rotate_text, lengths, dtype, heads, width):
    check(parts, rotate_text, lengths, dtype, heads, width, implementation)


def check(parts, rotate_text, lengths, dtype, N, H, implementation):  # noqa: N803
    img, txt = draw(0, B, T, parts, N, H), draw(1, B, J, parts, N, H)
    img, txt = (np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in (img, txt))
    img_scales, txt_scales = 1 + draw(2, 2, H), 1 + draw(3, 2, H)
    img_angle, txt_angle = 3 * draw(4, B, T, H // 2), 3 * draw(5, B, J, H // 2)
    single = [jnp.asarray(x, jnp.float32) for x in (np.cos(img_angle), np.sin(img_angle))]
    text = [jnp.asarray(x, jnp.float32) for x in (np.cos(txt_angle), np.sin(txt_angle))]
    out = jax.jit(functools.partial(qk_norm_rope, implementation=implementation))(
        jnp.asarray(img, dtype),
        jnp.asarray(txt, dtype),
        tuple(jnp.asarray(x, jnp.float32) for x in img_scales),
        tuple(jnp.asarray(x, jnp.float32) for x in txt_scales),
        tuple(single),
        tuple(text) if rotate_text else None,
        img_lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
    )
    assert len(out) == parts
    for part, joint in enumerate(out):
        kind = part + 3 - parts  # 0 query, 1 key, 2 value
        first, second = img[:, :, part], txt[:, :, part]
        if kind < 2:
            first = rotated(first, img_scales[kind], img_angle)
            second = rotated(second, txt_scales[kind], txt_angle if rotate_text else None)
        assert joint.dtype == dtype
        assert np.isfinite(joint.astype(jnp.float32)).all()  # attention multiplies padding by zero
        for row in range(B):
            count = T if lengths is None else lengths[row]
            expected = np.concatenate([first[row, :count], second[row]])
            got = np.asarray(joint[row, : count + J].astype(jnp.float32))
            assert np.abs(got - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_split_undoes_join(lengths):
    first, second = jnp.asarray(draw(0, 3, 4, 2, 5)), jnp.asarray(draw(1, 3, 6, 2, 5))
    counts = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    joint = join(first, second, counts)
    assert joint.shape == (3, 10, 2, 5)
    back = split(joint, 4, counts)
    np.testing.assert_array_equal(back[1], second)
    for row, count in enumerate(lengths or [4] * 3):
        np.testing.assert_array_equal(back[0][row, :count], first[row, :count])
        np.testing.assert_array_equal(joint[row, count : count + 6], second[row])


@pytest.mark.parametrize("implementation", PALLAS)
def test_gradients_are_those_of_the_reference(implementation):
    """Of both streams and every scale, from the valid places of all three results."""
    heads, width, lengths = 4, 64, (4, 2)
    heads = 16 if implementation == "mosaic" else heads
    img, txt = (jnp.asarray(draw(n, B, size, 3, heads, width), jnp.float32) for n, size in ((0, T), (1, J)))
    scales = [tuple(jnp.asarray(1 + draw(n, 2, width), jnp.float32)) for n in (2, 3)]
    angle = draw(4, B, T, width // 2)
    rotation = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    weights = draw(5, 3, B, T + J, heads, width) * (np.arange(T + J) < np.add(lengths, J)[:, None])[:, :, None, None]
    weights = jnp.asarray(weights, jnp.float32)

    def gradient(how):
        def loss(img, txt, scales, rotation, lengths):
            found = qk_norm_rope(img, txt, *scales, rotation, img_lengths=lengths, implementation=how)
            return sum(jnp.sum(weight * x) for weight, x in zip(weights, found, strict=True))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(img, txt, scales, rotation, jnp.asarray(lengths, jnp.int32))

    ours, expected = (jax.tree.leaves(gradient(how)) for how in (implementation, "reference"))
    for one, other in zip(ours, expected, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("heads", "width", "dtype"), [(5, 32, "float32"), (8, 24, "float32"), (8, 128, "float16")])
def test_unsupported_heads_are_refused(heads, width, dtype):
    img, txt = (jnp.ones((1, size, 3, heads, width), dtype) for size in (2, 1))
    scales, rotation = (jnp.ones(width),) * 2, (jnp.ones((1, 2, width // 2)),) * 2
    with pytest.raises(ValueError, match="mosaic: .*heads.*; the kernel takes"):
        qk_norm_rope(img, txt, scales, scales, rotation, implementation="mosaic")
