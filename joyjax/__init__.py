"""Open image-editing diffusion models in JAX.

import joyjax

pipeline = joyjax.load()  # the bundled demo; joyjax.load(FOLDER) for a model of your own
result = joyjax.edit(pipeline, image, "make the red circle blue")
result.save("edit.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

from joyjax.errors import (
    AdviceWarning,
    Cancelled,
    CheckpointError,
    ConfigError,
    JoyJaxError,
    MeshError,
    PictureError,
    RequestError,
)
from joyjax.version import VERSION

if TYPE_CHECKING:
    from joyjax import spatial
    from joyjax.api import edit, edit_batch
    from joyjax.runtime.job import StepEvent
    from joyjax.runtime.load import Pipeline, load
    from joyjax.runtime.result import Result

__version__ = VERSION

__all__ = [
    "AdviceWarning",
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "JoyJaxError",
    "MeshError",
    "PictureError",
    "Pipeline",
    "RequestError",
    "Result",
    "StepEvent",
    "edit",
    "edit_batch",
    "load",
    "spatial",
]

# Loaded on first use, so that `joyjax --help` does not wait for JAX.
_HOMES = {
    "edit": "joyjax.api",
    "edit_batch": "joyjax.api",
    "Result": "joyjax.runtime.result",
    "StepEvent": "joyjax.runtime.job",
    "load": "joyjax.runtime.load",
    "Pipeline": "joyjax.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name == "spatial":
        return importlib.import_module("joyjax.spatial")
    if name not in _HOMES:
        raise AttributeError(f"module 'joyjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
