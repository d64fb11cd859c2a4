"""Parts of a measurement: each a process with a time limit, whose output is kept; their report and its page."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT_LINES = 400  # of a part's output, the last ones
ENOUGH = 5.0  # seconds without which a part is not begun


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of a measurement.

    `{out}` in an argument is the report's folder, `{work}` one that is removed at the end. `read` returns rows from the
    lines of the output and the report's folder. `columns`: heading of the page's table, and the field of a row.
    `behind`: runs beside the parts that follow, until one that `needs` it.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    read: Callable[[Sequence[str], Path], list[dict[str, Any]]]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    behind: bool = False
    needs: str = ""


def json_lines(lines: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of an output of JSON lines; other lines are left out."""
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def no_rows(lines: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return nothing, for a part that only prepares."""
    return []


def run_part(part: Part, out: Path, work: Path, limit: float) -> dict[str, Any]:
    """Run a part, print its output as it comes, and return its record. Nothing that it does raises an error here."""
    command = [argument.replace("{out}", str(out)).replace("{work}", str(work)) for argument in part.command]
    record: dict[str, Any] = {"title": part.title, "command": shown(part), "limit_s": round(limit)}
    print(f"== {part.name}: {record['command']}", flush=True)
    started, lines = time.perf_counter(), []
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **part.environment},
            start_new_session=True,
        )
    except OSError as error:
        return record | {"status": f"not started: {error}", "seconds": 0.0, "output": [], "rows": []}
    ended = threading.Event()

    def stop() -> None:
        if not ended.wait(limit):
            os.killpg(process.pid, signal.SIGKILL)  # the part's own processes, too

    guard = threading.Thread(target=stop, daemon=True)
    guard.start()
    with process:
        for line in process.stdout or ():
            lines.append(line.rstrip("\n"))
            print(f"{part.name}: {lines[-1]}", flush=True)
    ended.set()
    seconds = time.perf_counter() - started
    stopped = seconds >= limit and process.returncode == -signal.SIGKILL
    status = "stopped at its limit" if stopped else "ok" if not process.returncode else f"status {process.returncode}"
    try:
        rows = part.read(lines, out)
    except Exception as error:  # the report must be written, whatever the output is
        rows, status = [], f"{status}; its output cannot be read: {type(error).__name__}: {error}"
    print(f"== {part.name}: {status}, {seconds:.1f} s", flush=True)
    return record | {"status": status, "seconds": round(seconds, 1), "output": lines[-KEPT_LINES:], "rows": rows}


def shown(part: Part) -> str:
    """Return a part's command as a reader would type it in the repository, without the paths of this machine."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in part.environment.items() if name != "PYTHONPATH"]
    words = ["python" if word == sys.executable else word.removeprefix(f"{ROOT}{os.sep}") for word in part.command]
    script = [n for n, word in enumerate(words) if "\n" in word]
    return " ".join([*variables, shlex.join(words[: script[0]] if script else words)])


def run_parts(parts: Sequence[Part], out: Path, work: Path, limit: float, file: Path) -> dict[str, Any]:
    """Run parts one after the other within `limit` seconds; the report is written after each of them."""
    started = time.perf_counter()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "parts": {}}
    behind: dict[str, threading.Thread] = {}

    def left() -> float:
        return limit - (time.perf_counter() - started)

    def one(part: Part) -> None:
        report["parts"][part.name] = run_part(part, out, work, min(part.limit, left()))
        file.write_text(json.dumps(report, indent=1))

    for part in parts:
        if part.needs in behind:
            behind[part.needs].join()
        if left() < ENOUGH:
            report["parts"][part.name] = {"title": part.title, "status": "no time was left", "rows": []}
        elif part.behind:
            behind[part.name] = threading.Thread(target=one, args=(part,), daemon=True)
            behind[part.name].start()
        else:
            one(part)
    for thread in behind.values():
        thread.join()
    report["seconds"] = round(time.perf_counter() - started, 1)
    file.write_text(json.dumps(report, indent=1))
    return report


def page(title: str, reports: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> str:
    """Return the reports as a page: for each part its command, how it ended, and a table."""
    known = {part.name: part for part in parts}
    lines = [f"# {title}", ""]
    for report in reports:
        lines += [f"{report['date']} UTC; {report.get('seconds', 0):.0f} s.", ""]
        for name, record in report["parts"].items():
            lines += [f"## {record['title']}", ""]
            if "command" in record:
                lines += [f"`{record['command']}`", ""]
            ended = f", {record['seconds']:.0f} s" if record.get("seconds") else ""
            lines += [f"{record['status']}{ended}.", ""]
            if record["rows"]:
                lines += [*_table(record["rows"], known[name].columns), ""]
            elif record["status"] != "ok":
                lines += ["```", *record.get("output", [])[-12:], "```", ""]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    shown = columns or {name: name for row in rows for name in row}
    body = ["| " + " | ".join(_cell(row.get(field)) for field in shown.values()) + " |" for row in rows]
    return ["| " + " | ".join(shown) + " |", "|---" * len(shown) + "|", *body]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def python(*arguments: str) -> tuple[str, ...]:
    """Return a command of this Python."""
    return (sys.executable, *arguments)
