"""Conversions that are killed, run out of disk, or lose their source: whole or refused, and then they go on."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from killed import Answer, Job
from safetensors.numpy import load_file, save_file

from joyjax.convert import blocks, checkpoint, conversion, orbax_part, stream
from joyjax.convert import manifest as manifests
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.manifest import Manifest, is_converted
from joyjax.convert.safetensors import Tensors
from joyjax.convert.source.model import model_folder
from joyjax.errors import CheckpointError, RequestError
from joyjax.layers.weights import leaves
from joyjax.reading import unfinished

CONFIG = toy.ToyConfig(layers=1)
BOTH = (toy.TOY, toy.OTHER)
PART_BYTES = 2000  # four parts for each component; one parameter is cut in two
TEXTS = ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")


def save_source(folder: Path) -> Path:
    toy.save_model(folder, *BOTH)
    for n, component in enumerate(BOTH):
        place = folder / component.folder
        (place / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
        (place / "diffusion_pytorch_model.safetensors").unlink()
        toy.save_sharded(place, toy.tensors(CONFIG, seed=n), 3)
    return folder


class Converter:
    """The program killed.py."""

    def __init__(self):
        program = Path(toy.__file__).with_name("killed.py")
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, program], env=environment, text=True, **pipes)

    def run(self, source: Path, target: Path, options: dict[str, Any], **how: Any) -> Answer:
        job = Job(str(source), str(target), options, PART_BYTES, **how)
        self.process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        self.process.stdin.flush()
        return Answer(**json.loads(self.process.stdout.readline()))

    def complete(self, source: Path, target: Path, options: dict[str, Any], **how: Any) -> Answer:
        ran = self.run(source, target, options, **how)
        assert (ran.signal, ran.error) == (0, "")
        return ran


@pytest.fixture(scope="module")
def converter():
    converter = Converter()
    yield converter
    converter.process.communicate()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def made(converter, source, tmp_path_factory) -> Callable[..., Path]:
    """Convert the source with some options, once for all tests."""
    folders: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        name = json.dumps(options)
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made") / "target"
            converter.complete(source, folders[name], options)
        return folders[name]

    return make


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "target"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(manifests, "PART_BYTES", PART_BYTES)


def loads(target: Path, component) -> bool:
    """Say whether a component loads, as in joyjax.load; if not, whether the error is a clear one."""
    try:
        folder = model_folder(target)
        config = component.read_config(folder)
        if is_converted(folder):
            checkpoint.plan(folder, component, config, jnp.float32)
        else:
            stream.plan(component, config, Tensors.open(folder / component.folder), jnp.float32)
        return True
    except CheckpointError as error:
        clear = str(target) in str(error)
    assert clear
    return False


def assert_whole(target: Path, manifest: Manifest, source: Path) -> None:
    """Check that a folder holds what the manifest of an undisturbed conversion says, bit for bit, and nothing more."""
    assert Manifest.read(target) == manifest
    for name, converted in manifest.components.items():
        expected = manifests.expected(converted.parameters)
        assert sorted(path.name for path in (target / name).iterdir()) == ["config.json", *expected]
        for part, held in expected.items():
            orbax_part.check_part(target / name / part, held)
    for text in (*TEXTS, *(f"{name}/config.json" for name in manifest.components)):
        assert (target / text).read_text() == (source / text).read_text()


def assert_same_numbers(target: Path, source: Path, *components, dtype: str = "float32", config=CONFIG) -> None:
    for component in components:
        ours = leaves(checkpoint.restore(target, component, config, jnp.dtype(dtype)).state)
        weights = stream.fill(component, config, Tensors.open(source / component.folder), jnp.dtype(dtype))
        for path, leaf in leaves(weights.state).items():
            assert np.asarray(ours[path][...]).tobytes() == np.asarray(leaf[...]).tobytes(), path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def noted(target: Path) -> dict[Path, tuple[int, int]]:
    """Return the files of the parts that are in the journal, each with its inode and the time of its last change."""
    journal = unfinished(target) / "journal.jsonl"
    found = {}
    for line in journal.read_text().splitlines() if journal.exists() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "part" in entry:
                part = Path(entry["component"]) / entry["part"]
                new = unfinished(target) / "new"
                folder = new if (new / part).exists() else target
                for path in (folder / part).rglob("*"):
                    found[path.relative_to(folder)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


# The kills


@dataclasses.dataclass
class Scenario:
    """A conversion: its options, and what is in the target before. `model` is a converted folder that lies there."""

    options: dict[str, Any]
    model: dict[str, Any] | None = None
    foreign: bool = False
    share: bool = False
    all_writes: bool = False  # be killed at some write of each kind


SCENARIOS = {
    "nothing there": Scenario({}, all_writes=True),
    "another model there": Scenario({"component": "toy", "overwrite": True}, foreign=True),
    "another component there": Scenario({"component": "other"}, {"component": "toy"}),
    "another dtype there": Scenario({"component": "other", "overwrite": True}, {"dtype": "bfloat16"}),
    "equal parts elsewhere": Scenario({"dtype": "bfloat16"}, share=True, all_writes=True),
}
MINE = {"notes.txt": b"mine", "pictures/cat.png": b"\x89"}


def begin(scenario: Scenario, target: Path, made) -> dict[str, bytes]:
    """Put into the target's place what is there before."""
    target.parent.mkdir()
    if scenario.foreign:
        toy.save_model(target, *reversed(BOTH))
        (target / "tokenizer" / "tokenizer_config.json").write_text('{"name": "another"}')
    elif scenario.model is not None:
        shutil.copytree(made(**scenario.model), target)
    else:
        return {}
    for name, content in MINE.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    return contents(target)


