"""Measures the first minute: `python benchmarks/start.py`.

An edit of the demo, cold (with an empty cache) and warm (after it), beside the floor: a process that imports JAX and
makes one array. Every run is a new process, and rounds alternate between them. Ratios are to the floor: of the medians
of user and system CPU seconds, and of the least wall times, since other work of the machine adds to both. With
`--beside CHECKOUT`, another version of joyjax is measured in the same rounds. The exit status is 1 where the pictures'
bytes differ between cold and warm, or from those of the other version.
"""

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOOR = (sys.executable, "-c", "import jax; jax.numpy.zeros(1).block_until_ready()")
OURS = "JAX_COMPILATION_CACHE_DIR", "JOYJAX_KEEP_PROGRAMS"
Run = tuple[float, float]  # CPU and wall seconds


def run(command: tuple[str, ...], folder: Path, checkout: Path) -> Run:
    """Run a process of this checkout with its cache and results in `folder`."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    environment = {**kept, "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(checkout)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def rounds(checkouts: dict[str, Path], count: int, steps: int) -> Iterator[tuple[str, Run, str]]:
    """Yield the name of each run, its times, and the digest of its picture."""
    picture = str(ROOT / "examples" / "shapes.png")
    edit = (sys.executable, "-m", "joyjax", "edit", "make the red circle blue", "--image", picture, "-o", "out.png")
    for _ in range(count):
        with tempfile.TemporaryDirectory() as temporary:
            yield "floor", run(FLOOR, Path(temporary), ROOT), ""
            folders = {name: Path(temporary, str(number)) for number, name in enumerate(checkouts)}
            for kind in ("cold", "warm"):
                for name, folder in folders.items():
                    folder.mkdir(exist_ok=True)
                    times = run((*edit, "--steps", str(steps)), folder, checkouts[name])
                    yield f"{kind}{name}", times, hashlib.sha256((folder / "out.png").read_bytes()).hexdigest()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of the edit; the demo's own number is 4")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another version, measured in the same rounds")
    arguments = parser.parse_args()
    checkouts = {"": ROOT} | ({} if arguments.beside is None else {", other": arguments.beside.resolve()})
    found: dict[str, list[Run]] = {}
    digests = set()
    for name, times, digest in rounds(checkouts, arguments.rounds, arguments.steps):
        found.setdefault(name, []).append(times)
        digests |= {digest} - {""}
    cpu = {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}
    wall = {name: min(run[1] for run in runs) for name, runs in found.items()}
    print(f"{'':14} {'CPU s':>7} {'x floor':>8} {'wall s':>7} {'x floor':>8}")
    for name in found:
        ratios = cpu[name] / cpu["floor"], wall[name] / wall["floor"]
        print(f"{name:14} {cpu[name]:7.2f} {ratios[0]:8.2f} {wall[name]:7.2f} {ratios[1]:8.2f}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {len(digests)} different pictures")
    if len(digests) != 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
