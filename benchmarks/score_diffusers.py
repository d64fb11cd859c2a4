"""The score of the demo model under Diffusers and under joyjax, and the differences of their pictures.

    python benchmarks/score_diffusers.py [--model FOLDER] [--count 64] [--dtype float32|bfloat16]

Both get the same pictures, prompts and noise. Prints one json object.
"""

import argparse
import json

import numpy as np
import torch
from compare import load_diffusers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.joyimage import image_processor
from PIL import Image

import joyjax
from joyjax.convert.source.model import model_folder
from joyjax.media.image import to_pixels
from joyjax.sampling.noise import initial_noise
from joyjax.score import Score, tasks
from joyjax.shapes.draw import render
from joyjax.shapes.judge import Verdict, judge
from joyjax.shapes.scene import SIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()  # joyjax takes the mode
    image_processor.BUCKETS[1024] = [(SIDE, SIDE)]  # Diffusers' setting for the model's native size
    folder = model_folder(arguments.model)
    theirs = load_diffusers(folder, getattr(torch, arguments.dtype))
    theirs.set_progress_bar_config(disable=True)
    ours = joyjax.load(folder, dtype=arguments.dtype)
    steps = arguments.steps or ours.generation_defaults.steps
    scale = ours.generation_defaults.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale

    verdicts: dict[str, dict[str, list[Verdict]]] = {"joyjax": {}, "diffusers": {}}
    largest, shares, disagree = [], [], 0
    for kind, task in tasks(arguments.count, arguments.seed):
        source = Image.fromarray(render(task.pair.source))
        noise = initial_noise(task.seed, (to_pixels(source)[None],), (1, SIDE // 8, SIDE // 8, 16))
        latents = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])[:, None]
        result = theirs(
            image=source, prompt=task.prompt, num_inference_steps=steps, guidance_scale=scale, latents=latents
        )
        pictures = {
            "joyjax": joyjax.edit(ours, source, task.prompt, seed=task.seed, steps=steps, guidance_scale=scale).image,
            "diffusers": result.images[0],
        }
        arrays = {name: np.asarray(picture) for name, picture in pictures.items()}
        for name, array in arrays.items():
            verdicts[name].setdefault(kind, []).append(judge(task.pair, array))
        off = np.abs(arrays["joyjax"].astype(int) - arrays["diffusers"].astype(int))
        largest.append(int(off.max()))
        shares.append(float(np.mean(off > 0)))
        last = [verdicts[name][kind][-1] for name in verdicts]
        disagree += (last[0].pixel, last[0].strict) != (last[1].pixel, last[1].strict)
    scores = {
        name: Score({kind: tuple(group) for kind, group in groups.items()}).as_dict()["all"]
        for name, groups in verdicts.items()
    }
    summary = {
        "edits": arguments.count,
        "dtype": arguments.dtype,
        "steps": steps,
        "guidance_scale": scale,
        "largest difference of 255": max(largest),
        "median of the largest differences": float(np.median(largest)),
        "share of values that differ": float(np.mean(shares)),
        "edits judged differently": disagree,
        **scores,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
