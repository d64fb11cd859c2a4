"""Parts of requests: which are read, how their rows are counted, and what is refused as a whole."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from joyjax.batch.rows import read_rows
from joyjax.errors import RequestError

GOOD = {"prompt": "x", "image": "a.png"}


def rows_of(folder: Path, text: str | bytes, name: str = "r.jsonl"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_rows(path)


def refused(folder: Path, text: str | bytes, *says: str, name: str = "r.jsonl") -> None:
    with pytest.raises(RequestError) as caught:
        rows_of(folder, text, name)
    for part in (str(folder / name), *says):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_gives_a_row_for_each_element(tmp_path, indent):
    values = [GOOD, {**GOOD, "id": "b", "steps": [1, {"a": ","}]}, {**GOOD, "prompt": "zeile\nzwei, ] und \u2028 赤"}]
    text = "\ufeff\n" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    rows = rows_of(tmp_path, text)
    assert [row.name for row in rows] == ["0001", "b", "0003"]
    assert [{**row.options} for row in rows] == [GOOD, {**GOOD, "steps": [1, {"a": ","}]}, values[2]]
    assert [row.line for row in rows] == ([2, 2, 2] if indent is None else [3, 7, 18])
    assert [row.error for row in rows] == [None] * 3


def test_a_bad_element_has_its_error_and_the_others_stay(tmp_path):
    text = '[\n {"prompt": "x"},\n\n "prompt",\n {"prompt": NaN},\n {"prompt": 1, "prompt": 2},\n {"noise": 1},'
    text += '\n {"cfg": 1}]'
    rows = rows_of(tmp_path, text)
    assert rows[0].error is None
    assert rows[1].error == "element 2 (line 4) holds a json str; expected a JSON object"
    assert rows[2].error.startswith("element 3 (line 5) is not valid JSON: Out of range")
    assert rows[3].error == "element 4 (line 6) is not valid JSON: 'prompt' is there twice"
    assert rows[4].error == "noise cannot be given in a file of requests"
    assert rows[5].error == "'cfg' is not an argument of edit: use guidance_scale"


def test_an_array_that_is_not_json_is_refused_whole(tmp_path):
    array = "begins with '[', as a JSON array of requests, but is not valid JSON"
    refused(tmp_path, '[\n{"prompt": "x"},\n{"prompt": "y"\n{"prompt": "z"}]', array, "in line 4, column 1")
    refused(tmp_path, '[\n{"prompt": "x"}\n', array, "in line 3, column 1")
    refused(tmp_path, '["prompt"]\n{"prompt": "x"}\n', array, "Extra data in line 2, column 1")
    refused(tmp_path, b'[\n{"prompt": "x"},\n{"prompt": "\xff"}]', "is not UTF-8 in line 3")
    refused(tmp_path, "[" * 100_000, "nested too deeply")
    refused(tmp_path, f'[{{"seed": {"9" * 5000}}}]', "is not a JSON array of requests")
    refused(tmp_path, '["a", "b"]', "a JSON array without an object: element 1 is 'a'", "expected one JSON object")
    refused(tmp_path, "[]", "holds no request")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_counted_as_an_editor_counts_them(tmp_path, end):
    text = end.join(["\ufeff", '{"prompt": "x"}', "  ", '{"prompt": "a\u2028b\x85c"}', '{"prompt" "x"}', ""])
    rows = rows_of(tmp_path, text)
    assert [(row.line, row.name) for row in rows] == [(2, "0002"), (4, "0004"), (5, "0005")]
    assert rows[1].options == {"prompt": "a\u2028b\x85c"}
    assert rows[2].error == "line 5 is not valid JSON: Expecting ':' delimiter at column 11"


def test_a_control_character_does_not_end_a_line(tmp_path):
    """A carriage return inside a string is an error of its line, and moves no number."""
    rows = rows_of(tmp_path, '{"prompt": "a\rb"}\n{"prompt": "a\x0bb"}\n{"prompt" "x"}\n')
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[0].error == "line 1 is not valid JSON: Invalid control character at at column 14"
    assert rows[2].error.startswith("line 3 ")


def test_equal_names_name_both_places(tmp_path):
    refused(tmp_path, '\n{"id": "a"}\n\n{"id": "A"}', "lines 2 and 4 are both named 'A'; give other ids")
    refused(tmp_path, '[{"id": "a"},\n{},\n{"id": "a"}]', "elements 1 and 3 (lines 1 and 3) are both named 'a'")
    refused(tmp_path, '[{},\n{"id": "0001"}]', "elements 1 and 2 (lines 1 and 2) are both named '0001'")


def test_an_object_over_several_lines_is_explained(tmp_path):
    pretty, remedy = json.dumps(GOOD, indent=2), "write each request in one line, or all of them as a JSON array"
    refused(tmp_path, pretty, "lines 1 to 4 are one JSON object", remedy)
    refused(tmp_path, f"{pretty}\n{pretty}\n", "lines 1 to 4 are one JSON object", remedy)
    refused(tmp_path, f"{json.dumps(GOOD)}\n\n{pretty}", "lines 3 to 6 are one JSON object", remedy)
    refused(tmp_path, '{"prompt": "x",\n "seed": 3}', "lines 1 to 2 are one JSON object", remedy)
    refused(tmp_path, '{\n"prompt": "x"\n"seed": 3\n}', "begins in line 1, and is not valid JSON", "in line 3", remedy)
    assert rows_of(tmp_path, '{"prompt": "x"\n{"prompt": "y"}')[0].error.startswith("line 1 is not valid JSON")


def saved(kind: str) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8)).save(held, kind)
    return held.getvalue()


def zipped(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return held.getvalue()


OTHERS = {
    "PNG": (saved("PNG"), "is a PNG picture, not a file of requests"),
    "JPEG": (saved("JPEG"), "is a JPEG picture"),
    "WebP": (saved("WEBP"), "is a WebP picture"),
    "TIFF": (saved("TIFF"), "is a TIFF picture"),
    "BMP": (saved("BMP"), "is a binary file"),
    "ZIP": (zipped("requests.jsonl"), "is a zip archive"),
    "Excel": (zipped("docProps/app.xml", "xl/workbook.xml"), "is an Excel workbook"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512), "is an Excel file"),
    "HEIC": (b"\0\0\0\x18ftypheic", "is a HEIC picture"),
    "weights": (b"GGUF\3\0\0\0", "is a GGUF file of weights"),
    "binary": (b"\x7fELF\0\0", "is a binary file"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), "is in UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": ('{"prompt": "x"}'.encode("utf-16-le"), "is in UTF-16; save it as UTF-8"),
    "CSV": (b"id,image,prompt\na,a.png,make it red\n", "looks like CSV: line 1 is 'id,image,prompt'"),
    "YAML": (b"- id: a\n  prompt: x\n", "looks like YAML: line 1 is '- id: a'"),
    "YAML map": (b"prompt: x\n", "looks like YAML"),
    "XML": (b"\n<html>\n", "looks like XML or HTML: line 2 is '<html>'"),
    "text": (b"make the sky red\n", "looks like text: line 1 is 'make the sky red'"),
    "cut text": (b"\xff\xfd" * 40 + b"\n", "looks like text"),
}


@pytest.mark.parametrize(("text", "says"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_not_a_file_of_requests_is_named(tmp_path, text, says):
    refused(tmp_path, text, says, *([] if "UTF-16" in says else ["expected one JSON object in each line"]))


def test_a_binary_file_is_not_read_whole(tmp_path):
    path = tmp_path / "model.bin"
    with path.open("wb") as opened:
        opened.truncate(2**40)  # sparse: to read it would need a terabyte of memory
    with pytest.raises(RequestError, match="is a binary file"):
        read_rows(path)
