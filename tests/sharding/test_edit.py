"""The tiny edit on meshes of simulated devices: the same latents as on one device."""

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from meshes import DAILY, EDITED, mesh_of, name_of
from PIL import Image

import joyjax
from joyjax.errors import MeshError
from joyjax.families.joyimage import EDIT
from joyjax.layers.weights import leaves
from joyjax.reading import read_json
from joyjax.sharding.mesh import check_mesh, parse_mesh
from joyjax.sharding.place import constrain, parameter_sharding
from joyjax.sharding.rules import RULES

pytestmark = pytest.mark.jax

OPTIONS = {"steps": 2, "height": 80, "width": 112, "exact_size": True}  # 35 tokens: no mesh divides them
CASES = [
    pytest.param(sizes, family, marks=() if family == "plus" and sizes in DAILY else pytest.mark.nightly)
    for sizes in EDITED
    for family in ("edit", "plus")
]
PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), np.uint8))
    for n, size in enumerate([(64, 96), (96, 64), (64, 64)])
]


def latents_and_image(pipeline: joyjax.Pipeline) -> tuple[np.ndarray, np.ndarray]:
    """Return what an edit with one reference gives, or with three where the model takes several."""
    kept: list[np.ndarray] = []
    pictures = PICTURES[: pipeline.family.references[1]]
    result = joyjax.edit(
        pipeline, pictures, "make the sky red", callback=lambda event: kept.append(event.latents), **OPTIONS
    )
    return np.asarray(kept[-1]), np.asarray(result.image, np.float32)


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """The tiny checkpoint, and the same as one of Edit-Plus, whose network is the same."""
    plus = tmp_path_factory.mktemp("plus") / "plus"
    shutil.copytree(checkpoint, plus)
    index = plus / "model_index.json"
    index.write_text(index.read_text().replace("JoyImageEdit", "JoyImageEditPlus"))
    return {"edit": checkpoint, "plus": plus}


@pytest.fixture(scope="module")
def alone(folders):
    """What an edit of a folder gives on one device."""
    return functools.cache(lambda name: latents_and_image(joyjax.load(folders[name], dtype="float32")))


