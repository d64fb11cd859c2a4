"""The noise levels of flow matching and the Euler step between them.

A latent at level sigma is `(1 - sigma)·data + sigma·noise`; the network predicts `noise - data` (Lipman et al., 2023).
Levels are worked out on the host, in the reference's precision, so that they agree to the last bit.
Source: FlowMatchEulerDiscreteScheduler in Diffusers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from joyjax.config import read_config
from joyjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What joyjax reads of scheduler_config.json."""

    shift: float
    num_train_timesteps: int

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], where: str = "scheduler_config.json") -> "ScheduleConfig":
        """Read the json object; raises ConfigError for another kind of schedule."""
        off = (False, None)
        switches = (
            *("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
            *("invert_sigmas", "stochastic_sampling"),
        )
        fixed = {"_class_name": ("FlowMatchEulerDiscreteScheduler",), **dict.fromkeys(switches, off)}
        config = read_config(
            cls,
            raw,
            where=where,
            fixed={**fixed, "shift_terminal": (None,)},
            # read only where shifting is dynamic
            ignored=("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
        )
        if config.shift <= 0 or config.num_train_timesteps < 1:
            raise ConfigError(f"{where}: shift {config.shift} and num_train_timesteps must be positive")
        return config


def sigmas(
    steps: int, config: ScheduleConfig, given: Sequence[float] | None = None, mu: float | None = None
) -> np.ndarray:
    """Return `steps` falling levels from 1 and a final 0, float32; or `given` ones, shifted, and a final 0.

    Where none are given, the lowest level is shifted twice, once when the range is set and once with all the others;
    the model was trained and is used that way.
    """
    lowest = np.float32(1) / np.float32(config.num_train_timesteps)
    shift = np.float32(config.shift)
    lowest = shift * lowest / (np.float32(1) + (shift - np.float32(1)) * lowest)
    scale = config.num_train_timesteps
    levels = np.linspace(1.0 * scale, float(lowest) * scale, steps) / scale
    if given is not None:
        levels = np.asarray(given, np.float32)
    levels = config.shift * levels / (1 + (config.shift - 1) * levels)
    return np.append(levels.astype(np.float32), np.float32(0))


def timesteps(levels: np.ndarray, config: ScheduleConfig) -> np.ndarray:
    """Return the time that the network is told at each level, float32: the level times 1000."""
    return levels * np.float32(config.num_train_timesteps)


def euler_step(
    latents: Float[Array, "b T P"],
    velocity: Float[Array, "b T P"],
    sigma: Float[Array, "..."],
    sigma_next: Float[Array, "..."],
) -> Float[Array, "b T P"]:
    """Move the latents from `sigma` to `sigma_next` along the predicted velocity; everything is float32."""
    return latents + (sigma_next - sigma) * velocity
