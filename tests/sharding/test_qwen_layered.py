"""The tiny Qwen-Image-Layered checkpoint's layers on meshes of simulated devices: the same latents as on one device."""

import functools

import numpy as np
import pytest
from layered_pairs import cutout
from meshes import EDITED, mesh_of, name_of

import joyjax
from joyjax.errors import MeshError

pytestmark = [pytest.mark.jax, pytest.mark.parity]

PICTURE = cutout(41, 60)
ALL_AXES = {"cfg": 2, "sequence": 2, "tensor": 2}
CASES = [
    pytest.param(sizes, marks=() if sizes == ALL_AXES else pytest.mark.nightly, id=name_of(sizes)) for sizes in EDITED
]


def latents_and_layers(pipeline: joyjax.Pipeline, **options) -> tuple[np.ndarray, np.ndarray]:
    kept: list[np.ndarray] = []
    options = {"layers": 2, "steps": 2, **options}
    result = joyjax.edit(pipeline, PICTURE, "a tree", callback=lambda event: kept.append(event.latents), **options)
    return np.asarray(kept[-1]), np.stack([np.asarray(layer, np.float32) for layer in result.layers])


@pytest.fixture(scope="module")
def alone(layered_loaded):
    """What one device gives, by the options."""
    return functools.cache(lambda *options: latents_and_layers(layered_loaded, **dict(options)))


@pytest.mark.parametrize("sizes", CASES)
def test_every_mesh_gives_the_same_layers(sizes, layered_folder, alone, error):
    pipeline = joyjax.load(layered_folder, dtype="float32", mesh=mesh_of(**sizes))
    latents, layers = latents_and_layers(pipeline)
    expected, pictures = alone()
    assert error(latents, expected) < 1e-4
    assert np.abs(layers - pictures).max() <= 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    "option",
    [("cache", 0.0), ("guidance_until", 0.5), ("vae_decode", "patch"), ("vae_encode", "patch"), ("vae_decode", "auto")],
    ids=lambda option: f"{option[0]}-{option[1]}",
)
def test_options_on_a_mesh(option, layered_folder, alone, error):
    pipeline = joyjax.load(layered_folder, dtype="float32", mesh=mesh_of(**ALL_AXES))
    latents, layers = latents_and_layers(pipeline, **dict([option]))
    assert layers.shape == (2, 64, 128, 4)
    if option[1] not in ("patch", "auto"):  # on eight devices: patches, which one device does not have
        expected, pictures = alone(option)
        assert error(latents, expected) < 1e-4
        assert np.abs(layers - pictures).max() <= 1


@pytest.mark.nightly
def test_a_picture_that_devices_cannot_cut_evenly(layered_folder):
    pipeline = joyjax.load(layered_folder, dtype="float32", mesh=mesh_of(sequence=5))
    for option in ("vae_decode", "vae_encode"):
        with pytest.raises(MeshError, match="patch"):
            latents_and_layers(pipeline, **{option: "patch"})
