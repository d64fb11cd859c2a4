"""Compiling for NVIDIA GPUs on a machine that has none: which kernels a program has, its memory and its collectives.

Nothing runs: no timing, no autotuning, no plan of cuDNN. It takes `jax-cuda13-plugin` and `jax-cuda13-pjrt` of JAX's
own version, `nvidia-cuda-nvcc` and `nvidia-nvvm`, all `--no-deps`; Mosaic GPU also takes `absl-py`. No driver, no
CUDA, no cuDNN. Import this before JAX where JAX_PLATFORMS is not set.
"""

import collections
import contextlib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from joyjax.sharding.mesh import check_mesh

PACKAGES = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia")
CUDNN = (9, 12, 0)
DEVICES = {"H100": (84942979072, 3352000000000), "H200": (151397597184, 4800000000000)}  # bytes, bytes a second
TARGET = """
gpu_device_info {{
  name: "NVIDIA {name}" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 device_address_bits: 64 ecc_enabled: true
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "{cudnn[0]}.{cudnn[1]}.{cudnn[2]}"
}}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
"""
# Without a device XLA cannot measure, and would give every product to a kernel that a real GPU does not choose.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def missing_packages() -> str | None:
    """Return why nothing can be compiled for a GPU here; None: it can."""
    for name in PACKAGES:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"compiling for a GPU needs {name}; see tests/gpu_compile.py for the packages"
    return None


@functools.cache
def _devices(count: int, name: str) -> tuple[Any, ...]:
    memory, bandwidth = DEVICES[name]
    target = TARGET.format(name=name, memory=memory, bandwidth=bandwidth, cudnn=CUDNN)
    return tuple(topologies.get_topology_desc(name, "cuda", target_config=target, topology=f"1x1x{count}").devices)


def gpu_mesh(sizes: Mapping[str, int] | None = None, name: str = "H100") -> Mesh:
    """Return a mesh over GPUs of one machine that exist for compiling alone; one device unless sizes are given."""
    sizes = {"data": 1} if sizes is None else sizes
    devices = np.asarray(_devices(math.prod(sizes.values()), name)).reshape(tuple(sizes.values()))
    return check_mesh(Mesh(devices, tuple(sizes)))


@contextlib.contextmanager
def cudnn_assumed() -> Iterator[None]:
    """Let JAX trace attention by cuDNN where none is installed: it asks for the version while it traces."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    asked = private.check_cudnn_version
    private.check_cudnn_version = lambda: CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2]
    try:
        yield
    finally:
        private.check_cudnn_version = asked


def compile_for_gpu(function: Callable[..., Any], *arguments: Any, mesh: Mesh | None = None) -> jax.stages.Compiled:
    """Compile for the devices of `gpu_mesh`; arguments are pytrees of jax.ShapeDtypeStruct, whole unless placed."""
    mesh = gpu_mesh() if mesh is None else mesh
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or whole), arguments)
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    # The abstract mesh names the device, from which Pallas takes the architecture.
    with cudnn_assumed(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*placed).lower(lowering_platforms=("cuda",)).compile(compiler_options=OPTIONS)


def custom_calls(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """Count what the program leaves to libraries and to hand-written kernels, by name."""
    return collections.Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))


def fusions(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """Count XLA's own fused kernels, by kind."""
    return collections.Counter(re.findall(r" fusion\(.*kind=k(\w+)", compiled.as_text()))
