"""Plots of metrics."""

import json
from pathlib import Path


def plot_metrics(file: Path) -> Path | None:
    """Plot every metric of a `metrics.jsonl` by step into a PNG beside it; return its path, None without metrics."""
    from matplotlib.figure import Figure  # in place of pyplot, which has global state

    rows = [json.loads(row) for row in file.read_text().splitlines()]
    if not rows:
        return None
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("step", "seconds")]
    figure = Figure(figsize=(10, 2.4 * ((len(names) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(names) + 1) // 2, 2, squeeze=False).reshape(-1)
    for axes, name in zip(grid, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, linewidth=1)
        axes.set_title(name, fontsize=9)
        if name in ("loss", "error") and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    for axes in grid[len(names) :]:
        axes.axis("off")
    target = file.with_suffix(".png")
    figure.savefig(target, dpi=100)
    return target
