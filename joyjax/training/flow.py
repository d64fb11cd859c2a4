"""Flow matching: text encoder and transformer learn the velocity noise - data (Lipman et al., 2023)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, UInt8

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.families.family import Parts
from joyjax.families.joyimage_prompt import DROPPED
from joyjax.families.joyimage_stages import item_positions
from joyjax.layers.condition import Condition
from joyjax.layers.decoder import TextInputs
from joyjax.models.qwen3_vl import Qwen3VL
from joyjax.models.qwen3_vl_vision import VisionInputs, patch_positions
from joyjax.processors.vision import VisionProcessorConfig
from joyjax.training.dataset import Batch
from joyjax.training.optimizer import Parameters
from joyjax.training.run import Loss, cast

COMPONENTS = {"text_encoder": TEXT_ENCODER, "transformer": TRANSFORMER}
TIMESTEPS = 1000  # the network's time is 1000·sigma


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The recipe of the loss.

    `shift` moves the noise levels towards noise, σ = s·u / (1 + (s − 1)·u), where an edit is decided. `change_weight`
    is added to the weight of tokens that differ between reference and target, which are few.
    """

    shift: float = 6.0
    change_weight: float = 4.0


def make_loss(config: FlowConfig, parts: Parts, dtype: DTypeLike, text: int) -> Loss:
    """Return the loss of a batch; `text` is the number of the prompt's hidden states for the transformer."""
    abstract = {name: part.abstract(parts.configs[name], dtype) for name, part in COMPONENTS.items()}

    def loss(parameters: Parameters, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        networks = {name: cast(split(parameters, name), abstract[name]).module() for name in COMPONENTS}
        condition = make_condition(networks["text_encoder"], parts, batch, text)
        keys = jax.random.split(key)
        uniform = jax.random.uniform(keys[0], (len(batch.targets),))
        sigma = config.shift * uniform / (1 + (config.shift - 1) * uniform)
        noise = jax.random.normal(keys[1], batch.targets.shape)
        noisy = (1 - sigma[:, None, None]) * batch.targets + sigma[:, None, None] * noise
        velocity = networks["transformer"](noisy, TIMESTEPS * sigma, condition)
        error = jnp.mean((velocity - (noise - batch.targets)) ** 2, axis=-1)
        change = jnp.minimum(1, 4 * jnp.mean(jnp.abs(batch.targets - batch.sources), axis=-1))
        weight = 1 + config.change_weight * change * (1 - batch.dropped[:, None])
        total = jnp.mean(weight * error)
        changed = change > 0.5
        metrics = {
            "loss": total,
            "error": jnp.mean(error),
            "error_changed": jnp.sum(error, where=changed) / jnp.maximum(1, jnp.sum(changed, dtype=jnp.float32)),
            "error_kept": jnp.sum(error, where=~changed) / jnp.maximum(1, jnp.sum(~changed, dtype=jnp.float32)),
        }
        return total, metrics

    return loss


def make_condition(text_encoder: Qwen3VL, parts: Parts, batch: Batch, text: int) -> Condition:
    """Return the transformer's condition for each edit, with `text` hidden states of the prompt."""
    rows, tokens = batch.targets.shape[:2]
    grid = round(tokens**0.5)
    positions = np.concatenate([item_positions(item, grid, grid) for item in range(2)])  # the target, its reference
    vision = vision_inputs(batch.pictures, parts)
    hidden = text_encoder(TextInputs(batch.ids, batch.positions, batch.image_token_index), vision)
    return Condition(
        txt=hidden[:, DROPPED : DROPPED + text],
        txt_lengths=batch.lengths,
        references=batch.sources,
        positions=jnp.broadcast_to(jnp.asarray(positions), (rows, 2 * tokens, 3)),
    )


def split(parameters: Parameters, name: str) -> Parameters:
    """Return the parameters of one component, without its name as prefix."""
    return {path.removeprefix(name + "."): value for path, value in parameters.items() if path.startswith(name + ".")}


def vision_inputs(pictures: UInt8[Array, "B h w 3"], parts: Parts) -> VisionInputs:
    """Compute the result of `joyjax.processors.vision` for pictures without resizing, on the device."""
    config: VisionProcessorConfig = parts.processor
    tower = parts.configs["text_encoder"].vision
    patch, merge, frames = config.patch_size, config.merge_size, config.temporal_patch_size
    rows, height, width, channels = pictures.shape
    grid = height // patch, width // patch
    mean, std = (jnp.asarray(values, jnp.float32) for values in (config.image_mean, config.image_std))
    unit = (pictures.astype(jnp.float32) / 255 - mean) / std
    unit = unit.reshape(rows, grid[0] // merge, merge, patch, grid[1] // merge, merge, patch, channels)
    patches = unit.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(rows, grid[0] * grid[1], channels, 1, patch * patch)
    patches = jnp.repeat(patches, frames, axis=3).reshape(rows, grid[0] * grid[1], -1)
    located = [jnp.asarray(array) for array in patch_positions(*grid, tower)]
    positions, taps, weights = (jnp.broadcast_to(array, (rows, *array.shape)) for array in located)
    lengths = jnp.full((rows,), grid[0] * grid[1], jnp.int32)
    return VisionInputs(patches=patches, positions=positions, taps=taps, weights=weights, lengths=lengths)
