"""Memory check: the parameters and working memory of a model, compared with the memory of a device."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.source.model import model_folder
from joyjax.families.family import Family
from joyjax.families.registry import DEFAULT, family_in
from joyjax.runtime.info import Requirement, parameter_requirement
from joyjax.runtime.storage import stored_form
from joyjax.sharding.devices import devices


@dataclasses.dataclass(frozen=True)
class Budget:
    """The memory for arrays, of one device, or of the host if JAX has a CPU only. `bytes` None: not reported."""

    device: str
    host: bool
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class MemoryCheck:
    """The memory that a model needs with all its networks resident, and the budget; `str` is a report."""

    model: str
    requirement: Requirement
    working_bytes: int
    budget: Budget

    @property
    def bytes(self) -> int:
        """Parameters and working memory."""
        return self.requirement.resident_bytes + self.working_bytes

    @property
    def fits(self) -> bool:
        """Whether the model fits; True if the budget is not reported."""
        return self.budget.bytes is None or self.bytes <= self.budget.bytes

    def __str__(self) -> str:
        """Return two sentences for the user."""
        needed = (
            f"{self.model} in {self.requirement.dtype} needs {_readable(self.requirement.resident_bytes)} for its "
            f"parameters and about {_readable(self.working_bytes)} to work: {_readable(self.bytes)}."
        )
        where = "This machine's host memory" if self.budget.host else f"The {self.budget.device} of this machine"
        if self.budget.bytes is None:
            return f"{needed} {where} does not report its size."
        has = f"{where} has {_readable(self.budget.bytes)}" + ("" if self.budget.host else " for JAX")
        if self.fits:
            return f"{needed} {has}: it fits."
        return f"{needed} {has}: it does NOT fit, {_readable(self.bytes - self.budget.bytes)} are missing."


def budget() -> Budget:
    """Return the memory of JAX's first device, or of the host if that is a CPU.

    Of a GPU, the share that JAX allocates: three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another.
    """
    device = devices()[0]
    if device.platform != "cpu":
        return Budget(device.device_kind, host=False, bytes=(device.memory_stats() or {}).get("bytes_limit"))
    return Budget(device.device_kind, host=True, bytes=host_bytes())


def host_bytes() -> int | None:
    """Return the memory of the host; None if the system does not report it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def what_fits(
    model: str | os.PathLike | None = None, *, dtype: str = "bfloat16", budget_here: Budget | None = None
) -> MemoryCheck:
    """Compare a model with the memory of this machine, or another; for a hub id, only configurations are downloaded.

    Raises:
        CheckpointError: as `joyjax.load` does for faulty configurations.
        RequestError: for an unknown dtype.
    """
    folder = model_folder(model, weights=False)
    family = family_in(folder)
    configs = {component.folder: component.read_config(folder) for component in family.components}
    base_size = GenerationDefaults.read(folder).base_size or family.defaults["base_size"]
    requirement = parameter_requirement(family.components, configs, dtype, stored_form(folder))
    name = "the demo model" if model is None else str(model)
    return MemoryCheck(name, requirement, working_bytes(family, configs, base_size), budget_here or budget())


def working_bytes(family: Family, configs: Mapping[str, Any], base_size: int) -> int:
    """Return the largest working memory of a stage, besides parameters, for a typical request."""
    return max(stage.working_bytes for stage in family.cost(configs, family.usual(configs, base_size)))


def real_fit(budget_here: Budget | None = None) -> MemoryCheck:
    """Compare the published model in bfloat16 with the memory of this machine, or another; nothing is downloaded."""
    real = DEFAULT.published
    requirement = Requirement("bfloat16", real.resident_bytes, real.staged_bytes)
    return MemoryCheck(real.name, requirement, real.working_bytes, budget_here or budget())


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
