"""Each stage is compiled once, however the weights came to lie where they are, and not again for the next edit."""

import jax
import numpy as np
import pytest
from compilations import counting
from jax.sharding import Mesh

import joyjax
from joyjax.convert.conversion import convert_checkpoint

pytestmark = [pytest.mark.jax, pytest.mark.parity]


@pytest.fixture(scope="module")
def converted(checkpoint, loaded, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "joy"
    convert_checkpoint(checkpoint, target, loaded.family.components)
    return target


@pytest.mark.parametrize("folder", ["checkpoint", "converted"])
@pytest.mark.parametrize(
    "sizes",
    [pytest.param({}, id="one"), pytest.param({"cfg": 2, "sequence": 2}, id="four", marks=pytest.mark.nightly)],
)
def test_one_compilation_of_each_stage(folder, sizes, request):
    mesh = None
    if sizes:
        devices = np.asarray(jax.devices()[: int(np.prod(list(sizes.values())))])
        mesh = Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))
    pipeline = joyjax.load(request.getfixturevalue(folder), dtype="float32", mesh=mesh)
    jax.clear_caches()
    with counting() as counts:
        options = {"height": 64, "width": 96, "exact_size": True}
        joyjax.edit(pipeline, None, "a tree", steps=3, **options)
        joyjax.edit(
            pipeline, None, "a dog", steps=4, seed=5, guidance_scale=2.5, callback=lambda event: None, **options
        )
        joyjax.edit(pipeline, None, "a tree", steps=4, cache=0.0, **options)
        joyjax.edit(pipeline, None, "a dog", steps=5, cache=0.3, **options)
    names = ("encode_prompt", "predict", "advance", "empty_cache", "predict_cached", "decode_latents")
    assert {name: counts[name] for name in names} == dict.fromkeys(names, 1)
