"""Headers, indices and json of any content: what they say is true of their files, or an error names the file."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.safetensors import Tensors
from joyjax.convert.source.model import DEMO
from joyjax.errors import CheckpointError
from joyjax.families.joyimage import EDIT
from joyjax.processors.vision import VisionProcessorConfig
from joyjax.reading import read_json
from joyjax.sampling.schedule import ScheduleConfig

thorough = settings(max_examples=200, deadline=None)

NAMED = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.ones(4, ml_dtypes.bfloat16),
    "count": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float16),
}
FILE = save(NAMED)
END = 8 + int.from_bytes(FILE[:8], "little")  # of the header
HEADER, DATA = json.loads(FILE[8:END]), FILE[END:]
SHARDS = {"model-1.safetensors": ["a", "b.weight"], "model-2.safetensors": ["count", "empty"]}
INDEX = {"metadata": {"total_size": 40}, "weight_map": {name: file for file, held in SHARDS.items() for name in held}}

near = st.sampled_from([0, 1, 2, 3, 4, 8, 24, 32, 40, 41, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**400])
leaf = (
    st.none()
    | st.booleans()
    | near
    | near.map(lambda number: -number)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["F32", "BF16", "I64", "F4", "model-1.safetensors", "../model-1.safetensors", "\ud800", "\x1b[2J"]
    )
)
anything = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def edits(value: Any) -> st.SearchStrategy[Callable[[Any], Any]]:
    """Return changes at any place of a json value: another value, none, one more, or one under another name."""
    places: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        places.append(path)
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, (*path, key))

    walk(value, ())

    def change(path: tuple[Any, ...], how: str, new: Any, name: str) -> Callable[[Any], Any]:
        def apply(value: Any) -> Any:
            if not path:
                return new if how == "set" else value
            held = value
            for key in path[:-1]:
                held = held[key]
            if how == "set":
                held[path[-1]] = new
            elif how == "drop":
                del held[path[-1]]
            elif isinstance(held, list):
                held.append(new)
            else:
                held[name] = held.pop(path[-1]) if how == "rename" else new
            return value

        return apply

    return st.builds(
        change,
        st.sampled_from(places),
        st.sampled_from(["set", "drop", "add", "rename"]),
        anything,
        st.text(max_size=9),
    )


def changed(value: Any, changes: list[Callable[[Any], Any]]) -> Any:
    value = copy.deepcopy(value)
    for change in changes:
        try:
            value = change(value)
        except (KeyError, IndexError, TypeError, AttributeError):  # another change took the place away
            pass
    return value


def several(value: Any) -> st.SearchStrategy[Any]:
    return st.lists(edits(value), min_size=1, max_size=3).map(lambda changes: changed(value, changes))


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result or the one error that may be."""
    try:
        return call(*arguments)
    except CheckpointError as error:
        return error


def is_sound(folder: Path) -> bool:
    """Open a folder: its tensors lie apart in its files, and can be read, or the error names the folder's file."""
    tensors = outcome(Tensors.open, folder)
    if isinstance(tensors, CheckpointError):
        assert str(folder) in str(tensors)
        assert len(str(tensors)) < 2000
        assert "\n" not in str(tensors)
        return False
    spans: dict[Path, list[tuple[int, int]]] = {}
    for name, tensor in tensors.headers.items():
        assert tensor.file.parent == folder
        assert name.isprintable()
        assert all(type(size) is int and size >= 0 for size in tensor.shape)
        spans.setdefault(tensor.file, []).append((tensor.start, tensor.start + tensor.nbytes))
        assert tensors.read(name).shape == tensor.shape
    for file, held in spans.items():
        ends = [0, *(end for _, end in sorted(held))]
        assert all(start >= end for (start, _), end in zip(sorted(held), ends, strict=False))
        assert ends[-1] == file.stat().st_size
    return True


