"""Every stage of an edit against Diffusers', by the script that compares checkpoints: benchmarks/compare.py."""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from joyjax.families import joyimage_buckets

pytest.importorskip("torch")
from pairs import BUCKETS, draw, photo
from parity.test_joyimage import TOLERANCE as TRANSFORMER_TOLERANCE
from parity.test_qwen3_vl import ENCODER_TOLERANCE
from parity.test_wan_vae import ENCODE_TOLERANCE

pytestmark = [pytest.mark.jax, pytest.mark.parity]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"
LATENTS_TOLERANCE = 4e-5  # measured: 1.1e-5
TOLERANCES = {
    "token ids": 0,
    "vision patches": 0,
    "hidden states": ENCODER_TOLERANCE,
    "reference latents": ENCODE_TOLERANCE,
    "first velocity": TRANSFORMER_TOLERANCE,
    "latents after step": LATENTS_TOLERANCE,
}


@pytest.fixture
def compare(monkeypatch):
    """The script as a module, small buckets on both sides; what it changes in Diffusers is undone."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setattr(joyimage_buckets, "buckets", lambda base_size: BUCKETS)
    monkeypatch.setitem(image_processor.BUCKETS, 1024, list(BUCKETS))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", DiagonalGaussianDistribution.sample)
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(compare, tmp_path):
    """Run one edit on both sides, of pictures of these heights and widths; return the stages, theirs and ours."""

    def run(model, *sizes, dtype="float32", seed=0):
        images = []
        for n, size in enumerate(sizes):
            images.append(str(tmp_path / f"{n}.png"))
            photo(*size, seed=seed + n).save(images[-1])
        arguments = argparse.Namespace(
            model=str(model),
            image=images,
            dtype=dtype,
            prompt="make the sky red",
            negative_prompt=None,
            steps=4,
            guidance_scale=4.0,
            height=None,
            width=None,
            base_size=256,
        )
        stored = []
        for side in (compare.run_diffusers, compare.run_joyjax):
            side(arguments, draw(64, 96, seed=seed), tmp_path / "stages.npz")
            stored.append(dict(np.load(tmp_path / "stages.npz")))
        return stored

    return run


@pytest.mark.parametrize("sizes", [[(75, 141)], [(131, 90), (75, 141)]], ids=["edit", "edit-plus"])
def test_stages(compare, run, sizes, tmp_path, error):
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", plus=len(sizes) == 2)
    theirs, ours = run(random_checkpoint.save(pipeline, tmp_path / "model"), *sizes)
    assert compare.compare(theirs, ours, "float32")
    seen = set()
    for name, expected in theirs.items():
        for kind in TOLERANCES:
            if name.startswith(kind):
                seen.add(kind)
                assert error(ours[name], expected) <= TOLERANCES[kind], name
    assert seen == set(TOLERANCES)
    ours["hidden states, prompt"] *= 1.001
    assert not compare.compare(theirs, ours, "float32")


@pytest.mark.nightly
def test_bfloat16_is_as_exact_as_the_reference(run, checkpoint):
    """The error of our bfloat16 edit is at most 1.1 times that of Diffusers', each against its own float32."""
    ratios = {}
    for seed in range(3):
        exact = run(checkpoint, (75, 141), seed=seed)
        half = run(checkpoint, (75, 141), seed=seed, dtype="bfloat16")
        for name in exact[0]:
            if exact[0][name].dtype == np.float32 and name.startswith(("hidden", "reference", "first", "latents")):
                theirs, ours = (np.linalg.norm(half[side][name] - exact[side][name]) for side in (0, 1))
                ratios.setdefault(name, []).append(ours / theirs)
    print("\n" + "\n".join(f"{name}: {np.mean(r):.2f} of the reference's error" for name, r in ratios.items()))
    assert np.mean(ratios["latents after step 4"]) <= 1.1
