"""What `joyjax edit` offers beside the edit: several results, recipes run again, masks, previews, notes."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from invoke import invoke, start, succeed
from PIL import Image
from web import serving

from joyjax.convert.source.model import DEMO
from joyjax.errors import AdviceWarning, CheckpointError, JoyJaxError, PictureError, RequestError
from joyjax.provenance.recipe import read_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
PROMPT = "make the red circle blue"
FAST = ["--dtype", "float32"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of its own to work in, with a square picture of the demo's kind and a wide one."""
    monkeypatch.chdir(tmp_path)
    Image.open(EXAMPLE).save("shapes.png")
    Image.open(EXAMPLE).resize((250, 100)).save("wide.png")
    return tmp_path


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def settings(path: str | Path) -> dict:
    return read_recipe(path)["settings"]


def fails(*arguments: object, says: str, error: type[Exception] = JoyJaxError) -> None:
    before = sorted(os.listdir())
    done = invoke("edit", *arguments)
    assert isinstance(done.exception, error), (done.exception, done.stderr)
    assert says in str(done.exception)
    assert done.stdout == ""
    assert sorted(os.listdir()) == before


def test_several_results(here):
    """Seeds that follow each other, names that follow each other, and nothing overwritten that was not named."""
    Path("edit-2.png").write_bytes(b"mine")
    done = succeed("edit", PROMPT, "-i", "shapes.png", "--num-images", 3, "--seed", 7, *FAST)
    assert done.stdout.split() == ["edit.png", "edit-3.png", "edit-4.png"]
    assert [settings(path)["seed"] for path in done.stdout.split()] == [7, 8, 9]
    for seed, path in zip((7, 8, 9), done.stdout.split(), strict=True):
        assert f"seed {seed}: {path}\n" in done.stderr
    assert Path("edit-2.png").read_bytes() == b"mine"
    alone = succeed("edit", PROMPT, "-i", "shapes.png", "--seed", 9, "-o", "edit.png", *FAST)  # it is named
    assert alone.stdout == "edit.png\n"
    np.testing.assert_array_equal(pixels("edit.png"), pixels("edit-4.png"))
    done = succeed("edit", PROMPT, "-i", "shapes.png", "-o", "edit-3.png", "--num-images", 2, *FAST)
    assert done.stdout.split() == ["edit-3.png", "edit-3-2.png"]
    assert invoke("edit", PROMPT, "--num-images", 0).exit_code == 2


def test_a_file_that_appears_meanwhile_is_not_overwritten(here):
    """Two programs in one folder choose the same free name; who comes second takes the next."""
    import joyjax

    plain = joyjax.load

    def load(*arguments, **options):
        Path("edit.png").write_bytes(b"another's")
        return plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joyjax, "load", load)
        assert succeed("edit", PROMPT, "-i", "shapes.png", *FAST).stdout == "edit-2.png\n"
    assert Path("edit.png").read_bytes() == b"another's"


