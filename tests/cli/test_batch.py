"""`joyjax batch`: rows good and bad, what it refuses, and going on after it was stopped."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from invoke import PROGRAM, environment, invoke, start, succeed
from PIL import Image
from web import serving

import joyjax
from joyjax.batch import run
from joyjax.batch.folder import LOCK, hold_folder
from joyjax.batch.rows import read_rows
from joyjax.errors import Cancelled, RequestError
from joyjax.media.image import open_picture
from joyjax.provenance.recipe import read_recipe
from joyjax.runtime.engine import Engine

PROMPT = "make the red circle blue"
ROW = {"image": "shapes.png", "prompt": PROMPT, "steps": 2}
EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
FLOAT32 = ["--dtype", "float32"]


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.open(EXAMPLE).save(tmp_path / "shapes.png")
    Image.open(EXAMPLE).resize((200, 96)).save(tmp_path / "wide.png")
    return tmp_path


def write(path: Path, *rows: object) -> Path:
    """Write rows, each an object for JSON or bytes as they are."""
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def listed(folder: Path) -> list[str]:
    """What a user sees in a folder of results: not the hidden file of its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def told(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_bytes())


BAD = {
    "missing": (b'{"prompt": "x", "image": "none.png"}', "none.png does not exist"),
    "a folder": (b'{"prompt": "x", "image": "."}', "is not a file"),
    "no name": (b'{"prompt": "x", "image": ""}', "image is ''; expected the name of a file"),
    "a number": (b'{"prompt": "x", "image": [3]}', "image is [3]; expected the name of a file"),
    "no pictures": (b'{"prompt": "x", "image": []}', "image is an empty list; give a picture, or for text to image"),
    "two masks": (b'{"prompt": "x", "image": "shapes.png", "mask": ["a", "b"]}', "mask is ['a', 'b']; expected"),
    "broken": (b'{"prompt": "x"', "line {line} is not valid JSON"),
    "a list": (b'["prompt"]', "line {line} holds a json list; expected a JSON object"),
    "twice": (b'{"prompt": "x", "prompt": "y"}', "'prompt' is there twice"),
    "not UTF-8": (b'{"prompt": "\xff"}', "line {line} is not UTF-8: byte 0xff after"),
    "NaN": (b'{"prompt": "x", "guidance_scale": NaN}', "line {line} is not valid JSON: Out of range"),
    "infinite": (b'{"prompt": "x", "guidance_scale": 1e999}', "line {line} is not valid JSON: Out of range"),
    "long": (b'{"prompt": "' + b"x" * 2**21 + b'"}', "it has 2097166 bytes; 1048576 at most"),
    "deep": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    "no prompt": (b'{"image": "shapes.png"}', "prompt is missing"),
    "unknown": (b'{"prompt": "x", "cfg": 4}', "'cfg' is not an argument of edit: use guidance_scale"),
    "their dtype": (b'{"prompt": "x", "torch_dtype": "x"}', "use dtype of joyjax.load (--dtype on the command line)"),
    "output": (b'{"prompt": "x", "output": "x.png"}', "a row of `joyjax batch` names its result by id"),
    "steps": (b'{"prompt": "x", "steps": 0}', "steps is 0; expected a number from 1"),
    "half": (b'{"prompt": "\\ud800"}', "U+D800"),
    "noise": (b'{"prompt": "x", "noise": [[0]]}', "noise cannot be given in a file of requests"),
    "slash": (b'{"prompt": "x", "id": "../x"}', "id is '../x'; expected up to 100 letters"),
    "dots": (b'{"prompt": "x", "id": ".."}', "id is '..'; expected"),
    "hidden": (b'{"prompt": "x", "id": ".x"}', "id is '.x'; expected"),
    "true": (b'{"prompt": "x", "id": true}', "id is True; expected"),
    "wide id": (json.dumps({"prompt": "x", "id": "赤" * 90}).encode(), "; expected up to 100 letters"),
}


