"""Edits in Diffusers, whole and stage by stage, by family: the other side of benchmarks/edit.py."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Call = Callable[[], object]
PROMPT = "replace the wooden table on the left by a round one of dark marble"
STAGES = ("prompt", "references", "step", "decode", "whole edit")


def inputs(side: int) -> tuple[Image.Image, np.ndarray]:
    """Return a picture and noise for a result of its size."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8))
    return image, rng.standard_normal((1, side // 8, side // 8, 16)).astype(np.float32)


class JoyImage:
    """JoyImage-Edit, eager or under torch.compile."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, *, compiled: bool):
        import torch
        from compare import load_diffusers
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.pipelines.joyimage import image_processor

        torch.set_grad_enabled(False)
        torch.set_num_threads(arguments.threads)
        DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
        image_processor.BUCKETS[1024] = [(arguments.size, arguments.size)]
        dtype = getattr(torch, arguments.dtype)
        self.pipeline = load_diffusers(folder, dtype)
        if compiled:
            compile_networks(self.pipeline)
        self.steps = arguments.steps
        self.image, noise = inputs(arguments.size)
        self.noise = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])[:, None].to(dtype)
        self.pixels = pixels_of(self.image).to(dtype)
        self.texts = self.prompts()
        self.encoded = self.pipeline.normalize_latents(self.references().latent_dist.mode())
        self.items = torch.cat([self.encoded[:, None], self.noise], dim=1)
        self.time = torch.tensor([1000.0])

    @staticmethod
    def save(folder: Path) -> Path:
        import random_checkpoint

        return random_checkpoint.save(random_checkpoint.make_pipeline("small"), folder)

    @staticmethod
    def options(side: int) -> dict[str, Any]:
        """Return the options of `joyjax.edit` for a picture and a result of these sides."""
        return {"exact_size": True}

    def edit(self) -> np.ndarray:
        result = self.pipeline(image=self.image, prompt=PROMPT, num_inference_steps=self.steps, latents=self.noise)
        return np.asarray(result.images[0])

    def prompts(self) -> list[Any]:
        encode = self.pipeline.encode_prompt_multiple_images
        return [encode(prompt=text, images=self.image, max_sequence_length=4096)[0] for text in (PROMPT, "")]

    def references(self) -> Any:
        return self.pipeline.vae.encode(self.pixels)

    def step(self) -> None:
        for text in self.texts:
            self.pipeline.transformer(self.items, self.time, text, return_dict=False)

    def decode(self) -> None:
        self.pipeline.vae.decode(self.encoded)

    def stages(self) -> dict[str, Call]:
        return stages(self)


class QwenImageEdit:
    """Qwen-Image-Edit, eager or under torch.compile."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, *, compiled: bool):
        import torch
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
        from qwen_pairs import channel_first, load_reference

        from joyjax.layers.patch import patchify

        torch.set_grad_enabled(False)
        torch.set_num_threads(arguments.threads)
        side = arguments.size
        pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (side, side, None)
        self.pipeline = load_reference(folder, arguments.dtype)
        dtype = self.pipeline.transformer.dtype
        if compiled:
            compile_networks(self.pipeline)
        self.steps, self.side = arguments.steps, side
        self.image, noise = inputs(side)
        self.noise = torch.from_numpy(channel_first(patchify(noise, (2, 2)))).to(dtype)
        self.pixels = pixels_of(self.image).to(dtype)
        self.texts = self.prompts()
        self.encoded = self.references().latent_dist.mode()
        self.tokens = torch.cat([self.noise, self.noise], dim=1)
        self.time = torch.tensor([0.9]).to(dtype)
        self.grids = [[(1, side // 16, side // 16)] * 2]

    @staticmethod
    def save(folder: Path) -> Path:
        import qwen_checkpoint

        return qwen_checkpoint.save(qwen_checkpoint.make_edit_pipeline(sizes=qwen_checkpoint.SMALL), folder)

    @staticmethod
    def options(side: int) -> dict[str, Any]:
        """Return the options of `joyjax.edit` for a picture and a result of these sides."""
        return {"base_size": side}

    def edit(self) -> np.ndarray:
        options = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": self.steps}
        sizes = {"height": self.side, "width": self.side}
        result = self.pipeline(self.image, PROMPT, latents=self.noise, **sizes, **options)
        return np.asarray(result.images[0])

    def prompts(self) -> list[Any]:
        return [self.pipeline.encode_prompt(image=self.image, prompt=text) for text in (PROMPT, " ")]

    def references(self) -> Any:
        return self.pipeline.vae.encode(self.pixels)

    def step(self) -> None:
        for states, mask in self.texts:
            self.pipeline.transformer(
                hidden_states=self.tokens,
                timestep=self.time,
                encoder_hidden_states=states,
                encoder_hidden_states_mask=mask,
                img_shapes=self.grids,
                return_dict=False,
            )

    def decode(self) -> None:
        self.pipeline.vae.decode(self.encoded)

    def stages(self) -> dict[str, Call]:
        return stages(self)


def stages(peer: Any) -> dict[str, Call]:
    """Return the calls of a peer by stage."""
    calls = (peer.prompts, peer.references, peer.step, peer.decode, peer.edit)
    return dict(zip(STAGES, calls, strict=True))


def pixels_of(image: Image.Image) -> Any:
    """Return a picture as the autoencoders take it, in float32."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1


def compile_networks(pipeline: Any) -> None:
    """Compile the networks with torch.compile."""
    for network in (pipeline.transformer, pipeline.text_encoder, pipeline.vae.encoder, pipeline.vae.decoder):
        network.compile()


PEERS: dict[str, Any] = {"joyimage": JoyImage, "qwen-image-edit": QwenImageEdit}
