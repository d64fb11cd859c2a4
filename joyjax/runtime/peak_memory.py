"""Peak memory of this process."""

import sys

import jax


def peak_bytes() -> int | None:
    """Return the peak memory so far, of the fullest device or, for a CPU, of the host; None if it is not reported."""
    if jax.default_backend() == "cpu":
        if sys.platform == "win32":
            return None
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((size for size in peaks if size is not None), default=None)
