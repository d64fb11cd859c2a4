"""File names of the results and previews of `joyjax edit`; no input is replaced."""

import dataclasses
import errno
import glob
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from joyjax.errors import RequestError
from joyjax.files import publish, publish_free, same_file

if TYPE_CHECKING:
    from PIL import Image

    from joyjax.runtime.result import Result

DEFAULT = Path("edit.png")
STANDARD_OUTPUT = Path("-")


@dataclasses.dataclass(frozen=True)
class Targets:
    """Names of results: `output` and then numbered names, or edit.png, edit-2.png, …; only `output` is overwritten."""

    output: Path | None
    quality: int | str | None = None
    metadata: bool = True

    @property
    def first(self) -> Path:
        """The name to which numbers are appended."""
        return DEFAULT if self.output in (None, STANDARD_OUTPUT) else self.output

    def candidates(self) -> Iterator[Path]:
        """Yield names in the order in which they are tried, including taken ones."""
        first = self.first
        numbered = (first.with_name(f"{first.stem}-{number}{first.suffix}") for number in itertools.count(2))
        return numbered if self.output is not None else itertools.chain([first], numbered)

    def expected(self, number: int) -> Path:
        """Return the name of the result with this index, unless another process takes it meanwhile."""
        if number == 0 and self.output is not None:
            return self.first
        return next(path for path in self.candidates() if not os.path.lexists(path))

    def check(self, count: int, inputs: Sequence[tuple[str, str | Path]]) -> None:
        """Check before the edit that the results can be written and do not replace an input.

        `inputs` are the inputs of the edit, each with its option; those that are not files are skipped.

        Raises:
            RequestError: naming --output or --quality.
        """
        from joyjax.media.formats import check_quality, format_of

        if self.output == STANDARD_OUTPUT:
            if count > 1:
                raise RequestError(f"--output is -, which takes one result, and --num-images is {count}")
            if sys.stdout.isatty():
                raise RequestError("--output is -, but standard output is a terminal; send it to a file or a program")
        elif self.output is not None:
            format_of(self.output)
            if self.output.is_dir():
                raise RequestError(f"--output is {self.output}, which is a folder; give the name of a file")
            for option, path in inputs:
                if same_file(self.output, path):
                    raise RequestError(
                        f"--output is {self.output}, which is the picture of {option} and would be replaced; "
                        "give another name"
                    )
        check_quality(self.quality, format_of(self.first))
        if self.output != STANDARD_OUTPUT:
            _check_folder(self.first)

    def check_layers(self, inputs: Sequence[tuple[str, str | Path]]) -> None:
        """Check the same of the files of layers, before the edit by a model that makes them.

        Raises:
            RequestError: naming --output.
        """
        from joyjax.media.formats import format_of

        if self.output == STANDARD_OUTPUT:
            raise RequestError("--output is -, which takes one picture, and this model makes layers; name a file")
        if not format_of(self.first).alpha:
            raise RequestError(
                f"--output is {self.output}, and {self.first.suffix} files have no transparency, which layers need; "
                "name a .png, .webp, .avif or .tiff"
            )
        if self.output is None:
            return
        for taken in self.output.parent.glob(f"{glob.escape(self.output.stem)}-layer*{self.output.suffix}"):
            for option, path in inputs:
                if same_file(taken, path):
                    raise RequestError(
                        f"--output is {self.output}, and its layer {taken} is the picture of {option} and would be "
                        "replaced; give another name"
                    )

    def save(self, result: "Result", number: int) -> Path:
        """Write the result with this index, and return its name."""
        from joyjax.media.formats import format_of

        if self.output == STANDARD_OUTPUT:
            _write_all(result.encoded(format_of(DEFAULT), Path(), metadata=self.metadata, quality=self.quality))
            return STANDARD_OUTPUT
        self.first.parent.mkdir(parents=True, exist_ok=True)
        if number == 0 and self.output is not None:
            result.save(self.output, metadata=self.metadata, quality=self.quality)
            return self.output
        return result.save_free(self.candidates(), metadata=self.metadata, quality=self.quality)


class Previews:
    """Previews of the steps of one result, STEM-step-001.png and so on, with a stem that is new in the folder."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        self._stem = stem
        self._taken = False

    def save(self, image: "Image.Image", step: int) -> None:
        """Write the preview of a step. The first one claims a stem; existing files are not replaced."""
        from joyjax.media.formats import PNG, encode, writing

        data = encode(image, PNG)
        with writing(self._folder):
            if self._taken:
                publish(data, self._folder / _preview(self._stem, step))
                return
            path = publish_free(data, (self._folder / _preview(stem, step) for stem in self._free_stems()))
            self._stem, self._taken = path.name.removesuffix(_preview("", step)), True

    def _free_stems(self) -> Iterator[str]:
        numbered = (f"{self._stem}-{number}" for number in itertools.count(2))
        for stem in itertools.chain([self._stem], numbered):
            if not any(self._folder.glob(f"{glob.escape(stem)}-step-*.png")):
                yield stem


def _preview(stem: str, step: int) -> str:
    return f"{stem}-step-{step:03}.png"


def _check_folder(output: Path) -> None:
    """Raise RequestError unless a file's folder is writable, or can be created."""
    existing = next(path for path in output.parents if path.exists())
    if not existing.is_dir():
        raise RequestError(f"--output is {output}, but {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK):
        raise RequestError(f"{existing.absolute()} is not writable; name another folder with --output")


def _write_all(data: bytes) -> None:
    """Write to the descriptor of standard output. Unlike for messages, a closed pipe is an error."""
    sys.stdout.flush()
    try:
        with open(1, "wb", closefd=False) as output:
            output.write(data)
    except OSError as error:
        reason = {errno.EPIPE: "its reader has closed it", errno.EBADF: "it is closed"}.get(
            error.errno or 0, error.strerror
        )
        raise RequestError(f"the picture cannot be written to standard output: {reason}") from None
