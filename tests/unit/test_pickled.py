"""Parts of `torch.save`: read bit for bit without unpickling, and refused by name whatever else they hold."""

import collections
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from joyjax.convert.pickled import read_pickled
from joyjax.errors import CheckpointError

torch = pytest.importorskip("torch")

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int64": torch.int64}
GLOBALS = {"storage": b"ctorch\nFloatStorage\n", "tensor": b"ctorch._utils\n_rebuild_tensor_v2\n"}
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def tensors(kind: str = "float32") -> dict[str, Any]:
    """Some tensors: of all sizes, and two that share their numbers."""
    numbers = (torch.arange(60) * 7 % 23 - 9).to(KINDS[kind])
    both = numbers[10:34].clone()
    return {
        "a.weight": numbers.reshape(3, 4, 5),
        "a.bias": numbers[50:],  # of the same storage, at its end
        "first": both[:12].reshape(4, 3),
        "second": both[12:],
        "one": numbers[3].clone(),
        "flat": numbers[:7].clone().reshape(1, 7, 1),
        "none": numbers[:0].clone(),
    }


def bits(array: np.ndarray) -> tuple[tuple[int, ...], str, bytes]:
    return array.shape, str(array.dtype), array.tobytes()


def torch_bits(tensor: Any) -> tuple[tuple[int, ...], str, bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), data


def same(file: Path, named: dict[str, Any]) -> None:
    found = read_pickled(file)
    assert found.keys() == named.keys()
    for name, tensor in found.items():
        assert bits(tensor.read()) == torch_bits(named[name]), name


def saved(folder: Path, value: Any, **options: Any) -> Path:
    torch.save(value, folder / "model.pth", **options)
    return folder / "model.pth"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, lambda named: {"model": named, "step": 3}])
def test_what_torch_saves_is_read_bit_for_bit(tmp_path, kind, wrap):
    same(saved(tmp_path, wrap(tensors(kind))), tensors(kind))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_with_a_zip_file(tmp_path, protocol):
    same(saved(tmp_path, collections.OrderedDict(tensors()), pickle_protocol=protocol), tensors())


def test_a_modules_state(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Conv2d(2, 3, 3)).bfloat16()
    same(saved(tmp_path, module.state_dict()), dict(module.state_dict()))


def test_thousands_of_tensors(tmp_path):  # their numbers in the pickle take more bytes
    named = {f"layers.{n}.weight": torch.full((2,), float(n)) for n in range(2000)}
    same(saved(tmp_path, named), named)


# hostile


