"""Finding the folder of a model: one on this machine, one of the hub, or the bundled demo."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from joyjax.errors import CheckpointError, RequestError
from joyjax.inputs.files import check_files, unfinished

DEMO = Path(__file__).parents[1] / "demo"
REAL = "jdopensource/JoyAI-Image-Edit-Diffusers"
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

# What joyjax reads of a checkpoint. The pickled ones are those of the model's own repository.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "transformer/*.pth", "vae/*.pth")
PATTERNS_OF_TEXT = ("*.json", "*.txt", "*.jinja")


def model_folder(model: str | os.PathLike | None, *, weights: bool = True) -> Path:
    """Return the folder of a model; of the bundled demo where None is given.

    What names no folder here and looks like `owner/name` or `owner/name@revision` is a hub id: what joyjax reads of it
    comes through huggingface_hub, with its cache, its tokens and its offline mode. Without `weights`, of a hub id only
    the configurations, tokenizer and indices are fetched.

    Raises:
        RequestError: if what is given is no path.
        CheckpointError: if there is no such folder or hub id, or something in it is not the checkpoint's own.
    """
    if model is None:
        return DEMO
    if not isinstance(model, str | os.PathLike):
        raise RequestError(f"model is a {type(model).__name__}; expected the path of a folder, or a hub id")
    folder = Path(model)
    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"model {str(model)!r} is not a folder")
    except OSError as error:
        raise CheckpointError(f"model {str(model)[:100]!r} cannot be looked for: {error.strerror}") from None
    if folder.name and unfinished(folder).is_dir() and not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"model {str(model)!r} is not whole yet: give the `joyjax convert` that began it once more"
        )
    if not folder.exists():
        found = HUB_ID.fullmatch(model) if isinstance(model, str) else None
        if found is None:
            raise CheckpointError(
                f"model {str(model)!r} does not exist; name a folder, or a hub id such as {REAL} or {REAL}@main"
            )
        folder = _from_hub(found["name"], found["revision"], PATTERNS if weights else PATTERNS_OF_TEXT)
    check_files(folder)
    return folder


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub's, of its HTTP library, of the disk
        if isinstance(error, OSError) and error.filename is not None:  # an error of the disk, not of HTTP
            raise CheckpointError(
                f"model {name!r} is no folder here, and the folder of the hub's files cannot be used: "
                f"{error.filename}: {error.strerror}; set HF_HOME to a folder that can be written, or unset it"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model {name!r} is no folder here, and cannot be had from the hub ({type(error).__name__}: {reason}); "
            "check the name and the connection, and for a closed model do `hf auth login`"
        ) from error
