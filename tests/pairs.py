"""One edit by Diffusers and by joyjax, on the same pictures and noise, and their comparison."""

import numpy as np
from PIL import Image

import joyjax

LEVELS = 2  # largest difference, in levels of 255; measured: 1, where a value rounds differently
BUCKETS = ((64, 64), (64, 96), (96, 64))  # a small table for the small checkpoint
SHARE = 0.003  # largest share of different values; measured: 0.08 %


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with edges, gradients and grain."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rng = np.random.default_rng(seed)
    base = np.stack([np.sin(9 * x + 5 * y * seed), np.cos(7 * y - 3 * x), (x * 6 % 1 > 0.5) * 1.0], axis=-1)
    grain = 0.2 * rng.standard_normal((height, width, 3))
    return Image.fromarray(np.uint8(np.clip(127 + 80 * (base + grain), 0, 255)))


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, height // 8, width // 8, 16)).astype(np.float32)


def their_edit(pipeline, monkeypatch, images, prompt, size, noise, sizes=None, **options) -> np.ndarray:
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setitem(image_processor.BUCKETS, 1024, sizes or [size])
    plus = type(pipeline).__name__ == "JoyImageEditPlusPipeline"
    import torch

    latents = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])
    given = {"images": images or None} if plus else {"image": images[0] if images else None}
    options = {"num_inference_steps": 4, **options}
    result = pipeline(**given, prompt=prompt, latents=latents if plus else latents[:, None], **options)
    return np.asarray(result.images[0])


def our_edit(pipeline, images, prompt, size, noise, **options) -> np.ndarray:
    options = {"steps": 4, **options}
    result = joyjax.edit(
        pipeline, images, prompt, height=size[0], width=size[1], exact_size=True, noise=noise, **options
    )
    assert result.image.size == (size[1], size[0])
    return np.asarray(result.image)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    off = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"largest difference {off.max()} of 255, {np.mean(off > 0):.2%} of values differ")
    assert theirs.std() > 10  # not a uniform picture, which would match trivially
    assert off.max() <= LEVELS
    assert np.mean(off > 0) <= SHARE