@pytest.mark.parity
@pytest.mark.parametrize(("sizes", "family"), CASES, ids=lambda x: x if isinstance(x, str) else name_of(x))
def test_every_mesh_gives_the_same_picture(sizes, family, folders, alone, error):
    pipeline = joyjax.load(folders[family], dtype="float32", mesh=mesh_of(**sizes))
    latents, image = latents_and_image(pipeline)
    expected, picture = alone(family)
    assert error(latents, expected) < 1e-4
    assert np.abs(image - picture).max() <= 1  # of 255, where a number lies between two of them
    kernel = leaves(pipeline.weights["transformer"].state)["blocks.0.img.up.kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // sizes.get("tensor", 1)


@pytest.mark.parity
def test_a_mesh_that_does_not_divide_a_network(checkpoint):
    with pytest.raises(MeshError, match=r"\.kernel has 4 heads, which 3 devices .*sizes that fit: 1, 2$"):
        joyjax.load(checkpoint, mesh=mesh_of(tensor=3))
    with pytest.raises(MeshError, match=r"ulysses=8 does not divide the 4 heads of a device; what fits: 1, 2, 4;"):
        joyjax.load(checkpoint, mesh=mesh_of(ulysses=8))


@pytest.mark.parity
@pytest.mark.parametrize("component", EDIT.components, ids=lambda component: component.folder)
def test_every_dimension_of_every_parameter_has_a_rule(component, checkpoint):
    for path, leaf in leaves(component.abstract(component.read_config(checkpoint), "bfloat16").state).items():
        assert len(leaf.axes) == leaf.ndim, path
        assert set(leaf.axes) <= {None, *RULES}, path


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("component", EDIT.components, ids=lambda component: component.folder)
def test_the_real_networks_divide(component, devices, reference_files):
    config = component.configure(read_json(reference_files / component.folder / "config.json"))
    shares = []
    for path, leaf in leaves(component.abstract(config, "bfloat16").state).items():
        sharding = parameter_sharding(path, leaf.shape, leaf.axes, mesh_of(tensor=devices))
        shares.append((leaf.size, np.prod(sharding.shard_shape(leaf.shape))))
    whole, share = np.sum(shares, axis=0, dtype=np.int64)
    expected = {"transformer": 1 / devices, "text_encoder": 1 / devices, "vae": 1}[component.folder]
    assert expected <= share / whole < expected + 0.002  # norms and modulation stay whole


def test_explicit_axes_are_made_automatic():
    mesh = check_mesh(jax.make_mesh((2,), ("tensor",)))
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_unknown_axis():
    with pytest.raises(MeshError, match="('model',).*cfg, data, sequence, ring, ulysses, tensor"):
        mesh_of(model=2)


def test_a_mesh_from_its_description():
    mesh = parse_mesh("tensor=2, cfg=2")
    assert dict(mesh.shape) == {"tensor": 2, "cfg": 2}


@pytest.mark.parametrize(
    "text",
    ["", "tensor", "tensor=", "tensor=0", "tensor=-2", "tensor=2,tensor=2", "model=2", "tensor=x", "tensor=2;cfg=2"],
)
def test_a_description_that_cannot_be_read(text):
    with pytest.raises(MeshError, match="tensor=4,sequence=2"):
        parse_mesh(text)


def test_more_devices_than_there_are():
    with pytest.raises(MeshError, match="needs 16 devices and 8 are here; what fits: tensor=4,cfg=2$"):
        parse_mesh("tensor=8,cfg=2")
    with pytest.raises(MeshError, match="needs 11 devices .* what fits: no mesh at all"):
        parse_mesh("tensor=11")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"cfg": 3}, "cfg is 1 or 2"), ({"sequence": 2, "ring": 2}, "sequence and ring do not go together")],
)
def test_axes_that_do_not_go_together(sizes, message):
    with pytest.raises(MeshError, match=message):
        mesh_of(**sizes)
    with pytest.raises(MeshError, match=message):
        parse_mesh(",".join(f"{name}={size}" for name, size in sizes.items()))


def test_a_mesh_gets_its_axes_in_order():
    """A ring over two axes in another order than the mesh's would go the wrong way."""
    mesh = check_mesh(Mesh(np.asarray(jax.devices()[:6]).reshape(2, 3), ("tensor", "data")))
    assert mesh.axis_names == ("data", "tensor")
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 3], [1, 4], [2, 5]]


def test_a_parameter_that_does_not_divide():
    with pytest.raises(MeshError, match="blocks.0.k.kernel has 6 heads.*sizes that fit: 1, 2, 3"):
        parameter_sharding("blocks.0.k.kernel", (16, 6), ("embed", "heads"), mesh_of(tensor=4))


def test_few_key_heads_stay_whole():
    place = parameter_sharding("blocks.0.k.kernel", (16, 2, 8), ("embed", "kv_heads", "head_width"), mesh_of(tensor=4))
    assert place.shard_shape((16, 2, 8)) == (16, 2, 8)


def test_constrain_checks_its_names_with_and_without_a_mesh():
    x = jax.numpy.zeros((3, 4))
    assert constrain(x, "batch", "embed") is x
    with pytest.raises(MeshError, match="'colour' has no rule"):
        constrain(x, "batch", "colour")
    with pytest.raises(ValueError, match="3 axis names"):
        constrain(x, "batch", "embed", None)
    with jax.set_mesh(mesh_of(cfg=2, tensor=2)):
        placed = jax.jit(lambda x: constrain(x, "batch", "mlp"))(x)
    # three rows are not cut in two; four columns are
    assert placed.addressable_shards[0].data.shape == (3, 2)
