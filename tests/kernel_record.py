"""The record of each Pallas kernel's resources on full-size shapes: measurement, comparison with tolerance, table."""

import functools
from typing import Any

import gpu_compile

from joyjax.kernels.cases import SHAPES, cases

# The implementation of `kernels/` for each GPU, and XLA's fusion of the reference.
COLUMNS = {"H100 mosaic": ("H100", "mosaic"), "A100 triton": ("A100", "triton"), "H100 xla": ("H100", "reference")}
REGISTERS = 0.1  # relative tolerance, for changes between builds of a compiler
TEMPORARIES = 4096  # bytes of tolerance

Row = dict[str, Any]
Kernels = dict[str, dict[str, dict[str, Row]]]


def measure_kernels(shapes: tuple[str, ...] = tuple(SHAPES)) -> Kernels:
    """Return a kernel's resources, and its program's kernels and temporaries, by column, shape and operation.

    To be called once per process: Mosaic GPU prints a kernel's resources only at its first compilation.
    """
    found: Kernels = {}
    for column, (device, implementation) in COLUMNS.items():
        for shape in shapes:
            for case in cases(shape):
                function = functools.partial(case.function, implementation=implementation)
                compiled, used = gpu_compile.kernel_resources(
                    function, *case.arguments, mesh=gpu_compile.gpu_mesh(name=device)
                )
                count = sum((gpu_compile.custom_calls(compiled) + gpu_compile.fusions(compiled)).values())
                row = {"kernels": count, "temporaries": compiled.memory_analysis().temp_size_in_bytes}
                found.setdefault(column, {}).setdefault(shape, {})[case.operation] = (used or {}) | row
    return found


def kernel_differences(recorded: Kernels, found: Kernels) -> list[str]:
    """Return a line for each spill and each difference to the record, for the measured shapes."""
    lines = []
    for column, shapes in found.items():
        for shape, operations in shapes.items():
            old_operations = recorded.get(column, {}).get(shape, {})
            for operation in sorted({*operations, *old_operations}):
                name = f"{column}, {shape}, {operation}"
                if operation not in operations or operation not in old_operations:
                    lines.append(f"{name}: {'not' if operation not in operations else 'only'} found now")
                    continue
                lines += [f"{name}: {line}" for line in _row(old_operations[operation], operations[operation])]
    return lines


def _row(old: Row, new: Row) -> list[str]:
    lines = []
    if new.get("spills"):
        lines.append(f"{new['spills']} bytes spilled")
    if old.keys() != new.keys():
        lines.append(f"has {', '.join(new)}; recorded: {', '.join(old)}")
    elif abs(new.get("registers", 0) - old.get("registers", 0)) > REGISTERS * old.get("registers", 0):
        lines.append(f"{new['registers']} registers; recorded: {old['registers']}")
    for what in ("kernels", "shared"):
        if old.get(what) != new.get(what):
            lines.append(f"{what} {new.get(what)}; recorded: {old.get(what)}")
    if abs(new["temporaries"] - old["temporaries"]) > TEMPORARIES + 0.05 * old["temporaries"]:
        lines.append(f"{new['temporaries']} bytes of temporaries; recorded: {old['temporaries']}")
    return lines


def kernel_table(recorded: Kernels) -> str:
    """Return the table of docs/kernels.md."""
    mosaic, triton, xla = (recorded[column] for column in COLUMNS)

    def cell(shape: str, operation: str) -> str:
        rows = [column[shape].get(operation) for column in (mosaic, triton)]
        return " · ".join(str(row["registers"]) for row in rows if row) or "–"

    def program(row: Row) -> str:
        return f"{row['kernels']}, {row['temporaries']:,} B"

    first = next(iter(SHAPES))
    lines = [
        f"| | {' | '.join(SHAPES)} | spills | XLA at {first}: kernels, temporaries | Mosaic GPU |",
        "|---" * (len(SHAPES) + 4) + "|",
    ]
    for operation in mosaic[first]:
        cells = [cell(shape, operation) for shape in SHAPES]
        spills = sum(
            rows[operation]["spills"] for column in (mosaic, triton) for rows in column.values() if operation in rows
        )
        ends = program(xla[first][operation]), program(mosaic[first][operation])
        lines.append("| " + " | ".join([f"`{operation}`", *cells, str(spills), *ends]) + " |")
    return "\n".join(lines)
