"""One guided denoising step of JoyImage in Diffusers, with random weights: the counterpart of benchmarks/step.py.

    python benchmarks/step_diffusers.py                                                   # a GPU of 80 GB
    python benchmarks/step_diffusers.py --layers 2 --width 128 --tokens 16 --device cpu   # anywhere, to try the script

Sizes are those of benchmarks/step.py. A step is what Diffusers' pipeline computes: the network once for each prompt,
guidance with the norm of the conditional prediction, and Euler's rule. One JSON line for each form, as soon as it is
measured: eager, then with every block compiled by `torch.compile`, which is how Diffusers advises to compile
(`compile_repeated_blocks`); the whole network takes minutes.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["JAX_PLATFORMS"] = "cpu"  # JAX is imported for the sizes alone, and must not take the GPU's memory

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except Exception:  # one that was built for another torch ends the import of Diffusers, which needs none
        sys.modules["torchvision"] = None  # type: ignore[assignment]

import torch
from diffusers import JoyImageEditTransformer3DModel
from full_size import JOYIMAGE, TARGET, TEXT

WARM_UP = 2
SCALE, SIGMA, NEXT = 4.0, 0.8, 0.75
PICTURES = 2  # the target, and a reference of its size


def network(layers: int, width: int, device: str) -> torch.nn.Module:
    """Return the transformer with random weights of realistic scale, in bfloat16, made on the device."""
    config = {
        "patch_size": list(JOYIMAGE.patch_size),
        "in_channels": JOYIMAGE.in_channels,
        "hidden_size": width,
        "num_attention_heads": width // JOYIMAGE.head_dim,
        "text_dim": width,
        "mlp_width_ratio": JOYIMAGE.mlp_width_ratio,
        "num_layers": layers,
        "rope_dim_list": list(JOYIMAGE.rope_dim_list),
        "theta": int(JOYIMAGE.theta),
    }
    with torch.device("meta"):
        model = JoyImageEditTransformer3DModel(**config)
    kept = set(model._keep_in_fp32_modules or ())  # as `from_pretrained` loads them
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else torch.bfloat16)
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.normal_(std=fan**-0.5)
    return model


def step_of(model: torch.nn.Module, tokens: int, texts: int, width: int, device: str) -> Callable[[], torch.Tensor]:
    """Return a step on random inputs."""
    side = 2 * round(tokens**0.5)  # latent pixels
    kind = {"device": device, "dtype": torch.bfloat16}
    latents = torch.randn(1, PICTURES, JOYIMAGE.in_channels, 1, side, side, **kind)
    prompts = [torch.randn(1, texts, width, **kind) for _ in range(2)]
    timestep = torch.full((1,), 1000 * SIGMA, device=device)

    def step() -> torch.Tensor:
        plain, conditional = (
            model(hidden_states=latents, timestep=timestep, encoder_hidden_states=prompt, return_dict=False)[0]
            for prompt in prompts
        )
        guided = plain + SCALE * (conditional - plain)
        norms = [torch.linalg.vector_norm(x.float(), dim=2, keepdim=True) for x in (conditional, guided)]
        velocity = guided.float() * (norms[0] / norms[1].clamp_min(1e-6))
        return (latents.float() + (NEXT - SIGMA) * velocity).to(latents.dtype)

    return step


def finish(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(step: Callable[[], torch.Tensor], rounds: int, device: str) -> dict[str, Any]:
    """Return the seconds of the first calls, which compile, and of each later one."""
    started = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    finish(device)
    first, seconds = time.perf_counter() - started, []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        finish(device)
        seconds.append(time.perf_counter() - started)
    peak = None if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"first_s": first, "median_ms": 1e3 * statistics.median(seconds), "seconds": seconds, "peak_bytes": peak}


def forms(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the measurement of each form."""
    device = arguments.device
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    head = {"device": name, "torch": torch.__version__, "layers": arguments.layers}
    model = network(arguments.layers, arguments.width, device)
    texts = TEXT * arguments.tokens // TARGET
    step = step_of(model, arguments.tokens, texts, arguments.width, device)
    for form in arguments.forms:
        if form == "compiled":
            model.compile_repeated_blocks(fullgraph=True)
        yield head | {"form": f"diffusers {form}"} | measure(step, arguments.rounds, device)


def main() -> None:
    """Print one JSON line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=JOYIMAGE.num_layers)
    parser.add_argument("--width", type=int, default=JOYIMAGE.hidden_size, help="a multiple of 128, the head width")
    parser.add_argument("--tokens", type=int, default=TARGET, help="target tokens, a square; the others in proportion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    for row in forms(arguments):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
