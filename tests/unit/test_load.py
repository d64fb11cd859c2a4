"""The picture that a user names: a file, standard input, or a pipe."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pictures import encoded, picture

from joyjax.errors import PictureError
from joyjax.media.load import load_image

PICTURE = encoded(picture(), "PNG")
PROGRAM = """
import sys
from joyjax.errors import PictureError
from joyjax.media import load
load.MOST_BYTES = 2**20
try:
    print(load.load_image(sys.argv[1]).tobytes().hex())
except PictureError as error:
    print(error)
"""


def read_by_shell(line: str, tmp_path: Path) -> str:
    """Have a shell start a program that reads a picture, as $READ LOCATION; return what it prints."""
    (tmp_path / "photo.png").write_bytes(PICTURE)
    (tmp_path / "read.py").write_text(PROGRAM)
    environment = {**os.environ, "READ": f"{sys.executable} -P {tmp_path / 'read.py'}"}
    shell = ["bash", "-c", line]
    return subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120).stdout


def test_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(PICTURE)
    Path("-").write_bytes(PICTURE)
    for name in ("photo.png", str(tmp_path / "photo.png"), "./-"):
        image = load_image(name)
        assert image.tobytes() == picture().tobytes()
        assert os.path.samefile(image.filename, name)
    monkeypatch.chdir("/")
    assert load_image("photo.png", folder=tmp_path).size == (7, 5)
    with pytest.raises(PictureError, match="none.png does not exist"):
        load_image("none.png")
    with pytest.raises(PictureError, match="name of a picture is empty"):
        load_image("")
    with pytest.raises(PictureError, match="is not a file"):
        load_image(str(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cat photo.png | $READ -", picture().tobytes().hex()),
        ("$READ - < photo.png", picture().tobytes().hex()),
        ("$READ <(cat photo.png)", picture().tobytes().hex()),
        ("cat photo.png | $READ /dev/stdin", picture().tobytes().hex()),
        ("$READ - < /dev/null", "standard input is empty"),
        ("$READ - <&-", "standard input is closed; pipe a picture into it, or name a file"),
        ("head -c 60 photo.png | $READ -", "standard input is broken or cut off"),
        ("echo no picture | $READ -", "standard input cannot be read as a picture: it is broken, or of another format"),
        ("$READ - < /dev/zero", "standard input has more than 1,048,576 bytes"),
        ("yes | $READ -", "standard input has more than 1,048,576 bytes"),
        ("$READ /dev/zero", "/dev/zero has more than 1,048,576 bytes"),
        ("$READ /dev/null", "/dev/null is empty"),
        ("$READ <(true)", " is empty"),
    ],
)
def test_standard_input_and_pipes(line, says, tmp_path):
    said = read_by_shell(line, tmp_path)
    assert says in said
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_terminal_is_not_waited_for(monkeypatch):
    import pty

    ours, theirs = pty.openpty()
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        for location in ("-", os.ttyname(theirs)):
            with pytest.raises(PictureError, match="is a terminal; pipe a picture into it"):
                load_image(location)
    os.close(ours)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_what_came_from_no_file_has_no_file_name(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[PICTURE])
    writer.start()
    piped = load_image(str(tmp_path / "pipe"))
    writer.join()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PICTURE)))
    for image, name in ((piped, str(tmp_path / "pipe")), (load_image("-"), "standard input")):
        assert image.tobytes() == picture().tobytes()
        assert not hasattr(image, "filename")
        assert image.location == name


def test_a_row_reads_no_pipe(tmp_path):
    """A pipe without a writer would keep a whole batch waiting."""
    with pytest.raises(PictureError, match="standard input, which a row cannot read"):
        load_image("-", pipes=False)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PictureError, match="pipe is not a file"):
            load_image("pipe", folder=tmp_path, pipes=False)
