"""Moved: import joyjax.config."""

from joyjax.config import read_config  # noqa: F401
