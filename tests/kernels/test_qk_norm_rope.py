"""Head norms, rotation and the joint buffer against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.kernels.joint import join, split
from joyjax.kernels.qk_norm_rope import qk_norm_rope

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
    img, txt = draw(0, B, T, parts, N, H), draw(1, B, J, parts, N, H)
    img, txt = (np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in (img, txt))
    img_scales, txt_scales = 1 + draw(2, 2, H), 1 + draw(3, 2, H)
    img_angle, txt_angle = 3 * draw(4, B, T, H // 2), 3 * draw(5, B, J, H // 2)
    single = [jnp.asarray(x, jnp.float32) for x in (np.cos(img_angle), np.sin(img_angle))]
    text = [jnp.asarray(x, jnp.float32) for x in (np.cos(txt_angle), np.sin(txt_angle))]
    out = qk_norm_rope(
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
