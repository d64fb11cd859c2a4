"""A JAX profile of a block of code, written into a folder."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from joyjax.errors import RequestError
from joyjax.files import temporary_beside


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Write a profile of what runs within the block into `folder`; None: no profile.

    The folder appears when the profile is complete. Only operations are recorded, not the functions of Python, whose
    events would crowd out those of the devices.

    Raises:
        RequestError: as `check_profile_folder`, or if the folder cannot be written.
    """
    if folder is None:
        yield
        return
    check_profile_folder(folder)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    temporary = temporary_beside(folder.absolute())
    try:
        with _writing(folder):
            temporary.mkdir(parents=True)
        with jax.profiler.trace(temporary, profiler_options=options):
            yield
        with _writing(folder):
            if folder.exists():
                folder.rmdir()  # empty; some systems do not rename onto an existing folder
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_profile_folder(folder: Path) -> None:
    """Raise RequestError unless `folder` is missing or empty."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--profile is {folder}, which is a file; name a folder")
    with _writing(folder):
        if folder.exists() and any(folder.iterdir()):
            raise RequestError(f"--profile is {folder}, which is not empty; name a new folder, or empty it")


def trace_file(folder: Path) -> Path:
    """Return the file of a profile that trace viewers open."""
    return next(folder.rglob("*.trace.json.gz"))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"--profile is {folder}, which cannot be written: {error.strerror or error}") from None
