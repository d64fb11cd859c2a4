"""The kernels that a call runs on a GPU, from the trace that JAX's profiler writes."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

NUMBER = re.compile(r"[._]\d+(?=$|[._])")


def traced(call: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Run `call` once under the profiler; return milliseconds and launches of each kernel, the slowest first.

    Names are without their numbers. On a CPU the result is empty: it has no streams.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as opened:
            return kernels(json.load(opened)["traceEvents"])


def kernels(events: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Return milliseconds and launches of each kernel among the events of a trace."""
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    processes = {pid for (pid, tid), name in names.items() if tid is None and "GPU" in name}
    streams = {key for key, name in names.items() if key[0] in processes and name.startswith("Stream")}
    spent: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            name = NUMBER.sub("", event["name"])
            spent[name] += event["dur"] / 1e3
            launches[name] += 1
    return {name: (round(ms, 3), launches[name]) for name, ms in spent.most_common()}


def kernel_table(found: Mapping[str, tuple[float, int]], rows: int = 24) -> str:
    """Return the slowest kernels as lines: share, milliseconds, launches, name."""
    total = sum(ms for ms, _ in found.values())
    lines = [f"{total:.2f} ms in kernels"]
    for name, (ms, count) in list(found.items())[:rows]:
        lines.append(f"{ms / total:7.1%}{ms:10.3f}{count:6}  {name[:110]}")
    return "\n".join(lines)
