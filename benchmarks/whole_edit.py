"""Loading of a model and two whole edits: `python benchmarks/whole_edit.py FOLDER`, for any model that joyjax reads.

One JSON line each: the load, the first edit, which compiles, and the second, with the seconds of every stage, the peak
memory so far, the kernels that ran, and notes on them. `benchmarks/random_model.py` writes a model of the real sizes.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

from PIL import Image

import joyjax
from joyjax.runtime.peak_memory import peak_bytes

EXAMPLE = Path(__file__).parents[1] / "examples" / "shapes.png"
PROMPT = "make the red circle blue"


def main() -> None:
    """Print one JSON line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--base-size", type=int, choices=[256, 512, 768, 1024])
    parser.add_argument("--kernels", choices=["auto", "xla", "pallas"], default="auto")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    size = sum(file.stat().st_size for file in arguments.model.rglob("*") if file.is_file())
    started = time.perf_counter()
    pipeline = joyjax.load(arguments.model, kernels=arguments.kernels)
    seconds = time.perf_counter() - started
    row = {"what": "load", "seconds": seconds, "gbyte": size / 1e9, "gbyte_s": size / seconds / 1e9}
    print(json.dumps(row | {"peak_bytes": peak_bytes()}), flush=True)
    for number, name in enumerate(("first edit", "second edit")):
        started = time.perf_counter()
        options = {"steps": arguments.steps, "base_size": arguments.base_size, "seed": number}
        result = joyjax.edit(pipeline, Image.open(EXAMPLE), PROMPT, **options)
        row = {"what": name, "seconds": time.perf_counter() - started, **result.timings}
        row |= {"step_ms": 1e3 * result.timings["denoise"] / arguments.steps, "kernels": result.settings["kernels"]}
        row |= {"size": result.image.size, "notes": [note for note in result.notes if note.startswith("kernels")]}
        print(json.dumps(row | {"peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
