"""The error of the autoencoder's tiled and patch modes against the exact one, on the demo model.

    python benchmarks/vae_modes.py

Pictures are mosaics of the demo's scenes, larger than a tile, on eight simulated devices. PSNR and the largest
difference are those of decoded pixels, with the mode in encoding, decoding or both.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import joyjax
from joyjax.layers.patch import pixels_to_unit
from joyjax.layers.weights import Weights
from joyjax.models.autoencoder.tiling import Mode
from joyjax.shapes.draw import render
from joyjax.shapes.scene import random_scene
from joyjax.sharding.mesh import check_mesh
from joyjax.sharding.place import replicate

ROWS, COLUMNS, PICTURES = 4, 3, 4  # scenes in a mosaic: 512 × 384 pixels


def mosaic(rng: np.random.Generator) -> np.ndarray:
    """Return a picture made of scenes."""
    return np.concatenate(
        [np.concatenate([render(random_scene(rng)) for _ in range(COLUMNS)], axis=1) for _ in range(ROWS)]
    )


@functools.partial(jax.jit, static_argnames=("encode", "decode"))
def round_trip(vae: Weights, pictures: jax.Array, encode: Mode, decode: Mode) -> jax.Array:
    """Return pixels from 0 to 255 after encoding and decoding."""
    network = vae.module()
    latents = network.encode(pixels_to_unit(pictures), encode)
    return (network.decode(latents, decode) / 2 + 0.5) * 255


def main() -> None:
    """Print one JSON line for each mode."""
    jax.config.update("jax_num_cpu_devices", 8)
    rng = np.random.default_rng(0)
    pictures = jnp.asarray(np.stack([mosaic(rng) for _ in range(PICTURES)]))
    vae = joyjax.load(dtype="float32").weights["vae"]
    exact = np.asarray(round_trip(vae, pictures, "exact", "exact"))
    mesh = check_mesh(Mesh(np.asarray(jax.devices()), ("sequence",)))
    vae, pictures = replicate((vae, pictures), mesh)
    for mode in ("exact", "tiled", "patch", "auto"):
        for half, modes in {"encode": (mode, "exact"), "decode": ("exact", mode), "both": (mode, mode)}.items():
            with jax.set_mesh(mesh):
                error = np.asarray(round_trip(vae, pictures, *modes)) - exact
            psnr = float(10 * np.log10(255**2 / max(float(np.mean(error**2)), 1e-12)))
            row = {"mode": mode, "half": half, "psnr": round(psnr, 1), "largest": round(float(np.abs(error).max()), 3)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
