"""Domains: the small worlds that demo checkpoints know, named in their joyjax.json."""

import dataclasses
from collections.abc import Callable

from PIL import Image


@dataclasses.dataclass(frozen=True)
class Domain:
    """`about` says in one line what the model can do; `advice` gives notes on a prompt and pictures that leave it."""

    about: str
    advice: Callable[[str, tuple[Image.Image, ...]], list[str]]


def domain_of(name: str | None) -> Domain | None:
    """Return the domain of that name, one of `DOMAINS` of convert/generation_defaults.py; None for None."""
    if name is None:
        return None
    from joyjax.shapes import advice  # only the demo needs it

    return Domain(advice.ABOUT, advice.advice)
