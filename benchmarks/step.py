"""Times one denoising step at the real size, with random weights, in all its forms; meant for a GPU.

    python benchmarks/step.py --json step.json                        # an NVIDIA GPU of 80 GB, no weights needed
    python benchmarks/step.py --layers 2 --width 256 --tokens 64      # anywhere, to try the script

Forms: exact, with the Pallas kernels of `kernels/`, with float8 linear maps, a step that the cache skips, and one pass
instead of guidance's two. Each is compiled first, timed separately, and warmed up; then all alternate (A B C C B A …).
The figure to quote is the ratio of a form's median to the exact one's in the same run. TFLOP/s are those of the
required arithmetic of a step.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
from full_size import JOYIMAGE, PASSES, REFERENCE, TARGET, TEXT
from step_record import least_tflop
from whole_step import cached_step, denoise_step

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.kernels import dispatch, modulate, qk_norm_rope
from joyjax.layers.condition import Condition
from joyjax.layers.stored import quantized
from joyjax.layers.weights import Weights, leaves
from joyjax.models.joyimage import JoyImageConfig
from joyjax.runtime.peak_memory import peak_bytes
from joyjax.sampling.step_cache import empty_cache
from joyjax.storage.float8 import CAPABILITY

NUMBERS = [np.float32(number) for number in (0.8, 0.75, 800, 4)]  # sigma, the next, timestep, guidance
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to run the step: `call` returns its unfinished results."""

    name: str
    call: Callable[[], Any]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(key: jax.Array, scale: np.float32, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return normal values of this standard deviation."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_weights(config: JoyImageConfig) -> Weights:
    """Return random weights of realistic scale, drawn on the device; zeros would run faster than real ones."""
    abstract = TRANSFORMER.abstract(config, jnp.bfloat16)
    drawn = {}
    for n, (path, leaf) in enumerate(leaves(abstract.state).items()):
        scale = np.float32(1 if leaf.ndim == 1 else np.prod(leaf.shape[:1]) ** -0.5)
        drawn[path] = draw(jax.random.key(n), scale, shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype))
    return abstract.filled(drawn)


def condition_of(config: JoyImageConfig, tokens: tuple[int, int, int], passes: int) -> Condition:
    """Return random text and references for these numbers of tokens: target, reference, text."""
    target, reference, text = tokens
    keys = jax.random.split(jax.random.key(0))
    return Condition(
        txt=jax.random.normal(keys[0], (passes, text, config.text_dim), jnp.bfloat16),
        txt_lengths=jnp.full((passes,), text, jnp.int32),
        references=jax.random.normal(keys[1], (passes, reference, config.in_channels * config.patch_area)),
        positions=jnp.zeros((passes, target + reference, 3), jnp.int32),
        target_lengths=jnp.full((passes,), target, jnp.int32),
        reference_lengths=jnp.full((passes,), reference, jnp.int32),
    )


@contextlib.contextmanager
def kernels_by_name(name: str, modules: tuple[Any, ...]) -> Iterator[None]:
    """Make `name` the default implementation in these modules, while a step is traced."""
    rules = [module.pallas for module in modules]
    for module in modules:
        module.pallas = lambda operation, implementation: dispatch.pallas(operation, implementation or name)
    try:
        yield
    finally:
        for module, rule in zip(modules, rules, strict=True):
            module.pallas = rule


