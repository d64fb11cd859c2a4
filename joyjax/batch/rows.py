"""The rows of a batch, read from a file of requests.

The file holds one JSON object in each line, or one JSON array of objects. A faulty row keeps its error; a file of
another kind is refused as a whole.
"""

import codecs
import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from joyjax.errors import RequestError
from joyjax.names import refusal
from joyjax.options import EDIT
from joyjax.reading import parse_json, quoted
from joyjax.signatures import signature

NAME = re.compile(r"\w[\w.-]{0,99}")
LONGEST_NAME = 200  # bytes, as most file systems allow 255
NOT_IN_ROWS = tuple(name for name, option in EDIT.items() if not option.row)  # what JSON cannot hold
IN_ROWS = tuple(name for name in EDIT if name not in NOT_IN_ROWS)
LONGEST_ROW = 2**20  # bytes
HEAD = 2**16  # bytes that are read to detect a binary file
WANTED = (
    'expected one JSON object in each line, such as {"image": "photo.jpg", "prompt": "make the sky red"}, '
    "or one JSON array of such objects"
)
DOCUMENTS = ((b"%PDF-", "a PDF document"), (b"\xd0\xcf\x11\xe0", "an Excel file (.xls) or another old Office document"))
OFFICE = (b"[Content_Types].xml", b"docProps/", b"xl/")  # names of files in a ZIP archive that Excel wrote
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"[\0", b"\0{", b"\0[")
BETWEEN = re.compile(r"[\s,]*")  # elements of a JSON array


@dataclasses.dataclass(frozen=True)
class Row:
    """One request: its position in the file, the name of its results, and its options as written, or its error.

    `line` counts from 1, as an editor does. `element` counts from 1 in a JSON array; elsewhere it is None.
    """

    line: int
    name: str
    options: Mapping[str, Any]
    error: str | None = None
    element: int | None = None

    @property
    def place(self) -> str:
        """Where the row is in the file, for messages."""
        return f"line {self.line}" if self.element is None else f"element {self.element} (line {self.line})"


def read_rows(file: Path) -> list[Row]:
    """Read a file of requests; a row that is not a JSON object of options is kept, with its error.

    Empty lines are skipped. A row's name is its `id`, else the number of its line, or of its element, in four digits.

    Raises:
        RequestError: if the file cannot be read, is not a file of requests, holds none, or two rows have equal names.
    """
    text = _read(file)
    found = _elements(file, text) if text.lstrip().startswith(b"[") else _lines(file, text)
    rows: dict[str, Row] = {}
    for row in found:
        key = unicodedata.normalize("NFC", row.name).casefold()  # equal names on some file systems
        if key in rows:
            raise RequestError(f"{file}: {_places(rows[key], row)} are both named {row.name!r}; give other ids")
        rows[key] = row
    if not rows:
        raise RequestError(f"{file} holds no request; {WANTED}")
    return list(rows.values())


def _places(one: Row, other: Row) -> str:
    lines = f"lines {one.line} and {other.line}"
    return lines if one.element is None else f"elements {one.element} and {other.element} ({lines})"


def _read(file: Path) -> bytes:
    """Return the text of a file without its byte order mark; only the head of a binary file is read."""
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
            if head.startswith(UTF16):
                raise RequestError(f"{file} is in UTF-16; save it as UTF-8")
            kind = _binary_kind(head)
            if kind is not None:
                raise RequestError(f"{file} is {kind}, not a file of requests; {WANTED}")
            return (head + opened.read()).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror or error}") from None


def _binary_kind(head: bytes) -> str | None:
    """Describe a binary file; None for text."""
    for magic, kind in DOCUMENTS:
        if head.startswith(magic):
            return kind
    found = signature(head)
    if found is not None and found.kind == "archive":
        office = any(name in head for name in OFFICE)
        return "an Excel workbook or another Office document" if office else f"a {found.format} archive"
    if found is not None and found.kind in ("picture", "video"):
        return f"a {found.format} {found.kind}"
    if found is not None and found.kind in ("gguf", "pickle", "hdf5", "numpy"):
        return f"a {found.format} file of weights"
    return "a binary file" if b"\0" in head else None


