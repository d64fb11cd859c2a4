"""Resolving a model to its folder: a local one, one from the hub, or the bundled demo."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from joyjax import version
from joyjax.convert.source.identify import identify
from joyjax.convert.source.identity import REAL
from joyjax.errors import CheckpointError, RequestError
from joyjax.reading import check_files

DEMO = Path(version.__file__).parent / "demo"
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# Other forms of a hub id: a URL, with a branch or a file; a path of the hub's pages.
ADDRESS = re.compile(
    r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<kind>datasets/|spaces/)?(?P<id>\w[\w.-]*/\w[\w.-]*)"
    r"(?:/(?:tree|blob|resolve|raw)/(?P<revision>[\w.-]+))?(?:/.*)?",
    re.ASCII,
)
PATH_IN_HUB = re.compile(
    r"(?P<scheme>hf:(?://)?)?(?P<id>\w[\w.-]*/\w[\w.-]*)(?(scheme)(?:/.*)?|/(?:tree|blob|resolve|raw)/(?P<revision>[\w.-]+)"
    r"(?:/.*)?)",
    re.ASCII,
)

# What joyjax reads of a checkpoint. The pickled ones are those of the model's own repository.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "transformer/*.pth", "vae/*.pth")
PATTERNS_OF_TEXT = ("*.json", "*.txt", "*.jinja")


def model_folder(model: str | os.PathLike | None, *, weights: bool = True) -> Path:
    """Return the folder of a model; of the bundled demo where None is given.

    `owner/name` or `owner/name@revision` is a hub id unless it is a local folder. The files that joyjax reads are
    downloaded by huggingface_hub, with its cache, tokens and offline mode; without `weights`, only configurations,
    tokenizer and indices.

    Raises:
        RequestError: if the model is not a path.
        CheckpointError: if there is no such folder or hub id, or a file in it links outside of the checkpoint.
    """
    if model is None:
        return DEMO
    if not isinstance(model, str | os.PathLike):
        raise RequestError(f"model is a {type(model).__name__}; expected the path of a folder, or a hub id")
    folder = Path(model)
    if not _is_folder(folder):
        found = HUB_ID.fullmatch(model) if isinstance(model, str) else None
        identity = identify(folder)
        if identity.kind != "missing":
            raise CheckpointError(f"model {str(model)[:100]!r} is {identity.what}; {identity.advice}")
        if found is None:
            advice = meant_hub_id(str(model)) or f"name a folder, or a hub id such as {REAL} or {REAL}@main"
            raise CheckpointError(f"model {str(model)!r} does not exist; {advice}")
        folder = _from_hub(found["name"], found["revision"], PATTERNS if weights else PATTERNS_OF_TEXT)
    check_files(folder)
    return folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # `identify` has the reason
        return False


def meant_hub_id(text: str) -> str | None:
    """Return the advice for a hub id in another form, such as its URL; None for other texts."""
    text = text.partition("?")[0].partition("#")[0]
    found = ADDRESS.fullmatch(text) or PATH_IN_HUB.fullmatch(text)
    if found is None:
        return "download it, and give the folder" if re.match(r"\w+:/+\w", text) else None
    if found.groupdict().get("kind"):
        return f"that is the address of one of the hub's {found['kind'][:-1]}, not of a model"
    revision = found["revision"]
    return f"give the hub id: {found['id']}" + (f"@{revision}" if revision not in (None, "main") else "")


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # errors of the hub, of its HTTP library, of the disk
        if isinstance(error, OSError) and error.filename is not None:  # an error of the disk, not of HTTP
            raise CheckpointError(
                f"model {name!r} is not a local folder, and the folder of the hub's files cannot be used: "
                f"{error.filename}: {error.strerror}; set HF_HOME to a folder that can be written, or unset it"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model {name!r} is not a local folder, and cannot be downloaded from the hub ({type(error).__name__}: "
            f"{reason}); check the name and the connection, and for a gated model run `hf auth login`"
        ) from error
