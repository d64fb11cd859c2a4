"""The key of a kept program: everything that decides which program JAX would compile.

JAX's own compile cache keys the lowered program, so it must trace and lower first. This key replaces the lowered
program by what it is made from: the bytes of joyjax's sources, and the functions' arguments. A key that changes without
need costs one compilation; a key that stays the same when the program changes would run the wrong program. So it holds
all of JAX's configuration and environment, whether a value matters or not.
"""

import functools
import hashlib
import os
import platform
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import einops
import flax
import jax
import jaxlib
import ml_dtypes
import numpy as np
from jaxlib import xla_client

from joyjax import version

FORMAT = 1  # of the files; another one has other keys
ENVIRONMENT = ("XLA_", "JAX_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "TF_", "FLAX_", "TRITON_", "PALLAS_")
PROCESSOR = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # lines of /proc/cpuinfo


def state() -> Hashable:
    """Return what tracing depends on besides the arguments, and what may change within a process."""
    everywhere = jax.config.values
    # a context such as `jax.default_matmul_precision` shows in the attribute alone
    values = (getattr(jax.config, name, everywhere[name]) for name in _names())
    config = tuple(repr(value) if type(value).__hash__ is None else value for value in values)
    return config, jax.sharding.get_abstract_mesh()


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(jax.config.values))


def digest(function: str, static: Any, arguments: Sequence[str], now: Hashable, device: jax.Device) -> str:
    """Return the key of a function's program for one device, as hexadecimal digits.

    `static` are its static arguments with their names; `arguments` are descriptions of the others; `now` is `state()`.
    """
    parts = FORMAT, _code(), _versions(), _environment(), _device(device), _names(), now, function, static
    text = "\n".join((*map(repr, parts), *arguments))
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


@functools.cache
def _code() -> str:
    """Return a digest of all of joyjax's sources, by name."""
    found = hashlib.sha256()
    root = Path(version.__file__).parent
    for folder, below, names in os.walk(root, followlinks=True):
        below.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                content = path.read_bytes()
                found.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _versions() -> tuple[Any, ...]:
    modules = jax, jaxlib, flax, np, ml_dtypes, einops
    return platform.python_version(), *((module.__name__, module.__version__) for module in modules)


@functools.cache
def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(ENVIRONMENT)))


@functools.cache
def _device(device: jax.Device) -> tuple[Any, ...]:
    """Describe a device and its host."""
    client = device.client
    try:
        topology = xla_client.get_topology_for_devices([device]).fingerprint()
    except Exception as error:  # a backend without topologies
        topology = type(error).__name__
    return (
        *(client.platform, client.platform_version, topology, device.device_kind, device.id, len(client.devices())),
        str(getattr(device, "compute_capability", "")),
        *(platform.machine(), platform.system(), os.cpu_count(), _processor()),
    )


def _processor() -> str:
    """Return a digest of the instruction set; a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    return hashlib.sha256("\n".join(sorted({x for x in lines if x.startswith(PROCESSOR)})).encode()).hexdigest()