def refused(file: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        read_pickled(file)
    assert str(raised.value).startswith(str(file))
    assert len(str(raised.value)) < len(str(file)) + 500


def zipped(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as opened:
        for name, data in members.items():
            opened.writestr(f"archive/{name}", data)
    return file


def program(tmp_path: Path, text: bytes, numbers: int = 40) -> Path:
    """Write a file with a pickle of our own and one run of numbers."""
    return zipped(tmp_path / "model.pth", {"data.pkl": text, "byteorder": b"little", "data/0": bytes(numbers)})


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(200, "little", signed=True) if abs(value) >= 2**31 else b""
    return b"\x8a" + bytes([len(data)]) + data if data else b"J" + struct.pack("<i", value)


def row(values: list[int]) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(size: bytes = number(10), key: bytes = word("0"), kind: bytes = GLOBALS["storage"]) -> bytes:
    return b"(" + word("storage") + kind + key + word("cpu") + size + b"tQ"


def tensor(
    shape: bytes, strides: bytes, offset: bytes = number(0), held: bytes = storage(), more: bytes = b""
) -> bytes:
    return GLOBALS["tensor"] + b"(" + held + offset + shape + strides + b"\x89}" + more + b"tR"


def pickle_of(value: bytes, name: bytes = word("x")) -> bytes:
    return b"\x80\x02}" + name + value + b"s."


def test_our_own_pickle_is_right(tmp_path):
    (found,) = read_pickled(program(tmp_path, pickle_of(tensor(row([2, 5]), row([5, 1]))))).values()
    assert bits(found.read()) == ((2, 5), "float32", bytes(40))


NO_RUN, NO_TENSOR = "tensor x is not contiguous", "'x' in it is not a tensor"
NO_DICTIONARY = "its pickle is not a dictionary of tensors"
PROGRAMS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NO_DICTIONARY),
    "no end": (b"\x80\x02}", NO_DICTIONARY),
    "nothing": (b"\x80\x02N.", NO_DICTIONARY),
    "an empty dictionary": (b"\x80\x02}.", NO_DICTIONARY),
    "an empty stack": (b"\x80\x02.", NO_DICTIONARY),
    "no mark": (b"\x80\x02}u.", NO_DICTIONARY),
    "a mark alone": (b"\x80\x02(.", NO_DICTIONARY),
    "an unknown instruction": (b"\x80\x02\xff.", NO_DICTIONARY),
    "a list": (b"\x80\x02].", NO_DICTIONARY),
    "a number": (pickle_of(number(3)), NO_TENSOR),
    "a text": (pickle_of(word("abcd")), NO_TENSOR),
    "a place in the memo that is not": (b"\x80\x02h\x07.", NO_DICTIONARY),
    "os.system": (
        pickle_of(b"cposix\nsystem\n" + word("touch mark") + b"\x85R"),
        "it calls posix system; joyjax",
    ),
    "builtins.eval": (pickle_of(b"cbuiltins\neval\n" + word("1") + b"\x85R"), "it calls builtins eval; joyjax"),
    "a stack of names": (pickle_of(word("os") + word("system") + b"\x93" + word("x") + b"\x85R"), "it calls os system"),
    "a module": (pickle_of(b"ctorch.nn\nLinear\n)\x81"), "instruction NEWOBJ"),
    "an instance": (pickle_of(b"(ios\nsystem\n"), "instruction INST"),
    "an extension": (pickle_of(b"\x82\x01"), "instruction EXT1"),
    "a buffer": (pickle_of(b"\x97"), "instruction NEXT_BUFFER"),
    "long names": (pickle_of(word("a" * 300) + word("b") + b"\x93"), "it has a name of over 200 letters"),
    "names of numbers": (pickle_of(number(1) + number(2) + b"\x93"), NO_DICTIONARY),
    "a call of no name": (pickle_of(number(1) + b")R"), NO_DICTIONARY),
    "transposed": (pickle_of(tensor(row([2, 5]), row([1, 2]))), NO_RUN),
    "of a step": (pickle_of(tensor(row([5]), row([2]))), NO_RUN),
    "expanded": (pickle_of(tensor(row([5, 10]), row([0, 1]))), NO_RUN),
    "larger than its storage": (pickle_of(tensor(row([11]), row([1]))), NO_RUN),
    "behind its storage": (pickle_of(tensor(row([10]), row([1]), number(1))), NO_RUN),
    "a storage larger than its file": (pickle_of(tensor(row([11]), row([1]), held=storage(number(11)))), NO_RUN),
    "a storage of exabytes": (pickle_of(tensor(row([2**60]), row([1]), held=storage(number(2**60)))), NO_RUN),
    "a storage of -1": (pickle_of(tensor(row([0]), row([1]), held=storage(number(-1)))), NO_RUN),
    "a storage that is not": (pickle_of(tensor(row([1]), row([1]), held=storage(key=word("../0")))), NO_TENSOR),
    "a storage of endless size": (
        pickle_of(tensor(row([1]), row([1]), held=storage(b"G" + struct.pack(">d", np.inf)))),
        "it has an invalid storage",
    ),
    "a storage of doubles": (
        pickle_of(tensor(row([1]), row([1]), held=storage(kind=b"ctorch\nDoubleStorage\n"))),
        "a storage of the kind torch DoubleStorage",
    ),
    "a storage of no kind": (pickle_of(tensor(row([1]), row([1]), held=storage(kind=number(1)))), NO_DICTIONARY),
    "a negative offset": (pickle_of(tensor(row([1]), row([1]), number(-1))), NO_TENSOR),
    "a negative shape": (pickle_of(tensor(row([-1, -10]), row([10, 1]))), NO_TENSOR),
    "a shape of text": (pickle_of(tensor(word("ab"), row([1, 1]))), NO_TENSOR),
    "a shape of floats": (pickle_of(tensor(b"G" + struct.pack(">d", 2.0) + b"\x85", row([1]))), NO_TENSOR),
    "a shape of bools": (pickle_of(tensor(b"\x88\x85", row([1]))), NO_TENSOR),
    "a shape of many": (pickle_of(tensor(row([2] * 10**5), row([1] * 10**5))), NO_TENSOR),
    "a shape of huge numbers": (pickle_of(tensor(row([2**1000] * 20), row([1] * 20))), NO_RUN),
    "strides that are too few": (pickle_of(tensor(row([1, 5]), row([1]))), NO_TENSOR),
    "negated": (pickle_of(tensor(row([1]), row([1]), more=b"}" + word("neg") + b"\x88s")), NO_RUN),
    "of too few words": (pickle_of(GLOBALS["tensor"] + row([1, 2]) + b"R"), NO_TENSOR),
    "a name of no text": (pickle_of(tensor(row([1]), row([1])), number(3)), "a tensor has the name of type int"),
    "a name of escapes": (pickle_of(tensor(row([1]), row([1])), word("\x1b[2J")), r"a tensor has the name '\\x1b"),
    "a long name": (pickle_of(tensor(row([1]), row([1])), word("a" * 10**6)), "a tensor has the name 'a{100}'"),
    "a name that is a row": (pickle_of(number(1), b")"), NO_DICTIONARY),
    "a deep name": (pickle_of(number(1), b")" + b"\x85" * 300_000), NO_DICTIONARY),  # its hash would end the process
    "a deep value": (pickle_of(b")" + b"\x85" * 300_000), NO_TENSOR),
    "a deep call": (pickle_of(b"]" + b"\x85" * 10**5 + b")R"), NO_DICTIONARY),
    "a name made of doubled rows": (pickle_of(b")" + b"q\x00h\x00\x86" * 99 + word("b") + b"\x93"), NO_DICTIONARY),
    "itself": (b"\x80\x02}q\x00" + word("x") + b"h\x00s.", NO_TENSOR),
    "a long number": (b"\x80\x02I" + b"1" * 5000 + b"\n.", NO_DICTIONARY),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_pickle_of_something_else(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = PROGRAMS[case]
    refused(program(tmp_path, text), message)
    assert os.listdir(tmp_path) == ["model.pth"]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: {"x": torch.zeros(2), "y": evil}, lambda evil: [evil]]
)
def test_nothing_is_called(tmp_path, wrap):
    file, mark = saved(tmp_path, wrap(Evil(tmp_path / "mark"))), tmp_path / "mark"
    refused(file, "it calls posix mkdir; joyjax calls nothing")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # so the pickle was a live one


