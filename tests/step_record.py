"""The record of the compiled stages of an edit on an H100: measurement, and comparison with tolerance."""

from pathlib import Path
from typing import Any

import jax
from contents import flops, kernels, largest_arrays
from full_size import JOYIMAGE, PASSES, REFERENCE, TARGET, TEXT, stage
from gpu_compile import compile_for_gpu, gpu_mesh

RECORD = Path(__file__).parents[1] / "benchmarks" / "record.json"
STAGES = ("encode_prompt", "encode_images", "decode_latents")
PARTS = ("block", "step", *STAGES)
BYTES, KERNELS = 0.05, 0.02  # relative tolerances, for changes between builds of XLA


def version() -> str:
    """Return JAX's version, the key of the record: each has its own version of XLA."""
    return jax.__version__


def measure(part: str) -> dict[str, Any]:
    """Return the contents of the whole `step`, or of another stage of an edit, for one picture of full size.

    The contents of one `block` are the difference of a step with three and a step with two blocks.
    """
    if part in STAGES:
        return _contents(part)
    if part == "step":
        return _step(JOYIMAGE.num_layers)
    two, three = _step(2), _step(3)
    names = sorted({*two["kernels"], *three["kernels"]})
    return {
        "kernels": {
            name: three["kernels"].get(name, 0) - two["kernels"].get(name, 0)
            for name in names
            if three["kernels"].get(name, 0) != two["kernels"].get(name, 0)
        },
        "tflop": round(three["tflop"] - two["tflop"], 3),
        "arguments_gib": round(three["arguments_gib"] - two["arguments_gib"], 3),
        "working_gib": three["working_gib"],
        "largest_arrays": three["largest_arrays"],
    }


def least_tflop(
    layers: int,
    width: int = JOYIMAGE.hidden_size,
    text_dim: int = JOYIMAGE.text_dim,
    token: int = JOYIMAGE.in_channels * JOYIMAGE.patch_area,
    sizes: tuple[int, ...] = (TARGET, REFERENCE, TEXT),
) -> float:
    """Return the required arithmetic of a double-stream step with guidance, in 10¹² operations.

    The last block computes queries and MLP of the target only, and keys and values of all tokens. `width`, `text_dim`
    and `token` are the channels of the network, of the text and of an image token; `sizes` are the tokens of target,
    reference and text.
    """
    target, reference, text = sizes
    image = target + reference
    tokens = image + text
    block = 2 * 12 * width**2 * tokens + 4 * width * tokens**2
    last = 2 * width**2 * (2 * tokens + 10 * target) + 4 * width * target * tokens
    ends = 2 * width * token * (image + target) + 2 * text * (text_dim * width + width**2)
    return PASSES * ((layers - 1) * block + last + ends) / 1e12


def differences(recorded: dict[str, Any], found: dict[str, Any], part: str) -> list[str]:
    """Return a line for each difference to the record: kernels, arithmetic, memory."""
    lines = []
    for name in sorted({*recorded["kernels"], *found["kernels"]}):
        old, new = (contents["kernels"].get(name, 0) for contents in (recorded, found))
        if abs(new - old) > KERNELS * old:
            lines.append(f"{part}: {new} × {name}; recorded: {old}")
    if abs(found["tflop"] - recorded["tflop"]) > 0.001 * recorded["tflop"]:
        lines.append(f"{part}: {found['tflop']} TFLOP; recorded: {recorded['tflop']}")
    for name in ("arguments_gib", "working_gib"):
        if abs(found[name] - recorded[name]) > BYTES * recorded[name]:
            lines.append(f"{part}: {name} {found[name]}; recorded: {recorded[name]}")
    return lines


def _step(layers: int) -> dict[str, Any]:
    return {"least_tflop": round(least_tflop(layers), 3)} | _contents("denoise_step", layers)


def _contents(name: str, layers: int | None = None) -> dict[str, Any]:
    function, arguments = stage(name, gpu_mesh(), layers=layers)
    compiled = compile_for_gpu(function, *arguments)
    program, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "kernels": kernels(program),
        "tflop": round(flops(program) / 1e12, 3),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "working_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "largest_arrays": largest_arrays(program),
    }
