"""Measures converting and loading a checkpoint of real widths, 6 GB: `python benchmarks/checkpoints.py`.

A random model (random_model.py) is copied, loaded, converted and loaded again, and the same is done with Diffusers and
Transformers, where loading and saving is the counterpart to converting. Each runs in its own process:

    s         the whole process with its imports; GB/s and "of copy" are derived from this
    call s    of that, the loading or copying
    sync s    after it, until the written files are on the disk
    peak GB   peak resident memory: `ru_maxrss`, with the pages of mapped files
    read GB   bytes of read calls (`rchar`), without mapped files
    disk GB   bytes read from the disk, not from the page cache

GB are 10⁹ bytes, and GB/s refer to the Diffusers folder in every row. The page cache is not dropped: the model was
written and copied just before, so it is cached as far as memory allows; "disk GB" is the rest. Linux only. Needs the
extra `joyjax[reference]`, or `--no-diffusers`. The exit status is 1 where converting exceeds its memory limit, or, at
the real width, where loading in float8 does: the loaded bytes, the largest tensor and 0.5 GB.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# No NumPy or JAX is imported here: a child's `ru_maxrss` starts with its parent's memory at the fork.

PROGRAM = Path(sys.executable).parent / "joyjax"
REAL_WIDTH = 4096
FOLDERS = ("source", "copy", "converted", "quantized", "saved")
SPARE = 10**9  # bytes: the model may be one layer larger than asked
PEAKS = {True: 3e9, False: 1e9}  # memory limit of converting in bytes, with and without the real word embedding
QUANTIZED = "joyjax.load, float8", "joyjax.load, converted, float8", "joyjax.load, converted in float8"
SPARE_TO_QUANTIZE = 5e8  # bytes of the memory limit of loading in float8, besides the loaded bytes and largest tensor
CLASSES = {
    "transformer": ("diffusers", "JoyImageEditTransformer3DModel", "torch_dtype"),
    "text_encoder": ("transformers", "Qwen3VLForConditionalGeneration", "dtype"),
    "vae": ("diffusers", "AutoencoderKLWan", "torch_dtype"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Time and memory of one process."""

    name: str
    bytes: int
    seconds: float
    call_seconds: float | None
    sync_seconds: float
    peak_bytes: int
    read_bytes: int
    disk_bytes: int


# Functions of the child processes.


def copy(source: Path, target: str) -> None:
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copied = Path(target) / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def load(folder: Path, devices: str = "1", quantize: str | None = None) -> None:
    import jax

    import joyjax
    from joyjax.sharding.mesh import parse_mesh

    jax.config.update("jax_num_cpu_devices", int(devices))
    mesh = parse_mesh(f"tensor={devices}") if int(devices) > 1 else None
    jax.block_until_ready(joyjax.load(folder, dtype="bfloat16", mesh=mesh, quantize=quantize).weights)


def peer_models(folder: Path) -> Iterator[tuple[str, object]]:
    import torch

    for name, (library, model, option) in CLASSES.items():
        kind = getattr(importlib.import_module(library), model)
        yield name, kind.from_pretrained(folder / name, **{option: torch.bfloat16})


def peer_load(folder: Path) -> None:
    dict(peer_models(folder))


def peer_convert(folder: Path, target: str) -> None:
    for name, model in peer_models(folder):
        model.save_pretrained(Path(target) / name)
        del model  # one at a time in memory


def limit(folder: Path) -> None:
    import jax

    from joyjax.convert.component import Component
    from joyjax.families.joyimage import EDIT

    def arrays(component: Component, form: str | None) -> list[int]:
        state = component.abstract(component.read_config(folder), "bfloat16", form).state
        return [array.size * array.dtype.itemsize for array in jax.tree.leaves(state)]

    float8 = sum(sum(arrays(component, "float8")) for component in EDIT.components)
    largest = max(max(arrays(component, None)) for component in EDIT.components)
    print(float8 + largest + SPARE_TO_QUANTIZE)


