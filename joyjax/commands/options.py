"""Choices that several commands offer, and the folders that they write into."""

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from joyjax.errors import RequestError


class DType(enum.StrEnum):
    """Of parameters and matrix products."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Linear(enum.StrEnum):
    """How the transformer's linear maps are stored and multiplied."""

    EXACT = "exact"
    FLOAT8 = "float8"


class BaseSize(enum.StrEnum):
    """The published bucket tables, by the side of their square."""

    P256 = "256"
    P512 = "512"
    P768 = "768"
    P1024 = "1024"


class Fit(enum.StrEnum):
    """How pictures come to their size."""

    CROP = "crop"
    PAD = "pad"


class VAEMode(enum.StrEnum):
    """How the autoencoder goes over a picture."""

    EXACT = "exact"
    TILED = "tiled"
    PATCH = "patch"
    AUTO = "auto"


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Folder or hub id, as for edit.  [default: the demo]"),
]
Steps = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1000, help="Denoising steps.  [default: the model's own]"),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(metavar="X", help="Strength of guidance; 1 or less: none.  [default: the model's own]"),
]
MeshAxes = Annotated[str | None, typer.Option(help="Split over devices, as in tensor=4.", metavar="AXES")]
LINEAR = typer.Option(
    "--quantize",
    "--linear",
    help="The transformer's linear maps: `float8` halves their memory; an approximation: docs/speed.md.  "
    "[default: as the model has them]",
    show_default=False,
)
Linears = Annotated[Linear | None, LINEAR]
GUIDANCE_UNTIL = typer.Option(
    metavar="X",
    help="Share of the steps, the first ones, that have guidance; below 1 an approximation.  [default: 1]",
    show_default=False,
)
GuidanceUntil = Annotated[float, GUIDANCE_UNTIL]
VAE_ENCODE = typer.Option(help="How pictures become latents; all but `exact` are approximations.  [default: exact]")
VAE_DECODE = typer.Option(
    help="How latents become a picture; all but `exact` are approximations, and `tiled` needs the least memory.  "
    "[default: exact]"
)
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="X",
        help="Leave out blocks that change less than this, as in 0.1; an approximation: docs/speed.md.",
    ),
]

AllowPrivateURLs = Annotated[
    bool,
    typer.Option(
        "--allow-private-urls",
        help="Fetch pictures by URL from private and loopback addresses too: your own network, or this machine.",
    ),
]


def make_folder(option: str, folder: Path) -> None:
    """Make a folder for results unless it is there.

    Raises:
        RequestError: naming the option, if it is no folder, or cannot be made or written into.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{option} is {folder}, which is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{option} is {folder}, which cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{option} is {folder}, which is not writable; name another folder")
