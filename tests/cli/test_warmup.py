"""Compiled programs that outlive the process: after `joyjax warmup`, or a first edit, nothing is compiled."""

import json
import subprocess
import sys
from pathlib import Path

import compile_cache
import pytest
from invoke import PROGRAM, environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"

# Runs commands in one new process, as `joyjax` does, and prints how many programs were compiled and how many found.
COUNTING = """
import collections, json, sys
from joyjax import cli
from joyjax.commands.environment import check_environment
check_environment(["edit"])
import jax, typer
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))  # JAX's and joyjax's
commands, lines = typer.main.get_command(cli.app).commands, []
for name, *arguments in json.loads(sys.argv[1]):
    seen.clear()
    commands[name].main(arguments, prog_name="joyjax", standalone_mode=False)
    lines.append([seen["cache_hits"] + seen["found"], seen["cache_misses"] + seen["compiled"]])
print(json.dumps(lines))
"""


def run(*command: object, cwd: Path, cache: Path) -> subprocess.CompletedProcess:
    variables = compile_cache.fresh(environment(), cache)
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=500, env=variables)


def counted(*commands: list[object], cwd: Path, cache: Path) -> list[tuple[int, int]]:
    """Return how many programs each command found in the cache and how many it compiled."""
    given = json.dumps([[str(each) for each in command] for command in commands])
    done = run(sys.executable, "-P", "-c", COUNTING, given, cwd=cwd, cache=cache)
    assert done.returncode == 0, done.stderr
    return [(hits, misses) for hits, misses in json.loads(done.stdout.splitlines()[-1])]


def edit(*more: object, words: int = 0) -> list[object]:
    prompt = "make the red circle blue" + " and the yellow star red" * words
    return ["edit", prompt, "--image", EXAMPLE, "--steps", 2, *more]


def test_after_warmup_nothing_is_compiled(tmp_path):
    """Any bucket, prompt length, seed, number of steps and way to use the result: all programs are there."""
    cache = tmp_path / "cache"
    done = run(PROGRAM, "warmup", "--references", 1, cwd=tmp_path, cache=cache)
    kept = cache / "joyjax" / "compiled"
    assert (done.returncode, done.stdout) == (0, f"{kept}\n"), done.stderr
    assert (
        len(list(kept.glob("stages/*.program"))) >= 8
    )  # the stages, two of them for two padded buckets and two for two lengths

    (hits, misses), *others = counted(
        edit(),
        edit("--height", 64, "--width", 250, "--seed", 3, words=3),  # the other padded bucket and the next length
        edit("--height", 200, "--width", 60, "--steps", 3, "--preview-dir", "previews"),
        edit("--paste-back", "--fit", "pad", "--num-images", 2, "--sigmas", "1,0.3"),
        ["batch", _requests(tmp_path), "--output", "out"],
        cwd=tmp_path,
        cache=cache,
    )
    assert hits >= 5  # so they are counted
    assert (misses, [missed for _, missed in others]) == (0, [0] * len(others))


def _requests(folder: Path) -> Path:
    rows = [{"image": str(EXAMPLE), "prompt": prompt, "steps": 2} for prompt in ("remove the star", "add a star")]
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.nightly
def test_after_an_edit_the_like_of_it_compiles_nothing(tmp_path):
    """A second process, with another size of the same padded bucket and another prompt of the same class of lengths."""
    cache = tmp_path / "cache"
    [(hits, misses)] = counted(edit("--height", 112, "--width", 128), cwd=tmp_path, cache=cache)
    assert hits == 0
    assert misses >= 5  # the stages and what puts them together; 18 on JAX 0.10
    like = edit("--height", 144, "--width", 100, "--seed", 5, "--steps", 3)
    like[1] = "remove the small yellow star"
    assert counted(like, cwd=tmp_path, cache=cache) == [(misses, 0)]


@pytest.mark.nightly
def test_warmup_for_what_is_used_otherwise(tmp_path):
    """Guidance in a part of the steps, a step cache, batches, long prompts and no picture, when asked for."""
    cache = tmp_path / "cache"
    more = ["--guidance-scale", 3, "--guidance-until", 0.5, "--cache", 0.1]
    warm = ["warmup", "--references", 1, "--references", 0, "--long-prompts", "--batch-size", 2, *more]
    done = run(PROGRAM, *warm, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr
    rows = [{"image": str(EXAMPLE), "prompt": "remove the star", "steps": 4, "seed": n} for n in range(3)]
    way = {"guidance_scale": 3, "guidance_until": 0.5, "cache": 0.1}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({**row, **way}) + "\n" for row in rows))
    found = counted(
        edit(*more, "--steps", 4),
        edit(*more, words=45),
        edit(*more, words=95),
        ["edit", "a red star", "--steps", 4, *more],
        ["batch", "r.jsonl", "--output", "out", "--batch-size", 2],
        cwd=tmp_path,
        cache=cache,
    )
    assert [misses for _, misses in found] == [0] * 5
