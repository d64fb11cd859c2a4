"""Kept measurements of kernels: a JSON file for each device, driver, version, dtype and shape.

They are in `joyjax/kernels` in XDG_CACHE_HOME, or in `~/.cache`. A file that is damaged, or of another form, counts as
missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from joyjax.files import publish
from joyjax.kernels.cases import Shape
from joyjax.kernels.dispatch import PALLAS
from joyjax.kernels.measure import Measured
from joyjax.kernels.measured import MEASURED
from joyjax.reading import parse_json
from joyjax.version import VERSION

DRIVER = Path("/proc/driver/nvidia/version")
LOCAL_FIELDS = ("driver", "joyjax")  # that a shipped measurement does not have
TYPES: Mapping[str, tuple[type, ...]] = {
    "operation": (str,),
    "kernel": (str,),
    "chosen": (bool,),
    "reason": (str,),
    "xla_us": (float, type(None)),
    "kernel_us": (float, type(None)),
}


@dataclasses.dataclass(frozen=True)
class Key:
    """What a measurement holds for: the device and its driver, the versions, and the dtype and shape of the arrays."""

    device: str
    driver: str
    jax: str
    joyjax: str
    dtype: str
    kernel: str
    shape: Shape

    @classmethod
    def of(cls, device: Any, dtype: str, kernel: str, shape: Shape) -> "Key":
        """Return the key of measurements on a device."""
        return cls(device.device_kind, driver(device), jax.__version__, VERSION, dtype, kernel, shape)

    def plain(self) -> dict[str, Any]:
        """Return the key as JSON data."""
        return dataclasses.asdict(self)

    @property
    def file(self) -> str:
        """The name of its file."""
        digest = hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()
        return f"{digest[:32]}.json"


def driver(device: Any) -> str:
    """Return the version of the driver, or what JAX knows of the platform."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", DRIVER.read_text(errors="replace")):
            return found[1]
    return " ".join(str(getattr(device.client, "platform_version", "")).split())


def cache_folder() -> Path:
    """Return the folder of the measurements."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "joyjax", "kernels")


def read(key: Key, folder: Path) -> list[Measured] | None:
    """Return the kept rows of a key, else the shipped ones; None if there are none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        held = parse_json((folder / key.file).read_bytes())
        if held["key"] == key.plain():
            return rows_of(held["rows"])
    wanted = {name: value for name, value in key.plain().items() if name not in LOCAL_FIELDS}
    for entry in MEASURED:
        if {name: value for name, value in entry.items() if name != "rows"} == wanted:
            return rows_of(entry["rows"])
    return None


def write(key: Key, rows: Sequence[Measured], folder: Path) -> None:
    """Keep rows; where the folder cannot be written, they are measured again by the next process."""
    held = {"key": key.plain(), "rows": [dataclasses.asdict(row) for row in rows]}
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        publish(f"{json.dumps(held, indent=1)}\n".encode(), folder / key.file)


def kept(folder: Path) -> Iterator[tuple[dict[str, Any], list[Measured]]]:
    """Yield the key, as JSON data, and the rows of every file that is whole."""
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            held = parse_json(file.read_bytes())
            shape = Shape(**held["key"]["shape"])
            if all(type(size) is int for size in dataclasses.astuple(shape)):
                yield Key(**{**held["key"], "shape": shape}).plain(), rows_of(held["rows"])


def rows_of(plain: Any) -> list[Measured]:
    """Return rows from JSON data.

    Raises:
        TypeError, ValueError, KeyError: if they are not rows of a measurement.
    """
    rows = []
    for row in plain:
        if (
            not isinstance(row, dict)
            or row.keys() != TYPES.keys()
            or not all(type(row[name]) in types for name, types in TYPES.items())
        ):
            raise ValueError(f"{row!r:.200} is no row of a measurement")
        if row["kernel"] not in PALLAS:
            raise ValueError(f"{row['kernel']!r:.200} is no kernel")
        rows.append(Measured(**row))
    return rows
