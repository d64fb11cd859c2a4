"""The headers of safetensors and GGUF files, read without trusting them."""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError
from joyjax.reading import Stamp, parse_json, stamp
from joyjax.signatures import stand_in

LONGEST_HEADER = 2**24  # bytes; the real one has 2**17


@dataclasses.dataclass(frozen=True)
class RawHeader:
    """The header of a safetensors file with unchecked entries; `begin` is the offset of the data in the file."""

    entries: Mapping[str, Any]
    metadata: Mapping[str, Any]
    begin: int
    seen: Stamp


def read_raw_header(file: Path) -> RawHeader:
    """Read the header of a safetensors file without checking its entries.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        seen = stamp(file)
        size = seen[2]
        with file.open("rb", buffering=0) as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8 or length > LONGEST_HEADER:
                if wrong := stand_in(file):
                    raise CheckpointError(f"{file} is {wrong}")
                cut = "; is the download complete?" if opened.read(1) == b"{" and length <= LONGEST_HEADER else ""
                raise unreadable(file, f"{size} bytes are too few for a header of {length}{cut}")
            text = opened.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except OSError as error:
        raise unreadable(file, error.strerror or str(error)) from None
    try:
        raw = parse_json(text)
    except (ValueError, TypeError) as error:
        raise unreadable(file, f"its header is not a json object: {error}") from None
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise unreadable(file, f"its __metadata__ is a json {type(metadata).__name__}")
    return RawHeader(raw, metadata, 8 + length, seen)


def unreadable(file: Path, why: str) -> CheckpointError:
    """Build the error for a file that is not a safetensors file, or a damaged one."""
    return CheckpointError(f"{file} is not a readable safetensors file: {why}")


def data_end(header: RawHeader) -> int:
    """Return the offset in the file where the last tensor ends, from the entries with valid offsets."""
    ends = [entry.get("data_offsets") for entry in header.entries.values() if isinstance(entry, dict)]
    last = [each[1] for each in ends if isinstance(each, list) and len(each) == 2 and type(each[1]) is int]
    return header.begin + max(last, default=0)


def comfy_metadata(file: Path, header: RawHeader) -> Mapping[str, Any]:
    """Return the metadata, with the first layer's quantisation where ComfyUI stores it in a tensor.

    The tensor is json, such as {"format": "int8_tensorwise", "convrot": true}.
    """
    entry = next((entry for name, entry in header.entries.items() if name.endswith(".comfy_quant")), None)
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if "_quantization_metadata" in header.metadata or not isinstance(offsets, list) or len(offsets) != 2:
        return header.metadata
    first, last = offsets
    if type(first) is not int or type(last) is not int or not 0 <= first < last <= min(first + 2**12, header.seen[2]):
        return header.metadata
    try:
        with file.open("rb") as opened:
            opened.seek(header.begin + first)
            layer = parse_json(opened.read(last - first))
    except (OSError, ValueError, TypeError):
        return header.metadata
    return {**header.metadata, "_quantization_metadata": json.dumps({"layers": {"first": layer}})}


# GGUF's value types of fixed size in bytes; 8 is a string, 9 an array
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MOST_VALUES = 1000
FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S"},
    **{12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"},
}


def gguf_facts(head: bytes) -> dict[str, Any]:
    """Return version, number of tensors, architecture and quantisation from the first bytes of a GGUF file.

    Facts beyond `head` or after a value of unknown type are left out.
    Source: docs/gguf.md in ggml.
    """
    facts: dict[str, Any] = {}
    try:
        version, tensors, values = struct.unpack_from("<IQQ", head, 4)
        facts |= {"version": version, "tensors": tensors}
        offset = 24
        for _ in range(min(values, MOST_VALUES)):
            key, offset = _string(head, offset)
            (kind,) = struct.unpack_from("<I", head, offset)
            value, offset = _value(head, kind, offset + 4)
            if key == "general.architecture" and isinstance(value, str):
                facts["architecture"] = value[:100]
            if key == "general.file_type" and value in FILE_TYPES:
                facts["quantisation"] = FILE_TYPES[value]
            if facts.keys() >= {"architecture", "quantisation"}:
                break
    except (struct.error, ValueError, OverflowError):  # the end of `head`, or a damaged file
        pass
    return facts


def _string(head: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, offset)
    end = offset + 8 + length
    if end > len(head):
        raise ValueError("beyond the head")
    return head[offset + 8 : end].decode("utf-8", "replace"), end


def _value(head: bytes, kind: int, offset: int) -> tuple[str | int | None, int]:
    """Return a string or uint32 (None for other types) and the offset of the next value."""
    if kind == STRING:
        return _string(head, offset)
    if kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", head, offset)
        offset += 12
        if inner == STRING:
            for _ in range(count):
                _, offset = _string(head, offset)
            return None, offset
        return None, offset + SIZES.get(inner, len(head)) * count
    if kind not in SIZES:
        raise ValueError(f"type {kind}")
    return (struct.unpack_from("<I", head, offset)[0] if kind == 4 else None), offset + SIZES[kind]
