"""The tensors of a file that `torch.save` wrote, located without unpickling it.

A pickle is a program. This interprets only the instructions that a dictionary of tensors needs, on plain values:
nothing is imported, nothing is called. The values are stored uncompressed in the zip file around the pickle, where
`joyjax.convert.safetensors.Tensor` reads them. Source: torch/serialization.py, `_save`.
"""

import dataclasses
import math
import pickletools
import zipfile
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert.safetensors import LONGEST_NAME, Tensor, check_name
from joyjax.errors import CheckpointError
from joyjax.reading import Stamp, stamp
from joyjax.signatures import stand_in

LONGEST_PICKLE = 2**22  # bytes, also of the zip directory; the real pickle has 2**18
MOST_DIMENSIONS = 32
STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in (("Float", "float32"), ("BFloat16", "bfloat16"), ("Half", "float16"), ("Long", "int64"))
}
ORDERED, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
MARK = object()


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of a global that the pickle would import."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A torch storage: a member of the zip file."""

    key: str
    dtype: str
    size: int


class _Capped(FileIO):
    """A file with bounded reads, whatever sizes its zip directory claims."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(LONGEST_PICKLE if size is None or not 0 <= size < LONGEST_PICKLE else size)


def read_pickled(file: Path) -> dict[str, Tensor]:
    """Locate the tensors of a `.pth` file by name.

    Raises:
        CheckpointError: if it is not a zip file as torch writes it, or has other contents than tensors.
    """
    try:
        seen = stamp(file)
        with _Capped(file) as raw, zipfile.ZipFile(raw) as opened:
            members = {info.filename: info for info in opened.infolist()}
            pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
            read = {f"{root}data.pkl", f"{root}byteorder"} & members.keys()
            if not root or any(members[name].file_size > LONGEST_PICKLE for name in read):
                raise _unreadable(file, f"it has no data.pkl of at most {LONGEST_PICKLE} bytes")
            starts = {
                name: _start(raw, info, seen[2])
                for name, info in members.items()
                if name in read or name.startswith(f"{root}data/")
            }
            if f"{root}byteorder" in read and opened.read(f"{root}byteorder") != b"little":
                raise _unreadable(file, "its values are not little-endian")
            text = opened.read(pickles[0])
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except zipfile.BadZipFile as error:
        wrong = stand_in(file)
        raise (CheckpointError(f"{file} is {wrong}") if wrong else _unreadable(file, str(error))) from None
    except (OSError, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(file, str(error)) from None
    try:
        found = _follow(text)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(file, f"its pickle is not a dictionary of tensors ({error})") from None
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found:
        raise _unreadable(file, "its pickle is not a dictionary of tensors")
    return {name: _tensor(file, seen, name, value, root, members, starts) for name, value in found.items()}


def _follow(text: bytes) -> Any:
    """Interpret the instructions of a pickle on plain values; raises ValueError for any that tensors do not need."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def popped(count: int) -> list[Any]:
        if count > len(stack):
            raise ValueError("stack underflow")
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    def popped_to_mark() -> list[Any]:
        values = popped(next((n for n, value in enumerate(reversed(stack)) if value is MARK), len(stack)))
        stack.pop()
        return values

    def put(items: list[Any]) -> None:
        # Only plain keys: hashing a deeply nested tuple overflows the C stack.
        if not isinstance(stack[-1], dict) or not all(type(key) in (str, int) for key in items[::2]):
            raise ValueError("it sets items of another object than a dictionary by name")
        stack[-1].update(zip(items[::2], items[1::2], strict=True))

    for code, argument, _ in pickletools.genops(text):
        value: Any = argument
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(MARK)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
            case "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_DICT": {}, "EMPTY_LIST": []}[code.name])
            case "TUPLE":
                stack.append(tuple(popped_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(int(code.name[-1]))))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = popped_to_mark()
                stack[-1].extend(items)
            case "SETITEM":
                put(popped(2))
            case "SETITEMS":
                put(popped_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(Global(value))
            case "STACK_GLOBAL":
                names = popped(2)
                if any(len(name) > LONGEST_NAME for name in names):
                    raise ValueError(f"it has a name of over {LONGEST_NAME} letters")
                stack.append(Global(" ".join(names)))
            case "BINPERSID":
                kind, storage, key, _, size = stack.pop()
                if kind != "storage" or not isinstance(key, str) or type(size) is not int:
                    raise ValueError("it has an invalid storage")
                if storage.name not in STORAGES:
                    raise ValueError(f"it has a storage of the kind {storage.name}")
                stack.append(Storage(key, STORAGES[storage.name], size))
            case "REDUCE":
                called, arguments = popped(2)
                if called.name == ORDERED and arguments in ((), ([],)):
                    stack.append({})
                elif called.name == TENSOR:
                    stack.append(arguments)
                else:
                    raise ValueError(f"it calls {called.name}; joyjax calls nothing")
            case "BUILD":  # attributes of the dictionary: versions of modules
                stack.pop()
            case "STOP":
                return stack.pop()
            case _:
                raise ValueError(f"instruction {code.name}")
    raise ValueError("it does not end")


def _tensor(
    file: Path,
    seen: Stamp,
    name: Any,
    value: Any,
    root: str,
    members: dict[str, zipfile.ZipInfo],
    starts: dict[str, int],
) -> Tensor:
    """Return the location of a tensor, which must be contiguous in its storage."""
    check_name(file, name)
    try:
        storage, offset, shape, strides = value[:4]
        member = f"{root}data/{storage.key}"
        item = np.dtype(storage.dtype).itemsize
        if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise ValueError
        in_order = all(
            size == 1 or stride == math.prod(shape[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
        )
        fits = (offset + math.prod(shape)) * item <= storage.size * item <= members[member].file_size
        transformed = any(value[6:])  # torch's flags of lazily negated or conjugated values
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _unreadable(file, f"{name!r} in it is not a tensor") from None
    if not fits or transformed or not (in_order or 0 in shape):
        raise _unreadable(file, f"tensor {name} is not contiguous in its storage")
    return Tensor(tuple(shape), storage.dtype, file, starts[member] + offset * item, seen)


def _start(raw: FileIO, info: zipfile.ZipInfo, size: int) -> int:
    """Return the offset of a member's bytes, after its local header of variable length."""
    if not 0 <= info.header_offset < size:
        raise ValueError(f"{info.filename} is outside of the file")
    raw.seek(info.header_offset)
    header = raw.read(30)
    uncompressed = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if len(header) < 30 or header[:4] != b"PK\3\4" or not uncompressed:
        raise ValueError(f"{info.filename} is not stored uncompressed")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > size:
        raise ValueError(f"{info.filename} ends beyond the file")
    return start


def _unreadable(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a file of tensors that joyjax reads: {why[:200]}")
