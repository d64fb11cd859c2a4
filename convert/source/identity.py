"""Identification of a single file that is given as a model, and advice on what joyjax takes."""

import codecs
import dataclasses
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from joyjax.convert.source import tensor_names
from joyjax.convert.source.headers import comfy_metadata, data_end, gguf_facts, read_raw_header
from joyjax.errors import CheckpointError
from joyjax.reading import quoted, read_json
from joyjax.signatures import HEAD, STAND_INS, signature

REAL = "jdopensource/JoyAI-Image-Edit-Diffusers"
TAKES = f"joyjax takes a folder in Diffusers format, one that `joyjax convert` wrote, or a hub id such as {REAL}"
RECIPES = (b"iTXtjoyjax\0", b"joyjax:recipe=")  # in a PNG and in XMP, see joyjax/media/metadata.py
INDEX = "model_index.json"

# runs: joyjax runs it. converts: `joyjax convert` takes it. foreign: complete, but joyjax does not run it.
# broken: damaged or incomplete. unknown: of an unknown kind.
State = Literal["runs", "converts", "foreign", "broken", "unknown"]


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a path is. `str` is one sentence with advice. `details` is a json object."""

    path: str
    kind: str
    what: str
    advice: str
    state: State = "foreign"
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.path} is {self.what}; {self.advice}"


def identify_file(path: Path) -> Identity:
    """Return what a path other than a folder is; it need not be a regular or readable file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Identity(str(path), "special", f"{_special(status.st_mode)}, not a file", TAKES, "unknown")
        with path.open("rb") as opened:
            head = opened.read(HEAD)
    except OSError as error:
        return Identity(str(path), "unreadable", f"a file that cannot be read ({error.strerror})", TAKES, "broken")
    if not head:
        return Identity(str(path), "empty", "an empty file", f"download it again; {TAKES}", "broken")
    found = signature(head)
    named = path.suffix == ".safetensors" and (found is None or found.kind not in STAND_INS)
    if named or head[5:9] == b"\0\0\0{":  # an 8-byte length below 2**40, then a json object
        return _safetensors(path, status.st_size)
    if found is None and path.suffix == ".onnx" and head[:1] == b"\x08":
        return _named(path, "onnx", "ONNX", head)
    if found is not None:
        return _named(path, found.kind, found.format, head)
    if (text := _text(head)) is not None:
        details = {"begins": text}
        return Identity(str(path), "text", f"a text file that begins {quoted(text)}", TAKES, "unknown", details)
    size = status.st_size
    return Identity(str(path), "unknown", f"a file of {size:,} bytes in an unknown format", TAKES, "unknown")


def _named(path: Path, kind: str, form: str, head: bytes) -> Identity:
    """Describe a file whose first bytes name its format."""
    name, whole = str(path), pipeline_above(path)
    match kind:
        case "git-lfs" | "web-page":
            what, advice = STAND_INS[kind]
            return Identity(name, kind, what, advice, "broken")
        case "gguf":
            facts = gguf_facts(head)
            shown = [f"architecture {quoted(facts['architecture'])}"] if "architecture" in facts else []
            shown += [facts["quantisation"]] if "quantisation" in facts else []
            shown += [counted(facts["tensors"], "tensor")] if "tensors" in facts else []
            what = f"a GGUF file ({', '.join(shown)})" if shown else "a truncated GGUF file"
            advice = f"this version of joyjax does not read GGUF; {TAKES}"
            return Identity(name, kind, what, advice, "foreign" if shown else "broken", facts)
        case "pickle":
            what = f"a file of pickled weights ({form}, as .ckpt, .pt, .pth and .bin files are)"
            if is_own_layout(path.absolute().parent.parent):
                advice = f"convert the folder of the whole model: joyjax convert {path.absolute().parent.parent} TARGET"
            else:
                advice = whole or f"joyjax unpickles nothing, since a pickle may run any code; {TAKES}"
            return Identity(name, kind, what, advice, details={"format": form})
        case "picture":
            recipe = any(mark in head for mark in RECIPES)
            what = f"a {form} picture" + (" with a recipe of joyjax" if recipe else "")
            advice = "`joyjax edit --from` runs its recipe, which names the model" if recipe else ""
            advice = advice or f"give a picture to edit with --image; {TAKES}"
            return Identity(name, kind, what, advice, details={"format": form, "recipe": recipe})
        case "archive":
            what = f"a {form} archive"
            advice = f"unpack it and give the folder in it that has {INDEX}"
            return Identity(name, kind, what, advice, details={"format": form})
        case "json":
            return _json(path)
    what = {"onnx": "an ONNX file", "hdf5": "an HDF5 file", "video": f"a video ({form})"}.get(kind, f"a {form} file")
    return Identity(name, kind, what, f"this version of joyjax does not read it; {TAKES}", details={"format": form})


