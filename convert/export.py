"""Writing a network as Diffusers and Transformers read it: the key tables backwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from joyjax.convert.component import Component
from joyjax.convert.rules import find_rule
from joyjax.errors import CheckpointError
from joyjax.files import temporary_beside
from joyjax.layers.weights import leaves
from joyjax.storage import forms

FILE = "diffusion_pytorch_model.safetensors"  # as Diffusers names it; Transformers has a name of its own
FILES = {"text_encoder": "model.safetensors"}


def export(component: Component, config: Any, parameters: Mapping[str, Any], folder: Path, dtype: DTypeLike) -> Path:
    """Write the parameters, by dotted path, as one safetensors file into the component's folder of a checkpoint.

    What one picture never reads but the reference's classes hold is written as `Component.unused` says, so that they
    load without a word about missing tensors.

    Raises:
        CheckpointError: for a parameter that is quantized. Diffusers has no such form, and what it stands for is not
            the weights of the model any more.
    """
    if quantized := [path for path, value in parameters.items() if isinstance(value, forms.Leaf)]:
        raise CheckpointError(
            f"{quantized[0]} is quantized, and {len(quantized) - 1} more: what is exported to Diffusers' format must "
            "be exact; load the model without quantize"
        )
    shapes = {path: leaf.shape for path, leaf in leaves(component.abstract(config, dtype).state).items()}
    if shapes.keys() != parameters.keys():
        raise ValueError(f"not the network's parameters: {sorted(shapes.keys() ^ parameters.keys())}")
    tensors = {}
    for path, value in parameters.items():
        rule, numbers = find_rule(component.rules(config), path)
        array = rule.transform.inverse(np.asarray(value))
        tensors[rule.source.format(**numbers)] = np.ascontiguousarray(array.astype(dtype))
    for name, (shape, number) in component.unused(config).items():
        tensors[name] = np.full(shape, number, dtype)
    target = folder / component.folder / FILES.get(component.folder, FILE)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
