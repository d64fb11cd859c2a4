"""Counts the collectives of a compiled program."""

import collections
import re

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
CALL = re.compile(rf" = (\(.*?\)|\S+) ({KINDS})(?:-start)?\(((?:[^()]|\([^()]*\))*)\)")
ARRAY = re.compile(r"\w+\[[\d,]*\]")


def count_collectives(program: str) -> collections.Counter:
    """Return the collectives of a program in XLA's text by kind; a combined one counts once for each of its arrays.

    The chunks of an all-to-all, which XLA lists separately, are one array.
    """
    found = collections.Counter()
    for _, kind, operands in CALL.findall(program):
        found[kind] += 1 if kind == "all-to-all" else max(1, operands.count("%"))
    return found


def gathered_shapes(program: str) -> list[str]:
    """Return the result shapes of all all-gathers."""
    return [shape for shape, kind, _ in CALL.findall(program) if kind == "all-gather"]