CHILDREN: dict[str, Callable[..., None]] = {
    "copy": copy,
    "load": load,
    "limit": limit,
    "peer-load": peer_load,
    "peer-convert": peer_convert,
}


def run_child(name: str, folder: str, *more: str) -> None:
    """Run one function and print its seconds, without imports."""
    if name == "load":
        import tokenizers  # noqa: F401

        import joyjax.runtime.load  # noqa: F401
    elif name.startswith("peer"):
        import torch  # noqa: F401

        for library, model, _ in CLASSES.values():
            getattr(importlib.import_module(library), model)
    started = time.perf_counter()
    CHILDREN[name](Path(folder), *more)
    print(time.perf_counter() - started, flush=True)


# Functions of this process.


def child(name: str, *values: object) -> list[str]:
    return [sys.executable, __file__, "--child", name, *map(str, values)]


def measure(name: str, nbytes: int, command: list[str]) -> Row:
    """Run a command and measure it. Ends this program if it fails."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        os.sync()
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but still in /proc
        seconds = time.perf_counter() - started
        counts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{errors.read()}\n{name} failed with status {process.returncode}")
        started = time.perf_counter()
        os.sync()
        synced = time.perf_counter() - started
        out.seek(0)
        call = float(out.read()) if "--child" in command else None
    read, disk = int(counts["rchar"]), int(counts["read_bytes"])
    return Row(name, nbytes, seconds, call, synced, usage.ru_maxrss * 1024, read, disk)


def files_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory(what: str) -> int:
    """Return a line of /proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def mesh_need(source: Path, size: int) -> tuple[int, int]:
    """Return over how many devices, up to eight, the heads can be split, and an estimate of the memory for that.

    CPU devices share no memory: each has its own word embedding, time and text embedders and autoencoder.
    """
    text = json.loads((source / "text_encoder" / "config.json").read_text())["text_config"]
    devices, width = math.gcd(8, text["num_key_value_heads"]), text["hidden_size"]
    return devices, size + (devices - 1) * 2 * width * (text["vocab_size"] + 16 * width)


def quantized_limit(source: Path) -> float:
    """Return the memory limit of loading in float8, computed in another process: see `PEAKS`."""
    command = child("limit", source)
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


def report(row: Row, copied: Row) -> None:
    call = f"{row.call_seconds:8.1f}" if row.call_seconds is not None else f"{'':8}"
    speed, base = row.bytes / row.seconds, copied.bytes / copied.seconds
    print(
        f"{row.name:33} {row.bytes / 1e9:6.2f} {row.seconds:7.1f} {speed / 1e9:6.3f} {speed / base:7.3f}× {call} "
        f"{row.sync_seconds:7.1f} {row.peak_bytes / 1e9:8.2f} {row.read_bytes / 1e9:8.2f} {row.disk_bytes / 1e9:8.2f}",
        flush=True,
    )


