"""The contents of a program compiled for a GPU, from XLA's text: kernels, arithmetic, largest arrays."""

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
    """Count kernels: library calls and hand-written kernels by name, products also by epilogue, XLA's by kind.

    XLA's own kernels are the instructions of the main program and of loop bodies, without those inside a fusion.
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
    """Return the floating-point operations of all products, convolutions and fused attention, loops counted in full."""
    shapes = {match[1]: ARRAY.findall(match[2]) for match in INSTRUCTION.finditer(program)}
    times, computation = _times(program), ""
    total = 0.0
    for line in program.splitlines():
        computation = _head(line) or computation
        match = INSTRUCTION.match(line)
        if match and match[3] == "custom-call":
            total += times.get(computation, 1) * _flops_of_call(match, shapes)
    return total


def _flops_of_call(match: re.Match[str], shapes: dict[str, list[tuple[str, str]]]) -> float:
    """Return the floating-point operations of one library call."""
    target = re.search(r'custom_call_target="([^"]+)"', match[4])
    operands = [_sizes(shapes[name][0]) for name in re.findall(r"%([^\s,)]+)", match[4].partition(")")[0])]
    if target is None:
        return 0.0
    if target[1] in PRODUCTS:
        numbers = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', match[4])
        assert numbers, match[0]
        axes = json.loads(numbers[1])["lhs_contracting_dimensions"]
        return 2 * math.prod(_sizes(ARRAY.findall(match[2])[0])) * math.prod(operands[0][int(n)] for n in axes)
    if target[1].startswith("__cudnn$conv"):
        labels = re.search(r"dim_labels=\w+_(\w+)->", match[4])
        assert labels, match[0]
        kernel = operands[1]
        inputs = math.prod(kernel) // kernel[labels[1].index("o")]
        return 2 * math.prod(_sizes(ARRAY.findall(match[2])[0])) * inputs
    if target[1].startswith("__cudnn$fmha"):
        (batch, queries, heads, width), (_, keys, _, _) = (_tokens_first(shape) for shape in operands[:2])
        return 4 * batch * heads * queries * keys * width
    return 0.0


def _times(program: str) -> dict[str, int]:
    """Return how often each loop's body runs, nested loops multiplied."""
    inside: dict[str, tuple[str, int]] = {}
    computation = ""
    for line in program.splitlines():
        computation = _head(line) or computation
        body = re.search(r" while\(.*body=%([^\s,)]+)", line)
        if body:
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            inside[body[1]] = (computation, int(count[1]) if count else 1)

    def times(name: str) -> int:
        outer, count = inside.get(name, ("", 1))
        return count * times(outer) if outer else count

    return {name: times(name) for name in inside}


def largest_arrays(program: str, count: int = 3) -> list[str]:
    """Return the largest arrays besides arguments, such as `bf16[2,8192,16384]`."""
    sizes: dict[str, int] = {}
    for match in INSTRUCTION.finditer(program):
        if match[3] == "parameter":
            continue
        for dtype, numbers in ARRAY.findall(match[2]):
            sizes[f"{dtype}[{numbers}]"] = math.prod(_sizes((dtype, numbers))) * _bits(dtype) // 8
    return sorted(sizes, key=lambda name: -sizes[name])[:count]


def loop_slices(program: str) -> list[tuple[str, int]]:
    """Return the slices that loops copy out of larger arrays, such as one layer's weights, with their counts.

    A slice is a separate kernel or a fusion of its own. One that a product reads in place is not counted.
    """
    times, found, computation, inside = _times(program), [], "", {}
    for line in program.splitlines():
        computation = _head(line) or computation
        match = INSTRUCTION.match(line)
        if match and match[3] == "fusion":
            called = re.search(r"calls=%([^\s,)]+)", line)
            if called and computation in times:
                inside[called[1]] = times[computation]
    for line in program.splitlines():
        computation = _head(line) or computation
        match = INSTRUCTION.match(line)
        count = times.get(computation) or inside.get(computation)
        if match and match[3] == "dynamic-slice" and count:
            found.append((match[2], count))
    return found


def bytes_of(array: str) -> int:
    """Return the bytes of an array such as `bf16[2,8192,16384]`."""
    dtype, numbers = ARRAY.findall(array)[0]
    return math.prod(_sizes((dtype, numbers))) * _bits(dtype) // 8


def _outside_fusions(program: str) -> list[str]:
    """Return the lines of the main program and of loops, without computations of fusions and reductions."""
    called = set(re.findall(r"(?:calls|to_apply)=%([^\s,)]+)", program))
    lines, inside = [], False
    for line in program.splitlines():
        head = _head(line)
        if head:
            inside = head in called
        if not inside:
            lines.append(line)
    return lines


def _head(line: str) -> str | None:
    """Return the name of the computation that begins on this line."""
    head = re.match(r"(?:ENTRY )?%(\S+) .*\{$", line)
    return head[1] if head else None


def _sizes(array: tuple[str, str]) -> list[int]:
    return [int(number) for number in array[1].split(",") if number]


def _tokens_first(shape: list[int]) -> tuple[int, ...]:
    """Return batch, tokens, heads and channels, the order of cuDNN's operands."""
    assert len(shape) == 4, shape
    return tuple(shape)


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