def test_tensors_that_are_views(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    refused(saved(tmp_path, {"x": matrix.T}), NO_RUN)
    refused(saved(tmp_path, {"x": matrix[:, :2]}), NO_RUN)
    refused(saved(tmp_path, {"x": matrix[0].expand(3, 4)}), NO_RUN)
    refused(saved(tmp_path, {"x": torch.zeros(2, dtype=torch.complex64)}), "kind torch ComplexFloatStorage")
    refused(saved(tmp_path, {"x": torch.nn.Parameter(matrix)}), "it calls torch._utils _rebuild_parameter")
    refused(saved(tmp_path, {"x": matrix.to_sparse()}), "it calls torch.serialization _get_layout")


# the zip file


def test_the_format_before_zip_files(tmp_path):
    refused(saved(tmp_path, tensors(), _use_new_zipfile_serialization=False), "File is not a zip file")


def test_big_endian_values_are_refused(tmp_path):
    file = zipped(tmp_path / "model.pth", {"data.pkl": b"\x80\x02}.", "byteorder": b"big"})
    refused(file, "its values are not little-endian")


@pytest.mark.parametrize("members", [{}, {"data.txt": b""}, {"more/data.pkl": b""}])
def test_no_pickle_in_it(tmp_path, members):
    refused(zipped(tmp_path / "model.pth", members), "it has no data.pkl of at most 4194304 bytes")


def test_two_pickles_in_it(tmp_path):
    file = program(tmp_path, b"\x80\x02}.")
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("other/data.pkl", b"\x80\x02}.")
    refused(file, "it has no data.pkl of at most 4194304 bytes")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_file_that_is_compressed(tmp_path, compression):
    refused(
        zipped(tmp_path / "model.pth", {"data.pkl": bytes(2**20)}, compression), "data.pkl is not stored uncompressed"
    )
    with zipfile.ZipFile(program(tmp_path, pickle_of(tensor(row([1]), row([1])))), "a") as opened:
        opened.writestr("archive/data/1", bytes(99), compression)
    refused(tmp_path / "model.pth", "archive/data/1 is not stored uncompressed")


def test_a_file_that_is_cut_short_or_missing(tmp_path):
    file = saved(tmp_path, tensors())
    data = file.read_bytes()
    for end in (0, 10, len(data) // 2, len(data) - 30, len(data) - 1):
        file.write_bytes(data[:end])
        refused(file, "is not a file of tensors that joyjax reads")
    file.unlink()
    refused(file, "is missing; is the download complete?")
    os.mkfifo(file)
    refused(file, "not a regular file")


def test_a_pickle_that_was_damaged(tmp_path):
    file = saved(tmp_path, tensors())
    file.write_bytes(file.read_bytes().replace(b"second", b"sekond", 1))
    refused(file, "Bad CRC-32")


def directory(file: Path, edit: Callable[[dict[str, int]], object], name: str = "archive/data/0") -> None:
    """Change what the directory of a zip file says of one member."""
    data = bytearray(file.read_bytes())
    places = {"compress_size": 20, "file_size": 24, "offset": 42}
    start = data.rindex(name.encode()) - 46
    held = {key: int.from_bytes(data[start + at : start + at + 4], "little") for key, at in places.items()}
    edit(held)
    for key, at in places.items():
        data[start + at : start + at + 4] = held[key].to_bytes(4, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda held: held.update(offset=2**31), "is outside of the file"),
        (lambda held: held.update(offset=1), "is not stored uncompressed"),
        (lambda held: held.update(file_size=2**31), "is not stored uncompressed"),
        (lambda held: held.update(file_size=2**31, compress_size=2**31), "ends beyond the file"),
    ],
)
def test_a_directory_that_is_wrong(tmp_path, edit, message):
    file = program(tmp_path, pickle_of(tensor(row([1]), row([1]))))
    directory(file, edit)
    refused(file, f"archive/data/0 {message}")


