"""Every stage of an edit against Diffusers', by the script that compares checkpoints: benchmarks/compare.py."""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from joyjax.inputs import image as pictures
from PIL import Image

pytestmark = pytest.mark.parity
pytest.importorskip("torch")

BUCKETS = ((64, 64), (64, 96), (96, 64))
TOLERANCES = {"first velocity": 8e-5, "latents": 5e-5}


@pytest.fixture
def compare(monkeypatch):
    """The script as a module, with small buckets on both sides; what it changes in Diffusers is undone."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setattr(pictures, "buckets", lambda base_size: BUCKETS)
    monkeypatch.setitem(image_processor.BUCKETS, 1024, list(BUCKETS))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    spec = importlib.util.spec_from_file_location("compare", Path(__file__).parents[2] / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photo(path, height, width, seed):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def run(compare, model, images, tmp_path, dtype="float32", seed=0, **options):
    arguments = argparse.Namespace(
        **{"model": str(model), "image": images, "dtype": dtype, "prompt": "make the sky red", "negative_prompt": None},
        **{"steps": 4, "guidance_scale": 4.0, "height": None, "width": None, "base_size": 256, **options},
    )
    height, width = BUCKETS[1]
    noise = np.random.default_rng(seed).standard_normal((1, height // 8, width // 8, 16)).astype(np.float32)
    stored = []
    for side in (compare.run_diffusers, compare.run_joyjax):
        side(arguments, noise, tmp_path / "stages.npz")
        stored.append(dict(np.load(tmp_path / "stages.npz")))
    return stored


@pytest.mark.parametrize("plus", [False, True], ids=["edit", "edit-plus"])
def test_stages(compare, plus, tmp_path, request):
    import random_checkpoint

    model = random_checkpoint.save(random_checkpoint.make_pipeline("tiny", plus=plus), tmp_path / "model")
    images = [photo(tmp_path / "b.png", 131, 90, 1), photo(tmp_path / "a.png", 75, 141, 0)]
    theirs, ours = run(compare, model, images if plus else images[1:], tmp_path)
    assert compare.compare(theirs, ours, "float32")


def test_bf(compare, checkpoint, tmp_path):
    squares = {}
    for seed in range(5):
        images = [photo(tmp_path / "a.png", 75, 141, seed)]
        e = run(compare, checkpoint, images, tmp_path, seed=seed)
        h = run(compare, checkpoint, images, tmp_path, seed=seed, dtype="bfloat16")
        row = []
        for name in e[0]:
            if name.startswith(("latents after", "hidden", "first", "refer")):
                t = np.sqrt(((h[0][name].astype(float) - e[0][name])**2).mean() / (e[0][name]**2).mean())
                o = np.sqrt(((h[1][name].astype(float) - e[1][name])**2).mean()/ (e[0][name]**2).mean())
                squares.setdefault(name, []).append((o, t))
    for name, v in squares.items():
        v = np.array(v)
        print(name, "ratio", np.round(v[:,0]/v[:,1], 2), "mean", (v[:,0]/v[:,1]).mean(), "rms ratio", np.sqrt((v[:,0]**2).sum()/(v[:,1]**2).sum()), "theirs", np.round(v[:,1],3))
