"""Atomic writing of files, under a given name or the first free one, and the identity of files behind paths."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

FileKey = tuple[int, int]  # device and inode

_unfinished: set[Path] = set()  # temporary files of this process, for an exit without stack unwinding


def publish(data: bytes, path: Path) -> None:
    """Write a file that appears under its name only when it is complete; a file of that name is replaced.

    Raises:
        OSError: if it cannot be written there.
    """
    publish_all({path: data})


def publish_free(data: bytes, candidates: Iterable[Path]) -> Path:
    """Write a file under the first name that is free, and return the name. All candidates are in one folder.

    A name is claimed atomically: of several processes that try it at once, one gets it. Nothing is replaced.

    Raises:
        OSError: if it cannot be written there.
    """
    return publish_all_free([data], ([name] for name in candidates))[0]


def publish_all(files: Mapping[Path, bytes]) -> None:
    """Write files that appear under their names only when all are complete, the first one last; others are replaced.

    Raises:
        OSError: if they cannot be written there.
    """
    with contextlib.ExitStack() as stack:
        written = [(stack.enter_context(_temporary(data, path)), path) for path, data in files.items()]
        for temporary, path in reversed(written):
            os.replace(temporary, path)


def publish_all_free(data: Sequence[bytes], candidates: Iterable[Sequence[Path]]) -> Sequence[Path]:
    """Write files under the first names that are free together, and return these. As `publish_free`, for several.

    Raises:
        OSError: if they cannot be written there.
    """
    groups = iter(candidates)
    names = next(groups)
    with contextlib.ExitStack() as stack:
        written = [stack.enter_context(_temporary(each, path)) for each, path in zip(data, names, strict=True)]
        while not _take_all(names, written):
            names = next(groups)
    return names


def temporary_beside(path: Path) -> Path:
    """Return a unique name in the folder of `path`: `.NAME.PID.RANDOM.part`."""
    kept = os.fsencode(path.name)[:200].decode(errors="ignore")  # file systems allow 255 bytes
    return path.with_name(f".{kept}.{os.getpid()}.{secrets.token_hex(4)}.part")


def discard_unfinished() -> None:
    """Remove the temporary files of this process, before an exit without stack unwinding."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            path.unlink()


def file_key(path: str | os.PathLike) -> FileKey | None:
    """Return the identity of the file behind a path, equal for all links and spellings; None if there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return found.st_dev, found.st_ino


def same_file(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Return whether two paths lead to the same existing file."""
    found = file_key(one)
    return found is not None and found == file_key(other)


@contextlib.contextmanager
def _temporary(data: bytes, path: Path) -> Iterator[Path]:
    """Write a temporary file beside `path`, and remove it at the end unless it was renamed."""
    temporary = temporary_beside(path)
    _unfinished.add(temporary)
    try:
        temporary.write_bytes(data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def _take_all(names: Sequence[Path], temporaries: Sequence[Path]) -> bool:
    """Give temporary files the names if all are free, the first one claimed first; False if one is taken."""
    if any(map(os.path.lexists, names)):
        return False
    if len(names) == 1:
        return _take(names[0], temporaries[0])
    claimed: list[Path] = []
    for name in names:
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:  # since the look: another process has taken it
            for one in claimed:
                one.unlink(missing_ok=True)
            return False
        claimed.append(name)
    for name, temporary in zip(reversed(names), reversed(temporaries), strict=True):
        os.replace(temporary, name)
    return True


def _take(name: Path, temporary: Path) -> bool:
    """Give a temporary file the name if it is free; False if it is taken."""
    if os.path.lexists(name):
        return False
    try:
        os.link(temporary, name)
    except FileExistsError:
        return False
    except OSError:  # the file system has no hard links; for a moment the file is empty
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, name)
    return True
