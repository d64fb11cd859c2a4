"""`identify` determines what a path that is given as a model is.

It reads names, first bytes and headers, of bounded size; nothing is unpickled and no weights are read. Errors on
unusable models include its result, and `joyjax info` prints it.
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.convert.source.identity import (
    INDEX,
    NO_ADAPTERS,
    TAKES,
    Identity,
    class_named,
    counted,
    identify_file,
    is_own_layout,
    pipeline_above,
)
from joyjax.convert.source.weights import MOST_NAMES, NOT_QUANTISED, PICKLED, quantised, weights_problem
from joyjax.errors import CheckpointError
from joyjax.reading import quoted, read_json, unfinished
from joyjax.signatures import STAND_INS, signature

PIPELINES = (
    "JoyImageEditPipeline",
    "JoyImageEditPlusPipeline",
    "QwenImagePipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
)  # the classes of joyjax.families.registry
NETWORKS = ("text_encoder", "transformer", "vae")
MANIFEST = "joyjax.json"  # of a converted folder, see convert/manifest.py
MODULAR = "modular_model_index.json"

SINGLE = (".safetensors", ".gguf", ".onnx", *PICKLED)
LARGEST_POINTER = 1024  # bytes of a Git LFS pointer
WITHOUT_WEIGHTS = {  # files that identify the folder of a component without weights
    "scheduler_config.json": "scheduler",
    "preprocessor_config.json": "processor",
    "tokenizer_config.json": "tokenizer",
    "tokenizer.json": "tokenizer",
    "vocab.json": "tokenizer",
}
ROLES = (("Transformer", "transformer"), ("Autoencoder", "vae"), ("Scheduler", "scheduler"), ("UNet", "unet"))


def identify(path: str | os.PathLike) -> Identity:
    """Return what a path is, whatever it is. Raises nothing and downloads nothing."""
    given = Path(path)
    try:
        if given.name and unfinished(given).is_dir() and not (given / INDEX).exists():
            what = "a model whose conversion is unfinished"
            return Identity(str(path), "unfinished", what, "run the same `joyjax convert` again", "broken")
        if not os.path.lexists(given):
            return Identity(str(path), "missing", "missing", TAKES, "broken")
        if given.is_symlink() and not given.exists():
            what = f"a link to {os.readlink(given)}, which does not exist"
            return Identity(str(path), "broken-link", what, "repair the link, or give the folder itself", "broken")
        return _folder(given) if given.is_dir() else identify_file(given)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circular link, in older Pythons
        why = getattr(error, "strerror", None) or str(error)
        return Identity(str(path), "unreadable", f"something that cannot be read ({why})", TAKES, "broken")


def _folder(folder: Path) -> Identity:
    name, absolute = str(folder), folder.absolute()
    names = sorted(entry.name for entry in itertools.islice(os.scandir(folder), MOST_NAMES))
    if absolute.name.startswith(".") and absolute.name.endswith(".unfinished"):
        target = absolute.name[1:].removesuffix(".unfinished")
        what = f"the work folder of an unfinished conversion to {target}"
        return Identity(name, "unfinished", what, "run the same `joyjax convert` again", "broken")
    if not names:
        return Identity(name, "empty", f"an empty folder: {INDEX} is missing", TAKES, "broken")
    if (folder / INDEX).exists():
        return _pipeline(folder)
    if is_own_layout(folder):
        what, advice = "a model in the layout of its own repository", f"convert it first: joyjax convert {name} TARGET"
        return Identity(name, "own-layout", what, advice, "converts")
    if MODULAR in names:
        kind = _read(folder / MODULAR).get("_class_name")
        what = f"a Diffusers folder of a modular pipeline, {class_named(kind)}"
        return Identity(name, "other-pipeline", what, TAKES, details={"class_name": _short(kind)})
    if MANIFEST in names and "format" in _read(folder / MANIFEST):
        what = f"a converted folder that is damaged: {INDEX} is missing"
        return Identity(name, "converted", what, "convert the model again", "broken")
    if "adapter_config.json" in names:
        return _peft(folder)
    if "config.json" in names:
        return _component(folder)
    for file, role in WITHOUT_WEIGHTS.items():
        if file in names:
            return _part(folder, role, role)
    return _without_config(folder, names)


def _pipeline(folder: Path) -> Identity:
    """Describe a folder with model_index.json."""
    name = str(folder)
    try:
        index = read_json(folder / INDEX)
    except CheckpointError as error:
        return Identity(
            name, "pipeline", f"a Diffusers folder that is damaged ({error})", "download it again", "broken"
        )
    kind = index.get("_class_name")
    details: dict[str, Any] = {"class_name": _short(kind)}
    if not isinstance(kind, str) or kind not in PIPELINES:
        what = f"a Diffusers folder of another pipeline, {class_named(kind)}"
        return Identity(
            name, "other-pipeline", what, f"this version of joyjax runs {', '.join(PIPELINES)}", "foreign", details
        )
    if "format" in _read(folder / MANIFEST):
        return Identity(name, "converted", f"a converted folder of {kind}", "joyjax runs it", "runs", details)
    what = f"a Diffusers folder of {kind}"
    if pointers := _pointers(folder):
        _, advice = STAND_INS["git-lfs"]
        what += f" with {counted(len(pointers), 'Git LFS pointer')} in place of files, such as {pointers[0]}"
        return Identity(name, "git-lfs", what, advice, "broken", details | {"pointers": pointers[:100]})
    for component in NETWORKS:
        if (part := folder / component).is_dir():
            if found := weights_problem(part):
                return Identity(name, found[0], what, found[1], "foreign", details | {"component": component})
            if method := quantised(part):
                advice = f"the weights of {component} are quantised ({method}); {NOT_QUANTISED}"
                return Identity(name, "quantised", what, advice, "foreign", details | {"quantisation": method})
    return Identity(name, "pipeline", what, "joyjax runs it", "runs", details)


def _component(folder: Path) -> Identity:
    """Describe a folder with config.json, of Diffusers or Transformers, without an index."""
    name, file = str(folder), folder / "config.json"
    found = identify_file(file)
    if found.kind in STAND_INS:
        what = f"a folder whose config.json is {found.what}"
        return Identity(name, found.kind, what, found.advice, "broken")
    try:
        config = read_json(file)
    except CheckpointError as error:
        return Identity(name, "unknown", f"a folder with a config.json that cannot be used ({error})", TAKES, "broken")
    kind, family = config.get("_class_name"), config.get("model_type")
    architectures = config.get("architectures")
    if isinstance(kind, str):
        role = next((role for word, role in ROLES if word in kind), "model")
        return _part(folder, role, kind)
    if isinstance(architectures, list) and architectures or isinstance(family, str):
        kind = architectures[0] if isinstance(architectures, list) and architectures else family
        kind = kind if isinstance(kind, str) else str(family)
        named = folder.absolute().name.startswith("text_encoder")
        if named or pipeline_above(folder) or is_own_layout(folder.absolute().parent):
            return _part(folder, "text_encoder", kind)
        what = f"a single model of Transformers, {class_named(kind)}"
        details = {"class_name": _short(kind), "model_type": _short(family)}
        return Identity(
            name, "transformers", what, f"a text encoder is one part of a model; {TAKES}", "foreign", details
        )
    return Identity(
        name, "unknown", f"a folder with a config.json that names no class: {INDEX} is missing", TAKES, "unknown"
    )


def _part(folder: Path, role: str, kind: str) -> Identity:
    """Describe a folder of one component, with advice where its pipeline is."""
    parent = folder.absolute().parent
    if (parent / INDEX).is_file():
        index = _read(parent / INDEX)
        role = folder.absolute().name if folder.absolute().name in index else role
        advice = f"give the folder of the whole pipeline: {parent}"
    elif is_own_layout(parent):
        advice = f"convert the folder of the whole model: joyjax convert {parent} TARGET"
    else:
        advice = f"give the folder of the whole pipeline, which has {INDEX}; {parent} has none; {TAKES}"
    what = f"one component of a model, its {role}" + (f" ({class_named(kind)})" if kind != role else "")
    return Identity(str(folder), "component", what, advice, details={"component": role, "class_name": _short(kind)})


def _peft(folder: Path) -> Identity:
    config = _read(folder / "adapter_config.json")
    method, rank, base = (config.get(key) for key in ("peft_type", "r", "base_model_name_or_path"))
    rank = rank if type(rank) is int and 0 < rank < 2**31 else None
    details = {"method": _short(method), "rank": rank, "base": _short(base)}
    facts = [class_named(method)] if isinstance(method, str) else []
    facts += [f"rank {rank}"] if rank else []
    facts += [f"of {quoted(base)}"] if isinstance(base, str) and base else []
    what = "an adapter of PEFT" + (f" ({', '.join(facts)})" if facts else "")
    return Identity(str(folder), "lora", what, f"{NO_ADAPTERS}; {TAKES}", details=details)


def _without_config(folder: Path, names: list[str]) -> Identity:
    """Describe a folder that has neither an index nor a configuration."""
    name = str(folder)
    if folder.absolute().name.startswith("models--") and "snapshots" in names:
        hub_id = folder.absolute().name.removeprefix("models--").replace("--", "/", 1)
        what = "a folder of the hub's cache"
        return Identity(name, "hub-cache", what, f"give the hub id, {hub_id}, or a folder in {folder / 'snapshots'}")
    if inside := [each for each in names if (folder / each / INDEX).is_file()]:
        what = f"a folder that holds {'a Diffusers folder' if len(inside) == 1 else f'{len(inside)} Diffusers folders'}"
        return Identity(name, "parent", what, f"give {folder / inside[0]}", details={"folders": inside[:100]})
    if (components := [each for each in NETWORKS if (folder / each / "config.json").is_file()]) and len(components) > 1:
        what = f"a folder with the components {', '.join(components)}, but {INDEX} is missing"
        return Identity(name, "incomplete", what, "download the rest of it", "broken", {"components": components})
    if any(each.endswith((".incomplete", ".part", ".crdownload", ".aria2")) for each in names):
        what = "a folder with an unfinished download"
        return Identity(name, "incomplete", what, "run the command of the download again", "broken")
    files = [Path(each) for each in names if each.endswith(SINGLE)]
    files += [
        Path(each, file)
        for each in ("diffusion_models", "unet", "split_files", "loras", "checkpoints")
        if each in names and (folder / each).is_dir()
        for file in sorted(entry.name for entry in itertools.islice(os.scandir(folder / each), MOST_NAMES))
        if file.endswith(SINGLE)
    ]
    if files:
        first = identify_file(folder / files[0])
        count = "one file of weights" if len(files) == 1 else f"{len(files)} single files of weights"
        what = f"a folder of {count}, without {INDEX}; {files[0]} is {first.what}"
        details = {"files": [str(each) for each in files[:100]]}
        if first.state == "broken":
            return Identity(name, first.kind, what, first.advice, "broken", details)
        return Identity(name, first.kind, what, TAKES, "foreign", details)
    return Identity(name, "unknown", f"a folder of an unknown kind: {INDEX} is missing", TAKES, "unknown")


def _pointers(folder: Path) -> list[str]:
    """Return the Git LFS pointers in a folder and its components."""
    found = []
    for each in (folder, *(path for path in itertools.islice(folder.iterdir(), MOST_NAMES) if path.is_dir())):
        for entry in itertools.islice(os.scandir(each), MOST_NAMES):
            if os.path.isfile(entry.path) and entry.stat().st_size <= LARGEST_POINTER:
                with open(entry.path, "rb") as opened:
                    known = signature(opened.read(128))
                if known is not None and known.kind == "git-lfs":
                    found.append(str(Path(entry.path).relative_to(folder)))
    return sorted(found)


def _short(value: object) -> str | None:
    """Return a string of a configuration for `details`, cut to 200 letters; None for other values."""
    return value[:200] if isinstance(value, str) else None


def _read(file: Path) -> Mapping[str, Any]:
    """Return a json object, an empty one where the file cannot be read; later readers raise the error."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}
