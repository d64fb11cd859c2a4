"""Small json files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Return the json object in a file.

    Raises:
        CheckpointError: if the file is missing or unreadable, is not json, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a Diffusers folder has it: is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid json: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a json {type(value).__name__}; expected an object")
    return value
