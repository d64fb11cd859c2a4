"""How much memory a run has needed."""

import sys

import jax


def peak_bytes() -> int | None:
    """Return the most memory that this process has held so far, on its fullest device, or on the host for a CPU."""
    if jax.default_backend() == "cpu":
        if sys.platform == "win32":
            return None
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((size for size in told if size is not None), default=None)
