"""Qwen's tokenizer: checks of a checkpoint's folder, and the tokenizer that it describes.

A folder gives the vocabulary, the merges and the added tokens. Normalization, pre-tokenizer and decoder are Qwen's own,
whatever the files say, as in Transformers' Qwen2Tokenizer, whose ids these are.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joyjax.errors import CheckpointError, ConfigError
from joyjax.reading import LONGEST_JSON, read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer, models

TOKENIZERS = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")  # names of one class
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")  # of keys that are not in the config


def check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError unless a tokenizer is of Qwen's kind.

    Another kind would give other ids. Files named in a configuration are not followed.
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


def build_tokenizer(folder: Path) -> "Tokenizer":
    """Return the tokenizer of a folder with tokenizer.json, or with vocab.json and merges.txt.

    What is wrong in the files raises errors of many kinds, and BaseException if the Rust core panics.
    """
    from tokenizers import models

    settings = _read(folder / "tokenizer_config.json")
    whole = _read(folder / "tokenizer.json")
    if whole:
        model = models.BPE(vocab=whole["model"]["vocab"], merges=_merges(whole))
    else:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made = qwen_tokenizer(model, add_prefix_space=bool(settings.get("add_prefix_space")))
    added, special = _added_tokens(folder, settings, whole)
    made.add_tokens(added)
    made.add_special_tokens(special)
    return made


def qwen_tokenizer(model: "models.BPE", *, add_prefix_space: bool = False) -> "Tokenizer":
    """Return Qwen's tokenizer with this vocabulary; special tokens in a text are plain text."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    made = Tokenizer(model)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.encode_special_tokens = True
    return made


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _merges(whole: Mapping[str, Any]) -> list[Any]:
    merges = whole["model"]["merges"]
    if not isinstance(merges, list):
        raise TypeError(f"merges is a {type(merges).__name__}; expected a list")
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _added_tokens(
    folder: Path, settings: Mapping[str, Any], whole: Mapping[str, Any]
) -> tuple[list["AddedToken"], list["AddedToken"]]:
    """Return the added tokens in order of their ids, and the special ones.

    tokenizer_config.json may hold all of them. Otherwise they are in files of their own, and in tokenizer.json. Ids are
    those of the vocabulary, and consecutive after it.
    Source: PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__ in Transformers.
    """
    by_id: dict[int, AddedToken] = {}
    named = {**DEFAULTS, **settings}
    if "added_tokens_decoder" in settings:
        by_id = {int(number): _token(value) for number, value in settings["added_tokens_decoder"].items()}
    else:
        named |= _read(folder / "special_tokens_map.json")
        special = set(map(str, map(_content, _special_tokens(named))))
        for text, number in _read(folder / "added_tokens.json").items():
            by_id[number] = _token({"content": text, "special": text in special, "normalized": text not in special})
        for value in whole.get("added_tokens", ()):
            by_id[value["id"]] = _token({key: value[key] for key in value if key != "id"})
    known = {token.content: token for token in by_id.values()}
    specials = [known.get(_content(value)) or _token(value, special=True) for value in _special_tokens(named)]
    added = [by_id[number] for number in sorted(by_id)]
    return added + [token for token in specials if token.content not in known], specials


def _special_tokens(named: Mapping[str, Any]) -> Iterable[Any]:
    """Yield the special tokens that a configuration names, each a text or an object."""
    yield from (named[key] for key in NAMED if named.get(key) is not None)
    yield from (
        value
        for key, value in named.items()
        if key.endswith("_token") and key not in NAMED and isinstance(value, str | dict)
    )
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or ()
    yield from extra.values() if isinstance(extra, dict) else extra


def _content(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else value


def _token(value: Any, *, special: bool = False) -> "AddedToken":
    """Return the token of a text or of an object, whose `special` is the default of its own."""
    from tokenizers import AddedToken

    if not isinstance(value, dict):
        return AddedToken(value, special=special)
    return AddedToken(**{"special": special, **{key: value[key] for key in value if key != "__type"}})