def kill(converter, source, target, options, before: dict[str, bytes], new: Manifest, **how: Any) -> bool:
    """Kill a conversion, look at what is there, let the same call go on, and look again. Say whether it was killed."""
    ran = converter.run(source, target, options, **how)
    assert ran.signal in (0, signal.SIGKILL)
    if any([loads(target, component) for component in BOTH]):
        now = contents(target)
        if not before or any(now.get(name) != content for name, content in before.items()):
            assert_whole(target, new, source)
    done = noted(target)
    if ran.signal:
        converter.complete(source, target, options)
    assert ran.error == ""
    assert_whole(target, new, source)
    for name, content in MINE.items() if before else ():
        assert (target / name).read_bytes() == content
    assert {path: ((target / path).stat().st_ino, (target / path).stat().st_mtime_ns) for path in done} == done
    assert os.listdir(target.parent) == [target.name]
    return ran.signal == signal.SIGKILL


DAILY = ("nothing there",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.nightly) for name in SCENARIOS]
)
def test_a_killed_conversion_goes_on_and_was_never_half_there(converter, source, made, tmp_path, name):
    scenario, rng, kills = SCENARIOS[name], random.Random(name), 0
    options = {**scenario.options, **({"share": str(made(dtype="bfloat16"))} if scenario.share else {})}

    def place(n: object) -> Path:
        return tmp_path / str(n) / "target"

    begin(scenario, place("undisturbed"), made)
    undisturbed = converter.complete(source, place("undisturbed"), options)
    new = Manifest.read(place("undisturbed"))
    assert new != (Manifest.read(made(**scenario.model)) if scenario.model is not None else None)

    def killed(**how: Any) -> bool:
        nonlocal kills
        target = place(kills)
        before = begin(scenario, target, made)
        hit = kill(converter, source, target, options, before, new, **how)
        shutil.rmtree(target.parent)
        kills += hit
        return hit

    for at in chosen_writes(undisturbed.writes, None if scenario.all_writes else rng):
        killed(at=at)
    for _ in range(7):
        after = rng.uniform(0, undisturbed.seconds)
        while not killed(after=after):
            after /= 2
    assert kills >= 20  # in each of the five scenarios


def chosen_writes(writes: list[str], rng: random.Random | None) -> list[tuple[str, int]]:
    """Return the first and the last write of each kind, as its kind and its number among those.

    With `rng` so of the manifest and what comes after it, but only four of what comes before.
    """
    begin = 0 if rng is None else writes.index("open joyjax.json")
    chosen = [(kind, writes[:n].count(kind)) for n, kind in enumerate(writes)]
    ends = [[at for at in chosen[begin:] if at[0] == kind] for kind in dict.fromkeys(writes[begin:])]
    found = {at for each in ends for at in (each[0], each[-1])}
    return [at for at in chosen if at in found] + (rng.sample(chosen[:begin], 4) if rng else [])


def test_an_undisturbed_conversion_has_the_same_numbers_as_its_source(made, source):
    assert_same_numbers(made(), source, *BOTH)
    assert_same_numbers(made(dtype="bfloat16"), source, *BOTH, dtype="bfloat16")


