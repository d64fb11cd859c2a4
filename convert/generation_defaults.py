"""What a checkpoint says of itself in joyjax.json: its native size and settings, where they are not its family's.

    {"base_size": 128, "steps": 4, "guidance_scale": 1.0, "learned": "shapes"}

In a Diffusers folder the file holds nothing else, and Diffusers does not read it. `joyjax convert` carries the four
over into the manifest, which has the same name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError
from joyjax.reading import LARGEST_FLOAT, read_json

FILE = "joyjax.json"
DOMAINS = ("shapes",)
LARGEST_SIZE = 2**13
KEYS = {
    "base_size": "base_size",
    "steps": "steps",
    "guidance_scale": "guidance_scale",
    "learned": "domain",
}  # of the file


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Settings that a checkpoint was made for; None: the family's own.

    `base_size` is the side of the square whose area the buckets have. `domain`, the key "learned" of the file,
    names the one small world that a demo model knows, so that the program can say where that ends.
    """

    base_size: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    domain: str | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> "GenerationDefaults":
        """Take the four keys out of a json object; raises CheckpointError for values that cannot be."""
        values: dict[str, Any] = {name: raw.get(key) for key, name in KEYS.items()}
        size, scale, domain = (values[name] for name in ("base_size", "guidance_scale", "domain"))
        for name in ("base_size", "steps"):
            if values[name] is not None and (type(values[name]) is not int or values[name] < 1):
                raise CheckpointError(f"{where}: {name} is {values[name]!r}; expected a positive whole number or null")
        if size is not None and (size % 16 or not 32 <= size <= LARGEST_SIZE):
            raise CheckpointError(f"{where}: base_size is {size}; expected a multiple of 16 from 32 to {LARGEST_SIZE}")
        if scale is not None and (type(scale) not in (int, float) or not abs(scale) <= LARGEST_FLOAT):
            raise CheckpointError(f"{where}: guidance_scale is {scale!r}; expected a number or null")
        if domain not in (None, *DOMAINS):
            raise CheckpointError(f"{where}: learned is {domain!r}; expected null or one of {', '.join(DOMAINS)}")
        return cls(size, values["steps"], None if scale is None else float(scale), domain)

    def plain(self) -> dict[str, Any]:
        """Return it as the file has it."""
        return {key: getattr(self, name) for key, name in KEYS.items()}

    @classmethod
    def read(cls, folder: Path) -> "GenerationDefaults":
        """Read the file in a checkpoint's folder, which need not be there."""
        file = folder / FILE
        return cls.from_json(read_json(file), str(file)) if file.is_file() else cls()
