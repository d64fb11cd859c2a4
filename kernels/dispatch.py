"""Choice of an operation's implementation: the named one, else by a rule for the device that is traced for.

The device is that of the mesh in force, else JAX's default one. The choice is made at trace time, so a program contains
one implementation, and programs for a GPU can be compiled on a machine without one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

HOPPER, AMPERE = (9, 0), (8, 0)
# The compute capability that each Pallas implementation needs. On a CPU, Pallas interprets it, for tests.
PALLAS = {"mosaic": HOPPER, "triton": AMPERE}


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a function is traced for; `capability` is that of an NVIDIA GPU, as (9, 0) is Hopper's."""

    kind: str
    capability: tuple[int, int] | None
    here: bool = True  # False: only compiled for


def target() -> Target:
    """Return the device of the mesh in force, else JAX's default device."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        here = [device for device in jax.local_devices() if device.device_kind == abstract.device_kind]
        # The capability of a device that is only compiled for is unknown. Hopper's is assumed, as in
        # tests/gpu_compile.py.
        return _target(abstract.platform, abstract.device_kind, here[0] if here else None)
    default = getattr(jax.config, "jax_default_device", None)
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return target_of(default)


def on_cpu() -> bool:
    """Return whether a function is traced for a CPU."""
    return target().kind == "cpu"


def target_of(device: Any) -> Target:
    """Return a device as a target."""
    return _target(device.platform, device.device_kind, device)


def _target(platform: str, kind: str, device: Any) -> Target:
    if platform not in ("gpu", "cuda") or kind.startswith("AMD"):
        return Target(kind, None)
    major, _, minor = str(getattr(device, "compute_capability", "9.0")).partition(".")
    return Target(kind, (int(major), int(minor or 0)), device is not None)


def pallas(operation: str, implementation: str | None) -> str | None:
    """Return which Pallas implementation to run; None: the reference, which is left to XLA.

    Without a name it is the reference: a network names the kernels that were measured to be faster (choice.py).

    Raises:
        ValueError: for an unknown name, or one that needs a newer device.
    """
    check_name(operation, implementation, ("reference", *PALLAS))
    if implementation in (None, "reference"):
        return None
    device, least = target(), PALLAS[str(implementation)]
    if device.capability is not None and device.capability < least:
        raise ValueError(
            f"{operation}: {implementation!r} needs compute capability {least[0]}.{least[1]}; {device.kind} has "
            f"{device.capability[0]}.{device.capability[1]}"
        )
    return implementation


def check_name(operation: str, implementation: str | None, names: tuple[str, ...]) -> None:
    """Raise ValueError for an implementation that an operation does not have."""
    if implementation is not None and implementation not in names:
        known = ", ".join(map(repr, names))
        raise ValueError(f"{operation} has no implementation {implementation!r}; there are: {known}")


def interpreted() -> bool:
    """Return whether Pallas kernels are interpreted: on everything but an NVIDIA GPU."""
    return target().capability is None


def lowered_once(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel as a jitted function: calls of equal shapes are traced and lowered once, not once a layer.

    Its keyword arguments are static.
    """

    @functools.cache
    def jitted(target: Target, keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        # Not one function for all targets: a kernel asks for the target while it is traced.
        return jax.jit(functools.partial(kernel, **dict(keywords)))

    @functools.wraps(kernel)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return jitted(target(), tuple(keywords.items()))(*arguments)

    return call


def with_gradient_of(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel as a function with the gradient of the reference, recomputed from the arguments."""

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return kernel(*arguments)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return kernel(*arguments), arguments

    def backward(arguments: Any, cotangents: Any) -> Any:
        return jax.vjp(reference, *arguments)[1](cotangents)

    call.defvjp(forward, backward)
    return call
