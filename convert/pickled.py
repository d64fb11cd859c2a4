"""The tensors of a file that `torch.save` wrote, found without unpickling it.

A pickle is a program. This reads its instructions one by one and follows only those that a dictionary of tensors is
made of, on plain values: nothing is imported, nothing is called. The numbers themselves lie uncompressed in the zip
file around it, where `joyjax.convert.safetensors.Tensor` reads them. Source: torch/serialization.py, `_save`.
"""

import dataclasses
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert.safetensors import Tensor
from joyjax.errors import CheckpointError
from joyjax.inputs.files import Stamp, stamp

LONGEST_PICKLE = 2**24  # bytes; the real one has 2**18
STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in (("Float", "float32"), ("BFloat16", "bfloat16"), ("Half", "float16"), ("Long", "int64"))
}
ORDERED, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
MARK = object()


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of something that the pickle would import."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of numbers: a member of the zip file."""

    key: str
    dtype: str
    size: int


def read_pickled(file: Path) -> dict[str, Tensor]:
    """Find the tensors of a `.pth` file by name.

    Raises:
        CheckpointError: if it is no zip file of the kind that torch writes, or holds anything else than tensors.
    """
    try:
        seen = stamp(file)
        with zipfile.ZipFile(file) as opened:
            members = {info.filename: info for info in opened.infolist()}
            pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1 or members[pickles[0]].file_size > LONGEST_PICKLE:
                raise _unreadable(file, "it has no data.pkl of a size that can be")
            root = pickles[0].removesuffix("data.pkl")
            order = opened.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
            if order != b"little":
                raise _unreadable(file, "its numbers are not little-endian")
            text = opened.read(pickles[0])
        with file.open("rb") as raw:
            starts = {
                name: _start(raw, info, seen[2]) for name, info in members.items() if name.startswith(f"{root}data/")
            }
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(file, str(error)) from None
    try:
        found = _follow(text)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(file, f"its pickle is no dictionary of tensors ({error})") from None
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found:
        raise _unreadable(file, "its pickle is no dictionary of tensors")
    return {name: _tensor(file, seen, name, value, root, members, starts) for name, value in found.items()}


def _follow(text: bytes) -> Any:
    """Run the instructions of a pickle on plain values; raises ValueError for one that a dictionary does not need."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def popped_to_mark() -> list[Any]:
        place = len(stack) - 1 - next(n for n, value in enumerate(reversed(stack)) if value is MARK)
        values = stack[place + 1 :]
        del stack[place:]
        return values

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
                count = int(code.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = popped_to_mark()
                stack[-1].extend(items)
            case "SETITEM":
                pair = stack[-2:]
                del stack[-2:]
                stack[-1][pair[0]] = pair[1]
            case "SETITEMS":
                items = popped_to_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(Global(value))
            case "STACK_GLOBAL":
                stack[-2:] = [Global(f"{stack[-2]} {stack[-1]}")]
            case "BINPERSID":
                kind, storage, key, _, size = stack.pop()
                if kind != "storage" or storage.name not in STORAGES:
                    raise ValueError(f"{kind} of {storage.name}")
                stack.append(Storage(str(key), STORAGES[storage.name], int(size)))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                if called == Global(ORDERED) and arguments in ((), ([],)):
                    stack.append({})
                elif called == Global(TENSOR):
                    stack.append(arguments)
                else:
                    raise ValueError(f"it calls {getattr(called, 'name', called)}, which joyjax does not")
            case "BUILD":  # attributes of the dictionary: versions of modules
                stack.pop()
            case "STOP":
                return stack.pop()
            case _:
                raise ValueError(f"instruction {code.name}")
    raise ValueError("no end")


def _tensor(
    file: Path,
    seen: Stamp,
    name: Any,
    value: Any,
    root: str,
    members: dict[str, zipfile.ZipInfo],
    starts: dict[str, int],
) -> Tensor:
    """Return where a tensor lies, once it is known to lie there in one run."""
    try:
        storage, offset, shape, strides = value[:4]
        member = f"{root}data/{storage.key}"
        item = np.dtype(storage.dtype).itemsize
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)) and isinstance(name, str)
        in_order = all(
            size == 1 or stride == math.prod(shape[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
        )
        fits = (offset + math.prod(shape)) * item <= storage.size * item <= members[member].file_size
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _unreadable(file, f"{str(name)[:100]!r} in it is no tensor of numbers") from None
    if not (whole and in_order and fits):
        raise _unreadable(file, f"tensor {name} does not lie in one run of its numbers")
    return Tensor(tuple(shape), storage.dtype, file, starts[member] + offset * item, seen)


def _start(raw: Any, info: zipfile.ZipInfo, size: int) -> int:
    """Return where the bytes of a member begin; its local header has a length of its own."""
    raw.seek(info.header_offset)
    header = raw.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is not stored as it is")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > size:
        raise ValueError(f"{info.filename} ends behind the file")
    return start


def _unreadable(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a file of tensors that joyjax reads: {why[:200]}")