def test_kills_in_a_row(converter, source, target, made):
    done: dict[Path, tuple[int, int]] = {}
    for how in (
        {"at": ["open journal.jsonl", 2]},
        {"after": 0.03},
        {"at": ["rename part", 1]},
        {"after": 0.01},
        {"at": ["remove commit_success.txt", 2]},
        {"at": ["open joyjax.json", 0]},
        {"at": ["rename target", 0]},
    ):
        assert converter.run(source, target, {}, **how).signal == signal.SIGKILL
        now = noted(target)
        assert done.items() <= now.items()
        done = now
        assert not any([loads(target, component) for component in BOTH])
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)
    assert os.listdir(target.parent) == [target.name]


def test_another_job_that_is_refused_leaves_what_was_done(converter, source, target, made):
    """Refused for its target, or for want of room: neither has a right to the work of the first."""
    assert converter.run(source, target, {}, at=["open joyjax.json", 0]).signal
    before = contents(target.parent)
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    ran = converter.run(source, target, {"dtype": "bfloat16"})
    assert ran.error.startswith("RequestError")
    assert "--overwrite" in ran.error
    shutil.rmtree(target)
    assert contents(target.parent) == before
    assert noted(target)
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)


@pytest.mark.parametrize(
    "at", [("remove journal.jsonl", 0), ("remove _METADATA", 2), ("rmdir toy", 0), ("rmdir new", 0)]
)
def test_a_job_that_comes_back_after_another(converter, source, target, made, at):
    """The other job removes what the first has done, and is killed over that."""
    first = {"dtype": "bfloat16"}
    assert converter.run(source, target, first, at=["open joyjax.json", 0]).signal
    assert converter.run(source, target, {}, at=at).signal
    converter.complete(source, target, first)
    assert_whole(target, Manifest.read(made(**first)), source)


@pytest.mark.parametrize(
    "at", [("remove joyjax.json", 0), ("rename toy", 0), ("rename joyjax.json", 0), ("rmdir new", 0)]
)
def test_an_overwrite_that_has_begun_needs_no_leave_to_end(converter, source, target, made, at):
    shutil.copytree(made(dtype="bfloat16"), target)
    assert converter.run(source, target, {"overwrite": True}, at=at).signal
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)
    assert os.listdir(target.parent) == [target.name]


def test_what_came_into_the_target_meanwhile_is_not_replaced(converter, source, target, made):
    assert converter.run(source, target, {}, at=["rename target", 0]).signal
    toy.save_model(target, *BOTH)
    before = contents(target)
    ran = converter.run(source, target, {})
    assert ran.error.startswith("RequestError")
    assert "--overwrite" in ran.error
    assert contents(target) == before
    converter.complete(source, target, {"overwrite": True})
    assert_whole(target, Manifest.read(made()), source)


def test_a_folder_of_a_components_name_is_not_taken_for_the_component(source, target, small_parts):
    convert_checkpoint(source, target, BOTH, component="toy")
    (target / "other").mkdir()
    (target / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds other, which no conversion has made"):
        convert_checkpoint(source, target, BOTH)
    assert (target / "other" / "notes.txt").read_text() == "mine"
    convert_checkpoint(source, target, BOTH, component="other", overwrite=True)
    assert_same_numbers(target, source, *BOTH)


@pytest.mark.parametrize("fault", ["version", "cut off"])
def test_a_target_of_another_version_may_be_overwritten(source, target, fault):
    convert_checkpoint(source, target, BOTH)
    text = (target / "joyjax.json").read_text()
    (target / "joyjax.json").write_text(text.replace('"version": 2', '"version": 1') if fault == "version" else "{")
    with pytest.raises(RequestError, match="--overwrite"):
        convert_checkpoint(source, target, BOTH)
    convert_checkpoint(source, target, BOTH, overwrite=True)
    assert_same_numbers(target, source, *BOTH)


@pytest.mark.parametrize(
    ("name", "left"),
    [("journal.jsonl", left) for left in (0, 0.5, 0.99)]
    + [(name, 0.5) for name in ("new/joyjax.json", "new/model_index.json", "new/toy/config.json")],
)
def test_a_file_that_the_kill_cut_off(converter, source, target, made, name, left):
    assert converter.run(source, target, {}, at=["open journal.jsonl", 9]).signal  # it would note that all is done
    file = unfinished(target) / name
    os.truncate(file, int(left * file.stat().st_size))
    done = noted(target)
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)
    assert {path: ((target / path).stat().st_ino, (target / path).stat().st_mtime_ns) for path in done} == done


