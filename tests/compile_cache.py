"""The tests' persistent compilation cache: one folder, kept between runs, for all workers and their subprocesses.

JOYJAX_TEST_CACHE names another folder; empty disables the cache. JAX's own lock makes it safe for several processes,
and its size is bounded. A test that counts compilations or times a cold start gives its programs an empty cache with
`fresh`.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

SIZE = 2**31  # bytes; the least recently used entries are evicted first
LEAST = 0.2  # seconds of compile time below which programs are not cached
KEEP = "JOYJAX_KEEP_PROGRAMS"  # joyjax's own: off in tests, which replace functions that stages are traced from
SETTINGS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


def folder() -> Path | None:
    """Return the folder for these versions and this processor; None: no cache."""
    root = os.environ.get("JOYJAX_TEST_CACHE", str(Path.home() / ".cache" / "joyjax-tests"))
    if not root:
        return None
    return Path(root).expanduser() / f"jax-{metadata.version('jax')}-python-{platform.python_version()}-{_processor()}"


def _processor() -> str:
    """Return a digest of this processor's instruction set: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]


def settings() -> dict[str, str]:
    """Return the environment variables of the cache, which JAX reads when it is imported."""
    cache = folder()
    return dict(zip(SETTINGS, map(str, (cache, SIZE, LEAST)), strict=True)) if cache else {}


def remove_incomplete() -> None:
    """Remove the incomplete entries of killed processes: JAX writes an entry and then the time of its last use."""
    cache = folder()
    for entry in cache.glob("*-cache") if cache else ():
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)


def fresh(environment: Mapping[str, str], cache: Path) -> dict[str, str]:
    """Return the environment of a user with empty caches in `cache`."""
    kept = {name: value for name, value in environment.items() if name not in (*SETTINGS, KEEP)}
    return {**kept, "XDG_CACHE_HOME": str(cache)}
