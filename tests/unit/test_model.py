"""Finding a model: a folder, a hub id in the hub's own cache, and what is refused."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as constants
import pytest

import joyjax
from joyjax.convert.manifest import Manifest
from joyjax.convert.source.model import DEMO, PATTERNS, model_folder
from joyjax.errors import CheckpointError
from joyjax.reading import check_files, unfinished
from joyjax.runtime.convert import convert_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache with the demo in it as someone/demo, at the branch `main`; the tests are offline."""
    cache = tmp_path / "hub"
    home = cache / "models--someone--demo"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    for number, file in enumerate(path for path in sorted(DEMO.rglob("*")) if path.is_file()):
        blob, place = home / "blobs" / f"{number:040x}", home / "snapshots" / COMMIT / file.relative_to(DEMO)
        shutil.copy(file, blob)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return home


@pytest.mark.parametrize("name", ["someone/demo", "someone/demo@main", f"someone/demo@{COMMIT}"])
def test_a_hub_id_is_found_in_the_hubs_cache(hub, name):
    assert model_folder(name) == hub / "snapshots" / COMMIT
    assert joyjax.load(name).generation_defaults == joyjax.load(DEMO).generation_defaults


def test_a_hub_id_converts_as_its_folder_does(hub, tmp_path):
    ours, theirs = convert_model("someone/demo", tmp_path / "a"), convert_model(DEMO, tmp_path / "b")
    for name, converted in ours.components.items():
        assert converted.parameters == theirs.components[name].parameters
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))
    assert Manifest.read(tmp_path / "a") == ours


def name_blobs_by_content(home: Path) -> None:
    """Name weights as the hub does, by SHA-256, and let them be as if fetched just now."""
    for link in (home / "snapshots").rglob("*.safetensors"):
        blob = link.resolve()
        named = blob.rename(blob.with_name(hashlib.sha256(blob.read_bytes()).hexdigest()))
        os.utime(named, ns=(time.time_ns(), time.time_ns()))
        link.unlink()
        link.symlink_to(os.path.relpath(named, link.parent))


def test_what_is_fetched_once_more_is_the_same_source(hub, tmp_path):
    """After a machine was lost with its cache, a conversion goes on; with other weights under the same names not."""

    def lose(done: int, total: int) -> None:
        raise ConnectionAbortedError

    def part_of(folder: Path) -> Path:
        return folder / "text_encoder" / "part-00000" / "manifest.ocdbt"

    target = tmp_path / "joy"
    name_blobs_by_content(hub)
    with pytest.raises(CheckpointError, match="the same command goes on from there"):
        convert_model("someone/demo", target, progress=lose)
    first = part_of(unfinished(target) / "new").stat().st_mtime_ns
    name_blobs_by_content(hub)
    with pytest.raises(CheckpointError, match="the same command goes on from there"):
        convert_model("someone/demo", target, progress=lose)
    assert part_of(unfinished(target) / "new").stat().st_mtime_ns == first

    weights = hub / "snapshots" / COMMIT / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the same size
    weights.resolve().write_bytes(content)
    name_blobs_by_content(hub)
    convert_model("someone/demo", target)
    assert part_of(target).stat().st_mtime_ns != first


def test_what_is_asked_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(DEMO))
    assert model_folder("some-one/A.model_1@refs/pr/3") == DEMO
    assert asked == [(("some-one/A.model_1",), {"revision": "refs/pr/3", "allow_patterns": list(PATTERNS)})]


@pytest.mark.parametrize("name", ["nobody/nothing", "someone/demo@v9"])
def test_a_hub_id_that_cannot_be_had(hub, name):
    with pytest.raises(
        CheckpointError, match="is not a local folder, and cannot be downloaded from the hub .*; check the name"
    ):
        model_folder(name)


@pytest.mark.parametrize("name", ["nothing", "./no/thing", "/no/thing", "a/b/c", "a/b@", "../a/b", "a b/c", "é/b", ""])
def test_what_is_no_hub_id_is_never_asked_for(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    if name:
        with pytest.raises(CheckpointError, match="does not exist; name a folder, or a hub id such as"):
            model_folder(name)
    else:
        with pytest.raises(CheckpointError, match="model_index.json is missing"):
            joyjax.load(name)  # the empty path is the folder one is in


def test_a_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, tmp_path / "someone" / "demo")
    assert model_folder("someone/demo") == Path("someone/demo")


def test_a_model_whose_conversion_was_stopped(tmp_path):
    (tmp_path / ".model.unfinished").mkdir()
    with pytest.raises(CheckpointError, match="is unfinished; run the same `joyjax convert` again"):
        joyjax.load(tmp_path / "model")


def test_a_model_whose_replacement_was_stopped(tmp_path):
    """Over an existing folder the index goes first and comes last."""
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / ".model.unfinished").mkdir()
    assert model_folder(tmp_path / "model") == tmp_path / "model"  # not first_output with yet
    (tmp_path / "model" / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="is unfinished; run the same `joyjax convert` again"):
        joyjax.load(tmp_path / "model")


def test_links_out_of_a_checkpoint_are_refused_but_the_hubs_are_not(hub, tmp_path):
    snapshot = hub / "snapshots" / COMMIT
    check_files(snapshot)
    (snapshot / "extra.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="extra.json is a link to /etc/hostname, outside of the checkpoint"):
        joyjax.load("someone/demo")
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    shutil.move(copy / "vae", tmp_path / "vae")
    (copy / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="vae is a link to .*, outside of the checkpoint"):
        joyjax.load(copy)
    (copy / "vae").unlink()
    shutil.move(tmp_path / "vae", copy / "elsewhere")
    (copy / "vae").symlink_to("elsewhere")
    joyjax.load(copy)  # a link within
