"""Choices that several commands offer."""

import enum


class DType(enum.StrEnum):
    """Of parameters and matrix products."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class BaseSize(enum.StrEnum):
    """The published bucket tables, by the side of their square."""

    P256 = "256"
    P512 = "512"
    P768 = "768"
    P1024 = "1024"


class VAEMode(enum.StrEnum):
    """How the autoencoder goes over a picture."""

    EXACT = "exact"
    TILED = "tiled"
    PATCH = "patch"
    AUTO = "auto"
