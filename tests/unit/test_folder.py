"""The folder of a batch: one batch at a time, and no input is ever replaced."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from joyjax.batch.folder import LOCK, Model, check_folder, hold_folder, sweep
from joyjax.batch.rows import Row
from joyjax.errors import RequestError

MODEL = Model("demo", "sha256:0", "float32", "exact")


def row(name: str, line: int = 1, **options: object) -> Row:
    return Row(line, name, {"prompt": "x", **options})


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "photo.png").write_bytes(b"photo")
    return tmp_path


def note(folder: Path, of: Row, **outcome: object) -> None:
    """Write a note as a batch does, and the picture where it names one."""
    held = {"id": of.name, "row": of.options, "model": dataclasses.asdict(MODEL), **outcome}
    (folder / "out" / f"{of.name}.json").write_text(json.dumps(held))


def check(folder: Path, *rows: Row, **options: object) -> dict[str, str]:
    return check_folder(folder / "out", rows, MODEL, folder, **options)


def refused(folder: Path, *rows: Row, says: str, **options: object) -> None:
    for overwrite in (False, True):
        with pytest.raises(RequestError) as caught:
            check(folder, *rows, overwrite=overwrite, **options)
        assert says in str(caught.value)


@pytest.mark.parametrize("named", ["out/a.png", "./out/../out/a.png", "link.png", "hard.png", "absolute", "out/a.json"])
@pytest.mark.parametrize("option", ["image", "mask", "list"])
def test_a_result_never_replaces_an_input(folder, named, option):
    """By what the file is: another spelling, a link and a hard link are the same file; --overwrite changes nothing."""
    target = folder / "out" / ("a.json" if named.endswith("json") else "a.png")
    target.write_bytes(b"mine")
    (folder / "link.png").symlink_to(target)
    os.link(target, folder / "hard.png")
    file = str(target) if named == "absolute" else named
    options = {"image": ["photo.png", file]} if option == "list" else {option: file}
    says = f"{target}, the result of 'a' (line 1), would replace a picture that 'b' (line 7) reads; give"
    refused(folder, row("a"), row("b", 7, **options), says=says)
    with pytest.raises(RequestError, match=r"would replace a picture that 'a' \(line 1\) reads"):
        check(folder, row("a", **options), overwrite=True)  # its own, too
    assert check(folder, row("c", **options)) == {"c": "new"}


def test_a_target_that_is_a_link_to_an_input_is_refused(folder):
    (folder / "out" / "a.png").symlink_to(folder / "photo.png")
    refused(folder, row("a", image="photo.png"), says="would replace a picture")


def test_the_file_of_requests_is_never_replaced(folder):
    requests = folder / "out" / "a.json"
    requests.write_text('{"prompt": "x"}')
    refused(folder, row("a"), requests=requests, says="would replace the file of requests")
    assert check(folder, row("b"), requests=requests) == {"b": "new"}


def test_a_folder_in_the_place_of_a_result_is_refused(folder):
    (folder / "out" / "a.png").mkdir()
    refused(folder, row("a"), says="a.png is a folder, and the result of line 1 has its name")


def test_a_row_may_read_what_the_batch_wrote(folder):
    """While it is done, or was not finished by the same row; not where it would be made anew from another row."""
    first, second = row("a", image="photo.png"), row("b", 2, image="out/a.png")
    assert check(folder, first, second) == {"a": "new", "b": "new"}  # nothing is there yet
    (folder / "out" / "a.png").write_bytes(b"result")
    note(folder, first, picture="a.png")
    assert check(folder, first, second) == {"a": "done", "b": "new"}
    assert check(folder, first, second, overwrite=True) == {"a": "done", "b": "new"}
    note(folder, first)  # killed after the picture and before the note
    assert check(folder, first, second) == {"a": "begun", "b": "new"}
    note(folder, first, error="no memory")  # then the picture is the user's
    refused(folder, first, second, says="a.png, the result of 'a' (line 1), would replace a picture that 'b' (line 2)")
    note(folder, row("a", image="photo.png", seed=3), picture="a.png")
    refused(folder, first, second, says="a.png, the result of 'a' (line 1), would replace a picture that 'b' (line 2)")


def test_names_that_no_file_can_have_are_left_to_their_row(folder):
    rows = [row("a", image="no\0name"), row("b", image="x" * 5000), row("c", image=[3, None, ""]), row("d", image={})]
    assert set(check(folder, *rows).values()) == {"new"}


HOLDS = """
import sys, pathlib
from joyjax.batch.folder import hold_folder
from joyjax.errors import RequestError
try:
    with hold_folder(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except RequestError as error:
    print(error, flush=True)
"""


def start(folder: Path) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], **pipes)


def test_a_folder_is_held_by_one_process_and_freed_by_its_death(tmp_path):
    taken = pytest.raises(RequestError, match="is being written by another batch at this time")
    with start(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        with taken, hold_folder(tmp_path):
            pytest.fail("two hold it")
        first.send_signal(signal.SIGKILL)
    with hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert LOCK.startswith(".")


def test_of_many_processes_one_holds_a_folder(tmp_path):
    """Eight at once, twice: the second time the file of the lock is there already."""
    for _ in range(2):
        processes = [start(tmp_path) for _ in range(8)]
        lines = [process.stdout.readline() for process in processes]
        for process in processes:
            process.communicate()
        assert sum(line == "held\n" for line in lines) == 1, lines


def test_what_a_killed_process_left_is_swept(folder):
    out = folder / "out"
    ours = [".a.png.123.part", ".a.json.0123456789abcdef.part", ".b.c.png.00ff.part"]
    others = [".d.png.123.part", ".a.png.part", ".a.png.xyz.part", "a.png.123.part", LOCK]
    for name in ours + others:
        (out / name).touch()
    sweep(out, [row("a"), row("b.c")])
    assert sorted(path.name for path in out.iterdir()) == sorted(others)
