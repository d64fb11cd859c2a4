"""Checks that a checkpoint's tokenizer is of Qwen's kind, before Transformers reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError, ConfigError
from joyjax.reading import LONGEST_JSON, read_json

TOKENIZERS = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")  # names of one class
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}


def check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError unless a tokenizer is of Qwen's kind.

    Transformers follows the names of classes and files in a tokenizer, and its Rust core may abort the process, exhaust
    memory or never return on parts of other kinds.
    """
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > LONGEST_JSON:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; a tokenizer's has {LONGEST_JSON} at most")
    settings, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    named = read_json(settings) if settings.exists() else {}
    if named.get("tokenizer_class") not in TOKENIZERS:
        raise ConfigError(f"{settings}: tokenizer_class is {named['tokenizer_class']!r:.200}; expected {TOKENIZERS[1]}")
    for key, value in named.items():
        if value is not None and (key == "auto_map" or key.endswith(("_file", "_files"))):
            raise ConfigError(f"{settings}: {key:.200} is {value!r:.200}; joyjax reads and runs nothing else by name")
    if whole.exists() and not _is_qwens(read_json(whole)):
        raise ConfigError(f"{whole} is not of the kind of {TOKENIZERS[1]}, the only one that joyjax implements")


def _is_qwens(raw: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json has the parts of Qwen's: NFC, Qwen's pre-tokenizer, byte-level BPE."""
    try:
        model, (split, in_bytes) = raw["model"], raw["pre_tokenizer"]["pretokenizers"]
        affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        kinds = model["type"], in_bytes["type"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return (
        kinds == ("BPE", "ByteLevel")
        and not any(affixes)
        and split == SPLIT
        and raw.get("normalizer") in (None, {"type": "NFC"})
    )
