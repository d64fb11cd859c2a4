"""Kept programs: found without tracing, never stale, and compiled again whatever is wrong with a file."""

import contextlib
import dataclasses
import hashlib
import os
import pickle
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from joyjax.kernels.choice import Kernels
from joyjax.layers.weights import Weights
from joyjax.programs import key, store
from joyjax.programs.stage import _describe, _described, stage
from joyjax.programs.store import DIGEST, Store

pytestmark = pytest.mark.jax
OPTIONS = "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of kept programs, with JAX's compile cache around it."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (str(tmp_path / "compiled"), 2**30, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    monkeypatch.setenv(store.SWITCH, "1")
    yield tmp_path / "compiled" / store.NAME
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Fresh:
    """A stage as in a new process, and how often it was traced."""

    def __init__(self, donate=()):
        self.traced = 0

        def scale_sum(weights, x, y=None, *, factor=2, name="a"):
            self.traced += 1
            total = weights["w"] @ x * factor
            return {"sum": total if y is None else total + y, "name": jnp.int32(len(name))}

        self.stage = stage(static=["factor", "name"], donate=donate)(scale_sum)

    def __call__(self, *args, **kwargs):
        return np.asarray(self.stage(*args, **kwargs)["sum"])


def weights(dtype=np.float32, size=4):
    return {"w": jax.device_put(jnp.arange(size * size, dtype=dtype).reshape(size, size), jax.devices()[0])}


X = np.arange(4, dtype=np.float32)
EXPECTED = 2 * np.arange(16, dtype=np.float32).reshape(4, 4) @ X


def files(folder):
    return sorted(folder.glob(f"*{store.SUFFIX}"))


def test_a_new_process_finds_the_program_without_tracing(folder):
    one, two = Fresh(), Fresh()
    np.testing.assert_array_equal(one(weights(), X), EXPECTED)
    assert (one.traced, len(files(folder))) == (1, 1)
    for _ in range(2):
        np.testing.assert_array_equal(two(weights(), X), EXPECTED)
    assert (two.traced, len(files(folder))) == (0, 1)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_donated_argument_is_donated_by_a_kept_program_too(folder):
    for _ in range(2):
        fresh = Fresh(donate=["x"])
        x = jax.device_put(X, jax.devices()[0])
        np.testing.assert_array_equal(fresh(weights(), x), EXPECTED)
        assert x.is_deleted()
        traced = fresh.traced
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            fresh(weights(), x)
    assert traced == 0


@contextlib.contextmanager
def environment(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        key._environment.cache_clear()
        yield
    key._environment.cache_clear()


@contextlib.contextmanager
def replaced(where, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, value)
        yield


def usual():
    return contextlib.nullcontext()


OTHERS = {  # what is another program: a context, arguments, options
    "a static argument": (usual, (weights, X), {"factor": 3}),
    "another static argument": (usual, (weights, X), {"name": "bb"}),
    "a shape": (usual, (lambda: weights(size=5), np.arange(5, dtype=np.float32)), {}),
    "a dtype": (usual, (lambda: weights(np.int32), X.astype(np.int32)), {}),
    "an optional argument": (usual, (weights, X, X), {}),
    "an argument by name": (usual, (weights, X), {"y": X}),
    "a number": (usual, (weights, X), {"y": 1.0}),
    "a structure": (usual, (lambda: {**weights(), "more": X}, X), {}),
    "an array on the device": (usual, (weights, jnp.asarray(X)), {}),
    "a committed array": (usual, (weights, jax.device_put(X, jax.devices()[0])), {}),
    "another device": (usual, (lambda: jax.device_put(weights(), jax.devices()[3]), X), {}),
    "precision": (lambda: jax.default_matmul_precision("highest"), (weights, X), {}),
    "an option of JAX": (lambda: jax.debug_nans(True), (weights, X), {}),
    "a flag of XLA": (lambda: environment("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), (weights, X), {}),
    "joyjax's code": (lambda: replaced(key, "_code", lambda: "other"), (weights, X), {}),
    "versions": (lambda: replaced(jax, "__version__", "0.0.1"), (weights, X), {}),
    "the processor": (lambda: replaced(key, "_device", lambda device: "other"), (weights, X), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_changes_a_program_has_a_file_of_its_own(name, folder):
    context, (make, *more), options = OTHERS[name]
    first = Fresh()
    first(weights(), X)
    with context():
        for _ in range(2):  # the same stage, and a new one
            other, arguments = Fresh(), make()
            same_process = first(arguments, *more, **options)
            np.testing.assert_array_equal(other(arguments, *more, **options), same_process)
        assert other.traced == 0
    assert len(files(folder)) == 2


def test_a_weak_type_has_a_file_of_its_own(folder):
    for number, y in enumerate((np.float32(1), 1.0, np.float32(1), 1.0)):
        fresh = Fresh()
        np.testing.assert_array_equal(fresh(weights(), X, y), EXPECTED + 1)
        assert fresh.traced == (number < 2)
    assert len(files(folder)) == 2


def test_a_choice_of_kernels_is_part_of_a_network_s_structure():
    """Two choices trace two programs; a kept one must not serve both."""
    plain = Weights.of(toy.Toy(toy.ToyConfig(), dtype=np.float32, rngs=nnx.Rngs(0)))
    found = [
        _describe(dataclasses.replace(plain, kernels=Kernels(qk_norm_rope=kernel)))
        for kernel in (None, "triton", "mosaic")
    ]
    assert len({each.text for each in found}) == len(set(found)) == 3
    assert _describe(dataclasses.replace(plain, kernels=Kernels())).text == found[0].text


def test_the_code_is_all_of_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "joyjax"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/a.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.setattr(key.version, "__file__", str(package / "version.py"))

    def code():
        return key._code.__wrapped__()

    seen = [code()]
    (package / "inner" / "a.py").write_text("x = 2\n")
    seen.append(code())
    (package / "inner" / "a.py").rename(package / "inner" / "b.py")
    seen.append(code())
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c.py").write_text("")
    (package / "kernels").symlink_to("../linked")
    seen.append(code())
    (package / "notes.txt").write_text("no code")
    assert len(set(seen)) == 4
    assert code() == seen[-1]


def seal(file, content):
    """Write a content with the digest that belongs to it."""
    name = file.name.removesuffix(store.SUFFIX)
    file.write_bytes(hashlib.sha256(name.encode() + content).digest() + content)


def of_another_function(file):
    program = jax.jit(lambda a: a + 1).lower(np.float32(1)).compile()
    payload, _, _ = jax.experimental.serialize_executable.serialize(program)
    seal(file, pickle.dumps((payload, {"sum": 0, "name": 0})))


def replaced_by(make):
    def apply(file):
        file.unlink()
        make(file)

    return apply


DAMAGE = {
    "a flipped bit": lambda file: file.write_bytes(file.read_bytes()[:-9] + b"\xff" + file.read_bytes()[-8:]),
    "a flipped bit of the digest": lambda file: file.write_bytes(b"\xff\x00" + file.read_bytes()[2:]),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "cut off in the digest": lambda file: file.write_bytes(file.read_bytes()[: DIGEST // 2]),
    "the digest alone": lambda file: file.write_bytes(file.read_bytes()[:DIGEST]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "of another key": lambda file: file.write_bytes(hashlib.sha256(b"k" + b"c").digest() + b"c"),
    "no pickle": lambda file: seal(file, b"no pickle"),
    "another pickle": lambda file: seal(file, pickle.dumps([1, 2, 3])),
    "a pickle of bytes": lambda file: seal(file, pickle.dumps((b"no program", {"sum": 0, "name": 0}))),
    "a program of another function": of_another_function,
    "a folder": replaced_by(lambda file: file.mkdir()),
    "a link": replaced_by(lambda file: file.symlink_to("/etc/hostname")),
    "a pipe": replaced_by(os.mkfifo),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_compiled_again(name, folder):
    Fresh()(weights(), X)
    (file,) = files(folder)
    DAMAGE[name](file)
    fresh = Fresh()
    np.testing.assert_array_equal(fresh(weights(), X), EXPECTED)
    assert fresh.traced == 1
    if name != "a folder":  # which nothing replaces
        again = Fresh()
        np.testing.assert_array_equal(again(weights(), X), EXPECTED)
        assert again.traced == 0


def test_a_program_that_fails_when_it_runs_is_compiled_again(folder, monkeypatch):
    """As one does that came out of JAX's own cache."""
    Fresh()(weights(), X)

    def broken(*_, **__):
        raise RuntimeError("Function fusion not found")

    monkeypatch.setattr("joyjax.programs.stage._read", lambda *_: broken)
    fresh = Fresh()
    np.testing.assert_array_equal(fresh(weights(), X), EXPECTED)
    assert fresh.traced == 1


def test_a_program_of_jaxs_cache_is_not_kept(folder):
    """It would serialize, and fail when it runs."""
    Fresh().stage.jitted(weights(), X)  # into JAX's cache
    assert list(folder.parent.glob("*-cache"))
    for traced in (1, 0):
        fresh = Fresh()
        np.testing.assert_array_equal(fresh(weights(), X), EXPECTED)
        assert fresh.traced == traced
    assert jax.config.jax_enable_compilation_cache


def others_folder(folder, monkeypatch):
    folder.chmod(0o755)


def anothers(folder, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: user + 1)


def linked(folder, monkeypatch):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [others_folder, anothers, linked])
def test_a_folder_that_is_not_the_users_own_is_neither_read_nor_written(spoil, folder, monkeypatch):
    Fresh()(weights(), X)
    spoil(folder, monkeypatch)
    for factor in (2, 3):
        fresh = Fresh()
        np.testing.assert_array_equal(fresh(weights(), X, factor=factor), EXPECTED * factor / 2)
        assert fresh.traced == 1
    assert len(files(folder)) == 1


SWITCHES = {
    "no switch": lambda patch: patch.delenv(store.SWITCH),
    "the switch off": lambda patch: patch.setenv(store.SWITCH, "0"),
    "no folder": lambda patch: jax.config.update("jax_compilation_cache_dir", ""),
    "a url": lambda patch: jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache"),
    "no bytes": lambda patch: jax.config.update("jax_compilation_cache_max_size", 0),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_jaxs_cache_are_this_ones_too(name, folder, monkeypatch):
    SWITCHES[name](monkeypatch)
    assert store.configured() is None


def test_the_cache_that_is_off(folder):
    assert store.configured() == Store(folder, 2**30)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert store.configured() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_the_least_recently_used_are_removed(tmp_path):
    kept = Store(tmp_path / "kept", 3 * (100 + DIGEST))
    for number, name in enumerate("abc"):
        kept.write(name, bytes(100))
        os.utime(kept.folder / f"{name}{store.SUFFIX}", (number, number))
    assert kept.read("a") == bytes(100)  # used now
    (kept.folder / ".x.part").write_bytes(b"")
    (kept.folder / ".y.part").write_bytes(b"")
    os.utime(kept.folder / ".y.part", (0, 0))
    kept.write("d", bytes(100))
    assert [name for name in "abcd" if kept.read(name) is not None] == ["a", "c", "d"]
    assert [path.name for path in kept.folder.glob(".*")] == [".x.part"]
    kept.write("e", bytes(1000))
    assert kept.read("e") is None
    endless = Store(tmp_path / "endless", -1)
    endless.write("e", bytes(1000))
    assert endless.read("e") == bytes(1000)


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Store(tmp_path / "file" / "kept", -1)
    kept.write("a", b"a")
    kept.remove("a")
    assert kept.read("a") is None


def test_writers_and_readers_at_once(tmp_path):
    kept, contents, wrong = Store(tmp_path / "kept", 5000), {bytes([n]) * 1000 for n in range(4)}, []

    def work(content):
        for _ in range(50):
            kept.write("a", content)
            if (found := kept.read("a")) is not None and found not in contents:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept.read("a") in contents
    assert len(list(kept.folder.iterdir())) == 1


def calling_back(x):
    return jax.pure_callback(lambda value: np.asarray(value) + 1, jax.ShapeDtypeStruct((4,), jnp.float32), x)


def printing(x):
    jax.debug.callback(lambda _: None, x)
    return x + 1


@pytest.mark.parametrize("function", [calling_back, printing])
def test_a_program_that_calls_python_is_not_kept(function, folder):
    made, x = stage()(function), jax.device_put(X, jax.devices()[0])
    for _ in range(2):
        np.testing.assert_array_equal(made(x), X + 1)
    jax.effects_barrier()
    assert files(folder) == []


def test_inside_jit_a_stage_is_jit(folder):
    fresh = Fresh()
    outer = jax.jit(lambda held, x: fresh.stage(held, x)["sum"])
    np.testing.assert_array_equal(outer(weights(), X), EXPECTED)
    assert jax.eval_shape(fresh.stage, weights(), X)["sum"].shape == (4,)
    assert "scale_sum" in str(jax.make_jaxpr(fresh.stage)(weights(), X))
    assert files(folder) == []


def test_arguments_on_no_device_or_on_several_are_left_to_jit(folder):
    fresh = Fresh()
    np.testing.assert_array_equal(fresh({"w": np.arange(16, dtype=np.float32).reshape(4, 4)}, X), EXPECTED)
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put(weights(), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(fresh(spread, X), EXPECTED)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(fresh(spread, X), EXPECTED)
    assert files(folder) == []


def test_a_stage_looks_like_its_function(folder):
    fresh = Fresh()
    assert fresh.stage.__name__ == "scale_sum"
    fresh(weights(), X)
    assert fresh.stage.lower(weights(), X).compile() is not None
    fresh.stage.clear_cache()
    with pytest.raises(AttributeError, match="nothing"):
        _ = fresh.stage.nothing


def test_weights_are_described_once(folder):
    """So a step costs little; and no reference holds them."""
    fresh = stage()(lambda held: held.leaves[0] * 2)
    held = Many()
    fresh(held)
    assert id(held) in _described
    started = time.perf_counter()
    for _ in range(20):
        fresh(held)
    assert time.perf_counter() - started < 2
    number = id(held)
    del held
    assert number not in _described


@jax.tree_util.register_pytree_node_class
class Many:
    def __init__(self, leaves=None):
        self.leaves = [jax.device_put(X, jax.devices()[0]) for _ in range(40)] if leaves is None else leaves

    def tree_flatten(self):
        return self.leaves, None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(leaves)
