"""Times the whole edit and its stages against Diffusers, in one process on one checkpoint: `python benchmarks/edit.py`.

Without MODEL a random checkpoint is made: six transformer layers of 512, language model and vision tower to match, the
real VAE's shape at a third of its width. Sides take turns (A B B A …), after warm-up calls that do not count; compiling
is timed on its own line. The figure to quote is the ratio of medians. Inputs, noise, steps and threads are the same,
and the pictures are compared before anything is timed. Needs the extra `joyjax[test]`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def paired(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> tuple[list[float], list[float]]:
    """Return the seconds of both sides, taken in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for n in range(pairs):
        for side in (0, 1) if n % 2 == 0 else (1, 0):
            seconds[side].append(timed((ours, theirs)[side]))
    return seconds


def report(name: str, ours: list[float], theirs: list[float]) -> dict[str, object]:
    """Print one line and return it as data."""
    our, their = np.median(ours), np.median(theirs)

    def spread(values: list[float]) -> str:
        return f"{min(values) * 1e3:8.1f} {np.median(values) * 1e3:8.1f} {max(values) * 1e3:8.1f}"

    print(f"{name:12} {spread(ours)}   {spread(theirs)}   {their / our:6.2f}×", flush=True)
    return {"stage": name, "joyjax": ours, "diffusers": theirs, "ratio": their / our}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="Diffusers folder (default: a random one)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    import jax
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    import random_checkpoint
    from compare import load_diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.joyimage import image_processor

    import joyjax
    from joyjax import editing
    from joyjax.request import check_request
    from joyjax.sampling import steps as stage

    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    size = (arguments.size, arguments.size)
    image_processor.BUCKETS[1024] = [size]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model
        if folder is None:
            folder = random_checkpoint.save(random_checkpoint.make_pipeline("small"), Path(scratch) / "model")
        theirs = load_diffusers(folder, torch.float32)
        ours = joyjax.load(folder, dtype="float32")

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
    prompt = "replace the wooden table on the left by a round one of dark marble"
    noise = rng.standard_normal((1, size[0] // 8, size[1] // 8, 16)).astype(np.float32)
    options = {"steps": arguments.steps, "height": size[0], "width": size[1], "exact_size": True, "noise": noise}

    def our_edit() -> np.ndarray:
        return np.asarray(joyjax.edit(ours, image, prompt, **options).image)

    latents = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])[:, None]

    def their_edit() -> np.ndarray:
        result = theirs(image=image, prompt=prompt, num_inference_steps=arguments.steps, latents=latents)
        return np.asarray(result.images[0])

    versions = {"jax": jax.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    print(f"{versions}, {arguments.threads} threads, {size[0]}×{size[1]}, {arguments.steps} steps, float32, guidance 4")
    print(f"first joyjax edit, with compiling: {timed(our_edit):.1f} s")
    off = np.abs(our_edit().astype(int) - their_edit().astype(int))
    print(f"pictures differ by {off.max()} of 255 at most, in {np.mean(off > 0):.2%} of the values")
    if off.max() > 2:
        sys.exit("the pictures differ: nothing is timed")

    # The stages alone, on the inputs that the edit gives them.
    check = {"negative_prompt": None, "guidance_scale": 4.0, "seed": 0, "base_size": None, **options}
    inputs = ours.family.prepare(check_request(ours, image, prompt, **check), ours.files)
    txt, references = editing.encode_prompt(ours, inputs), editing.encode_references(ours, inputs)
    condition = ours.family.condition(inputs, txt, references)
    config = ours.files.configs["transformer"]
    start = np.asarray(stage.patchify(jax.numpy.asarray(noise), config.patch))
    scalars = [np.float32(value) for value in (1.0, 0.9, 1000.0, 4.0)]

    def our_step() -> None:
        done = stage.denoise_step(
            ours.weights["transformer"], jax.numpy.asarray(start), condition, *scalars, channels=config.in_channels
        )
        done.block_until_ready()

    def their_prompts() -> list:
        encode = theirs.encode_prompt_multiple_images
        return [encode(prompt=text, images=image, max_sequence_length=4096)[0] for text in (prompt, "")]

    prompts = their_prompts()
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    encoded = theirs.normalize_latents(theirs.vae.encode(pixels).latent_dist.mode())
    items = torch.cat([encoded[:, None], latents], dim=1)

    def their_step() -> None:
        for text in prompts:
            theirs.transformer(items, torch.tensor([1000.0]), text, return_dict=False)

    stages = {
        "prompt": (lambda: editing.encode_prompt(ours, inputs).block_until_ready(), their_prompts),
        "references": (
            lambda: editing.encode_references(ours, inputs).block_until_ready(),
            lambda: theirs.vae.encode(pixels),
        ),
        "step": (our_step, their_step),
        "decode": (
            lambda: editing.decode(ours, inputs, jax.numpy.asarray(start)).block_until_ready(),
            lambda: theirs.vae.decode(encoded),
        ),
        "whole edit": (our_edit, their_edit),
    }
    print(f"\n{'ms':12} {'joyjax':>8} {'(min, median, max)':>17}   {'Diffusers':>8} {'':17}   {'ratio':>7}")
    rows = []
    for name, (our, their) in stages.items():
        paired(our, their, 2)
        rows.append(report(name, *paired(our, their, arguments.pairs)))
    if arguments.json:
        figures = {"versions": versions, "arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
