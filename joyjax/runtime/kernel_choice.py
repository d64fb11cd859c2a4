"""The choice between a kernel and XLA's own form, for each operation of the denoiser: the option `kernels`.

`auto` measures each kernel on the device, at the shapes of the step, when a step first runs, and keeps the result
(kernel_cache.py). On a mesh over several processes the first one measures, and all follow. On a CPU, and whatever
fails, it is XLA's form.
"""

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from joyjax.errors import RequestError
from joyjax.families.family import Lengths
from joyjax.kernels.cases import Case, Shape, cases
from joyjax.kernels.choice import PLAIN, Kernels
from joyjax.kernels.dispatch import PALLAS, target_of
from joyjax.kernels.measure import NO_MEMORY, Measured, failure, measure, refusal
from joyjax.options import LOAD
from joyjax.runtime.kernel_cache import Key, cache_folder, read, rows_of, write
from joyjax.sharding.attention import sequence_mesh
from joyjax.sharding.hosts import broadcast
from joyjax.sharding.place import devices_along

NOTE = "kernels: "  # the start of a note on them
INTERPRETED = "triton"  # on a CPU, where `pallas` interprets kernels: the quicker of the two
Result = TypeVar("Result")


class KernelChooser:
    """Chooses kernels by the option `kernels`, and remembers the choice of each shape.

    `kernel` is the implementation that the device would run, None if it has none. `notes` are for the user.
    """

    def __init__(
        self, setting: str, device: Any, dtype: str, mesh: Mesh | None = None, *, kernel: str | None, folder: Path
    ):
        self.setting, self.device, self.dtype, self.kernel, self.folder = setting, device, dtype, kernel, folder
        self.shared = mesh is not None and len({one.process_index for one in mesh.devices.flat}) > 1
        self.rows: dict[Shape, list[Measured]] = {}
        self.notes: list[str] = []

    @classmethod
    def of(cls, setting: object, device: Any, dtype: str, mesh: Mesh | None) -> "KernelChooser":
        """Return the chooser for the device, or for the mesh that it is the first of.

        Raises:
            RequestError: for an unknown value of the option, or `pallas` on a device that cannot run the kernels.
        """
        checked: str = LOAD["kernels"].check(setting)
        own = device if mesh is None else mesh.local_devices[0]
        kernel = kernel_of(own)
        if checked == "pallas" and own.platform != "cpu" and kernel is None:
            least = min(PALLAS.values())
            raise RequestError(
                f"kernels is 'pallas', which needs an NVIDIA GPU of compute capability {least[0]}.{least[1]} or more; "
                f"the device is {own.device_kind}: leave the option out"
            )
        if checked == "pallas":
            kernel = kernel or INTERPRETED
        return cls(checked, own, dtype, mesh, kernel=kernel, folder=cache_folder())

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return self.setting != "xla" and self.kernel is not None

    def choose(self, shape: Shape) -> Kernels:
        """Return the kernels for a step of these sizes on each device."""
        if not self.chooses:
            return PLAIN
        if shape not in self.rows:
            # In a thread of its own, where no mesh is in force.
            self.rows[shape] = _in_thread(self._agreed if self.setting == "auto" else self._asked_for, shape)
        chosen: dict[str, Any] = {row.operation: row.kernel for row in self.rows[shape] if row.chosen}
        return dataclasses.replace(PLAIN, **chosen)

    def take_notes(self) -> tuple[str, ...]:
        """Return the notes since the last call."""
        notes, self.notes = tuple(self.notes), []
        return notes

    def _agreed(self, shape: Shape) -> list[Measured]:
        """Return the measured rows; on several processes those of the first one."""
        if not self.shared:
            return self._measured(shape)
        rows = self._measured(shape) if jax.process_index() == 0 else []
        return rows_of(json.loads(broadcast(json.dumps([dataclasses.asdict(row) for row in rows]))))

    def _measured(self, shape: Shape) -> list[Measured]:
        try:
            key = Key.of(self.device, self.dtype, str(self.kernel), shape)
            rows = read(key, self.folder)
            if rows is None:
                started = time.perf_counter()
                with jax.default_device(self.device):
                    rows = [measure(case, str(self.kernel)) for case in self._cases(shape)]
                self.notes.append(summary(rows, time.perf_counter() - started))
                if not any(NO_MEMORY in row.reason for row in rows):  # there may be more memory next time
                    write(key, rows, self.folder)
            return rows
        except Exception as error:  # the choice must not end an edit
            return [Measured(name, str(self.kernel), False, failure(error)) for name in shape.operations]

    def _asked_for(self, shape: Shape) -> list[Measured]:
        """Return the rows of the option `pallas`: every kernel that takes the shapes."""
        rows = []
        with jax.default_device(self.device):
            for case in self._cases(shape):
                reason = refusal(case, str(self.kernel))
                rows.append(Measured(case.operation, str(self.kernel), not reason, reason))
                if reason:
                    self.notes.append(f"{NOTE}{case.operation} is left to XLA: {reason}")
        if self.device.platform == "cpu":
            self.notes.append(f"{NOTE}on a CPU they are interpreted, which is for tests: slower than XLA's form")
        return rows

    def _cases(self, shape: Shape) -> Sequence[Case]:
        return cases("", shape, self.dtype, shape.operations)


def kernel_of(device: Any) -> str | None:
    """Return the implementation for a device: Mosaic GPU from Hopper on, Triton on older GPUs; None elsewhere."""
    capability = target_of(device).capability
    if capability is None:
        return None
    return next((name for name, least in PALLAS.items() if capability >= least), None)


def step_shape(config: Any, lengths: Sequence[Lengths], edits: int) -> Shape:
    """Return the sizes of a step of these edits on each device of the mesh in force."""
    mesh, share = sequence_mesh(config.num_attention_heads), devices_along("batch")
    rows = max(each.passes for each in lengths) * edits

    def most(part: str) -> int:
        return -(-max(getattr(each, part)[1] for each in lengths) // mesh.devices)

    return Shape(
        rows=-(-rows // share),
        images=most("target") + most("references"),
        texts=most("text"),
        heads=config.num_attention_heads // devices_along("heads"),
        width=config.head_dim,
        channels=config.hidden_size,
        modulations=config.modulations,
    )


def summary(rows: Sequence[Measured], seconds: float) -> str:
    """Return one line on a measurement."""
    chosen = [f"{row.operation} {row.ratio:.2f} ×" for row in rows if row.chosen and row.ratio is not None]
    others = "; XLA for the others" if len(chosen) < len(rows) else ""
    found = f"{rows[0].kernel} for {', '.join(chosen)}{others}" if chosen else "XLA for all"
    return f"{NOTE}measured in {seconds:.1f} s: {found} (`joyjax info --kernels` lists them)"


def _in_thread(function: Callable[[Shape], Result], shape: Shape) -> Result:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, shape).result()
