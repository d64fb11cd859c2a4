"""The noise that an edit starts from, fixed by its seed and its references."""

import hashlib
from collections.abc import Sequence

import numpy as np

NOISE_RULE = 1  # stored in recipes: the same rule, seed and references always give the same noise


def initial_noise(seed: int, references: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 noise that depends on the arguments only.

    `references` are the pictures as the model sees them (uint8). They are part of the key because editing a picture
    with the noise that generated it spoils the result, and a chain of edits with the default seed would do that.
    Drawn on the host by a counter-based generator, so it is the same for any device, batch and mesh.
    """
    digest = hashlib.sha256(f"joyjax noise {NOISE_RULE}, seed {seed}".encode())
    for picture in references:
        digest.update(str(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).tobytes())
    key = np.frombuffer(digest.digest()[:16], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)