def test_a_part_that_went_away_is_written_again(converter, source, target, made):
    assert converter.run(source, target, {}, at=["open joyjax.json", 0]).signal
    shutil.rmtree(unfinished(target) / "new" / "toy" / "part-00001")
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)


def test_a_read_only_source_is_no_read_only_target(converter, target, tmp_path, made, source):
    """A mere user could not write into a copy that kept the modes, as a run that goes on does."""
    shutil.copytree(source, tmp_path / "source")
    everything = [tmp_path / "source", *(tmp_path / "source").rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    shutil.copytree(made(dtype="bfloat16"), target)
    try:
        for at in (("open joyjax.json", 0), ("rename tokenizer", 0), None):
            ran = converter.run(tmp_path / "source", target, {"overwrite": True}, at=at, mere_user=True)
            assert (bool(ran.signal), ran.error) == (at is not None, "")
    finally:
        for path in everything:
            path.chmod(0o755)
    assert_whole(target, Manifest.read(made()), source)


# Two at once


def test_two_programs_at_once(converter, source, target, made, small_parts):
    stopped = converter.run(source, target, {}, at=["rename part", 2], signal=signal.SIGSTOP)
    try:
        assert stopped.signal == signal.SIGSTOP
        before = contents(unfinished(target))
        for options in ({}, {"overwrite": True}, {"dtype": "bfloat16"}):
            with pytest.raises(CheckpointError, match="target is being written by another program") as raised:
                convert_checkpoint(source, target, BOTH, **options)
            assert "goes on" not in str(raised.value)
        assert contents(unfinished(target)) == before
    finally:
        os.kill(stopped.pid, signal.SIGKILL)
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)


