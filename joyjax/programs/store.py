"""The folder of kept programs (docs/programs.md): files by key, each with the digest of its content.

A program is a pickle: who can write the folder could run code here. So it is used only if it belongs to this user and
nobody else may enter it, and a file is read only with a matching digest. Whatever is wrong, a program is not found.
"""

import contextlib
import dataclasses
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import Any

import jax

from joyjax.files import publish

SWITCH = "JOYJAX_KEEP_PROGRAMS"  # 1: on; the program `joyjax` sets it, unless the user has
NAME = "stages"  # in the folder of JAX's compile cache
SUFFIX = ".program"
STALE = 3600  # seconds after which the temporary file of a killed process is removed
OTHERS = stat.S_IRWXG | stat.S_IRWXO
DIGEST = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder with at most `limit` bytes; -1: no limit."""

    folder: Path
    limit: int

    def read(self, key: str) -> bytes | None:
        """Return the content of a key; None if there is none, or it is damaged or not this user's own."""
        if not self._is_private():
            return None
        try:
            number = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                return None
            with open(number, "rb", closefd=False) as file:
                digest, content = file.read(DIGEST), file.read()
            if hashlib.sha256(key.encode() + content).digest() != digest:
                return None
            with contextlib.suppress(OSError):
                os.utime(number)  # the last use
            return content
        except OSError:
            return None
        finally:
            os.close(number)

    def write(self, key: str, content: bytes) -> None:
        """Keep a content; the least recently used ones are removed. Nothing is kept if that is not possible."""
        if 0 <= self.limit < len(content) + DIGEST:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_private():
                publish(hashlib.sha256(key.encode() + content).digest() + content, self._path(key))
                self._evict()

    def remove(self, key: str) -> None:
        """Remove a key."""
        if self._is_private():
            with contextlib.suppress(OSError):
                self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _is_private(self) -> bool:
        try:
            found = os.lstat(self.folder)
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & OTHERS

    def _evict(self) -> None:
        """Remove the least recently used programs beyond the limit, and what killed processes have left."""
        entries, total = [], 0
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                found = path.lstat()
                if path.suffix == SUFFIX:
                    entries.append((found.st_mtime_ns, found.st_size, path))
                    total += found.st_size
                elif found.st_mtime < time.time() - STALE:
                    path.unlink()
        for _, size, path in sorted(entries):
            if not 0 <= self.limit < total:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def configured() -> Store | None:
    """Return the store beside JAX's compile cache, with its limit; None where either is off, or not in a folder."""
    if os.environ.get(SWITCH) != "1":
        return None
    config: Any = jax.config
    folder, limit = config.jax_compilation_cache_dir, config.jax_compilation_cache_max_size
    if not folder or "://" in folder or not config.jax_enable_compilation_cache or limit == 0:
        return None
    if not hasattr(os, "geteuid") or not hasattr(os, "O_NOFOLLOW"):  # no owners to check
        return None
    return Store(Path(folder).absolute() / NAME, limit)