def test_recipes_run_again(here):
    """The same pixels from the PNG alone; what is given wins; a reference that is gone or another is an error."""
    first = ["--steps", 3, "--guidance-scale", "2,2,1", "--seed", 5, "--mask", "mask.png", "--fit", "pad", *FAST]
    white = np.zeros((100, 250), np.uint8)
    white[20:, 100:] = 255
    Image.fromarray(white).save("mask.png")
    succeed("edit", PROMPT, "-i", "wide.png", "--negative-prompt", "grey", *first)
    again = succeed("edit", "--from", "edit.png")
    assert again.stdout == "edit-2.png\n"
    np.testing.assert_array_equal(pixels("edit.png"), pixels("edit-2.png"))
    for path in ("edit.png", "edit-2.png"):
        assert (settings(path)["guidance_scale"], settings(path)["fit"]) == ([2.0, 2.0, 1.0], "pad")
    assert read_recipe("edit-2.png") == read_recipe("edit.png")

    succeed("edit", "remove the star", "--from", "edit.png", "--seed", 6, "--num-images", 2, "-o", "other.png")
    assert [settings(path)["seed"] for path in ("other.png", "other-2.png")] == [6, 7]
    assert settings("other.png") == {**settings("edit.png"), "prompt": "remove the star", "seed": 6}
    assert np.abs(pixels("other.png") - pixels("edit.png")).max() > 1
    fails("--from", "edit.png", "--steps", 2, says="guidance_scale has 3 values")
    succeed("edit", "--from", "edit.png", "--steps", 2, "--guidance-scale", 1, "-o", "one.png")
    assert (settings("one.png")["steps"], settings("one.png")["guidance_scale"]) == (2, 1.0)
    fails("--from", "edit.png", "-i", "shapes.png", says="mask")  # which was as large as the other picture
    fails("--from", "shapes.png", says="holds no recipe")
    fails("--from", "none.png", says="none.png does not exist")

    os.mkdir("moved")  # with its pictures beside it, a result may go anywhere
    for name in ("edit.png", "wide.png", "mask.png"):
        os.rename(name, Path("moved") / name)
    succeed("edit", "--from", "moved/edit.png", "-o", "moved-again.png")
    np.testing.assert_array_equal(pixels("moved/edit.png"), pixels("moved-again.png"))
    Image.open("moved/wide.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("moved/wide.png")
    fails("--from", "moved/edit.png", says="has changed")
    os.remove("moved/wide.png")
    fails("--from", "moved/edit.png", says="wide.png, is missing")


def test_a_recipe_with_another_picture_or_levels(here):
    succeed("edit", PROMPT, "-i", "shapes.png", "--sigmas", "1,0.7,0.2", "--paste-back", *FAST)
    assert settings("edit.png")["sigmas"] == [1.0, 0.7, 0.2]
    assert settings("edit.png")["steps"] == 3
    succeed("edit", "--from", "edit.png", "-i", "wide.png", "-o", "wide-edit.png")
    assert Image.open("wide-edit.png").size == (250, 100)  # the other picture's own size, not the first one's
    succeed("edit", "--from", "edit.png", "--steps", 2, "-o", "two.png")  # in place of the levels
    assert (settings("two.png")["steps"], settings("two.png")["sigmas"]) == (2, None)
    succeed("edit", "--from", "edit.png", "--sigmas", "0.9,0.1", "-o", "levels.png")
    assert settings("levels.png")["steps"] == 2
    fails("--from", "edit.png", "--model", "none", says="does not exist", error=CheckpointError)


def test_a_recipe_with_another_model(here):
    succeed("edit", PROMPT, "-i", "shapes.png", "--steps", 1, *FAST)
    shutil.copytree(DEMO, "model")
    config = Path("model/processor/preprocessor_config.json")
    config.write_text(config.read_text() + "\n")
    done = succeed("edit", "--from", "edit.png", "--model", "model", "-o", "other.png")
    assert "the model is not the one in the recipe: the result will not be the same" in done.stderr
    made, other = (read_recipe(path)["model"] for path in ("edit.png", "other.png"))
    assert other["source"] == "model"
    assert other["fingerprint"] != made["fingerprint"]
    assert "another one" not in succeed("edit", "--from", "other.png", "-o", "again.png").stderr
    config.write_text(config.read_text() + "\n")
    fails("--from", "other.png", says="the model in model is not the one that made the picture", error=RequestError)


def test_no_metadata(here):
    succeed("edit", PROMPT, "-i", "shapes.png", "--no-metadata", *FAST)
    assert Image.open("edit.png").text == {}
    fails("--from", "edit.png", says="--no-metadata")


def test_pictures_that_are_not_in_files(here, monkeypatch):
    """From standard input and by URL; a recipe then names no file, but knows the picture by its digest."""
    data = Path("shapes.png").read_bytes()
    fast = ["--steps", 1, *FAST]
    succeed("edit", PROMPT, "-i", "shapes.png", "-o", "file.png", *fast)
    with monkeypatch.context() as patch:
        patch.setattr("joyjax.media.fetch.is_public", lambda address: False)
        with serving({"/shapes.png": data}) as url:
            succeed("edit", PROMPT, "-i", f"{url}/shapes.png?a=b", "--allow-private-urls", "-o", "url.png", *fast)
            fails(PROMPT, "-i", f"{url}/shapes.png", *fast, says="not a public address", error=PictureError)
            fails(PROMPT, "-i", "shapes.png", "--mask", f"{url}/none.png", "--allow-private-urls", says="404")
    done = invoke("edit", PROMPT, "-i", "-", "-o", "stdin.png", *fast, input=data)
    assert done.exit_code == 0, done.exception
    for name in ("url.png", "stdin.png"):
        np.testing.assert_array_equal(pixels(name), pixels("file.png"))
        [source], [named] = read_recipe(name)["references"], read_recipe("file.png")["references"]
        url = {"url": source.get("url")} if name == "url.png" else {}
        assert source == {**named, "file": None, **url}
    assert read_recipe("url.png")["references"][0]["url"].endswith("/shapes.png?…")  # without what may be a secret
    fails("--from", "stdin.png", says="the reference came from no file; name it with --image")
    succeed("edit", "--from", "url.png", "-i", "shapes.png", "-o", "again.png")
    np.testing.assert_array_equal(pixels("again.png"), pixels("file.png"))
    for arguments in (["-i", "-", "-i", "-"], ["-i", "-", "--mask", "-"]):
        done = invoke("edit", PROMPT, *arguments, input=data)
        assert done.exit_code == 2
        assert "standard input can be read once" in done.stderr
    fails(PROMPT, "-i", "ftp://host/photo.png", says="only http and https", error=PictureError)
    fails(PROMPT, "-i", "-", says="standard input is empty", error=PictureError)


def test_a_file_that_a_recipe_names_is_never_standard_input_or_a_url(here):
    """A recipe may be a stranger's."""
    os.rename("shapes.png", "-")
    succeed("edit", PROMPT, "-i", "./-", "--steps", 1, *FAST)
    assert [source["file"] for source in read_recipe("edit.png")["references"]] == ["-"]
    succeed("edit", "--from", "edit.png", "-o", "again.png")
    np.testing.assert_array_equal(pixels("again.png"), pixels("edit.png"))


def test_what_of_a_picture_is_not_used_is_noted(here):
    clear = Image.open("shapes.png").convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save("clear.png")
    first = Image.open("shapes.png")
    first.save("anim.gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    transparent = "clear.png is partly transparent, which models do not see: the colours beneath show"
    done = succeed("edit", PROMPT, "-i", "clear.png", "--steps", 1, "--num-images", 2, *FAST)
    assert done.stderr.splitlines().count(transparent) == 1
    done = succeed("edit", PROMPT, "-i", "clear.png", "--paste-back", "--steps", 1, *FAST)
    assert "transparent" not in done.stderr  # it is in the result
    done = succeed("edit", PROMPT, "-i", "anim.gif", "--steps", 1, *FAST)
    assert "anim.gif: frame 1 of 3 is used" in done.stderr.splitlines()
    done = succeed("edit", PROMPT, "-i", "shapes.png", "--steps", 1, *FAST)
    assert "transparent" not in done.stderr
    assert "frame" not in done.stderr

    import joyjax

    with pytest.warns(AdviceWarning, match="frame 1 of 3 is used"):
        result = joyjax.edit(joyjax.load(dtype="float32"), Image.open("anim.gif"), PROMPT, steps=1)
    assert result.notes == ("anim.gif: frame 1 of 3 is used",)


def test_masks_and_paste_back(here):
    """Outside of the mask not a bit changes, in five edits of each other's results either; sizes stay the picture's."""
    white = np.zeros((100, 250), np.uint8)
    white[:, 125:] = 255
    Image.fromarray(white).save("mask.png")
    before = "wide.png"
    for n in range(5):
        result = f"round-{n}.png"
        succeed("edit", PROMPT, "-i", before, "--mask", "mask.png", "-o", result, "--steps", 1, *FAST)
        np.testing.assert_array_equal(pixels(result)[white == 0], pixels("wide.png")[white == 0])
        assert np.abs(pixels(result)[white > 0] - pixels(before)[white > 0]).max() > 1
        before = result
    for fit in ("crop", "pad"):
        succeed("edit", PROMPT, "-i", "wide.png", "--paste-back", "--fit", fit, "-o", "p.png", "--steps", 1, *FAST)
        assert Image.open("p.png").size == (250, 100)
    fails(PROMPT, "--mask", "mask.png", *FAST, says="mask is given without a picture")
    fails(PROMPT, "-i", "shapes.png", "--mask", "mask.png", *FAST, says="mask")
    fails(PROMPT, "-i", "wide.png", "--mask", "none.png", *FAST, says="none.png does not exist")


def test_notes_say_what_was_done_to_the_picture(here):
    done = succeed("edit", PROMPT, "-i", "wide.png", "--steps", 1, "--num-images", 2, *FAST)
    notes = [line for line in done.stderr.splitlines() if line.startswith("picture 250 × 100 → ")]
    assert len(notes) == 1  # not for every result
    assert " % cropped: columns " in notes[0]
    size = Image.open("edit.png").size
    done = succeed("edit", PROMPT, "-i", "wide.png", "--steps", 1, "--fit", "pad", "-o", "pad.png", *FAST)
    assert "nothing cropped; " in done.stderr
    assert "of padding" in done.stderr
    assert Image.open("pad.png").size[1] < size[1]  # the padding is gone from the result
    ratio = np.divide(*Image.open("pad.png").size)
    assert abs(ratio - 2.5) < 0.1


def test_a_profile(here):
    Path("trace").mkdir()  # an empty folder is taken
    done = succeed("edit", PROMPT, "-i", "shapes.png", "--steps", 1, "--profile", "trace", *FAST)
    (file,) = Path("trace").rglob("*.trace.json.gz")
    assert f"profile: {file}, for https://ui.perfetto.dev; or the folder, for xprof trace" in done.stderr
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"PjitFunction(predict)", "PjitFunction(advance)"} <= names
    assert "PjitFunction(decode_latents)" not in names  # only the denoising
    fails(PROMPT, "--steps", 1, "--profile", "trace", says="--profile is trace, which is not empty; name a new folder")
    fails(PROMPT, "--steps", 1, "--profile", "edit.png", says="which is a file; name a folder")
    done = invoke("edit", PROMPT, "--profile", "new", "--num-images", 2)
    assert done.exit_code == 2
    assert "is of one edit, and --num-images is 2" in done.stderr


def test_previews_and_timings(here):
    more = ["--steps", 3, "--preview-dir", "new/previews", "--num-images", 2, "--timings"]
    done = succeed("edit", PROMPT, "-i", "shapes.png", *more, *FAST)
    names = [f"{stem}-step-{step:03}.png" for stem in ("edit", "edit-2") for step in (1, 2, 3)]
    assert sorted(os.listdir("new/previews")) == sorted(names)
    assert all(Image.open(Path("new/previews") / name).size == (128, 128) for name in names)
    last = pixels("new/previews/edit-step-003.png")  # at level 0 the preview is the picture
    assert np.abs(last - pixels("edit.png")).max() <= 1
    assert np.abs(pixels("new/previews/edit-step-001.png") - pixels("edit.png")).max() > 1
    stages = ["load", *["prepare", "prompt", "references", "denoise", "decode", "total"] * 2]
    rows = [line.split() for line in done.stderr.splitlines() if line.split()[1:2] and line.split()[0] in stages]
    assert [row[0] for row in rows] == stages
    assert all(float(row[1]) >= 0 and row[2].startswith("s") for row in rows)
    assert any("s a step" in " ".join(row) for row in rows)
    assert done.stderr.splitlines()[-1].startswith("peak memory: ")
    fails(PROMPT, "--preview-dir", "shapes.png", says="which is a file")
    fails(PROMPT, "--preview-dir", "shapes.png/in", says="cannot be made: Not a directory")
    fails(PROMPT, "-i", "shapes.png", "--sigmas", "0.2,0.7", *FAST, says="falling levels")
    assert invoke("edit", PROMPT, "--sigmas", "high").exit_code == 2
    assert invoke("edit", PROMPT, "--guidance-scale", "4;4").exit_code == 2


def test_an_interrupt_keeps_the_results_that_are_done(here):
    process = start("edit", PROMPT, "-i", "shapes.png", "--num-images", 3, "--steps", 60)
    assert process.stdout.readline() == "edit.png\n"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, ""), said
    assert said.endswith("joyjax: cancelled\n")
    assert "Traceback" not in said
    assert sorted(os.listdir()) == ["edit.png", "shapes.png", "wide.png"]
    assert settings("edit.png")["seed"] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_results_reach_a_pipe_when_the_notes_reach_a_terminal(here):
    """As in `joyjax edit … | xargs`: the bar is on the terminal, the path in the pipe."""
    import pty

    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).with_name("joyjax")), "edit", PROMPT, "-i", "shapes.png"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ})
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 2**16):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.communicate(timeout=120)[0] == "edit.png\n"
    assert process.returncode == 0
    assert b"editing" in seen
    assert b"edit.png" not in seen