def forms(weights: Weights, config: JoyImageConfig, tokens: tuple[int, int, int], pallas: str | None) -> Iterator[Form]:
    """Yield the forms that this device supports, each with its program compiled."""
    channels = config.in_channels
    start = jax.random.normal(jax.random.key(1), (1, tokens[0], channels * config.patch_area))
    guided, alone = (condition_of(config, tokens, passes) for passes in (PASSES, 1))

    def step(weights: Weights, condition: Condition) -> Callable[[], Any]:
        # A separate program for each: the choice of kernels is made at trace time and is not part of jit's key.
        flat, tree = jax.tree.flatten((weights, start, condition, *NUMBERS))
        program = jax.jit(lambda *flat: denoise_step.__wrapped__(*tree.unflatten(flat), channels=channels))
        compiled = program.lower(*flat).compile()
        return lambda: compiled(*flat)

    yield Form("exact", step(weights, guided))
    if pallas is not None:
        for name, modules in (("norms", (modulate,)), ("head norms and rotation", (qk_norm_rope,))):
            with kernels_by_name(pallas, modules):
                yield Form(f"{name} by {pallas}", step(weights, guided))
    yield Form("one pass", step(weights, alone))
    cache = empty_cache(weights, start, guided, kind="first-block")
    _, cache = cached_step(
        weights, jnp.copy(start), cache, guided, *NUMBERS, np.float32(0), np.bool_(True), channels=channels
    )

    def skipped() -> Any:
        latents, kept = jnp.copy(start), jax.tree.map(jnp.copy, cache)  # the step donates both
        limit = np.float32(1e6), np.bool_(False)
        return cached_step(weights, latents, kept, guided, *NUMBERS, *limit, channels=channels)

    yield Form("skipped by the cache", skipped)
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None or float(capability) >= CAPABILITY:
        yield Form("float8", step(quantized(weights, "float8"), guided))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=JOYIMAGE.num_layers)
    parser.add_argument("--width", type=int, default=JOYIMAGE.hidden_size, help="a multiple of 128, the head width")
    parser.add_argument("--tokens", type=int, default=TARGET, help="target tokens; the others in proportion")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pallas", choices=["mosaic", "triton", "none"], help="kernels to try  [default: by device]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    config = dataclasses.replace(
        JOYIMAGE,
        num_layers=arguments.layers,
        hidden_size=arguments.width,
        num_attention_heads=arguments.width // 128,
        text_dim=arguments.width,
    )
    tokens = tuple(size * arguments.tokens // TARGET for size in (TARGET, REFERENCE, TEXT))
    capability = dispatch.target().capability
    default = None if capability is None else "mosaic" if capability >= dispatch.HOPPER else "triton"
    pallas = default if arguments.pallas is None else None if arguments.pallas == "none" else arguments.pallas
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {config.num_layers} layers of {config.hidden_size},")
    print(f"tokens of target, reference, text: {tokens}, bfloat16, guidance")

    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    weights = jax.block_until_ready(random_weights(config))
    started = time.perf_counter()
    for form in forms(weights, config, tokens, pallas):
        rows[form.name] = {"compile_s": time.perf_counter() - started}
        calls[form.name] = form.call
        for _ in range(WARM_UP):
            jax.block_until_ready(form.call())
        started = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(arguments.rounds):
        for name in list(calls) if n % 2 == 0 else list(reversed(calls)):
            started = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - started)
    exact = statistics.median(seconds["exact"])
    scale = least_tflop(config.num_layers, config, tokens)
    print(f"{'':36}{'compile s':>10}{'min ms':>10}{'median':>10}{'max':>10}{'ratio':>8}")
    for name, values in seconds.items():
        median = statistics.median(values)
        rows[name] |= {"seconds": values, "ratio": exact / median}
        shown = "".join(f"{1e3 * value:10.2f}" for value in (min(values), median, max(values)))
        print(f"{name:36}{rows[name]['compile_s']:10.1f}{shown}{exact / median:7.2f}×", flush=True)
    peak = peak_bytes()
    print(
        f"exact: {scale / exact:.1f} TFLOP/s of {scale:.2f} TFLOP; peak {0 if peak is None else peak / 2**30:.1f} GiB"
    )
    if arguments.json:
        head = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tokens": tokens, "peak_bytes": peak}
        arguments.json.write_text(json.dumps(head | {"config": dataclasses.asdict(config), "forms": rows}, indent=1))


if __name__ == "__main__":
    main()