def test_bad_rows_do_not_stop_the_others(folder):
    """Every kind of bad row has its error in its file and on standard error, good ones run, and the status is 1."""
    good = {"id": "good-1.b", **ROW}
    lines = [good, *(line for line, _ in BAD.values()), b"", {**ROW, "seed": 1}]
    requests, output = write(folder / "r.jsonl", *lines), folder / "new" / "out"
    done = invoke("batch", requests, "-o", output, *FLOAT32)
    last = f"{len(lines):04}"
    assert done.stdout.split() == [str(output / "good-1.b.png"), str(output / f"{last}.png")], done.stderr
    assert isinstance(done.exception, joyjax.JoyJaxError)
    assert str(done.exception).startswith(f"{len(BAD)} of {len(BAD) + 2} requests failed")
    for number, (kind, (_, says)) in enumerate(BAD.items(), 2):
        name = f"{number:04}"
        expected = says.format(line=number)
        assert expected in told(output, name)["error"], kind
        assert f"{name}: failed: " in done.stderr, kind
        assert not (output / f"{name}.png").exists()
    assert "\x1b" not in done.stderr
    names = {f"{number:04}.json" for number in range(2, len(BAD) + 2)}
    assert set(listed(output)) == names | {*("good-1.b.png", "good-1.b.json", f"{last}.png", f"{last}.json")}
    held = told(output, "good-1.b")
    assert (held["id"], held["row"], held["picture"]) == ("good-1.b", ROW, "good-1.b.png")
    assert held["timings"]["total"] > 0
    assert read_recipe(output / f"{last}.png")["settings"]["seed"] == 1


