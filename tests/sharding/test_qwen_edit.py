"""The tiny Qwen-Image checkpoint's pictures on meshes of simulated devices: the same latents as on one device."""

import functools

import numpy as np
import pytest
from meshes import EDITED, mesh_of, name_of
from pairs import photo

import joyjax
from joyjax.errors import MeshError
from joyjax.layers.weights import leaves

pytestmark = [pytest.mark.jax, pytest.mark.parity]
nightly = pytest.mark.nightly

OPTIONS = {"steps": 2, "height": 80, "width": 112}  # 35 tokens, padded to 40
ALL_AXES = {"cfg": 2, "sequence": 2, "tensor": 2}
CASES = [pytest.param(sizes, marks=() if sizes == {"ring": 4} else nightly, id=name_of(sizes)) for sizes in EDITED]


def latents_and_image(pipeline: joyjax.Pipeline, **options) -> tuple[np.ndarray, np.ndarray]:
    kept: list[np.ndarray] = []
    result = joyjax.edit(
        pipeline, None, "a red fox in the snow", callback=lambda event: kept.append(event.latents), **OPTIONS, **options
    )
    return np.asarray(kept[-1]), np.asarray(result.image, np.float32)


@pytest.fixture(scope="module")
def alone(qwen_loaded):
    """What one device gives, by the options."""
    return functools.cache(lambda *options: latents_and_image(qwen_loaded, **dict(options)))


@pytest.mark.parametrize("sizes", CASES)
def test_every_mesh_gives_the_same_picture(sizes, qwen_folder, alone, error):
    pipeline = joyjax.load(qwen_folder, dtype="float32", mesh=mesh_of(**sizes))
    latents, image = latents_and_image(pipeline)
    expected, picture = alone()
    assert error(latents, expected) < 1e-4
    assert np.abs(image - picture).max() <= 1  # of 255, where a number lies between two of them
    for path in ("blocks.0.img.up.kernel", "blocks.0.txt.modulation.kernel"):
        kernel = leaves(pipeline.weights["transformer"].state)[path][...]
        assert kernel.addressable_shards[0].data.size == kernel.size // sizes.get("tensor", 1)


@nightly
@pytest.mark.parametrize(
    "option",
    [
        ("cache", 0.0),
        ("cache", "taylor:1000"),
        ("guidance_until", 0.5),
        ("guidance_scale", 1.0),
        ("vae_decode", "tiled"),
        ("vae_decode", "auto"),
    ],
    ids=lambda option: f"{option[0]}-{option[1]}",
)
def test_options_on_a_mesh(option, qwen_folder, alone, error):
    pipeline = joyjax.load(qwen_folder, dtype="float32", mesh=mesh_of(**ALL_AXES))
    latents, image = latents_and_image(pipeline, **dict([option]))
    expected, picture = alone(option)
    assert error(latents, expected) < 1e-4
    assert np.abs(image - picture).max() <= 1


@nightly
def test_a_batch_of_two_sizes_on_a_mesh(qwen_folder, qwen_loaded):
    """Three edits, which two devices do not divide; three sizes of one token class, and prompts of two lengths."""
    rows = [
        {"prompt": "a tree", "steps": 2, "height": 96, "width": 144},
        {"prompt": 12 * "a red fox in the snow; ", "steps": 2, "height": 160, "width": 80},
        {"prompt": "", "steps": 2, "height": 80, "width": 160, "seed": 4},
    ]
    pipeline = joyjax.load(qwen_folder, dtype="float32", mesh=mesh_of(data=2, sequence=2))
    for row, result in zip(rows, joyjax.edit_batch(pipeline, rows), strict=True):
        alone = joyjax.edit(qwen_loaded, None, **row)
        assert np.abs(np.asarray(result.image, int) - np.asarray(alone.image, int)).max() <= 1


def test_a_mesh_that_does_not_divide_a_network(qwen_folder):
    with pytest.raises(MeshError, match=r"which 3 devices .*sizes that fit: 1, 2"):
        joyjax.load(qwen_folder, mesh=mesh_of(tensor=3))
    with pytest.raises(MeshError, match=r"ulysses=8 does not divide the 4 heads of a device; what fits: 1, 2, 4;"):
        joyjax.load(qwen_folder, mesh=mesh_of(ulysses=8))


def test_a_picture_that_devices_cannot_cut_evenly(qwen_folder):
    """Refused before anything is computed, as for other families."""
    pipeline = joyjax.load(qwen_folder, dtype="float32", mesh=mesh_of(sequence=3))
    with pytest.raises(MeshError, match="patch"):
        joyjax.edit(pipeline, None, "a tree", vae_decode="patch", **OPTIONS)


# Edit-Plus with two references

PICTURES = [photo(70, 100), photo(110, 90, seed=1)]


def edit(pipeline: joyjax.Pipeline, **options) -> tuple[np.ndarray, np.ndarray]:
    kept: list[np.ndarray] = []
    given = {"steps": 2, "base_size": 256, **options}
    result = joyjax.edit(pipeline, PICTURES, "swap both", callback=lambda event: kept.append(event.latents), **given)
    return np.asarray(kept[-1]), np.asarray(result.image, np.float32)


@pytest.fixture(scope="module")
def edited_alone(qwen_plus_loaded):
    """What one device gives, by the options."""
    return functools.cache(lambda *options: edit(qwen_plus_loaded, **dict(options)))


EDITS = [pytest.param(sizes, marks=() if sizes == ALL_AXES else nightly, id=name_of(sizes)) for sizes in EDITED]


@pytest.mark.parametrize("sizes", EDITS)
def test_every_mesh_gives_the_same_edit(sizes, qwen_plus_folder, edited_alone, error):
    pipeline = joyjax.load(qwen_plus_folder, dtype="float32", mesh=mesh_of(**sizes))
    latents, image = edit(pipeline)
    expected, picture = edited_alone()
    assert error(latents, expected) < 1e-4
    assert np.abs(image - picture).max() <= 1


@nightly
@pytest.mark.parametrize(
    "option",
    [("cache", "taylor:1000"), ("guidance_scale", 1.0), ("vae_encode", "tiled"), ("vae_encode", "auto")],
    ids=lambda option: f"{option[0]}-{option[1]}",
)
def test_options_of_an_edit_on_a_mesh(option, qwen_plus_folder, edited_alone, error):
    pipeline = joyjax.load(qwen_plus_folder, dtype="float32", mesh=mesh_of(**ALL_AXES))
    latents, image = edit(pipeline, **dict([option]))
    expected, picture = edited_alone(option)
    assert error(latents, expected) < 1e-4
    assert np.abs(image - picture).max() <= 1
