"""The installed program in a process of its own: status, standard output, standard error, files."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import compile_cache
import numpy as np
import pytest
import typer
from invoke import start
from PIL import Image
from saved import save

from joyjax.cli import app
from joyjax.media.image import open_picture
from joyjax.media.references import Source
from joyjax.provenance.recipe import make_recipe, read_recipe
from joyjax.shapes.advice import ABOUT
from joyjax.shapes.edits import KINDS

PROGRAM = Path(sys.executable).with_name("joyjax")
SMALL = ["--steps", "2", "--height", "64", "--width", "96", "--exact-size", "--dtype", "float32"]


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    # not what conftest sets for this process: a user has none of it
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKENIZERS_"))}
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )


def fails(*arguments: object, cwd: Path | None = None, says: str) -> None:
    """The work failed: status 1, nothing on standard output, one line that says why, after those of the stages."""
    done = run(*arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (1, ""), done
    *stages, reason = done.stderr.splitlines()
    assert set(stages) <= {"loading", "editing", "converting", "verifying"}
    assert reason.startswith("joyjax: ")
    assert says in reason


def misused(*arguments: object, says: str) -> None:
    """Wrong usage: status 2."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "photo.jpg"
    y, x = np.mgrid[:150, :220]
    Image.fromarray(np.uint8(np.stack([y, x, (x * y) % 256], -1) % 256)).save(path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "joy"
    done = run("convert", checkpoint, target)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{target}\n"
    for name in ("text_encoder", "transformer", "vae", "next: joyjax edit"):
        assert name in done.stderr
    return target


def test_help_and_version():
    listed = run("--help").stdout.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == [
        "edit",
        "batch",
        "convert",
        "info",
        "score",
        "warmup",
        "bench",
        "train-demo",
    ]
    assert "..." not in listed  # what each does is said in full
    for arguments in ([], *([line.split()[0]] for line in listed.splitlines())):
        done = run(*arguments, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: joyjax")
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert "edit-2.png" in run("edit", "--help").stdout
    assert run("--version").stdout.strip() == "0.1.0"


def test_every_option_is_explained():
    commands = typer.main.get_command(app).commands.values()
    assert [f"{command.name} {p.name}" for command in commands for p in command.params if not p.help] == []


def test_wrong_usage():
    misused(says="Usage: joyjax")
    misused("edit", says="what to change")
    misused("edit", "a", "--prompt", "b", says="given twice")
    misused("edit", "a", "--seed", "-1", says="--seed")
    misused("edit", "a", "--seed", "1.5", says="--seed")
    misused("edit", "a", "--steps", "many", says="--steps")
    misused("edit", "a", "--steps", "0", says="--steps")
    misused("edit", "a", "--height", "8", says="--height")
    misused("edit", "a", "--dtype", "float16", says="bfloat16")
    misused("edit", "a", "--base-size", "300", says="1024")
    misused("edit", "a", "--cfg-scale", "4", says="No such option: --cfg-scale; use --guidance-scale")
    misused("sketch", says="No such command")
    misused("convert", says="SOURCE")


def test_failures_of_an_edit(tmp_path, picture):
    fails("edit", "x", "--model", tmp_path / "none", says="does not exist")
    fails("edit", "x", "--model", picture, says="is a JPEG picture; give a picture to edit with --image")
    fails("edit", "x", "--model", tmp_path, says="model_index.json is missing")
    fails("edit", "x", "--model", tmp_path, "--image", tmp_path / "none.jpg", says="none.jpg does not exist")
    (tmp_path / "text.jpg").write_text("no picture")
    fails("edit", "x", "--model", tmp_path, "--image", tmp_path / "text.jpg", says="cannot be read as a picture")
    (tmp_path / "half.jpg").write_bytes(picture.read_bytes()[:2000])
    fails("edit", "x", "--model", tmp_path, "--image", tmp_path / "half.jpg", says="half.jpg is broken or cut off")
    fails("edit", "x", "--model", tmp_path, "--mesh", "model=2", says="expected axes such as tensor=4,sequence=2")
    fails("edit", "x", "--model", tmp_path, "--mesh", "tensor=64,cfg=2", says="needs 128 devices")
    fails("edit", "x", "--model", tmp_path, "--output", tmp_path / "a.gif", says=".png")
    (tmp_path / "folder.png").mkdir()
    fails("edit", "x", "--model", tmp_path, "--output", tmp_path / "folder.png", says="is a folder")
    debug = run("edit", "x", "--model", tmp_path / "none", "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


@pytest.mark.parity
def test_edit_from_both_kinds_of_folder(tmp_path, checkpoint, converted, picture):
    """The same pixels from both, and from a random seed when it is given; only a file that is named is overwritten."""
    arguments = ["--image", picture, *SMALL]
    done = run("edit", "make the sky red", "--model", checkpoint, "--seed", "random", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "edit.png\n"), done.stderr
    assert "cropped: " in done.stderr  # 2 % of the picture
    seed = done.stderr.split("seed ")[1].split()[0]
    first = (tmp_path / "edit.png").read_bytes()

    arguments += ["--model", converted]
    done = run("edit", "--prompt", "make the sky red", "--seed", seed, "--timings", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "edit-2.png\n"), done.stderr
    for stage in ("prompt", "references", "denoise", "decode", "total"):
        assert stage in done.stderr
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("edit.png", "edit-2.png")]
    assert pixels[0].shape == (64, 96, 3)
    np.testing.assert_array_equal(*pixels)

    named = tmp_path / "edit.png"
    done = run("edit", "make the sky red", "--output", named, *arguments, cwd=tmp_path)  # and the default seed
    assert (done.returncode, done.stdout) == (0, f"{named}\n"), done.stderr
    assert named.read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit-2.png", "edit.png"]


@pytest.mark.parity
def test_failures_after_loading_leave_no_file(converted, picture, tmp_path):
    arguments = ["edit", "x", "--model", converted]
    fails(*arguments, "--image", picture, "--image", picture, cwd=tmp_path, says="2 reference pictures")
    fails(*arguments, "--height", "100", "--width", "64", "--exact-size", cwd=tmp_path, says="height is 100")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parity
def test_a_converted_part_that_is_cut_off(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "joy")
    for path in (folder / "transformer" / "part-00000" / "ocdbt.process_0" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = run("edit", "x", "--model", folder)
    assert (done.returncode, done.stdout) == (1, "")
    # Orbax sometimes writes a traceback of its own before our line, from a thread that nobody waits for
    assert "transformer/part-00000 cannot be read; convert the model again" in done.stderr


@pytest.mark.parity
def test_info(checkpoint, converted):
    done = run("info", checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("JoyImage-Edit (JoyImageEditPipeline), diffusers folder, complete")
    described = json.loads(run("info", converted, "--json").stdout)
    assert described["format"] == "converted"
    assert [part["folder"] for part in described["components"]] == ["text_encoder", "transformer", "vae"]
    assert described["parameters"] == sum(part["parameters"] for part in described["components"])
    part = run("info", converted / "vae")
    assert (part.returncode, part.stderr) == (0, "")
    assert "is one component of a model, its vae (AutoencoderKLWan)" in part.stdout
    assert f"what to do: give the folder of the whole pipeline: {converted}\n" in part.stdout
    fails("edit", "x", "--model", converted / "vae", says=f"give the folder of the whole pipeline: {converted}")
    on_mesh = run("info", checkpoint, "--mesh", "sequence=8,tensor=2")
    assert "mesh sequence=8,tensor=2: each of 16 devices holds\n  2 of the transformer's heads\n" in on_mesh.stdout
    assert "(ring 4 × ulysses 2)" in on_mesh.stdout
    fails("info", checkpoint, "--mesh", "tensor=3", says="sizes that fit: 1, 2")


def test_info_of_a_picture(tmp_path, picture):
    settings = dict.fromkeys(("dtype", "linear", "kernels", "fit", "vae_encode", "vae_decode"), "x") | {
        **{"model": str(tmp_path / "joy"), "family": "JoyImage-Edit", "noise": "rule 1", "cache": None},
        **{"prompt": "a \x1b[31mred\u202e sky\nseed 7 赤", "negative_prompt": "", "sigmas": None},
        **{"steps": 40, "guidance_scale": [4.0, 1.0], "guidance_until": 1.0, "seed": 3, "base_size": 1024},
        **{"height": 768, "width": 1024, "exact_size": False, "paste_back": False},
    }
    source = Source.of(open_picture(picture), picture)
    recipe = make_recipe(
        settings, fingerprint=f"sha256:{'ab' * 32}", jax="0.10.2", device="cpu", references=[source], mask=source
    )
    path = tmp_path / "edit.png"
    save(Image.new("RGB", (8, 8)), path, recipe)
    done = run("info", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isprintable() or set(filter(lambda c: not c.isprintable(), done.stdout)) == {"\n"}
    rows = done.stdout.splitlines()
    assert rows[0] == f"{path}: made by joyjax 0.1.0 with JAX 0.10.2 on cpu"
    assert rows[1:3] == ["  prompt           a \\x1b[31mred\\u202e sky", "                   seed 7 赤"]
    assert "  guidance_scale   [4.0, 1.0]" in rows
    assert f"  model            {tmp_path / 'joy'}" in rows
    assert any(row.startswith("  mask             ") and row.endswith("photo.jpg") for row in rows)
    done = run("info", path, "--json")
    assert done.stdout.isascii()
    recipe = json.loads(done.stdout)
    assert recipe == read_recipe(path)
    assert recipe["settings"]["prompt"] == settings["prompt"]
    misused("info", path, "--verify", says="--verify: is for a checkpoint")
    misused("info", path, "--mesh", "tensor=2", says="--mesh: is for a checkpoint")
    fails("info", picture, says="photo.jpg holds no recipe")
    fails("info", tmp_path / "none.png", says="none.png does not exist")
    save(Image.new("RGB", (8, 8)), path, None)
    fails("info", path, says="holds no recipe")


def test_info_of_what_joyjax_does_not_run(tmp_path):
    """What it recognises it prints, with status 0; what is broken, or nothing that it knows, is an error."""
    (tmp_path / "q.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 894, 0))
    done = run("info", tmp_path / "q.gguf")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [
        f"{tmp_path / 'q.gguf'} is a GGUF file (894 tensors)",
        "  version          3",
        "  tensors          894",
    ]
    assert done.stdout.splitlines()[3].startswith(
        "what to do: this version of joyjax does not read GGUF; joyjax takes a folder"
    )
    facts = json.loads(run("info", tmp_path / "q.gguf", "--json").stdout)
    assert facts["path"] == str(tmp_path / "q.gguf")
    assert (facts["kind"], facts["state"], facts["details"]) == ("gguf", "foreign", {"version": 3, "tensors": 894})
    misused("info", tmp_path / "q.gguf", "--verify", says="--verify: is for a checkpoint, and")
    fails("convert", tmp_path / "q.gguf", tmp_path / "out", says="is a GGUF file (894 tensors); this version")
    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "model_index.json").write_text('{"_class_name": "Flux\\u001b[31mPipeline"}')
    done = run("info", flux)
    assert (done.returncode, done.stderr) == (0, "")
    assert "another pipeline, 'Flux\\x1b[31mPipeline'" in done.stdout
    assert done.stdout.replace("\n", "").isprintable()
    (tmp_path / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails("info", tmp_path / "m.safetensors", says="is a Git LFS pointer")
    fails("info", tmp_path / "m.safetensors", "--json", says="git lfs pull")
    (tmp_path / "notes.md").write_text("# notes")
    fails("info", tmp_path / "notes.md", says="is a text file that begins '# notes'")
    fails("info", tmp_path / "none", says="does not exist")
    fails("info", "https://huggingface.co/owner/name", says="give the hub id: owner/name")


@pytest.mark.parity
def test_convert_keeps_what_is_there(checkpoint, converted, tmp_path):
    again = run("convert", checkpoint, converted)  # the same command on a finished target: nothing to do
    assert (again.returncode, again.stdout) == (0, f"{converted}\n"), again.stderr
    fails("convert", checkpoint, converted, "--dtype", "bfloat16", says="--overwrite")
    fails("convert", tmp_path / "none", tmp_path / "out", says="does not exist")
    fails("convert", checkpoint, tmp_path / "out", "--component", "nose", says="'nose'")
    assert list(tmp_path.iterdir()) == []
    done = run("convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16", "--component", "vae")
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stderr
    assert "next:" not in done.stderr  # one component alone cannot be edited with
    fails("edit", "x", "--model", tmp_path / "half", says="is missing")


@pytest.mark.parity
def test_interrupt_ends_cleanly(tmp_path, converted):
    """Ctrl-C in the middle of the steps: status 1, one word, no file."""
    arguments = ["edit", "a tree", "--model", converted, "--steps", "1000", "--base-size", "256", "--dtype", "float32"]
    process = start(*arguments, cwd=tmp_path, env={"JAX_LOG_COMPILES": "1"})
    seen = ""
    for line in process.stderr:  # wait until the step is compiled, so that steps are running
        seen += line
        if "Finished XLA compilation of jit(predict)" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err[-500:]
    assert out == ""
    assert "joyjax: cancelled" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shapes(tmp_path) -> Path:
    from joyjax.shapes.draw import render
    from joyjax.shapes.scene import Ground, Scene, Thing

    path = tmp_path / "shapes.png"
    things = (Thing("circle", "red", "large", 24, 24), Thing("star", "yellow", "medium", 104, 64))
    Image.fromarray(render(Scene(Ground("mint", "plain"), things))).save(path)
    return path


@pytest.mark.jax
def test_compiled_programs_are_kept_for_the_next_run(tmp_path, shapes, monkeypatch):
    for name, value in compile_cache.fresh({}, tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in (*compile_cache.SETTINGS, compile_cache.KEEP):
        monkeypatch.delenv(name, raising=False)
    kept = []
    for name in ("one.png", "two.png"):
        done = run("edit", "remove the star", "--image", shapes, "--output", tmp_path / name, "--steps", "1")
        assert done.returncode == 0, done.stderr
        kept.append({path.name for path in (tmp_path / "joyjax" / "compiled").rglob("*") if path.suffix != ".lockfile"})
    assert len([name for name in kept[0] if name.endswith(".program")]) > 4  # at least the four stages
    assert kept[1] == kept[0]  # nothing was compiled anew
    assert done.stderr.splitlines() == ["loading", ABOUT, "editing"]  # no word of XLA's
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    monkeypatch.setenv(compile_cache.KEEP, "0")
    done = run("edit", "remove the star", "--image", shapes, "--output", tmp_path / "jit.png", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "jit.png").read_bytes()


def test_the_first_command_uses_the_demo_and_says_so(tmp_path, shapes):
    done = run("edit", "make the red circle blue", "--image", shapes, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "edit.png\n"), done.stderr
    assert done.stderr.splitlines() == ["loading", ABOUT, "editing"]
    assert Image.open(tmp_path / "edit.png").size == (128, 128)
    again = run("edit", "make the sky red", "--image", shapes, "--steps", 1, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "edit-2.png\n")
    assert "never saw the words 'sky'" in again.stderr
    assert "Warning" not in again.stderr


def test_score(tmp_path):
    # So much guidance is too much: some must fail.
    done = run("score", "--count", 8, "--guidance-scale", 100, "--steps", 1, "--failures", tmp_path / "failed")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["kind", *KINDS, "all"]
    assert [row[1] for row in rows[1:]] == ["1"] * 8 + ["8"]
    pictures = list((tmp_path / "failed").iterdir())
    assert pictures
    assert Image.open(pictures[0]).size == (384, 128)
    score = json.loads(run("score", "--count", 8, "--steps", 1, "--json").stdout)
    assert score["all"]["edits"] == 8
    assert {*score} == {*KINDS, "all"}
    misused("score", "--count", "3", says="--count")
    (tmp_path / "file").touch()
    fails("score", "--failures", tmp_path / "file", says="which is a file")


def test_training_refuses_before_it_begins(tmp_path):
    (tmp_path / "file").touch()
    fails("train-demo", tmp_path / "file", says="is a file; name a folder")
    fails("train-demo", tmp_path, says="holds other files")
    fails("train-demo", tmp_path / "new", "--start", tmp_path / "none", says="does not exist")
    misused("train-demo", tmp_path / "new", "--decay", "2", says="--decay")


def test_bench(shapes):
    done = run("bench", "--repeats", 2, "--steps", 2)
    assert done.stderr == "loading\nmeasuring\n"
    lines = done.stdout.splitlines()
    assert lines[1] == "JoyImage-Edit, 128 × 128, 2 steps, guidance 1, bfloat16, kernels xla"
    stages = ["prepare", "prompt", "references", "denoise", "decode", "total"]
    assert [line.split()[0] for line in lines if line.count(" s") == 3] == stages
    found = json.loads(run("bench", "--repeats", 3, "--steps", 2, "--image", shapes, "--json").stdout)
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in found["seconds"].values())
    assert found["step_seconds"] == pytest.approx(sorted(found["seconds"]["denoise"])[1] / 2)
    assert found["first"] > max(found["seconds"]["total"])  # it compiles
    assert found["peak_bytes"] > 2**27
    done = run("bench", "--repeats", 1, "--steps", 3, "--cache", "1000", "--linear", "float8", "--json")
    settings = json.loads(done.stdout)["settings"]
    assert (settings["cache"], settings["linear"]) == ("taylor:1000", "float8")
    misused("bench", "--repeats", "0", says="--repeats")
    fails("bench", "--image", "missing.jpg", says="missing.jpg")


@pytest.mark.nightly
def test_speed_that_costs_a_little(tmp_path, shapes):
    edit = ["edit", "make the red circle blue", "--image", shapes, "--steps", 6]
    done = run(*edit, "--cache", "taylor:1000", "--guidance-scale", 2, "--guidance-until", 0.5, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "edit.png\n"), done.stderr
    assert "cache: 3 of 6 steps computed in full" in done.stderr  # the first of each kind, and the last
    for wrong, says in (
        (("--cache", "often"), "cache is 'often'; expected a threshold"),
        (("--guidance-until", "0"), "guidance_until is 0; expected a share of the steps"),
    ):
        done = run(*edit, *wrong, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert says in done.stderr.splitlines()[-1]
    misused(*edit, "--linear", "int4", says="--linear")