def fresh(folder: Path, files: Mapping[str, bytes]) -> Path:
    for file in folder.iterdir():
        file.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def as_header(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def test_what_is_sound_is_read(folder):
    assert is_sound(fresh(folder, {"model.safetensors": FILE}))
    assert is_sound(fresh(folder, {"model.safetensors": as_header(HEADER) + DATA}))
    assert is_sound(fresh(folder, shards(INDEX)))


@thorough
@given(header=several(HEADER))
def test_any_change_of_a_header(folder, header):
    is_sound(fresh(folder, {"model.safetensors": as_header(header) + DATA}))


@thorough
@given(
    entries=st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BF16"]),
                "shape": st.lists(near | st.integers(0, 5), max_size=3),
                "data_offsets": st.lists(near | st.integers(0, 40), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    )
)
def test_any_offsets_of_tensors(folder, entries):
    is_sound(fresh(folder, {"model.safetensors": as_header(entries) + DATA}))


@thorough
@given(
    flips=st.dictionaries(st.integers(0, len(FILE) - 1), st.integers(0, 255), max_size=4),
    end=st.just(len(FILE)) | st.integers(0, len(FILE)),
    more=st.binary(max_size=9),
)
def test_any_damage_of_a_file(folder, flips, end, more):
    data = bytearray(FILE)
    for place, byte in flips.items():
        data[place] = byte
    is_sound(fresh(folder, {"model.safetensors": bytes(data[:end]) + more}))


@thorough
@given(
    length=st.integers(0, 2**64 - 1) | st.integers(0, len(FILE) + 8), rest=st.just(FILE[8:]) | st.binary(max_size=40)
)
def test_any_length_of_a_header(folder, length, rest):
    is_sound(fresh(folder, {"model.safetensors": length.to_bytes(8, "little") + rest}))


def shards(index: Any) -> dict[str, bytes]:
    held = {file: save({name: NAMED[name] for name in names}) for file, names in SHARDS.items()}
    return {**held, "model.safetensors.index.json": json.dumps(index).encode()}


@thorough
@given(index=several(INDEX))
def test_any_change_of_an_index(folder, index):
    is_sound(fresh(folder, shards(index)))


@thorough
@given(where=st.dictionaries(st.sampled_from([*NAMED, "d"]) | st.text(), st.sampled_from(list(SHARDS)) | st.text()))
def test_any_map_of_an_index(folder, where):
    is_sound(fresh(folder, shards({"weight_map": where})))


@thorough
@given(data=st.binary() | st.text().map(str.encode) | anything.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 10**5)
@example(b'{"a":' * 10**5)
@example(b'{"a":' + b"1" * 5000 + b"}")
@example(b'{"a":1e999}')
@example(b'{"a":NaN}')
@example(b'{"a":1,"a":1}')
@example(b'{"\\ud800":"\\udfff"}')
@example(b"\xef\xbb\xbf{}")
def test_any_json(folder, data):
    file = fresh(folder, {"config.json": data}) / "config.json"
    found = outcome(read_json, file)
    assert isinstance(found, dict) or (str(found).startswith(str(file)) and len(str(found)) < 1000)


CONFIGS: dict[str, Callable[[Mapping[str, Any]], object]] = {
    **{f"{component.folder}/config.json": component.configure for component in EDIT.components},
    "processor/preprocessor_config.json": VisionProcessorConfig.from_json,
    "scheduler/scheduler_config.json": ScheduleConfig.from_diffusers,
    "joyjax.json": lambda raw: GenerationDefaults.from_json(raw, "joyjax.json"),
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_change_of_a_configuration(folder, name, data):
    raw = data.draw(several(json.loads((DEMO / name).read_text())))
    file = fresh(folder, {"config.json": json.dumps(raw).encode()}) / "config.json"
    found = outcome(lambda: CONFIGS[name](read_json(file)))
    assert not isinstance(found, CheckpointError) or "config" in str(found) or name in str(found)