def _elements(file: Path, text: bytes) -> Iterator[Row]:
    """Yield the rows of a JSON array; an invalid array is refused as a whole."""
    try:
        decoded = text.decode("utf-8")
        values = json.loads(decoded)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{file} is not UTF-8 in line {line}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{file} begins with '[', as a JSON array of requests, but is not valid JSON: {error.msg} in line "
            f"{error.lineno}, column {error.colno}; correct it, nothing was run"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"{file} is not a JSON array of requests: {reason}") from None
    if values and not any(isinstance(value, dict) for value in values):
        raise RequestError(f"{file} is a JSON array without an object: element 1 is {quoted(values[0])}; {WANTED}")
    decoder = json.JSONDecoder()
    at, line, counted = decoded.index("[") + 1, 1, 0
    for element in range(1, len(values) + 1):
        start = at + len(BETWEEN.match(decoded, at)[0])  # type: ignore[index] # it matches anything
        _, at = decoder.raw_decode(decoded, start)
        line, counted = line + decoded.count("\n", counted, start), start
        yield _read_row(decoded[start:at].encode(), line, element)


def _lines(file: Path, text: bytes) -> Iterator[Row]:
    """Yield the rows of a file with one request in each line; only a line feed ends a line."""
    lines = text.split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if numbered and not any(line.lstrip().startswith(b"{") for _, line in numbered):
        number, first = numbered[0]
        shown = quoted(first.decode("utf-8", "replace").strip())
        raise RequestError(f"{file} looks like {_text_kind(file, text)}: line {number} is {shown}; {WANTED}")
    good = True
    for number, line in numbered:
        row = _read_row(line, number)
        if line.strip() == b"{" or (good and row.error is not None and line.lstrip().startswith(b"{")):
            _refuse_several_lines(file, lines, number)
        good = good and row.error is None
        yield row


def _refuse_several_lines(file: Path, lines: list[bytes], number: int) -> None:
    """Raise RequestError if a JSON object begins in a line and continues in the next ones."""
    rest = b"\n".join(lines[number - 1 : number + 9999])[:LONGEST_ROW].decode("utf-8", "replace").lstrip()
    remedy = "write each request in one line, or all of them as a JSON array: [{…}, {…}]"
    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except json.JSONDecodeError as error:
        if lines[number - 1].strip() != b"{":
            return  # a fault of this line alone
        raise RequestError(
            f"{file}: a JSON object over several lines begins in line {number}, and is not valid JSON: {error.msg} "
            f"in line {number + error.lineno - 1}; {remedy}"
        ) from None
    except (ValueError, RecursionError):
        return
    last = number + rest.count("\n", 0, end)
    if last > number:
        raise RequestError(f"{file}: lines {number} to {last} are one JSON object; {remedy}")


def _text_kind(file: Path, text: bytes) -> str:
    first, *others = [line for line in text.split(b"\n") if line.strip()]
    if first.lstrip().startswith(b"<"):
        return "XML or HTML"
    if file.suffix.lower() in (".csv", ".tsv"):
        return "CSV"
    if re.match(rb"---|- |[\w-]+:(\s|$)", first) or file.suffix.lower() in (".yaml", ".yml"):
        return "YAML"
    if others and any(first.count(mark) == others[0].count(mark) > 0 for mark in (b",", b";", b"\t")):
        return "CSV"
    return "text"


def _read_row(text: bytes, line: int, element: int | None = None) -> Row:
    row = Row(line, f"{element or line:04}", {}, element=element)
    try:
        if len(text) > LONGEST_ROW:
            raise ValueError(f"it has {len(text)} bytes; {LONGEST_ROW} at most are read")
        options = parse_json(text)
        json.dumps(options, allow_nan=False)
    except TypeError as error:
        return dataclasses.replace(row, error=f"{row.place} holds {error}; expected a JSON object")
    except UnicodeDecodeError as error:
        byte = f"byte {text[error.start]:#04x} after {text[: error.start].decode()[-20:]!r}"
        return dataclasses.replace(row, error=f"{row.place} is not UTF-8: {byte}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        return dataclasses.replace(row, error=f"{row.place} is not valid JSON: {reason}")
    except ValueError as error:
        return dataclasses.replace(row, error=f"{row.place} is not valid JSON: {error}")
    given = options.pop("id", row.name)
    row = dataclasses.replace(row, options=options)
    if isinstance(given, bool) or not isinstance(given, str | int) or not _is_name(str(given)):
        reason = (
            f"id is {quoted(given)}; expected up to 100 letters, digits, '.', '-' and '_', the first of them a letter "
            "or digit: it names the result's file"
        )
        return dataclasses.replace(row, error=reason)
    row = dataclasses.replace(row, name=str(given))
    for key in NOT_IN_ROWS:
        if key in options:
            return dataclasses.replace(row, error=f"{key} cannot be given in a file of requests")
    if unknown := [name for name in options if name not in EDIT]:
        return dataclasses.replace(row, error=refusal(unknown, "edit", IN_ROWS))
    return row


def _is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None and len(text.encode()) <= LONGEST_NAME