def test_errors_of_the_whole_batch(folder):
    (folder / "file").touch()
    for text, says in (
        (b"", "holds no request"),
        (b"\n  \n", "holds no request"),
        ('{"prompt": "x"}'.encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        (b'{"id": "a", "prompt": "x"}\n{"id": "A", "prompt": "y"}', "lines 1 and 2 are both named 'A'"),
        (b'{"prompt": "x"}\n{"id": "0001", "prompt": "y"}', "lines 1 and 2 are both named '0001'"),
    ):
        (folder / "r.jsonl").write_bytes(text)
        with pytest.raises(RequestError, match=says):
            read_rows(folder / "r.jsonl")
    for arguments, says in (
        ((folder / "none.jsonl", "-o", folder / "out"), "none.jsonl cannot be read"),
        ((folder, "-o", folder / "out"), "cannot be read: Is a directory"),
        ((write(folder / "r.jsonl", ROW), "-o", folder / "file"), "file, which is a file; name a folder"),
        ((folder / "r.jsonl", "-o", folder / "out", "-m", folder), "model_index.json is missing"),
    ):
        assert says in str(invoke("batch", *arguments).exception)
        assert not (folder / "out").exists()
    assert invoke("batch", folder / "r.jsonl").exit_code == 2
    assert [row.name for row in read_rows(write(folder / "r.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode()))]


def test_resuming_and_refusing(folder):
    """What is there is not done again; of other rows, models or hands it is not replaced unless --overwrite says so."""
    requests, output = folder / "r.jsonl", folder / "out"
    batch = ["batch", requests, "-o", output, *FLOAT32]
    write(requests, {"id": "a", **ROW}, {"id": "b", **ROW, "image": "later.png"})
    assert invoke(*batch).exit_code == 1
    first = (output / "a.png").read_bytes()
    Image.open(EXAMPLE).save(folder / "later.png")
    done = succeed(*batch)  # what failed is tried again
    assert done.stdout.split() == [str(output / "b.png")]
    assert "1 of 2 are there already" in done.stderr
    assert "error" not in told(output, "b")
    assert succeed(*batch).stdout == ""

    def refused(*more: object, says: str) -> None:
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        done = invoke(*batch, *more)
        assert isinstance(done.exception, RequestError)
        assert says in str(done.exception)
        assert "--overwrite" in str(done.exception)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before

    refused("--dtype", "bfloat16", says="made by another model")
    held = told(output, "b")
    (output / "b.json").write_text(json.dumps({**held, "model": {**held["model"], "fingerprint": "sha256:0"}}))
    refused(says="b.png was made by another model")
    (output / "b.json").write_text(json.dumps(held))
    write(requests, {"id": "a", **ROW, "seed": 5}, {"id": "b", **ROW, "image": "later.png"})
    refused(says="a.png is of a row that has changed since; name another folder")
    (output / "c.png").write_bytes(b"mine")
    write(requests, {"id": "a", **ROW}, {"id": "c", **ROW})
    refused(says="c.png exists and is not from these requests")
    (output / "c.json").write_text("mine")
    refused(says="c.json exists and is not from `joyjax batch`")

    write(requests, {"id": "a", **ROW, "seed": 5}, {"id": "c", **ROW, "steps": 0})
    assert invoke(*batch, "--overwrite").exit_code == 1
    assert (output / "a.png").read_bytes() != first
    assert "steps is 0" in told(output, "c")["error"]
    assert not (output / "c.png").exists()  # an error and a picture of another row do not lie side by side


def test_stopped_between_picture_and_note(folder, monkeypatch):
    """The worst moment: the picture is whole, and its note does not say so yet. The row is then done again."""
    requests, output = write(folder / "r.jsonl", {"id": "a", **ROW}), folder / "out"
    batch = ["batch", requests, "-o", output, *FLOAT32]
    note = run._Writer._note

    def killed(self, row, outcome):
        if outcome:
            raise KeyboardInterrupt
        note(self, row, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(run._Writer, "_note", killed)
        assert invoke(*batch).exit_code != 0
    assert (output / "a.png").exists()
    for name in (".a.png.12345.part", ".a.json.0123456789abcdef.part"):
        (output / name).write_bytes(b"half")
    assert succeed(*batch).stdout.split() == [str(output / "a.png")]
    assert listed(output) == ["a.json", "a.png"]


def test_rows_of_one_shape_run_together(folder, monkeypatch):
    """--batch-size gives the pictures that one by one gives, to a level of 255, and groups what can be grouped."""
    rows = [
        {"id": "a", **ROW},
        {"id": "b", **ROW, "seed": 1, "prompt": "remove the yellow star, please, and leave all else as it is"},
        {"id": "wide", **ROW, "image": "wide.png"},
        {"id": "more", **ROW, "steps": 3},
        {"id": "bad", **ROW, "image": "wide.png", "mask": "shapes.png"},
        {"id": "mask", **ROW, "mask": "mask.png"},
    ]
    white = np.zeros((128, 128), np.uint8)
    white[:, 64:] = 255
    Image.fromarray(white).save(folder / "mask.png")
    requests = write(folder / "r.jsonl", *rows)
    sizes, right = [], Engine._denoise

    def counted(self, jobs, *rest):
        sizes.append(len(jobs))
        return right(self, jobs, *rest)

    monkeypatch.setattr(Engine, "_denoise", counted)
    loads, load = [], joyjax.load
    monkeypatch.setattr(joyjax, "load", lambda *args, **options: loads.append(args) or load(*args, **options))
    alone = invoke("batch", requests, "-o", folder / "alone", *FLOAT32)
    assert "1 of 6 requests failed" in str(alone.exception)
    assert sizes == [1] * len(sizes)
    assert len(loads) == 1
    del sizes[:]
    done = invoke("batch", requests, "-o", folder / "two", "--batch-size", 2, *FLOAT32)
    assert "1 of 6 requests failed" in str(done.exception)
    assert "mask" in told(folder / "two", "bad")["error"]
    assert sizes == [2, 2, 1]  # a and b; wide and mask, of another bucket but as many tokens; more, by itself
    for row in rows:
        if row["id"] != "bad":
            one, two = (pixels(folder / out / f"{row['id']}.png") for out in ("alone", "two"))
            assert np.abs(one - two).max() <= 1, row["id"]
    outside = pixels(folder / "two" / "mask.png")[:, :64]
    np.testing.assert_array_equal(outside, pixels(EXAMPLE)[:, :64])
    assert np.abs(pixels(folder / "two" / "a.png") - pixels(EXAMPLE)).max() > 50


def test_a_group_that_fails_is_run_one_by_one(folder, monkeypatch):
    """An error of the devices, too, is its row's alone."""
    requests = write(folder / "r.jsonl", *({"id": name, **ROW, "seed": n} for n, name in enumerate("abc")))
    right = Engine._denoise

    def fails(self, jobs, *rest):
        if any(job.plan.request.seed == 1 for job in jobs):
            raise MemoryError("out of memory")
        return right(self, jobs, *rest)

    monkeypatch.setattr(Engine, "_denoise", fails)
    done = invoke("batch", requests, "-o", folder / "out", "--batch-size", 3, *FLOAT32)
    assert [Path(line).stem for line in done.stdout.split()] == ["a", "c"]
    assert told(folder / "out", "b")["error"] == "internal error, MemoryError: out of memory"


def test_cancelling_stops_all_rows(folder):
    rows = read_rows(write(folder / "r.jsonl", {"id": "a", **ROW}, {"id": "b", **ROW}))
    pipeline = joyjax.load(dtype="float32")
    steps = []

    def cancel(event):
        steps.append(event.step)
        if len(steps) == 3:
            raise Cancelled

    done = []
    with pytest.raises(Cancelled):
        done.extend(run.run_rows(pipeline, rows, folder, folder / "out", callback=cancel))
    assert steps == [1, 2, 1]
    assert listed(folder / "out") == ["a.json", "a.png"]


def test_rows_with_pictures_by_url(folder):
    """The command may allow private addresses, a row may not; nor may it read standard input."""
    with serving({"/shapes.png": (folder / "shapes.png").read_bytes()}) as url:
        rows = [
            {"id": "url", **ROW, "image": f"{url}/shapes.png"},
            {"id": "file", **ROW},
            {"id": "none", **ROW, "image": f"{url}/none.png"},
            {"id": "asks", **ROW, "image": f"{url}/shapes.png", "allow_private_urls": True},
            {"id": "stdin", **ROW, "image": "-"},
        ]
        requests = write(folder / "r.jsonl", *rows)
        done = invoke("batch", requests, "-o", folder / "public", *FLOAT32)
        assert [Path(line).stem for line in done.stdout.split()] == ["file"]
        assert "not a public address" in told(folder / "public", "url")["error"]
        done = invoke("batch", requests, "-o", folder / "all", "--allow-private-urls", *FLOAT32)
    assert [Path(line).stem for line in done.stdout.split()] == ["url", "file"]
    np.testing.assert_array_equal(pixels(folder / "all" / "url.png"), pixels(folder / "all" / "file.png"))
    assert "answered with 404" in told(folder / "all", "none")["error"]
    assert "'allow_private_urls' is not an argument of edit" in told(folder / "all", "asks")["error"]
    assert "standard input, which a row cannot read" in told(folder / "all", "stdin")["error"]


def test_notes_are_of_their_own_row_where_rows_run_together(folder):
    image = Image.open(folder / "shapes.png").convert("RGBA")
    image.putalpha(9)
    image.save(folder / "clear.png")
    rows = [{"id": "a", **ROW}, {"id": "b", **ROW, "image": "clear.png"}]
    done = succeed("batch", write(folder / "r.jsonl", *rows), "-o", folder / "out", "--batch-size", 2, *FLOAT32)
    notes = [line for line in done.stderr.splitlines() if "transparent" in line]
    assert notes == ["b: clear.png is partly transparent, which models do not see: the colours beneath show"]


def test_notes_name_their_row(folder):
    rows = [{"id": "sky", **ROW, "prompt": "make the sky red", "image": "wide.png", "fit": "pad"}, {"id": "a", **ROW}]
    done = succeed("batch", write(folder / "r.jsonl", *rows), "-o", folder / "out", "--no-metadata", *FLOAT32)
    notes = [line for line in done.stderr.splitlines() if line.startswith("sky: ")]
    assert any("never saw the words 'sky'" in line for line in notes)
    assert any("picture 200 × 96 → " in line and "padding" in line for line in notes)
    assert not [line for line in done.stderr.splitlines() if line.startswith("a: ")]
    assert Image.open(folder / "out" / "a.png").text == {}


@pytest.mark.parity
def test_several_references_in_a_row(folder, tmp_path_factory):
    import random_checkpoint

    plus = random_checkpoint.save(random_checkpoint.make_pipeline("tiny", plus=True), tmp_path_factory.mktemp("plus"))
    small = {"prompt": "x", "height": 64, "width": 64, "exact_size": True, "steps": 1}
    rows = [
        {"id": "two", **small, "image": ["shapes.png", "wide.png"]},
        {"id": "none", **small},
        {"id": "six", **small, "image": ["shapes.png"] * 6},
        {"id": "gone", **small, "image": ["shapes.png", "none.png"]},
    ]
    done = invoke("batch", write(folder / "r.jsonl", *rows), "-o", folder / "out", "--model", plus, *FLOAT32)
    assert [Path(line).stem for line in done.stdout.split()] == ["two", "none"]
    assert len(read_recipe(folder / "out" / "two.png")["references"]) == 2
    assert "takes 5 at most" in told(folder / "out", "six")["error"]
    assert "none.png does not exist" in told(folder / "out", "gone")["error"]
    pipeline = joyjax.load(plus, dtype="float32")
    pictures = [open_picture(folder / name) for name in ("shapes.png", "wide.png")]
    result = joyjax.edit(pipeline, pictures, "x", height=64, width=64, exact_size=True, steps=1)
    np.testing.assert_array_equal(np.asarray(result.image), pixels(folder / "out" / "two.png"))


def test_killed_and_interrupted_runs_go_on(folder):
    """SIGKILL, then Ctrl-C, in the middle of a row: nothing is half-written, and the same command ends the work."""
    rows = [{"id": f"row{n}", **ROW, "steps": 60, "seed": n} for n in range(5)]
    wrong = {"steps": {"prompt": "x", "steps": "4"}, "text": {"prompt": 4}, "image": {"prompt": "x", "image": 5}}
    rows += [{"id": name, **row} for name, row in wrong.items()]  # of wrong types, told without the checks of tests
    requests, output = write(folder / "r.jsonl", *rows), folder / "out"
    batch = ["batch", requests, "-o", output]

    def stopped(sign: signal.Signals) -> tuple[int, str]:
        process = start(*batch)
        first = process.stdout.readline()  # now the next row runs
        process.send_signal(sign)
        rest, said = process.communicate(timeout=120)
        assert first.startswith(str(output)), said
        for path in output.glob("*.png"):
            Image.open(path).load()
        for path in output.glob("*.json"):
            json.loads(path.read_bytes())
        return process.returncode, said

    status, _ = stopped(signal.SIGKILL)
    assert status == -signal.SIGKILL
    there = len(list(output.glob("*.png")))
    assert 1 <= there < 5
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.png")}

    status, said = stopped(signal.SIGINT)
    assert status == 1
    assert f"{there} of 8 are there already" in said
    assert "the same command goes on from here" in said
    assert said.endswith("joyjax: cancelled\n")
    assert "Traceback" not in said
    assert [path.name for path in output.glob(".*")] == [".joyjax-batch.lock"]
    now = len(list(output.glob("*.png")))
    assert there < now < 5

    process = start(*batch)
    out, said = process.communicate(timeout=120)
    assert said.splitlines()[-1].startswith("joyjax: 3 of 8 requests failed"), said
    assert process.returncode == 1
    assert len(out.split()) == 5 - now
    assert {path.stem for path in output.glob("*.png")} == {f"row{n}" for n in range(5)}
    assert told(output, "steps")["error"] == "steps is '4'; expected a whole number"
    assert told(output, "text")["error"] == "prompt is a int; expected a str"
    assert told(output, "image")["error"].startswith("image is 5; expected the name of a file")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def unloaded(monkeypatch) -> None:
    monkeypatch.setattr(joyjax, "load", lambda *_, **__: pytest.fail("a model was loaded"))


def test_what_is_not_a_file_of_requests_writes_nothing(folder, monkeypatch):
    unloaded(monkeypatch)
    for name, text in (("rows.csv", b"id,prompt\na,x\n"), ("rows.json", b'[{"prompt": "x"},\n{"prompt": }]')):
        (folder / name).write_bytes(text)
    for name, says in (("shapes.png", "is a PNG picture"), ("rows.csv", "like CSV"), ("rows.json", "in line 2")):
        done = invoke("batch", folder / name, "-o", folder / "out")
        assert isinstance(done.exception, RequestError)
        assert says in str(done.exception)
        assert not (folder / "out").exists()


def test_a_folder_is_written_by_one_batch_at_a_time(folder, monkeypatch):
    unloaded(monkeypatch)
    (folder / "out").mkdir()
    with hold_folder(folder / "out"):
        done = invoke("batch", write(folder / "r.jsonl", ROW), "-o", folder / "out")
    assert isinstance(done.exception, RequestError)
    assert "is being written by another batch at this time" in str(done.exception)
    assert listed(folder / "out") == []


def test_a_batch_never_replaces_what_it_reads(folder, monkeypatch):
    unloaded(monkeypatch)
    before = (folder / "shapes.png").read_bytes()
    rows = [{"id": "a", **ROW}, {"id": "shapes", **ROW, "image": "wide.png"}]
    requests = write(folder / "r.json", *rows)
    for more in ([], ["--overwrite"]):
        done = invoke("batch", requests, "-o", folder, *more)
        assert isinstance(done.exception, RequestError)
        assert "would replace a picture that 'a' (line 1) reads" in str(done.exception)
    done = invoke("batch", write(folder / "r.json", {"id": "r", **ROW}), "-o", folder, "--overwrite")
    assert "would replace the file of requests" in str(done.exception)
    assert (folder / "shapes.png").read_bytes() == before


def test_an_array_of_rows_that_build_on_each_other(folder):
    """Seeds are drawn once, kept beside the picture and in it; a row reads an earlier row's result, also later on."""
    rows = [
        {"id": "a", **ROW, "seed": "random"},
        {"id": "b", **ROW, "image": "out/a.png", "seed": "random"},
        {"id": "c", **ROW, "seed": "chance"},
    ]
    requests, output = folder / "r.json", folder / "out"
    requests.write_text(json.dumps(rows, indent=2))
    batch = ["batch", requests, "-o", output, *FLOAT32]
    done = invoke(*batch)
    assert done.stdout.split() == [str(output / "a.png"), str(output / "b.png")]
    assert told(output, "c")["error"] == "seed is 'chance'; expected a whole number from 0, or \"random\""
    seeds = [told(output, name)["seed"] for name in "ab"]
    assert seeds == [read_recipe(output / f"{name}.png")["settings"]["seed"] for name in "ab"]
    assert len({0, *seeds}) == 3
    assert f"a: seed {seeds[0]}\n" in done.stderr
    assert told(output, "a")["row"]["seed"] == "random"
    requests.write_text(json.dumps(rows[:2]))
    for more in ([], ["--overwrite"]):
        done = succeed(*batch, *more)
        assert done.stdout == ""
        assert "2 of 2 are there already" in done.stderr
    assert seeds == [told(output, name)["seed"] for name in "ab"]


FULL = 'mount -t tmpfs -o size=40k none "$2" && "$1" batch "$3" -o "$2"; status=$?; cp -a "$2" "$4"; exit $status'


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no file system can be mounted here",
)
def test_a_full_disk_names_the_file_and_ends_the_run(folder):
    """On a real file system of 40 KiB, where the result of the third row or so finds no room."""
    requests = write(folder / "r.jsonl", *({**ROW, "id": f"row{n}", "steps": 1, "seed": n} for n in range(12)))
    output = folder / "out"
    output.mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", PROGRAM, output, requests, folder / "left"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 1, done
    *_, summary, error = done.stderr.splitlines()
    drawn = done.stdout.splitlines()
    assert 1 <= len(drawn) < 12
    assert summary == f"{len(drawn)} done, 0 there already, 0 failed; the same command goes on from here"
    last = f"row{len(drawn)}"
    assert re.fullmatch(rf"joyjax: {output}/{last}\.(png|json) cannot be written: No space left on device", error)
    whole = {f"row{n}.{ending}" for n in range(len(drawn)) for ending in ("png", "json")}
    left = set(listed(folder / "left"))
    assert whole <= left <= whole | {f"{last}.png", f"{last}.json"}
    for name in left:
        pixels(folder / "left" / name) if name.endswith("png") else told(folder / "left", name.removesuffix(".json"))
