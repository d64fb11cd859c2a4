"""Times one denoising step at the real size, with random weights, in all its forms; meant for a GPU.

    python benchmarks/step.py --json step.json                        # an NVIDIA GPU of 80 GB, no weights needed
    python benchmarks/step.py --model qwen-image --forms exact float8 # another family, two forms
    python benchmarks/step.py --layers 2 --width 256 --tokens 64      # anywhere, to try the script

Forms: exact, with the Pallas kernels of `kernels/`, with float8 linear maps, a step that the cache skips, and one pass
instead of guidance's two. Each is compiled first, timed separately, and warmed up; then all alternate (A B C C B A …).
The figure to quote is the ratio of a form's median to the exact one's in the same run; beside it stands its difference
from the exact result. TFLOP/s are those of the required arithmetic of a step. `--profile` prints the kernels of one
step of each form, by their share of its time.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
import qwen_full_size as qwen_image
from device_trace import kernel_table, traced
from full_size import JOYIMAGE, PASSES, REFERENCE, TARGET, TEXT
from step_record import least_tflop
from whole_step import cached_step, denoise_step

from joyjax.convert import joyimage as joyimage_weights
from joyjax.convert import qwen_image as qwen_image_weights
from joyjax.convert.component import Component
from joyjax.kernels import dispatch
from joyjax.kernels.choice import OPERATIONS, Kernels
from joyjax.layers.condition import Condition
from joyjax.layers.stored import quantized
from joyjax.layers.weights import Weights, leaves
from joyjax.runtime.peak_memory import peak_bytes
from joyjax.sampling.step_cache import empty_cache
from joyjax.storage.float8 import CAPABILITY

NUMBERS = [np.float32(number) for number in (0.8, 0.75, 800, 4)]  # sigma, the next, timestep, guidance
WARM_UP = 3
FORMS = ("exact", "norms", "rotation", "kernels", "one-pass", "skipped", "float8")


@dataclasses.dataclass(frozen=True)
class Network:
    """A transformer at its real size: `tokens` of target, reference and text, `token` values of an image token.

    `start` is the position of the first text token, None where text is not rotated.
    """

    component: Component
    config: Any
    tokens: tuple[int, int, int]
    text_dim: int
    token: int
    start: int | None = None


def network(model: str, layers: int | None, width: int | None, target: int) -> Network:
    """Return a model's transformer, scaled down where `layers`, `width` or `target` say so."""
    if model == "joyimage":
        width = width or JOYIMAGE.hidden_size
        sizes = {"hidden_size": width, "num_attention_heads": width // 128, "text_dim": width}
        config: Any = dataclasses.replace(JOYIMAGE, num_layers=layers or JOYIMAGE.num_layers, **sizes)
        tokens = tuple(size * target // TARGET for size in (TARGET, REFERENCE, TEXT))
        return Network(joyimage_weights.TRANSFORMER, config, tokens, width, config.in_channels * config.patch_area)
    full = qwen_image.transformer(layers or qwen_image.LAYERS)
    config = dataclasses.replace(full, num_attention_heads=(width or full.hidden_size) // 128)
    tokens = target, 0, qwen_image.TEXT * target // TARGET
    return Network(qwen_image_weights.TRANSFORMER, config, tokens, config.joint_attention_dim, config.in_channels, 64)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to run the step: `call` returns its unfinished results."""

    name: str
    call: Callable[[], Any]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(key: jax.Array, scale: np.float32, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return normal values of this standard deviation."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_weights(network: Network) -> Weights:
    """Return random weights of realistic scale, drawn on the device; zeros would run faster than real ones."""
    abstract = network.component.abstract(network.config, jnp.bfloat16)
    drawn = {}
    for n, (path, leaf) in enumerate(leaves(abstract.state).items()):
        scale = np.float32(1 if leaf.ndim == 1 else np.prod(leaf.shape[:1]) ** -0.5)
        drawn[path] = draw(jax.random.key(n), scale, shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype))
    return abstract.filled(drawn)


def condition_of(network: Network, passes: int) -> Condition:
    """Return random text and references of this network's sizes."""
    target, reference, text = network.tokens
    keys = jax.random.split(jax.random.key(0))
    return Condition(
        txt=jax.random.normal(keys[0], (passes, text, network.text_dim), jnp.bfloat16),
        txt_lengths=jnp.full((passes,), text, jnp.int32),
        references=jax.random.normal(keys[1], (passes, reference, network.token)),
        positions=jnp.zeros((passes, target + reference, 3), jnp.int32),
        target_lengths=jnp.full((passes,), target, jnp.int32),
        reference_lengths=jnp.full((passes,), reference, jnp.int32),
        txt_start=None if network.start is None else jnp.full((passes,), network.start, jnp.int32),
    )


def start_of(network: Network) -> jax.Array:
    """Return the latents before the step."""
    return jax.random.normal(jax.random.key(1), (1, network.tokens[0], network.token))


def difference(result: Any, exact: Any, start: jax.Array) -> float:
    """Return how far a form's latents are from the exact form's, relative to the step (root mean squares)."""
    one, other = (np.asarray(jax.tree.leaves(each)[0], np.float32) for each in (result, exact))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - np.asarray(start)))


def forms(weights: Weights, network: Network, pallas: str | None, wanted: Collection[str]) -> Iterator[Form]:
    """Yield those of the wanted forms that this device supports, each with its program compiled."""
    channels, start = network.config.in_channels, start_of(network)
    guided, alone = (condition_of(network, passes) for passes in (PASSES, 1))
    programs: set[str] = set()

    def step(weights: Weights, condition: Condition) -> Callable[[], Any]:
        flat, tree = jax.tree.flatten((weights, start, condition, *NUMBERS))
        program = jax.jit(lambda *flat: denoise_step.__wrapped__(*tree.unflatten(flat), channels=channels))
        lowered = program.lower(*flat)
        text = lowered.as_text()
        if text in programs:
            raise RuntimeError("two forms are the same program")
        programs.add(text)
        compiled = lowered.compile()
        return lambda: compiled(*flat)

    if "exact" in wanted:
        yield Form("exact", step(weights, guided))
    norms = [operation for operation in OPERATIONS if operation.endswith("layer_norm_scale_shift")]
    kernels = {"norms": norms, "rotation": ["qk_norm_rope"], "kernels": OPERATIONS}
    for name in [name for name in kernels if name in wanted and pallas is not None]:
        chosen = Kernels(**dict.fromkeys(kernels[name], pallas))
        yield Form(name, step(dataclasses.replace(weights, kernels=chosen), guided))
    if "one-pass" in wanted:
        yield Form("one-pass", step(weights, alone))
    if "skipped" in wanted:
        yield Form("skipped", skipped_step(weights, start, guided, channels))
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if "float8" in wanted and (capability is None or float(capability) >= CAPABILITY):
        yield Form("float8", step(quantized(weights, "float8"), guided))


def skipped_step(weights: Weights, start: jax.Array, guided: Condition, channels: int) -> Callable[[], Any]:
    """Return a step that the cache skips."""
    cache = empty_cache(weights, start, guided, kind="first-block")
    _, cache = cached_step(
        weights, jnp.copy(start), cache, guided, *NUMBERS, np.float32(0), np.bool_(True), channels=channels
    )

    def call() -> Any:
        latents, kept = jnp.copy(start), jax.tree.map(jnp.copy, cache)  # the step donates both
        limit = np.float32(1e6), np.bool_(False)
        return cached_step(weights, latents, kept, guided, *NUMBERS, *limit, channels=channels)

    return call


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["joyimage", "qwen-image"], default="joyimage")
    parser.add_argument("--layers", type=int, help="[default: the model's own]")
    parser.add_argument("--width", type=int, help="a multiple of 128, the head width  [default: the model's own]")
    parser.add_argument("--tokens", type=int, default=TARGET, help="target tokens; the others in proportion")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pallas", choices=["mosaic", "triton", "none"], help="kernels to try  [default: by device]")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="[default: all]")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step of each form")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    found = network(arguments.model, arguments.layers, arguments.width, arguments.tokens)
    config, tokens = found.config, found.tokens
    capability = dispatch.target().capability
    default = None if capability is None else "mosaic" if capability >= dispatch.HOPPER else "triton"
    pallas = default if arguments.pallas is None else None if arguments.pallas == "none" else arguments.pallas
    print(f"{arguments.model}: {config.num_layers} layers of {config.hidden_size}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"tokens of target, reference, text: {tokens}, bfloat16, guidance")

    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    started = time.perf_counter()
    weights = jax.block_until_ready(random_weights(found))
    print(f"weights drawn in {time.perf_counter() - started:.1f} s", flush=True)
    started, exact_result = time.perf_counter(), None
    for form in forms(weights, found, pallas, arguments.forms):
        rows[form.name] = {"compile_s": time.perf_counter() - started}
        calls[form.name] = form.call
        for _ in range(WARM_UP):
            started = time.perf_counter()
            result = jax.block_until_ready(form.call())
        shown = 1e3 * (time.perf_counter() - started)
        exact_result = result if form.name == "exact" else exact_result
        if exact_result is not None and form.name not in ("exact", "one-pass"):  # one pass has no guidance
            rows[form.name]["difference"] = difference(result, exact_result, start_of(found))
        off = "".join(f"; {each:.2g} from exact" for each in [rows[form.name].get("difference")] if each is not None)
        print(f"{form.name}: compiled in {rows[form.name]['compile_s']:.1f} s; {shown:.1f} ms{off}", flush=True)
        started = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(arguments.rounds):
        for name in list(calls) if n % 2 == 0 else list(reversed(calls)):
            started = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(calls))  # the exact form, if wanted
    exact = statistics.median(seconds[first])
    scale = least_tflop(config.num_layers, config.hidden_size, found.text_dim, found.token, tokens)
    print(f"{'':12}{'compile s':>10}{'min ms':>10}{'median':>10}{'max':>10}{'ratio':>8}")
    for name, values in seconds.items():
        median = statistics.median(values)
        rows[name] |= {"seconds": values, "ratio": exact / median}
        shown = "".join(f"{1e3 * value:10.2f}" for value in (min(values), median, max(values)))
        print(f"{name:12}{rows[name]['compile_s']:10.1f}{shown}{exact / median:7.2f}×", flush=True)
    peak = peak_bytes()
    print(
        f"{first}: {scale / exact:.1f} TFLOP/s of {scale:.2f} TFLOP; peak {0 if peak is None else peak / 2**30:.1f} GiB"
    )
    for name, call in calls.items() if arguments.profile else ():
        rows[name]["kernels"] = traced(call)
        print(f"\n{name}\n{kernel_table(rows[name]['kernels'])}", flush=True)
    if arguments.json:
        head = {"model": arguments.model, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        head |= {"tokens": tokens, "peak_bytes": peak, "tflop": scale}
        arguments.json.write_text(json.dumps(head | {"config": dataclasses.asdict(config), "forms": rows}, indent=1))


if __name__ == "__main__":
    main()
