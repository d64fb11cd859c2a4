"""Success rates on held-out edits of the demo's domain, judged from the pixels of the results."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from joyjax.api import edit
from joyjax.files import publish
from joyjax.media.formats import writing
from joyjax.runtime.load import Pipeline
from joyjax.shapes.draw import render
from joyjax.shapes.edits import KINDS, Pair, pairs
from joyjax.shapes.judge import Verdict, judge
from joyjax.shapes.wording import sentence


@dataclasses.dataclass(frozen=True)
class Task:
    """One edit to be judged."""

    pair: Pair
    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of successes with its 95 % confidence interval (Wilson's)."""

    passed: int
    count: int

    @property
    def share(self) -> float:
        """Successes over trials."""
        return self.passed / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound; Wilson, 1927."""
        z, n, p = 1.96, self.count, self.share
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


@dataclasses.dataclass(frozen=True)
class Score:
    """The verdicts of a run by kind of edit, and the mean number of steps computed in full."""

    verdicts: Mapping[str, tuple[Verdict, ...]]
    computed: float | None = None

    def rate(self, test: str, kind: str | None = None) -> Rate:
        """Return the rate of the test "pixel", "strict" or "both", of one kind of edit or of all."""
        chosen = [v for name, group in self.verdicts.items() if kind in (None, name) for v in group]
        passed = sum((v.pixel and v.strict) if test == "both" else getattr(v, test) for v in chosen)
        return Rate(passed, len(chosen))

    def psnr(self, kind: str | None = None) -> float:
        """Return the mean peak signal-to-noise ratio to the expected pictures, in dB; values are capped at 60."""
        chosen = [v.psnr for name, group in self.verdicts.items() if kind in (None, name) for v in group]
        return float(np.mean(np.minimum(chosen, 60)))

    def as_dict(self) -> dict[str, Any]:
        """Return the rates and PSNR per kind and overall as JSON data, with 95 % intervals."""
        table: dict[str, Any] = {}
        for kind in (*self.verdicts, None):
            row: dict[str, Any] = {"edits": self.rate("pixel", kind).count, "psnr": self.psnr(kind)}
            for test in ("pixel", "strict", "both"):
                rate = self.rate(test, kind)
                row[test] = {"share": rate.share, "interval": rate.interval}
            table[kind or "all"] = row
        return table


def tasks(count: int, seed: int = 0, *, held: bool = True) -> Iterator[tuple[str, Task]]:
    """Yield `count` edits determined by the seed, the kinds in turn; with `held`, of held-out combinations."""
    streams = {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng((seed, number))
        streams[kind] = rng, pairs(rng, kind, held=held)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        rng, drawn = streams[kind]
        pair = next(drawn)
        yield kind, Task(pair, sentence(rng, pair), seed=number)


def score(
    pipeline: Pipeline,
    count: int = 512,
    *,
    seed: int = 0,
    held: bool = True,
    report: Callable[[int, Task, Image.Image, Verdict], None] | None = None,
    **options: Any,
) -> Score:
    """Run edits and judge them. `options` are those of `joyjax.edit`; `report` is called after each edit."""
    verdicts: dict[str, list[Verdict]] = {kind: [] for kind in KINDS}
    computed = []
    for number, (kind, task) in enumerate(tasks(count, seed, held=held)):
        source = Image.fromarray(render(task.pair.source))
        result = edit(pipeline, source, task.prompt, seed=task.seed, **options)
        image = result.image
        computed.append(result.computed_steps)
        verdict = judge(task.pair, np.asarray(image))
        verdicts[kind].append(verdict)
        if report:
            report(number, task, image, verdict)
    return Score({kind: tuple(group) for kind, group in verdicts.items() if group}, float(np.mean(computed)))


def save_comparison(file: Path, task: Task, image: Image.Image) -> None:
    """Write source, result and expected picture side by side, with the prompt in a text chunk of the PNG."""
    side = image.size
    sheet = Image.new("RGB", (3 * side[0], side[1]))
    pictures = (Image.fromarray(render(task.pair.source)), image, Image.fromarray(render(task.pair.target)))
    for column, picture in enumerate(pictures):
        sheet.paste(picture, (column * side[0], 0))
    text, written = PngInfo(), io.BytesIO()
    text.add_text("prompt", task.prompt)
    sheet.save(written, "PNG", pnginfo=text)
    with writing(file):
        publish(written.getvalue(), file)