def test_an_input_is_never_replaced(here):
    """By what the file is: other spellings and links too; and before a model is loaded."""
    Image.new("L", (128, 128), 255).save("mask.png")
    os.symlink("shapes.png", "link.png")
    os.link("shapes.png", "hard.png")
    os.mkdir("sub")
    before = {name: Path(name).read_bytes() for name in ("shapes.png", "mask.png")}
    nowhere = ["--model", "not-there"]  # which is an error of its own, later
    edit = [PROMPT, "-i", "shapes.png", "--mask", "mask.png", *nowhere]
    for output in ("shapes.png", "./shapes.png", "sub/../shapes.png", here / "shapes.png", "link.png", "hard.png"):
        fails(*edit, "-o", output, says="which is the picture of --image and would be replaced", error=RequestError)
    fails(*edit, "-o", "mask.png", says="which is the picture of --mask and would be replaced", error=RequestError)
    fails(PROMPT, "-i", "wide.png", "-i", "link.png", *nowhere, "-o", "shapes.png", says="would be replaced")
    fails(*edit, "-o", "other.png", says="'not-there'", error=CheckpointError)
    assert {name: Path(name).read_bytes() for name in before} == before


def test_a_recipe_may_replace_its_own_result_but_not_its_reference(here):
    succeed("edit", PROMPT, "-i", "shapes.png", "--steps", 1, *FAST)
    first = pixels("edit.png")
    assert succeed("edit", "--from", "edit.png", "-o", "edit.png").stdout == "edit.png\n"
    np.testing.assert_array_equal(pixels("edit.png"), first)
    fails("--from", "edit.png", "-o", "shapes.png", says="would be replaced", error=RequestError)
    fails("--from", "edit.png", "-i", "edit.png", "-o", "edit.png", says="would be replaced", error=RequestError)