def measure_all(arguments: argparse.Namespace, work: Path) -> tuple[list[Row], int]:
    """Return the rows and the size of the converted folder. At most two models are on the disk; three with --keep."""
    source, copied, converted, small, saved = (work / name for name in FOLDERS)
    size, rows = files_bytes(source), []

    def add(name: str, command: list[str]) -> None:
        rows.append(measure(name, size, command))
        report(rows[-1], rows[0])

    add("copy", child("copy", source, copied))
    shutil.rmtree(copied)
    add("joyjax.load", child("load", source))
    add(QUANTIZED[0], child("load", source, 1, "float8"))
    if not arguments.no_diffusers:
        add("from_pretrained", child("peer-load", source))
    add("joyjax convert", [str(PROGRAM), "convert", str(source), str(converted)])
    made = files_bytes(converted)
    add("joyjax.load, converted", child("load", converted))
    add(QUANTIZED[1], child("load", converted, 1, "float8"))
    devices, needed = mesh_need(source, size)
    available = memory("MemAvailable")
    if devices > 1 and needed < available:
        add(f"joyjax.load, converted, tensor={devices}", child("load", converted, devices))
    elif devices > 1:
        print(f"no mesh of {devices}: it needs {needed / 1e9:.0f} GB of memory; {available / 1e9:.0f} are available")
    if not arguments.keep:
        shutil.rmtree(converted)
    add("joyjax convert --quantize float8", [str(PROGRAM), "convert", str(source), str(small), "--quantize", "float8"])
    add(QUANTIZED[2], child("load", small))
    shutil.rmtree(small)
    if not arguments.no_diffusers:
        add("from_pretrained, save_pretrained", child("peer-convert", source, saved))
        shutil.rmtree(saved)
    return rows, made


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder on a disk for all files (default: a temporary one)")
    parser.add_argument("--size-gb", type=float, default=6.0)
    parser.add_argument("--width", type=int, default=REAL_WIDTH, help="smaller for a trial: 512 takes 0.1 GB")
    parser.add_argument("--no-embedding", action="store_true", help="without the word embedding of 1.24 GB")
    parser.add_argument("--no-diffusers", action="store_true", help="only joyjax and the copy")
    parser.add_argument("--keep", action="store_true", help="keep the model and the converted one in --work")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.keep and not arguments.work:
        parser.error("--keep needs --work")
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
        return run(arguments, arguments.work)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:  # /tmp may be in memory
        return run(arguments, Path(work))


def run(arguments: argparse.Namespace, work: Path) -> int:
    names = [name for name in FOLDERS if (work / name).exists()]
    if names:
        sys.exit(f"{work} holds {', '.join(names)} already; remove them, or name another folder")
    needed = (3 if arguments.keep else 2) * (arguments.size_gb * 1e9 + SPARE)
    free = shutil.disk_usage(work).free
    if free < needed:
        sys.exit(f"{work} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    try:
        return measured(arguments, work)
    finally:
        for name in ("copy", "quantized", "saved") if arguments.keep else FOLDERS:
            shutil.rmtree(work / name, ignore_errors=True)
            shutil.rmtree(work / f".{name}.unfinished", ignore_errors=True)


def measured(arguments: argparse.Namespace, work: Path) -> int:
    generator = Path(__file__).with_name("random_model.py")
    options = ["--size-gb", str(arguments.size_gb), "--width", str(arguments.width)]
    options += ["--no-embedding"] if arguments.no_embedding else []
    made = measure("random_model.py", 0, [sys.executable, str(generator), str(work / "source"), *options])
    packages = ["joyjax", "jax", "orbax-checkpoint", "transformers"]
    packages += [] if arguments.no_diffusers else ["torch", "diffusers"]
    about = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory("MemTotal"),
        "available_bytes": memory("MemAvailable"),
    }
    print(about)
    print(f"written in {made.seconds:.1f} s, peak {made.peak_bytes / 1e9:.2f} GB; bfloat16, CPU")
    heads = ("s", 7), ("GB/s", 6), ("of copy", 8), ("call s", 8), ("sync s", 7), ("peak GB", 8), ("read GB", 8)
    print(f"\n{'':33} {'GB':>6} " + " ".join(f"{head:>{width}}" for head, width in (*heads, ("disk GB", 8))))
    rows, converted = measure_all(arguments, work)
    allowed = PEAKS[not arguments.no_embedding]
    peak = next(row.peak_bytes for row in rows if row.name == "joyjax convert")
    print(f"\nthe converted folder has {converted / 1e9:.2f} GB")
    print(f"converting took {peak / 1e9:.2f} GB of memory; the limit is {allowed / 1e9:.0f} GB")
    quantized, most = max(row.peak_bytes for row in rows if row.name in QUANTIZED), quantized_limit(work / "source")
    print(f"loading in float8 took {quantized / 1e9:.2f} GB of memory; the limit is {most / 1e9:.2f} GB")
    if arguments.json:
        figures = {
            "about": about,
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "converted_bytes": converted,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(figures, indent=1))
    return int(peak > allowed or (quantized > most and arguments.width == REAL_WIDTH))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    else:
        sys.exit(main())
