"""Parts appear whole, names are taken by one alone, and a path is known by what it leads to."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from joyjax import files
from joyjax.files import (
    discard_unfinished,
    file_key,
    publish,
    publish_all,
    publish_all_free,
    publish_free,
    same_file,
    temporary_beside,
)

PROCESSES, ROUNDS = 6, 40


def names(folder: Path, count: int = 10_000) -> list[Path]:
    return [folder / "edit.png", *(folder / f"edit-{number}.png" for number in range(2, count))]


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "edit.png"
    publish(b"one", path)
    publish(b"two", path)
    assert path.read_bytes() == b"two"
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        publish(b"three", path)
    with pytest.raises(OSError, match="full"):
        publish_free(b"three", names(tmp_path))
    assert [each.name for each in tmp_path.iterdir()] == ["edit.png"]
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize("links", [True, False])
def test_a_free_name_is_taken(tmp_path, monkeypatch, links):
    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    (tmp_path / "edit.png").write_bytes(b"mine")
    (tmp_path / "edit-2.png").symlink_to("nowhere")
    assert publish_free(b"one", names(tmp_path)) == tmp_path / "edit-3.png"
    assert publish_free(b"two", names(tmp_path)) == tmp_path / "edit-4.png"
    assert [(tmp_path / name).read_bytes() for name in ("edit.png", "edit-3.png", "edit-4.png")] == [
        b"mine",
        b"one",
        b"two",
    ]
    assert len(list(tmp_path.iterdir())) == 4


TAKE_NAMES = """
import itertools, sys, time
from pathlib import Path
from joyjax.files import publish_free
folder, process, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(rounds):
    names = itertools.chain(["edit.png"], (f"edit-{n}.png" for n in itertools.count(2)))
    publish_free(f"{process} {number}".encode(), (folder / name for name in names))
"""


def test_names_are_taken_by_one_process_each(tmp_path):
    """240 files by 6 processes at once: none is lost, and the names have no gap."""
    command = [sys.executable, "-c", TAKE_NAMES, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, str(number), str(ROUNDS)], **pipes) for number in range(PROCESSES)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    for run in runs:
        run.communicate(timeout=60)
    assert [run.returncode for run in runs] == [0] * PROCESSES
    total = PROCESSES * ROUNDS
    assert sorted(tmp_path.iterdir()) == sorted(names(tmp_path, total + 1))
    held = {path.read_text() for path in tmp_path.iterdir()}
    assert held == {f"{process} {number}" for process in range(PROCESSES) for number in range(ROUNDS)}


def test_threads_write_to_one_path(tmp_path):
    """8 threads, 50 times each: every write ends well, and the file is always one of them, whole."""
    path, faults, start = tmp_path / "edit.png", [], threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        for _ in range(50):
            try:
                publish(bytes([number]) * 10_000, path)
                data = path.read_bytes()
                assert len(data) == 10_000
                assert len(set(data)) == 1
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [each.name for each in tmp_path.iterdir()] == ["edit.png"]


def test_temporary_names_differ_and_fit(tmp_path):
    path = tmp_path / f"{'é' * 120}.png"  # 244 bytes
    found = {temporary_beside(path) for _ in range(1000)}
    assert len(found) == 1000
    publish(b"x", path)
    assert path.read_bytes() == b"x"
    assert {each.parent for each in found} == {tmp_path}


def test_what_is_unfinished_is_discarded(tmp_path, monkeypatch):
    """As Ctrl-C does, which unwinds no stack."""
    held = threading.Event()
    seen = []

    def stop(temporary, path):
        seen.extend(each.name for each in tmp_path.iterdir())
        discard_unfinished()
        held.set()
        raise OSError("the process would end here")

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(OSError, match="end here"):
        publish(b"x", tmp_path / "edit.png")
    assert len(seen) == 1
    assert seen[0].endswith(".part")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_path_is_known_by_what_it_leads_to(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "link.png").symlink_to("a.png")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path)
    for same in ("a.png", "./a.png", "sub/../a.png", "link.png", "hard.png", tmp_path / "a.png"):
        assert same_file("a.png", same), same
    for other in ("b.png", "none.png", "sub", "a\0.png", "x" * 5000):
        assert not same_file("a.png", other), other
        assert not same_file(other, "a.png"), other
    assert file_key("none.png") is None
    assert not same_file("none.png", "none.png")


def test_files_that_belong_together(tmp_path, monkeypatch):
    """All are replaced, or all new under the first names that are free together; a name taken meanwhile is left."""
    pair = [tmp_path / "a", tmp_path / "a-1"]
    pair[0].write_bytes(b"old")
    publish_all({pair[0]: b"one", pair[1]: b"two"})
    assert [path.read_bytes() for path in pair] == [b"one", b"two"]
    names = [[tmp_path / name, tmp_path / f"{name}-1"] for name in "abcd"]
    names[1][1].write_bytes(b"other")
    real = os.open

    def taken(path, *flags, **more):  # another process takes c-1 after the look
        if path == names[2][1]:
            monkeypatch.setattr(os, "open", real)
            path.write_bytes(b"theirs")
        return real(path, *flags, **more)

    monkeypatch.setattr(os, "open", taken)
    assert publish_all_free([b"3", b"4"], names) == names[3]
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"a": b"one", "a-1": b"two", "b-1": b"other", "c-1": b"theirs", "d": b"3", "d-1": b"4"}
    with pytest.raises(FileNotFoundError):
        publish_all({tmp_path / "e": b"5", tmp_path / "none" / "e-1": b"6"})
    assert {path.name for path in tmp_path.iterdir()} == found.keys()