def test_the_suffix_decides_the_format(here):
    edit = [PROMPT, "-i", "shapes.png", "--steps", 1, *FAST]
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF"), ("tiff", "TIFF")):
        name = f"new/folder/{kind}/edit.{suffix}"
        assert succeed("edit", *edit, "-o", name).stdout == f"{name}\n"
        assert Image.open(name).format == kind
        assert invoke("info", name).stdout.splitlines()[1].split() == ["prompt", *PROMPT.split()]
    jpeg, webp = Path("new/folder/JPEG/edit.jpg"), Path("new/folder/WEBP/edit.webp")
    np.testing.assert_array_equal(pixels(webp), pixels("new/folder/PNG/edit.png"))
    succeed("edit", "--from", jpeg, "-o", "again.png")
    np.testing.assert_array_equal(pixels("again.png"), pixels(webp))
    assert succeed("edit", *edit, "-o", "small.jpg", "--quality", 20, "--num-images", 2).stdout.split() == [
        "small.jpg",
        "small-2.jpg",
    ]
    assert Path("small.jpg").stat().st_size < jpeg.stat().st_size / 2
    for output, more, says in (
        ("edit", (), "edit has no suffix; name a file that ends in .png"),
        ("edit.gif", (), "edit.gif ends in .gif; name a file"),
        ("edit.png", ("--quality", 80), "quality is 80, but .png files are lossless"),
        ("edit.jpg", ("--quality", 0), "quality is 0; expected a whole number from 1 to 100"),
        ("edit.jpg", ("--quality", "best"), "quality is 'best'; expected"),
        ("edit.jpg", ("--quality", "lossless"), "but .jpg files lose detail"),
        ("new", (), "new has no suffix"),
        ("shapes.png/in/edit.png", (), "but shapes.png is a file; name another folder"),
    ):
        fails(*edit, "-o", output, *more, "--model", "not-there", says=says, error=RequestError)