# Disks


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """Mount a disk in memory; yields what mounts it anew with other options."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("a disk of a given size needs root on Linux")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    folder.mkdir(exist_ok=True)
    ran = subprocess.run(mount, capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"no disk may be mounted here: {ran.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_beginning(source, target):
    with disk(target.parent, "size=1m"):
        with pytest.raises(CheckpointError, match=f"{target.parent} has 0.0 GiB free; 0.1 GiB are needed: make room"):
            convert_checkpoint(source, target, BOTH)
        assert os.listdir(target.parent) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of threads that Orbax leaves
def test_a_disk_that_gets_full(source, target, made, small_parts, monkeypatch):
    """At every size the call goes on from where it was, until all fits."""
    monkeypatch.setattr(conversion, "SPARE", -(2**30))  # other programs fill the disk, after the check
    errors = []
    with disk(target.parent, "size=4k") as remount:
        for size in range(8, 4000, 20):
            remount(f"size={size}k")
            try:
                convert_checkpoint(source, target, BOTH)
                break
            except CheckpointError as error:
                errors.append(str(error))
            assert not any([loads(target, component) for component in BOTH])
            done = noted(target)
            assert target.name in errors[-1]
            assert ("the same command goes on from there" in errors[-1]) == bool(done)
        assert_whole(target, Manifest.read(made()), source)
        assert os.listdir(target.parent) == [target.name]
    unsaid = [error for error in errors if "No space left on device" not in error]
    assert (len(errors) > 10, unsaid) == (True, [])


@pytest.mark.parametrize("longest", [100, 1000, 2500])
def test_a_file_that_cannot_grow(converter, source, target, made, longest):
    """What a full disk does, where none can be mounted: writes fail, at first some and then all."""
    ran = converter.run(source, target, {}, longest_file=longest)
    assert ran.signal == 0
    assert ran.error.startswith("CheckpointError")
    assert target.name in ran.error
    assert ("the same command goes on from there" in ran.error) == bool(noted(target))
    assert not any([loads(target, component) for component in BOTH])
    converter.complete(source, target, {})
    assert_whole(target, Manifest.read(made()), source)
    assert os.listdir(target.parent) == [target.name]


def test_a_read_only_disk(converter, source, target, made, small_parts):
    with disk(target.parent, "size=200m") as remount:
        remount("ro")
        with pytest.raises(CheckpointError, match=f"{target} cannot be written: .*Read-only file system"):
            convert_checkpoint(source, target, BOTH)
        remount("rw")
        assert os.listdir(target.parent) == []
        assert converter.run(source, target, {}, at=["rename part", 3]).signal
        remount("ro")
        before = contents(target.parent)
        with pytest.raises(CheckpointError, match=f"{target} cannot be written: .*Read-only file system"):
            convert_checkpoint(source, target, BOTH)
        assert contents(target.parent) == before
        remount("rw")
        done = noted(target)
        converter.complete(source, target, {})
        assert done.items() <= {path: value for path, value in done.items() if (target / path).exists()}.items()
        assert_whole(target, Manifest.read(made()), source)


@pytest.mark.parametrize("which", ["parent", "target"])
def test_a_folder_that_may_not_be_written_to(converter, source, target, made, which):
    folder = target.parent if which == "parent" else target
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    ran = converter.run(source, target, {}, mere_user=True)
    assert ran.error.startswith("CheckpointError")
    assert str(target) in ran.error
    assert ("Permission denied" if which == "parent" else "is read-only") in ran.error
    assert [path for path in target.parent.rglob("*") if path != target] == []
    folder.chmod(0o755)
    converter.complete(source, target, {}, mere_user=True)
    assert_whole(target, Manifest.read(made()), source)


def test_the_root_of_a_disk_is_refused_before_anything_is_written(source, target):
    with disk(target, "size=64m"), pytest.raises(RequestError, match="the root of a disk.*name one in it"):
        convert_checkpoint(source, target, BOTH)
    assert os.listdir(target.parent) == [target.name]


# A source that changes


def change(file: Path, how: str) -> None:
    """Change a file of weights; of the same length, if it is whole, but with other numbers."""
    other = {name: array + 1 for name, array in load_file(file).items()}
    if how == "removed":
        file.unlink()
    elif how == "cut off":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "replaced":
        save_file(other, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    elif how == "written over":
        save_file(other, file.with_suffix(".new"))
        file.write_bytes(file.with_suffix(".new").read_bytes())
        file.with_suffix(".new").unlink()


@pytest.mark.parametrize(("number", "during"), [(1, False), (7, False), (7, True), (17, False)])
@pytest.mark.parametrize("how", ["written over", "cut off", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_read(tmp_path, target, small_parts, monkeypatch, how, number, during):
    """The number-th tensor's file changes before the tensor is read, or while it is."""
    source = save_source(tmp_path / "source")
    reading, fill, read_run = [], blocks.Source.fill, blocks._read_run

    def read(source, *args, **options):
        reading.append(source)
        if len(reading) == number and not during:
            change(source.file, how)
        return fill(source, *args, **options)

    def read_some(*args):
        if len(reading) == number and during:
            change(reading[-1].file, how)
        read_run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Source, "fill", read)
        patch.setattr(blocks, "_read_run", read_some)
        with pytest.raises(CheckpointError) as raised:
            convert_checkpoint(source, target, BOTH)
    file = reading[number - 1].file
    said = str(raised.value)
    assert str(file) in said
    assert "tensor " in said
    assert not any([loads(target, component) for component in BOTH])
    if how in ("cut off", "removed"):  # it is not whole now
        with pytest.raises(CheckpointError, match=file.name):
            convert_checkpoint(source, target, BOTH)
        named = toy.tensors(CONFIG, seed=9)
        save_file({name: named[name] for name in in_shard(source, file)}, file)
    convert_checkpoint(source, target, BOTH)
    assert_same_numbers(target, source, *BOTH)
    assert os.listdir(target.parent) == [target.name]


def in_shard(source: Path, file: Path) -> list[str]:
    index = json.loads((file.parent / "model.safetensors.index.json").read_text())
    return [name for name, where in index["weight_map"].items() if where == file.name]


def test_a_configuration_that_changes_before_the_call_goes_on(converter, tmp_path, target):
    """The same tensors make parameters of other shapes then: what was done is of no use."""
    source = save_source(tmp_path / "source")
    assert converter.run(source, target, {}, at=["open joyjax.json", 0]).signal
    config = dataclasses.replace(CONFIG, heads=4, head_width=4)
    (source / "toy" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    converter.complete(source, target, {})
    assert_same_numbers(target, source, toy.TOY, config=config)
    assert_same_numbers(target, source, toy.OTHER)
