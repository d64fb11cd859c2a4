"""A record of an edit's stages at the real size and of each kernel's resources, compiled for an H100 without running.

    python benchmarks/record.py                          # compare with benchmarks/record.json; some minutes
    python benchmarks/record.py --parts block kernels
    python benchmarks/record.py --write                  # after an intended change, to be committed with it
    python benchmarks/record.py --table                  # the table of docs/kernels.md, from the record

The record has, for each version of JAX, the kernels of each stage by kind, the operations of products, convolutions and
attention, and the bytes of arguments and working memory; and for each Pallas kernel and shape the registers per thread
and spills, on an H100 (Mosaic GPU) and on an A100 (Triton). tests/kernels/test_record.py compares it;
tests/gpu_compile.py lists the packages.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_record import kernel_differences, kernel_table, measure_kernels
from step_record import PARTS, RECORD, differences, measure, version

from joyjax.kernels.cases import SHAPES

KERNELS = "kernels"


def main() -> None:
    """Measure, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the results as the record of this version of JAX")
    parser.add_argument("--parts", nargs="*", choices=(*PARTS, KERNELS), default=[*PARTS, KERNELS])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="shapes of the kernels")
    parser.add_argument("--table", action="store_true", help="print the record's table of kernels without measuring")
    arguments = parser.parse_args()
    if arguments.write and arguments.shapes != list(SHAPES):
        parser.error("--write records all shapes; leave out --shapes")
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if arguments.table:
        print(kernel_table(recorded[version()][KERNELS]))
        return
    found = {
        part: measure_kernels(tuple(arguments.shapes)) if part == KERNELS else measure(part) for part in arguments.parts
    }
    print(json.dumps(found, indent=1))
    if arguments.write:
        recorded[version()] = recorded.get(version(), {}) | found
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
        return
    if version() not in recorded:
        sys.exit(f"{RECORD} has JAX {', '.join(recorded)}, not {version()}; --write adds it")
    wrong = []
    for part, contents in found.items():
        old = recorded[version()][part]
        wrong += kernel_differences(old, contents) if part == KERNELS else differences(old, contents, part)
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