def test_edits_at_once_lose_no_result(here):
    """Three programs that start together under default names, with previews in one folder: 3 of each are there."""
    edit = ["edit", PROMPT, "-i", "shapes.png", "--steps", 2, "--num-images", 2, "--preview-dir", "steps"]
    runs = [start(*edit, "--seed", seed) for seed in (10, 20, 30)]
    printed = [run.communicate(timeout=300)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    names = ["edit.png", *(f"edit-{number}.png" for number in range(2, 7))]
    assert sorted(name for each in printed for name in each) == sorted(names)
    assert {settings(name)["seed"] for name in names} == {10, 11, 20, 21, 30, 31}
    assert {(settings(name)["seed"]) // 10 for name in printed[1]} == {2}
    previews = sorted(os.listdir("steps"))
    assert len(previews) == 3 * 2 * 2
    assert all(f"{name.removesuffix('001.png')}002.png" in previews for name in previews if name.endswith("001.png"))


def test_a_failure_takes_no_name(here):
    fails(PROMPT, "-i", "shapes.png", "--seed", str(2**65), says="seed")
    assert succeed("edit", PROMPT, "-i", "shapes.png", "--steps", 1, *FAST).stdout == "edit.png\n"


def test_previews_replace_nothing(here):
    os.mkdir("steps")
    Path("steps/edit-step-002.png").write_bytes(b"mine")
    edit = ["edit", PROMPT, "-i", "shapes.png", "--steps", 2, "--preview-dir", "steps", *FAST]
    succeed(*edit, "-o", "edit.png")
    succeed(*edit, "-o", "edit.png")
    expected = {f"edit-{n}-step-00{step}.png" for n in (2, 3) for step in (1, 2)} | {"edit-step-002.png"}
    assert set(os.listdir("steps")) == expected
    assert Path("steps/edit-step-002.png").read_bytes() == b"mine"
