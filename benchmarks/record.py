"""What one block and the whole step at the real size contain on an H100, compiled without one, against a record.

    python benchmarks/record.py            # compare with benchmarks/record.json
    python benchmarks/record.py --write    # after a change that is meant; the difference is then in the commit

The record has, for each version of JAX: the kernels by kind, the operations of products and attention, and the bytes of
arguments and working memory. tests/kernels/test_record.py compares it; tests/gpu_compile.py names the packages.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from step_record import RECORD, differences, measure, version

STEPS = ("block", "step")


def main() -> None:
    """Measure, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep what is found as the record of this version of JAX")
    parser.add_argument("--parts", nargs="*", choices=STEPS, default=list(STEPS))
    arguments = parser.parse_args()
    found = {part: measure(part) for part in arguments.parts}
    print(json.dumps(found, indent=1))
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if arguments.write:
        recorded[version()] = recorded.get(version(), {}) | found
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
        return
    if version() not in recorded:
        sys.exit(f"{RECORD} has JAX {', '.join(recorded)}, not {version()}; --write keeps what was found")
    wrong = [line for part in arguments.parts for line in differences(recorded[version()][part], found[part], part)]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
