"""The noise levels of flow matching.

A latent at level sigma is `(1 - sigma)·data + sigma·noise`; the network predicts `noise - data` (Lipman et al., 2023).
Levels are computed on the host, in the reference's precision, so that they agree bit by bit.
Source: FlowMatchEulerDiscreteScheduler in Diffusers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from joyjax.config import read_config
from joyjax.errors import ConfigError

# The keys that apply only where `use_dynamic_shifting` is true.
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
LARGEST_SHIFT = 20.0
LARGEST_MU = 80.0  # e^80 is near the largest float32; levels saturate at 0 and 1 far below it


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The keys of scheduler_config.json that joyjax reads.

    `shift` is used for every picture, unless shifting is dynamic: then it depends on the number of target tokens
    (`mu`). `shift_terminal` is the lowest level before 0, to which the others are stretched; 0: no stretch.
    """

    shift: float
    num_train_timesteps: int
    shift_terminal: float = 0.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.0
    max_shift: float = 0.0
    base_image_seq_len: int = 0
    max_image_seq_len: int = 0
    time_shift_type: str = "exponential"

    @classmethod
    def from_diffusers(
        cls, raw: Mapping[str, Any], where: str = "scheduler_config.json", *, dynamic: bool = False
    ) -> "ScheduleConfig":
        """Read the json object; raises ConfigError for another kind of schedule.

        `dynamic`: the family supports dynamic shifting; otherwise `use_dynamic_shifting` must be off.
        """
        off = (False, None)
        switches = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
        optional: dict[str, Any] = {"shift_terminal": 0.0, "use_dynamic_shifting": False}
        if not raw.get("use_dynamic_shifting"):
            raw = {key: value for key, value in raw.items() if key not in DYNAMIC}
            optional |= {field.name: field.default for field in dataclasses.fields(cls) if field.name in DYNAMIC}
        config = read_config(
            cls,
            raw,
            where=where,
            fixed={
                "_class_name": ("FlowMatchEulerDiscreteScheduler",),
                **({} if dynamic else {"use_dynamic_shifting": off}),
                **dict.fromkeys((*switches, "stochastic_sampling"), off),
                "time_shift_type": ("exponential", "linear"),
            },
            optional=optional,
        )
        if config.shift <= 0 or config.num_train_timesteps < 1:
            raise ConfigError(f"{where}: shift {config.shift} and num_train_timesteps must be positive")
        if not 0 <= config.shift_terminal < 1:
            raise ConfigError(
                f"{where}: shift_terminal is {config.shift_terminal}; expected null, or a level from 0 to below 1"
            )
        if config.use_dynamic_shifting:
            config._check_dynamic(where)
        return config

    def _check_dynamic(self, where: str) -> None:
        lowest = 0.0 if self.time_shift_type == "linear" else -LARGEST_SHIFT
        if not all(lowest < shift < LARGEST_SHIFT for shift in (self.base_shift, self.max_shift)):
            raise ConfigError(
                f"{where}: base_shift is {self.base_shift} and max_shift is {self.max_shift}; expected numbers between "
                f"{lowest:g} and {LARGEST_SHIFT:g}"
            )
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ConfigError(
                f"{where}: base_image_seq_len and max_image_seq_len are both {self.base_image_seq_len}; expected two "
                "numbers of tokens, each with its own shift"
            )

    def mu(self, tokens: int) -> float | None:
        """Return the shift for a number of target tokens, linear in it through the two points of the config.

        None where shifting is not dynamic. Source: `calculate_shift` in Diffusers.
        """
        if not self.use_dynamic_shifting:
            return None
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


def even_levels(steps: int) -> np.ndarray:
    """Return even levels 1, …, 1/steps before the shift, as pipelines with a dynamic schedule use."""
    return np.linspace(1.0, 1 / steps, steps)


def sigmas(
    steps: int, config: ScheduleConfig, given: Sequence[float] | np.ndarray | None = None, *, mu: float | None = None
) -> np.ndarray:
    """Return `steps` descending levels from 1 and a final 0, float32; or the `given` ones, shifted, and a final 0.

    Where none are given and shifting is not dynamic, the lowest level is shifted twice, once when the range is set and
    once with all the others, as in the reference. A dynamic schedule needs `mu`, the result of `ScheduleConfig.mu`.
    """
    lowest = np.float32(1) / np.float32(config.num_train_timesteps)
    if not config.use_dynamic_shifting:
        lowest = _shifted(lowest, np.float32(config.shift))
    scale = config.num_train_timesteps
    levels = np.linspace(1.0 * scale, float(lowest) * scale, steps) / scale
    if given is not None:
        levels = np.asarray(given, np.float32)
    if not config.use_dynamic_shifting:
        levels = _shifted(levels, config.shift)
    elif mu is None:
        raise ValueError("this schedule shifts by the number of tokens; give `mu`")
    else:
        weight = mu
        if config.time_shift_type == "exponential":
            weight = math.exp(min(max(mu, -LARGEST_MU), LARGEST_MU))
        levels = weight / (weight + (1 / levels - 1))
    if config.shift_terminal and levels[-1] < 1:  # a single level stays 1, where the reference divides 0 by 0
        rest = 1 - levels
        levels = 1 - rest / (rest[-1] / (1 - config.shift_terminal))
    return np.append(levels.astype(np.float32), np.float32(0))


def _shifted(levels: Any, shift: Any) -> Any:
    return shift * levels / (1 + (shift - 1) * levels)


def timesteps(levels: np.ndarray, config: ScheduleConfig) -> np.ndarray:
    """Return the network's timestep at each level, float32: the level times `num_train_timesteps`."""
    return levels * np.float32(config.num_train_timesteps)
