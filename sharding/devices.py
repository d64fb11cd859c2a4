"""JAX's devices, and a JoyJaxError with the reason where there are none."""

import contextlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator

import jax

from joyjax.errors import JoyJaxError

PLATFORMS, ONE_PLATFORM = "JAX_PLATFORMS", "JAX_PLATFORM_NAME"
LOGGER = logging.getLogger("jax._src.xla_bridge")  # JAX's own, for plugins that fail


def devices() -> list[jax.Device]:
    """Return JAX's devices, those of all processes.

    Raises:
        JoyJaxError: if JAX has none of the platform that the environment or its own settings name.
    """
    with _plugin_faults() as faults:
        try:
            found = jax.devices()
        except (RuntimeError, AssertionError) as error:  # AssertionError: no listed platform is present
            raise JoyJaxError(_reason(error, faults)) from error
    for fault in faults:
        LOGGER.warning("JAX cannot use what is installed for other devices than %s: %s", found[0].platform, fault)
    return found


def cpu_device() -> jax.Device:
    """Return the CPU device, which exists beside other devices unless the environment excludes it.

    Raises:
        JoyJaxError: as `devices`, and where JAX_PLATFORMS leaves out the CPU.
    """
    devices()
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = _platforms()
        raise JoyJaxError(
            f"{PLATFORMS} is {platforms!r}, which leaves out the CPU; set it to {platforms},cpu, or unset it"
        ) from error


@contextlib.contextmanager
def _plugin_faults() -> Iterator[list[str]]:
    """Collect the reasons why plugins fail, one line each, in place of the tracebacks that JAX logs."""
    faults: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        error = record.exc_info[1] if record.exc_info else None
        faults.append(" ".join(str(error or record.getMessage()).split()).rstrip("."))
        return False

    LOGGER.addFilter(collect)
    try:
        yield faults
    finally:
        LOGGER.removeFilter(collect)


def _reason(error: Exception, faults: list[str]) -> str:
    platforms, one = _platforms(), os.environ.get(ONE_PLATFORM)
    after = re.match("Unknown backend|Backend '", str(error))  # platforms are initialised; choosing one by name failed
    name, value = (ONE_PLATFORM, one) if one and (after or not platforms) else (PLATFORMS, platforms)
    if not value:
        return f"JAX finds no device to run on: {error}"
    installed = _installed()
    source = "" if os.environ.get(name) == value else f" (in JAX's settings, {name.lower()})"
    wanted = [part for part in value.split(",") if part not in installed] or value.split(",")
    if {"cuda", "gpu"} & set(wanted):
        reason = "JAX finds no NVIDIA GPU here that it can use" + (f" ({faults[0]})" if faults else "")
        remedy = f"unset {name}" + (
            "" if "cuda" in installed else ", or for an NVIDIA GPU: pip install 'joyjax[cuda13]'"
        )
    else:
        reason, remedy = f"JAX has no platform {wanted[0]!r} here", f"unset {name}, or set it to one of these"
    return f"{name} is {value!r}{source}, but {reason}; installed: {', '.join(installed)}; {remedy}"


def _platforms() -> str | None:
    return getattr(jax.config, "jax_platforms", None)  # from the environment, or set since


def _installed() -> list[str]:
    """Return the platforms that JAX is installed for, with or without such a device."""
    plugins = {
        "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"),
        "rocm": ("jax-rocm60-plugin", "jax-rocm7-plugin"),
        "tpu": ("libtpu",),
        "METAL": ("jax-metal",),
    }
    names = {distribution.name.lower() for distribution in importlib.metadata.distributions() if distribution.name}
    return ["cpu", *(platform for platform, packages in plugins.items() if names & set(packages))]
