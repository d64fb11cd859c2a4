"""What a program compiled for a GPU contains, read from XLA's text: its kernels, its arithmetic, its largest arrays."""

import collections
import json
import math
import re

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", re.MULTILINE)
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "s64": 64, "f64": 64}  # 32 otherwise, or as the name says
PRODUCTS = ("__cublas$lt$matmul", "__cublas$gemm", "__cublas$lt$matmul$f8")
OWN_KERNELS = {
    "fusion",
    "copy",
    "transpose",
    "concatenate",
    "convert",
    "dynamic-update-slice",
    "reduce",
    "scatter",
    "sort",
}


def kernels(program: str) -> dict[str, int]:
    """Count what runs: calls of libraries and hand-written kernels by name, products also by epilogue, XLA's by kind.

    XLA's own kernels are the instructions of the main program and of its loops' bodies, not those inside a fusion.
    """
    found: collections.Counter[str] = collections.Counter()
    for line in _outside_fusions(program):
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        operation = match[3].removesuffix("-start")
        if operation == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', line)
            epilogue = re.search(r'"epilogue":"(\w+)"', line)
            name = target[1] if target else "custom-call"
            found[f"{name} {epilogue[1]}" if epilogue and epilogue[1] != "DEFAULT" else name] += 1
        elif operation == "fusion":
            kind = re.search(r"kind=k(\w+)", line)
            found[f"fusion {kind[1].lower()}" if kind else "fusion"] += 1
        elif operation in OWN_KERNELS:
            found[operation] += 1
    return dict(sorted(found.items()))


def flops(program: str) -> float:
    """Return the floating-point operations of all products and of fused attention, each as often as it stands there.

    A product of a loop's body counts once: the programs that this is for have no loops.
    """
    shapes = {match[1]: ARRAY.findall(match[2]) for match in INSTRUCTION.finditer(program)}
    total = 0.0
    for match in INSTRUCTION.finditer(program):
        if match[3] != "custom-call":
            continue
        target = re.search(r'custom_call_target="([^"]+)"', match[4])
        operands = [_sizes(shapes[name][0]) for name in re.findall(r"%([^\s,)]+)", match[4].partition(")")[0])]
        if target and target[1] in PRODUCTS:
            numbers = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', match[4])
            assert numbers, match[0]
            axes = json.loads(numbers[1])["lhs_contracting_dimensions"]
            total += 2 * math.prod(_sizes(ARRAY.findall(match[2])[0])) * math.prod(operands[0][int(n)] for n in axes)
        elif target and target[1].startswith("__cudnn$fmha"):
            (batch, queries, heads, width), (_, keys, _, _) = (_tokens_first(shape) for shape in operands[:2])
            total += 4 * batch * heads * queries * keys * width
    return total


def largest_arrays(program: str, count: int = 3) -> list[str]:
    """Return the largest arrays that anything but an argument gives, such as `bf16[2,8192,16384]`."""
    sizes: dict[str, int] = {}
    for match in INSTRUCTION.finditer(program):
        if match[3] == "parameter":
            continue
        for dtype, numbers in ARRAY.findall(match[2]):
            sizes[f"{dtype}[{numbers}]"] = math.prod(_sizes((dtype, numbers))) * _bits(dtype) // 8
    return sorted(sizes, key=lambda name: -sizes[name])[:count]


def bytes_of(array: str) -> int:
    """Return the bytes of an array such as `bf16[2,8192,16384]`."""
    dtype, numbers = ARRAY.findall(array)[0]
    return math.prod(_sizes((dtype, numbers))) * _bits(dtype) // 8


def _outside_fusions(program: str) -> list[str]:
    """Return the lines of the main program and of loops, without what a fusion calls or a reduction applies."""
    called = set(re.findall(r"(?:calls|to_apply)=%([^\s,)]+)", program))
    lines, inside = [], False
    for line in program.splitlines():
        head = re.match(r"(?:ENTRY )?%(\S+) .*\{$", line)
        if head:
            inside = head[1] in called
        if not inside:
            lines.append(line)
    return lines


def _sizes(array: tuple[str, str]) -> list[int]:
    return [int(number) for number in array[1].split(",") if number]


def _tokens_first(shape: list[int]) -> tuple[int, ...]:
    """Return batch, tokens, heads and channels; cuDNN's operands lie so."""
    assert len(shape) == 4, shape
    return tuple(shape)


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
