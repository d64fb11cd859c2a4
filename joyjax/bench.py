"""Benchmark of whole edits: the time of each stage, with compilation measured separately."""

import dataclasses
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from joyjax.api import edit
from joyjax.errors import AdviceWarning
from joyjax.runtime.load import Pipeline
from joyjax.runtime.peak_memory import peak_bytes
from joyjax.runtime.result import Result
from joyjax.shapes.draw import render
from joyjax.shapes.scene import random_scene
from joyjax.sharding.devices import devices

PACKAGES = ("joyjax", "jax", "jaxlib", "flax")
PROMPT = "make the circle blue"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measurements on one machine. `seconds` has one value per edit for each stage and for `total`.

    `first` is the time of the first edit, which compiles or loads compiled programs; `seconds` leaves it out.
    `peak_bytes` is of the fullest device, or of the process on a CPU; None if the device does not report it.
    """

    device: str
    devices: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    first: float
    seconds: Mapping[str, tuple[float, ...]]
    peak_bytes: int | None

    @property
    def step_seconds(self) -> float:
        """Median seconds of a denoising step."""
        return statistics.median(self.seconds["denoise"]) / self.settings["steps"]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON data."""
        return dataclasses.asdict(self) | {"step_seconds": self.step_seconds}


def bench(
    pipeline: Pipeline,
    image: Image.Image | None = None,
    prompt: str = PROMPT,
    *,
    repeats: int = 5,
    report: Callable[[Result], None] = lambda result: None,
    **options: Any,
) -> Bench:
    """Edit a picture once to compile, then `repeats` times to measure. `options` are those of `joyjax.edit`.

    Without `image`, a model that takes one is given a drawing: the time does not depend on the content of a picture.
    """
    picture = image
    if picture is None and pipeline.family.tasks & {"edit", "layers"}:
        picture = Image.fromarray(render(random_scene(np.random.default_rng(0))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # the results are not used
        started = time.perf_counter()
        report(edit(pipeline, picture, prompt, **options))
        first = time.perf_counter() - started
        results = []
        for _ in range(repeats):
            results.append(edit(pipeline, picture, prompt, **options))
            report(results[-1])
    return Bench(
        device=_device_name(),
        devices=1 if pipeline.mesh is None else pipeline.mesh.size,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        settings=results[-1].settings,
        first=first,
        seconds={name: tuple(result.timings[name] for result in results) for name in results[0].timings},
        peak_bytes=peak_bytes(),
    )


def _device_name() -> str:
    device = devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU, {platform.processor() or platform.machine()}, {len(devices())} of JAX's devices"
