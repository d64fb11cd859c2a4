"""Domains of demo checkpoints: the inputs that they were trained on, named in joyjax.json."""

import dataclasses
from collections.abc import Callable

from PIL import Image


@dataclasses.dataclass(frozen=True)
class Domain:
    """`about`: one line on what the model can do. `advice`: notes on a prompt and pictures outside the domain."""

    about: str
    advice: Callable[[str, tuple[Image.Image, ...]], list[str]]


def domain_of(name: str | None) -> Domain | None:
    """Return the domain of that name, one of `DOMAINS` of convert/generation_defaults.py; None for None."""
    if name is None:
        return None
    from joyjax.shapes import advice  # only the demo needs it

    return Domain(advice.ABOUT, advice.advice)
