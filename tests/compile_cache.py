"""Where the tests keep compiled programs: one folder, kept between runs, for all workers and what they start.

JOYJAX_TEST_CACHE names another place for it; empty, nothing is kept. JAX's own lock makes it safe for several
processes, and its size is bounded. A test that counts compilations or times a cold start gives its programs a fresh
folder with `fresh`.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

SIZE = 2**31  # bytes; what was used least goes first
LEAST = 0.2  # seconds of compiling; what takes less is compiled anew
SETTINGS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


def folder() -> Path | None:
    """Return the folder, by all that a compiled program depends on; None: nothing is kept."""
    place = os.environ.get("JOYJAX_TEST_CACHE", str(Path.home() / ".cache" / "joyjax-tests"))
    if not place:
        return None
    return Path(place).expanduser() / f"jax-{metadata.version('jax')}-python-{platform.python_version()}-{_processor()}"


def _processor() -> str:
    """Return a short name for the instructions of this processor: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


def settings() -> dict[str, str]:
    """Return the environment in which JAX keeps programs there; it reads it when it is imported."""
    place = folder()
    return dict(zip(SETTINGS, map(str, (place, SIZE, LEAST)), strict=True)) if place else {}


def mend() -> None:
    """Remove what a killed process left half-written: JAX writes an entry and then the time of its last use."""
    place = folder()
    for entry in place.glob("*-cache") if place else ():
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)


def fresh(environment: Mapping[str, str], place: Path) -> dict[str, str]:
    """Return the environment of a user whose caches begin empty in `place`."""
    kept = {name: value for name, value in environment.items() if name not in SETTINGS}
    return {**kept, "XDG_CACHE_HOME": str(place)}