def test_a_member_far_beyond(tmp_path):
    """A 64-bit offset, which no call to seek takes."""
    text = pickle_of(tensor(row([1]), row([1])))
    file = program(tmp_path, text)
    data = file.read_bytes()
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    place = data.rindex(b"archive/data/0") - 46
    entry = bytearray(data[place : place + 46 + len("archive/data/0")])
    entry[30:32] = len(extra).to_bytes(2, "little")
    entry[42:46] = b"\xff" * 4
    end = bytearray(data[place + len(entry) :])
    end[12:16] = (int.from_bytes(end[12:16], "little") + len(extra)).to_bytes(4, "little")
    file.write_bytes(data[:place] + bytes(entry) + extra + bytes(end))
    refused(file, "archive/data/0 is outside of the file")


@pytest.mark.parametrize("claimed", ["pickle", "byteorder", "directory"])
def test_a_claim_of_gigabytes_takes_no_memory(tmp_path, claimed):
    file = program(tmp_path, b"\x80\x02}.")
    if claimed == "directory":  # the record at the end says that the gigabytes before it are all directory
        end = bytearray(file.read_bytes()[-22:])
        os.truncate(file, 2**31)
        end[12:16], end[16:20] = (2**31 - 100).to_bytes(4, "little"), (100).to_bytes(4, "little")
        with file.open("ab") as opened:
            opened.write(end)
    else:
        name = "archive/data.pkl" if claimed == "pickle" else "archive/byteorder"
        directory(file, lambda held: held.update(file_size=2**31, compress_size=2**31), name)
    tracemalloc.start()
    try:
        refused(file, "is not a file of tensors that joyjax reads")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


# any change


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pickled") / "model.pth"


def pickle_in(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as opened:
        return opened.read("archive/data.pkl")


PICKLE = pickle_in(collections.OrderedDict(tensors()))


def is_sound(file: Path) -> None:
    """Read a file: its tensors lie within it, or one error names it."""
    try:
        found = read_pickled(file)
    except CheckpointError as error:
        found, message = {}, str(error)
    else:
        message = str(file)
    assert message.startswith(str(file))
    for name, held in found.items():
        assert name.isprintable()
        assert held.start >= 0
        assert held.start + held.nbytes <= file.stat().st_size
        assert held.read().shape == held.shape
    assert os.listdir(file.parent) == [file.name]


changes = st.tuples(st.integers(0, len(PICKLE)), st.integers(0, 5), st.sampled_from(OPCODES) | st.binary(max_size=4))


@settings(max_examples=200, deadline=None)
@given(changed=st.lists(changes, min_size=1, max_size=5))
@example(changed=[(0, len(PICKLE), pickle.dumps({"x": Evil(Path("mark"))}))])
def test_any_change_of_the_pickle(place, changed):
    text = bytearray(PICKLE)
    for start, count, new in changed:
        text[start : start + count] = new
    members = {"data.pkl": bytes(text), **{f"data/{n}": bytes(240) for n in range(5)}}
    is_sound(zipped(place, members))


@settings(max_examples=100, deadline=None)
@given(flips=st.dictionaries(st.integers(0, 10**6), st.integers(0, 255), min_size=1, max_size=4), end=st.floats(0, 9))
def test_any_damage_of_the_file(place, flips, end):
    data = bytearray(zipped(place, {"data.pkl": PICKLE, "data/0": bytes(240)}).read_bytes())
    for at, byte in flips.items():
        data[-1 - at % len(data)] = byte
    place.write_bytes(data[: int(len(data) * min(1, end))])
    is_sound(place)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([*OPCODES, b"X\x01\x00\x00\x00a", b"K\x01", b"h\x00", b"q\x00"]), max_size=40))
def test_any_program(place, text):
    is_sound(zipped(place, {"data.pkl": b"".join(text) + b"."}))
