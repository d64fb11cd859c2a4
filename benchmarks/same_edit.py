"""Edits by the demo on this device, beside the same edits on a CPU: `python benchmarks/same_edit.py`.

One JSON line for each dtype and choice of kernels, with the largest difference of a pixel's value, of 255, and the
seconds of a first and a second edit. On a CPU it compares with itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import joyjax

EXAMPLE = Path(__file__).parents[1] / "examples" / "shapes.png"
PROMPT = "make the red circle blue"
FORMS = (("float32", "xla"), ("bfloat16", "xla"), ("bfloat16", "pallas"))  # dtype, kernels; the last on GPUs only


def edits(dtype: str, kernels: str) -> dict[str, Any]:
    """Make an edit twice; return its picture, the seconds of both, and the device."""
    pipeline = joyjax.load(dtype=dtype, kernels=kernels)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        result = joyjax.edit(pipeline, Image.open(EXAMPLE), PROMPT)
        seconds.append(round(time.perf_counter() - started, 3))
    kernels = result.settings["kernels"]
    return {"picture": result.image, "seconds": seconds, "device": result.device, "kernels": kernels}


def on_cpu(dtype: str, file: Path) -> subprocess.Popen:
    """Start a process that makes the edit on a CPU."""
    command = [sys.executable, __file__, "--write", str(file), "--dtype", dtype]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})


def main() -> None:
    """Print one JSON line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="only make the edit, and write its picture here")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.write is not None:
        edits(arguments.dtype, "xla")["picture"].save(arguments.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {dtype: Path(folder) / f"{dtype}.png" for dtype, _ in FORMS}
        running = {dtype: on_cpu(dtype, file) for dtype, file in files.items()}
        for dtype, kernels in FORMS:
            if kernels == "pallas" and jax.default_backend() == "cpu":
                continue
            found = edits(dtype, kernels)
            if running[dtype].wait():
                raise RuntimeError(f"the edit in {dtype} on a CPU failed")
            ours, theirs = (np.asarray(image, np.int16) for image in (found.pop("picture"), Image.open(files[dtype])))
            off = np.abs(ours - theirs)
            row = {"dtype": dtype, **found, "most": int(off.max()), "differing": float((off > 0).mean())}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
