"""`stage`: `jax.jit` whose programs are kept on disk and found again without tracing or lowering.

A kept program is found by a key (key.py) in a folder (store.py). Where nothing is kept, a stage is `jax.jit` alone:

- without JOYJAX_KEEP_PROGRAMS, which the program `joyjax` sets. There all code that is traced is joyjax's own, as the
  key assumes; a library's user may replace a function;
- where JAX's compile cache is off;
- inside another `jax.jit`, for arguments that are on no device or on several, under a mesh, with several processes.

A program that cannot be serialized, or calls back into Python, runs and is not kept.
"""

import contextlib
import functools
import pickle
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from joyjax.programs import key
from joyjax.programs.store import Store, configured

Program = Callable[..., Any]
FOUND, COMPILED = "/joyjax/programs/found", "/joyjax/programs/compiled"  # events of jax.monitoring
FEW = 32  # leaves that are described again for each call


class Unkept(Exception):  # noqa: N818 - not an error
    """The program for these arguments is left to `jax.jit`."""


def stage(*, static: Sequence[str] = (), donate: Sequence[str] = ()) -> Callable[[Callable[..., Any]], "Stage"]:
    """Return a decorator: `jax.jit` with kept programs. `static` arguments are keyword-only."""
    return lambda function: Stage(function, static, donate)


class Stage:
    """A jitted function with kept programs. Other attributes are those of the `jax.jit` function."""

    def __init__(self, function: Callable[..., Any], static: Sequence[str], donate: Sequence[str]):
        self.jitted = jax.jit(function, static_argnames=tuple(static), donate_argnames=tuple(donate))
        self.static = frozenset(static)
        self.programs: dict[Hashable, Program] = {}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        store = configured()
        if store is None:
            return self.jitted(*args, **kwargs)
        static = tuple(sorted((name, value) for name, value in kwargs.items() if name in self.static))
        dynamic = {name: value for name, value in kwargs.items() if name not in self.static}
        try:
            described = tuple(_describe(value) for value in (*args, dynamic))
            device = _device(described)
        except Unkept:
            return self.jitted(*args, **kwargs)
        wanted = static, described, key.state()
        if program := self.programs.get(wanted):
            return program(*args, **dynamic)
        name = key.digest(
            f"{self.__module__}.{self.__qualname__}",
            static,
            [x.text for x in described],
            wanted[-1],
            device,
        )
        kept = _read(store, name, args, dynamic, device)
        if kept is not None:
            try:  # a program that loads may still fail when it runs
                result = jax.block_until_ready(kept(*args, **dynamic))
            except Exception:
                store.remove(name)
                if any(leaf.is_deleted() for leaf in jax.tree.leaves((args, dynamic)) if isinstance(leaf, jax.Array)):
                    raise
            else:
                self.programs[wanted] = kept
                jax.monitoring.record_event(FOUND)
                return result
        jax.monitoring.record_event(COMPILED)
        with _without_compile_cache():
            program = self.jitted.lower(*args, **kwargs).compile()
        self.programs[wanted] = program
        if (content := _content(program, args, dynamic)) is not None:
            store.write(name, content)
        return program(*args, **dynamic)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the `jax.jit` function, such as `lower`."""
        return getattr(self.__dict__["jitted"], name)


class Described:
    """The structure of an argument and a description of its leaves, with its hash."""

    def __init__(self, tree: Any, leaves: tuple[Any, ...]):
        self.tree, self.leaves, self.hash = tree, leaves, hash((tree, leaves))

    @functools.cached_property
    def text(self) -> str:
        """Both as a text, which tells them apart in any process."""
        return f"{self.tree} {self.leaves!r}"

    def __hash__(self) -> int:
        """Return the hash, which is computed once."""
        return self.hash

    def __eq__(self, other: object) -> bool:
        """Compare structure and leaves."""
        return isinstance(other, Described) and (self.tree, self.leaves) == (other.tree, other.leaves)


_described: dict[int, tuple[weakref.ref, Described]] = {}  # arguments with many leaves, by identity


def _describe(value: Any) -> Described:
    """Describe an argument; one with many leaves, such as weights, is described once."""
    number = id(value)
    if (known := _described.get(number)) is not None and known[0]() is value:
        return known[1]
    leaves, tree = jax.tree.flatten(value)
    found = Described(tree, tuple(map(_describe_leaf, leaves)))
    if len(leaves) > FEW:
        with contextlib.suppress(TypeError):  # no weak references to some types
            _described[number] = weakref.ref(value, lambda _: _described.pop(number, None)), found
    return found


def _describe_leaf(leaf: Any) -> tuple[Any, ...]:
    """Describe an array or a number: all that `jax.jit` compiles for.

    Raises:
        Unkept: if it is traced, deleted, or not on exactly one device.
    """
    if isinstance(leaf, jax.core.Tracer):
        raise Unkept
    if not isinstance(leaf, jax.Array):
        of_host: Any = jax.typeof(leaf)
        return of_host.shape, of_host.dtype, of_host.weak_type
    if leaf.is_deleted() or type(leaf.sharding) is not SingleDeviceSharding or not isinstance(leaf.dtype, np.dtype):
        raise Unkept
    array: Any = leaf
    (device,) = array.sharding.device_set
    layout = repr(array.format.layout)
    return array.shape, array.dtype, array.weak_type, array.committed, device, array.sharding.memory_kind, layout


def _device(described: Sequence[Described]) -> jax.Device:
    """Return the one device of all arguments.

    Raises:
        Unkept: if there is none or there are several, or it is not certain that the program will run there.
    """
    arrays = [leaf for each in described for leaf in each.leaves if len(leaf) > 3]
    devices, committed = {leaf[4] for leaf in arrays}, any(leaf[3] for leaf in arrays)
    if len(devices) != 1 or not committed or jax.process_count() > 1 or not jax.sharding.get_abstract_mesh().empty:
        raise Unkept
    return devices.pop()


def _read(store: Store, name: str, args: tuple, dynamic: dict[str, Any], device: jax.Device) -> Program | None:
    """Return a kept program; None if there is none that can be loaded."""
    content = store.read(name)
    if content is None:
        return None
    try:
        payload, result = pickle.loads(content)
        structures = jax.tree.structure((args, dynamic)), jax.tree.structure(result)
        return serialize_executable.deserialize_and_load(
            payload, *structures, backend=device.client, execution_devices=[device]
        )
    except Exception:
        store.remove(name)
        return None


def _content(program: Any, args: tuple, dynamic: dict[str, Any]) -> bytes | None:
    """Return a compiled program as bytes; None if it cannot be serialized or needs more than its arguments."""
    needs = getattr(getattr(program, "_executable", None), "_unloaded_executable", None)
    if any(getattr(needs, name, True) for name in ("host_callbacks", "keepalive", "ordered_effects")):
        return None
    try:
        payload, tree, out_tree = serialize_executable.serialize(program)
        result = out_tree.unflatten([0] * out_tree.num_leaves)
        if tree != jax.tree.structure((args, dynamic)) or jax.tree.structure(result) != out_tree:
            return None
        return pickle.dumps((payload, result))
    except Exception:
        return None


@contextlib.contextmanager
def _without_compile_cache() -> Iterator[None]:
    """Turn JAX's compile cache off: a program that came out of it serializes, and then fails when it runs."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the option once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
