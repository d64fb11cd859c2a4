"""The weight files of a component's folder: their names, and whether they are quantised."""

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.convert.source.headers import read_raw_header
from joyjax.convert.source.tensor_names import quantisation
from joyjax.errors import CheckpointError
from joyjax.reading import read_json

# The default names of Diffusers and Transformers; a variant such as model.fp16.safetensors is not read.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
INDEX = ".index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
VARIANT = re.compile(r"\.(?P<variant>[A-Za-z]\w*)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")

MOST_NAMES = 1000  # that are read of a folder
MOST_SHARDS = 4  # of a component whose headers are read
NOT_QUANTISED = "joyjax reads float32, bfloat16 and float16: take the checkpoint that is not quantised"


def weights_problem(folder: Path) -> tuple[str, str] | None:
    """Return a kind and a message if a component's folder has weights only under names that joyjax does not read."""
    names = sorted(entry.name for entry in itertools.islice(os.scandir(folder), MOST_NAMES))
    if any(name in names for stem in WEIGHTS for name in (stem, stem + INDEX)):
        return None
    if others := [name for name in names if name.endswith(".safetensors")]:
        only = f"{folder} holds no {WEIGHTS[0]} or {WEIGHTS[1]}, only {others[0]}"
        if variant := VARIANT.search(others[0]):
            mark = variant["variant"]
            advice = f"download the files without .{mark} in their names"
            return "variant", f"{only}, of the variant {mark!r}; joyjax reads the default names: {advice}"
        return "other-names", f"{only}; joyjax reads the default names"
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        advice = "download the .safetensors files, or convert these with Diffusers' save_pretrained"
        return "pickle", f"{folder} holds pickled weights only ({pickled[0]}); joyjax reads safetensors only: {advice}"
    return None


def quantised(folder: Path) -> str | None:
    """Return how the weights of a component are quantised, by its config.json or the headers of its first files."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:  # a later reader raises it
        config = {}
    if method := quantisation_method(config):
        return method
    files = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))
    for file in files[:MOST_SHARDS]:
        try:
            header = read_raw_header(folder / file)
        except CheckpointError:
            continue
        if found := quantisation(header.entries, header.metadata):
            return found
    return None


def quantisation_method(config: Mapping[str, Any]) -> str | None:
    """Return the method in a configuration's `quantization_config`; None without one."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    return method[:40] if isinstance(method, str) and method.isprintable() else "of an unnamed method"
