"""Compiling for NVIDIA GPUs on a machine without one: a program's kernels, memory and collectives.

Nothing runs: no timing, no autotuning, no cuDNN plans. It needs `jax-cuda13-plugin` and `jax-cuda13-pjrt` of JAX's
version, `nvidia-cuda-nvcc` and `nvidia-nvvm`, all `--no-deps`; Mosaic GPU also needs `absl-py`. It needs no driver, no
CUDA and no cuDNN. Import this before JAX where JAX_PLATFORMS is not set.
"""

import collections
import contextlib
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
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
HOPPER = (
    'platform_version: "Compute Capability 9.0a" cuda_compute_capability { major: 9 feature_extension: '
    "ACCELERATED_FEATURES } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800 "
    "shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472"
)
AMPERE = (
    'platform_version: "Compute Capability 8.0" cuda_compute_capability { major: 8 } '
    "core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040 "
    "shared_memory_per_block_optin: 166912 shared_memory_per_core: 167936"
)
DEVICES = {  # memory in bytes, bandwidth in bytes per second, properties of the architecture
    "A100": (85197979648, 2039000000000, AMPERE),
    "H100": (84942979072, 3352000000000, HOPPER),
    "H200": (151397597184, 4800000000000, HOPPER),
}
TARGET = """
gpu_device_info {{
  name: "NVIDIA {name}" device_vendor: "NVIDIA Corporation" {kind}
  device_address_bits: 64 ecc_enabled: true device_memory_size: {memory} memory_bandwidth: {bandwidth}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 shared_memory_per_block: 49152
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "{cudnn[0]}.{cudnn[1]}.{cudnn[2]}"
}}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
"""
# Without a device XLA cannot autotune, and would choose Triton kernels for all products, unlike on a real GPU.
OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
# ptxas's output for the kernels, and the host program that launches them.
MOSAIC_DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_HOST_LLVM")


def missing_packages() -> str | None:
    """Return why compiling for a GPU is impossible here; None: it is possible."""
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
    memory, bandwidth, kind = DEVICES[name]
    target = TARGET.format(name=name, memory=memory, bandwidth=bandwidth, kind=kind, cudnn=CUDNN)
    return tuple(topologies.get_topology_desc(name, "cuda", target_config=target, topology=f"1x1x{count}").devices)


def gpu_mesh(sizes: Mapping[str, int] | None = None, name: str = "H100") -> Mesh:
    """Return a mesh over compile-only GPUs of one machine; one device unless sizes are given."""
    sizes = {"data": 1} if sizes is None else sizes
    devices = np.asarray(_devices(math.prod(sizes.values()), name)).reshape(tuple(sizes.values()))
    return check_mesh(Mesh(devices, tuple(sizes)))


@contextlib.contextmanager
def cudnn_assumed() -> Iterator[None]:
    """Let JAX trace cuDNN attention without cuDNN, whose version it checks at trace time."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    original = private.check_cudnn_version
    private.check_cudnn_version = lambda: CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2]
    try:
        yield
    finally:
        private.check_cudnn_version = original


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Disable JAX's persistent cache, whose entries cannot be read for a device that is not present."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def compile_for_gpu(
    function: Callable[..., Any], *arguments: Any, mesh: Mesh | None = None, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compile for the devices of `gpu_mesh`; arguments are pytrees of jax.ShapeDtypeStruct, replicated by default.

    `options` are XLA's, in addition to `OPTIONS`.
    """
    mesh = gpu_mesh() if mesh is None else mesh
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or replicated), arguments
    )
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    # Pallas takes the architecture from the abstract mesh's device.
    with nothing_kept(), cudnn_assumed(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.trace(*sharded).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=OPTIONS | dict(options or {}))


def custom_calls(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """Count the calls of libraries and hand-written kernels by name."""
    return collections.Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))


def fusions(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """Count XLA's fusions by kind."""
    return collections.Counter(re.findall(r" fusion\(.*kind=k(\w+)", compiled.as_text()))


@contextlib.contextmanager
def _compiler_output() -> Iterator[list[str]]:
    """Enable Mosaic GPU's dumps, and collect everything that this process prints, from any language."""
    output: list[str] = []
    before = {name: os.environ.get(name) for name in MOSAIC_DUMPS}
    os.environ.update(dict.fromkeys(MOSAIC_DUMPS, "1"))
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield output
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            file.seek(0)
            output.append(file.read().decode(errors="replace"))


def kernel_resources(
    function: Callable[..., Any], *arguments: Any, mesh: Mesh | None = None
) -> tuple[jax.stages.Compiled, dict[str, int | None] | None]:
    """Compile, and return the resources of the Pallas kernel in it; None: no kernel, or no output of ptxas.

    `registers` per thread, `spills` in bytes, and `shared` bytes of a block; None where unknown, as for Mosaic GPU of
    JAX 0.12. Mosaic GPU compiles a kernel once per process and prints nothing the second time.
    """
    with tempfile.TemporaryDirectory() as dumped:
        with _compiler_output() as output:
            options = {"xla_dump_to": dumped, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "^ptx$"}
            compiled = compile_for_gpu(function, *arguments, mesh=mesh, options=options)
        names = re.findall(r'"__gpu\$xla\.gpu\.triton".*name = \\?"(\w+)', compiled.as_text())
        if names:
            return compiled, _triton_resources(Path(dumped), names[0])
    return compiled, _resources(output[0], re.findall(r"@mosaic_gpu_get_function\(.*, i32 (\d+), i32 \d+\)", output[0]))


def _triton_resources(dumped: Path, name: str) -> dict[str, int | None] | None:
    """Run ptxas again on a kernel's PTX, as XLA does, for its verbose output."""
    [ptx] = [path for path in dumped.glob("*.ptx") if f".entry {name}(" in path.read_text()]
    architecture = re.search(r"\.target (\w+)", ptx.read_text())
    assert architecture, ptx.read_text()[:200]
    package = importlib.util.find_spec("nvidia")
    assert package, missing_packages()
    [assembler] = [path for root in package.submodule_search_locations or () for path in Path(root).glob("*/bin/ptxas")]
    command = [assembler, "-v", "--gpu-name", architecture[1], ptx, "-o", os.devnull]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    launches = "".join(path.read_text() for path in dumped.glob("*thunk_sequence.txt"))
    return _resources(done.stdout + done.stderr, re.findall(rf" {name} grid: .*shared_memory: (\d+) bytes", launches))


def _resources(output: str, shared: list[str]) -> dict[str, int | None] | None:
    """Parse ptxas's output for a kernel; `shared` memory is requested at the launch, which ptxas does not see."""
    found = [int(number) for number in re.findall(r"[Uu]sed (\d+) registers", output)]
    if not found:
        return None
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", output)]
    return {"registers": max(found), "spills": sum(spills), "shared": max(map(int, shared), default=None)}
