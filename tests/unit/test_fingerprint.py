"""What tells one checkpoint from another: which changes show, which do not, and how little is read."""

import json
import re
import shutil

import numpy as np
import pytest

from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.safetensors import Tensors
from joyjax.convert.source.model import DEMO
from joyjax.errors import CheckpointError, RequestError
from joyjax.families.registry import FAMILIES
from joyjax.provenance.fingerprint import SEEN, check_model, fingerprint

COMPONENTS = ("text_encoder", "transformer", "vae")


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert_checkpoint(checkpoint, folder, FAMILIES["JoyImageEditPipeline"].components, dtype="bfloat16")
    return folder


def flip(folder, name, byte):
    """Flip one bit of a tensor in a component's folder."""
    tensor = Tensors.open(folder).headers[name]
    assert byte < tensor.nbytes
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + byte)
        (value,) = file.read(1)
        file.seek(tensor.start + byte)
        file.write(bytes([value ^ 1]))


def largest(folder):
    return max(Tensors.open(folder).headers.items(), key=lambda item: item[1].nbytes)[0]


def test_the_demo():
    found = fingerprint(DEMO)
    assert re.fullmatch("sha256:[0-9a-f]{64}", found)
    assert fingerprint(DEMO) == found
    check_model({"model": {"source": None, "fingerprint": found}}, DEMO)
    with pytest.raises(RequestError, match=r"demo is not the one .*\(the bundled demo of another version of joyjax\)"):
        check_model({"model": {"source": None, "fingerprint": "sha256:" + "0" * 64}}, DEMO)


@pytest.mark.parity
def test_the_same_weights_in_another_place_and_other_files(checkpoint, reference, copy, tmp_path):
    import random_checkpoint

    (copy / "README.md").write_text("# a model")
    (copy / "tokenizer" / "README.md").write_text("# a tokenizer")
    (copy / "vae" / "notes.json").write_text("{}")  # nothing reads it
    assert fingerprint(copy) == fingerprint(checkpoint)
    sharded = random_checkpoint.save(reference, tmp_path / "sharded", shard_size="100KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    assert fingerprint(sharded) == fingerprint(checkpoint)


@pytest.mark.parity
def test_other_weights(checkpoint, tmp_path):
    import random_checkpoint

    other = random_checkpoint.save(random_checkpoint.make_pipeline("tiny", seed=1), tmp_path / "other")
    assert fingerprint(other) != fingerprint(checkpoint)


@pytest.mark.parity
@pytest.mark.parametrize("component", COMPONENTS)
def test_one_bit_of_one_tensor(checkpoint, copy, component):
    folder, before = copy / component, fingerprint(checkpoint)
    for name in (largest(folder), min(Tensors.open(folder).headers)):
        end = min(SEEN, Tensors.open(folder).headers[name].nbytes) - 1
        for byte in (0, end):
            flip(folder, name, byte)
            assert fingerprint(copy) != before
            flip(folder, name, byte)
    assert fingerprint(copy) == before
    flip(folder, largest(folder), SEEN)  # behind what is seen, as the docstring says
    assert fingerprint(copy) == before


@pytest.mark.parity
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "processor/preprocessor_config.json",
        *(f"{component}/config.json" for component in COMPONENTS),
    ],
)
def test_one_setting(checkpoint, converted, tmp_path, file):
    for number, folder in enumerate((checkpoint, converted)):
        changed = shutil.copytree(folder, tmp_path / str(number))
        raw = json.loads((changed / file).read_text())
        (changed / file).write_text(json.dumps({**raw, "another": 1}))
        assert fingerprint(changed) != fingerprint(folder)


@pytest.mark.parity
def test_a_file_more(checkpoint, copy):
    (copy / "tokenizer" / "added_tokens.json").write_text("{}")
    more = fingerprint(copy)
    (copy / "joyjax.json").write_text('{"steps": 3}')
    assert len({fingerprint(checkpoint), more, fingerprint(copy)}) == 3


@pytest.mark.parity
def test_a_converted_folder(checkpoint, converted, tmp_path):
    before = fingerprint(converted)
    assert before != fingerprint(checkpoint)
    copy = shutil.copytree(converted, tmp_path / "copy")
    shutil.rmtree(copy / "transformer" / "part-00000")  # no array is read
    assert fingerprint(copy) == before
    raw = json.loads((copy / "joyjax.json").read_text())
    piece = next(iter(raw["components"]["vae"]["parameters"].values()))["pieces"][0]
    piece["sha256"] = "0" + piece["sha256"][1:] if piece["sha256"][0] != "0" else "1" + piece["sha256"][1:]
    (copy / "joyjax.json").write_text(json.dumps(raw))
    assert fingerprint(copy) != before
    other = tmp_path / "float32"
    convert_checkpoint(checkpoint, other, FAMILIES["JoyImageEditPipeline"].components)
    assert fingerprint(other) != before
    del raw["components"]["vae"]
    (copy / "joyjax.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="component vae is missing"):
        fingerprint(copy)


@pytest.mark.parity
def test_little_is_read(checkpoint, monkeypatch):
    read, sizes = Tensors.read, []

    def counting(*arguments):
        found = read(*arguments)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(Tensors, "read", counting)
    fingerprint(checkpoint)
    assert len(sizes) == sum(len(Tensors.open(checkpoint / component).headers) for component in COMPONENTS)
    assert max(sizes) == SEEN


@pytest.mark.parity
def test_a_folder_that_is_not_whole(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="model_index.json is missing"):
        fingerprint(tmp_path / "empty")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="download complete"):
        fingerprint(copy)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="vae/config.json is missing"):
        fingerprint(copy)


@pytest.mark.parity
def test_checking_a_model(checkpoint, copy):
    recipe = {"model": {"source": "/models/joy", "fingerprint": fingerprint(checkpoint)}}
    check_model(recipe, copy)
    flip(copy / "transformer", largest(copy / "transformer"), 0)
    begin = fingerprint(copy)[:15]
    with pytest.raises(RequestError, match=rf"copy is not the one .*\(/models/joy\): .* is {begin}….* with --model"):
        check_model(recipe, copy)


def test_every_dtype_and_shape_is_seen(tmp_path):
    """Scalars, empty tensors and eight bits, which a checkpoint may hold beside its weights."""
    from ml_dtypes import float8_e4m3fn
    from safetensors.numpy import save_file

    shutil.copytree(DEMO, tmp_path / "demo")
    encoder, before = tmp_path / "demo" / "text_encoder" / "model.safetensors", fingerprint(DEMO)
    held = {name: Tensors.open(encoder.parent).read(name) for name in Tensors.open(encoder.parent).headers}
    more = {"a": np.array(1.5), "b": np.zeros((0, 3), np.int64), "c": np.zeros(9000, bool)}
    seen = {before}
    for name, array in more.items():
        save_file({**held, name: array}, encoder)
        seen.add(fingerprint(tmp_path / "demo"))
    held["c"] = np.zeros(9000, float8_e4m3fn)
    save_file(held, encoder)
    assert len({*seen, fingerprint(tmp_path / "demo")}) == 5