def _json(path: Path) -> Identity:
    """Describe a json file; for one of a checkpoint, advise to give the folder."""
    name, folder = str(path), path.absolute().parent
    try:
        raw = read_json(path)
    except CheckpointError as error:
        return Identity(name, "json", f"a json file that cannot be used ({error})", TAKES, "broken")
    if path.name == INDEX:
        return Identity(name, "json", "the index of a Diffusers folder", f"give the folder: {folder}")
    if isinstance(raw.get("weight_map"), dict):
        what, otherwise = "the index of a component's weights", f"it belongs to a component; {TAKES}"
        return Identity(name, "json", what, pipeline_above(path) or otherwise)
    if "nodes" in raw or any(isinstance(node, dict) and "class_type" in node for node in raw.values()):
        return Identity(name, "workflow", "a workflow of ComfyUI", f"it holds no weights; {TAKES}")
    return Identity(name, "json", "a json file", pipeline_above(path) or TAKES)


def _safetensors(path: Path, size: int) -> Identity:
    """Describe a safetensors file by its header."""
    name = str(path)
    try:
        header = read_raw_header(path)
    except CheckpointError as error:
        why = str(error).removeprefix(f"{path} is ").removeprefix("not a readable safetensors file: ")
        what = f"a damaged or incomplete safetensors file ({why.removesuffix('; is the download complete?')})"
        return Identity(name, "safetensors", what, "download it again", "broken")
    entries, metadata = header.entries, comfy_metadata(path, header)
    facts: dict[str, Any] = {"tensors": len(entries), "dtypes": tensor_names.dtypes(entries)}
    if (end := data_end(header)) > size:
        what = f"an incomplete safetensors file: it has {size:,} bytes of {end:,}"
        return Identity(name, "safetensors", what, "download it again", "broken", facts)
    whole = pipeline_above(path)
    if found := tensor_names.adapter(entries):
        return Identity(name, "lora", _adapter(found), f"{NO_ADAPTERS}; {TAKES}", details=facts | found)
    quantisation = tensor_names.quantisation(entries, metadata)
    stored = quantisation or ", ".join(facts["dtypes"]) or "no tensors"
    model, component = tensor_names.network(entries) or ("", "")
    facts |= {"quantisation": quantisation, "model": model or None, "component": component or None}
    several = tensor_names.is_whole(entries)
    content = "several components in one file" if several else f"one component: {f'{model} {component}'.strip()}"
    content = content if component or several else "tensors of an unknown network"
    what = f"a single safetensors file with {content} ({counted(len(entries), 'tensor')}, {stored})"
    kind = "single-file" if several or component else "safetensors"
    advice = whole or f"a single file has no tokenizer and no configurations; {TAKES}"
    return Identity(name, kind, what, advice, details={key: value for key, value in facts.items() if value is not None})


NO_ADAPTERS = "this version of joyjax does not apply adapters"


def _adapter(facts: Mapping[str, Any]) -> str:
    shown = [f"for {facts['model']}"] if "model" in facts else []
    shown += [counted(facts["modules"], "module")]
    shown += [f"rank {', '.join(map(str, facts['ranks']))}"] if "ranks" in facts else []
    shown += [f"with {facts['naming']}'s names"] if "naming" in facts else []
    name = "a LoRA" if facts["method"] == "LoRA" else f"an adapter of the kind {facts['method']}"
    return f"{name} ({', '.join(shown)})"


def pipeline_above(path: Path) -> str | None:
    """Return the advice to give the pipeline's folder that contains a path or its component; None without one."""
    folder = path.absolute()
    above = next((each for each in (folder.parent, folder.parent.parent) if (each / INDEX).is_file()), None)
    return None if above is None else f"give the folder of the whole pipeline: {above}"


ENCODER = "JoyAI-Image-Und"


def is_own_layout(folder: Path) -> bool:
    """Return whether a folder has the layout of the model's own repository, see convert/joyimage_original.py."""
    return (folder / ENCODER / "config.json").is_file() and not (folder / INDEX).exists()


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 tensor" or "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def class_named(value: object) -> str:
    """Return the name of a class in a checkpoint as a message shows it."""
    return value if isinstance(value, str) and value.isidentifier() and len(value) <= 100 else quoted(value)


def _special(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))
    return next((name for check, name in kinds if check(mode)), "a device")


def _text(head: bytes) -> str | None:
    """Return the beginning of a UTF-8 text; None for anything else."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head[:200])  # the cut may split a letter
    except UnicodeDecodeError:
        return None
    readable = all(c.isprintable() or c in "\r\n\t" for c in text) and bool(text.strip())
    return " ".join(text.split())[:60] if readable else None
