"""What the command line says to who writes something else than it takes: the remedy, and status 2."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import typer
from click.testing import CliRunner, Result
from invoke import PROGRAM, environment, invoke
from PIL import Image

from joyjax.cli import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
HALF = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale that knows ASCII alone


def program(*arguments: str) -> Result:
    """Run the whole program here, as `main` does."""
    return CliRunner().invoke(typer.main.get_command(app), list(arguments), prog_name="joyjax")


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PROGRAM, *arguments], cwd=cwd, capture_output=True, timeout=120, env=environment() | variables
    )


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("edit make the sky red -i x.png", 'put it into quotes: joyjax edit "make the sky red"'),
        ("edit -i x.png make the sky red", 'put it into quotes: joyjax edit "make the sky red"'),
        ("edit -p make the sky red", "the prompt is several arguments"),
        (["edit", "make it red", "photo.jpg"], "pictures are named with --image, one for each: --image photo.jpg"),
        (["edit", "photo.jpg", "make it red"], "one for each: --image photo.jpg"),
        ("edit a -i a.png b.png c.png", "--image b.png --image c.png"),
        (["edit", "-20 degrees", "-i", "x.png"], 'begins with "-" is written --prompt="-20 degrees"'),
        ("edit -20 degrees -i x.png", 'begins with "-" is written --prompt="-20 …"'),
        (["edit", "-make it red", "-i", "x.png"], 'begins with "-" is written --prompt="-make it red"'),
        (["edit", "--make it red"], '--prompt="--make it red"'),
        (["edit", "- make it red"], '--prompt="- make it red"'),
        ("edit a --num-inference-steps 4", "No such option: --num-inference-steps; use --steps"),
        ("edit a --num-inference-steps=4", "No such option: --num-inference-steps; use --steps"),
        ("edit a --cfg 4", "use --guidance-scale"),
        ("edit a -n 4", "No such option: -n; use --num-images"),
        ("edit a --n-iter 4", "use --num-images"),
        ("edit a --num_images 4", "use --num-images"),
        ("edit a --negative_prompt x", "use --negative-prompt"),
        ("edit a --guidance 4", "use --guidance-scale"),
        ("edit a --strength 1", "there is no strength"),
        ("edit a --out x.png", "use --output"),
        ("edit a --input x.png", "use --image"),
        ("edit a --checkpoint x", "use --model"),
        ("edit a --ckpt x", "use --model"),
        ("edit a --device cpu", "JAX_PLATFORMS"),
        ("edit a --size 4x4", "use --height and --width"),
        ("edit a -W 64", "use --width"),
        ("edit a -steps 4", "No such option: -steps; use --steps"),
        ("edit a -image x.png", "No such option: -image; use --image"),
        ("edit a -output x.png", "use --output"),
        ("edit a --latents x", "use noise of joyjax.edit in Python"),
        ("edit a --batch-size 4", "joyjax batch has --batch-size"),
        ("edit a --stpes 4", "--steps"),
        ("edit a --frobnicate", "No such option: --frobnicate"),
        ("batch r.jsonl -o out --steps 4", 'a row of the requests has it, as "steps"'),
        ("batch r.jsonl -o out --num-inference-steps 4", 'a row of the requests has it, as "steps"'),
        ("batch r.jsonl -o out --torch-dtype x", "use --dtype"),
        ("batch r.jsonl -o out more", "unexpected extra argument(s) (more)"),
        ("convert a b --revision main", 'as in "owner/name@main"'),
        ("bench --num-inference-steps 4", "use --steps"),
        ("edti a", "Did you mean 'edit'?"),
        ("generate a", "use joyjax edit"),
        (["make the sky red", "-i", "x.png"], 'write joyjax edit "make the sky red" --image FILE'),
        ("make the sky red", 'write joyjax edit "the prompt" --image FILE'),
        ("photo.jpg", 'write joyjax edit "…" --image photo.jpg'),
        (["-i", "x.png", "make it red"], "joyjax edit has -i"),
        ("--num-inference-steps 4", "joyjax edit has --steps"),
        (["edit", "a", "--x\x1b[31m"], r"--x\x1b[31m"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_remedy_is_said(arguments, says, here):
    done = program(*(arguments.split() if isinstance(arguments, str) else arguments))
    assert done.exit_code == 2, (done.stderr, done.exception)
    assert done.stdout == ""
    assert says in done.stderr.splitlines()[-1]
    assert "Usage: joyjax" in done.stderr
    assert "\x1b" not in done.stderr
    assert os.listdir() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "-20 degrees"],
        ["--prompt=-20 degrees"],
        ["-p-20 degrees"],
        ["--", "-20 degrees"],
        ["a", "--width=64", "--height=64"],
    ],
)
def test_what_is_right_is_taken(arguments, here):
    """It comes as far as the model, which is missing."""
    done = invoke("edit", "--model", "none", *arguments)
    assert "model 'none' does not exist" in str(done.exception)


def test_help_begins_with_the_basic_options():
    text = invoke("edit", "--help").stdout
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        *("Arguments:", "Options:", "Sizes and masks:", "Sampling:", "Speed and memory:", "Devices:"),
        "Results and records:",
    ]
    basic = text.partition("\nOptions:\n")[2].partition("\n\n")[0]
    rows = [line for line in basic.splitlines() if line.startswith("  -")]
    named = [word for row in rows for word in row.split() if word.startswith("--")]
    assert named == ["--prompt", "--image", "--output", "--model", "--seed", "--num-images", "--help"]
    every = {option for param in typer.main.get_command(app).commands["edit"].params for option in param.opts}
    assert [option for option in every if option.startswith("--") and option not in text] == []
    assert "Sampling:" not in invoke("convert", "--help").stdout  # of few options


def test_a_locale_that_cannot_read_what_was_written(tmp_path):
    """In `LC_ALL=C` without UTF-8 mode a prompt or a name of a file is refused; what is in ASCII runs."""
    Image.open(EXAMPLE).save(tmp_path / "rö.png")
    for arguments in (["edit", "rötlich"], ["edit", "a", "--image", "rö.png"], ["info", "rö.png"], ["rö"]):
        done = run(*arguments, cwd=tmp_path, **HALF)
        assert (done.returncode, done.stdout) == (1, b""), done
        [line] = done.stderr.decode().splitlines()
        assert line.startswith("joyjax: 'r\\udcc3\\udcb6")
        assert "cannot be read as ascii, the encoding of the locale; set LC_ALL=C.UTF-8 or PYTHONUTF8=1" in line
    row = {"id": "a", "image": "rö.png", "prompt": "make the red circle blue", "steps": 1}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    done = run("batch", "r.jsonl", "-o", "out", cwd=tmp_path, **HALF)
    assert done.returncode == 1
    said = json.loads((tmp_path / "out" / "a.json").read_bytes())["error"]
    assert said.startswith("the file 'rö.png' cannot be named in ascii, the encoding of the locale; set LC_ALL=C.UTF-8")
    assert run("edit", "--help", cwd=tmp_path, **HALF).returncode == 0


def test_bytes_that_are_not_utf_8(tmp_path):
    """A prompt of them is refused before a model is loaded; help is printed to a stream that lacks its letters."""
    done = run("edit", os.fsdecode(b"r\xf6tlich"), cwd=tmp_path, PYTHONUTF8="1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"cannot be read as utf-8, the encoding of the locale; have the terminal send UTF-8" in done.stderr
    done = run("edit", "--help", cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert rb"edit-2.png, \u2026]" in done.stdout


def test_a_result_whose_name_is_not_utf_8_is_printed_as_its_bytes(tmp_path):
    name = b"b\xff.png"
    arguments = ["edit", "remove the star", "--image", str(EXAMPLE), "--steps", "1", "--output", os.fsdecode(name)]
    done = run(*arguments, cwd=tmp_path, PYTHONUTF8="1")
    assert (done.returncode, done.stdout) == (0, name + b"\n"), done.stderr
    assert os.listdir(os.fsencode(tmp_path)) == [name]
