"""What a model family says of itself, and what passes between it and the engine.

A request is planned, prepared, encoded, denoised and finished. `plan` and `prepare` are the host's: nothing of them is
on a device. `encode` and `finish` use networks through `Networks`, which alone decides what is in memory.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from joyjax.convert.component import Component
from joyjax.convert.safetensors import Tensors
from joyjax.families.request import Request
from joyjax.layers.weights import Weights
from joyjax.media.framing import Crop
from joyjax.media.image import Size
from joyjax.options import Option
from joyjax.sampling.guidance import Guidance
from joyjax.sampling.solver import Solver

Configs = Mapping[str, Any]  # the networks' configurations, by component
Task = Literal["edit", "text-to-image"]


@runtime_checkable
class Guard(Protocol):
    """Refuses what must not be made. Where it raises, no pixels leave the engine, previews included."""

    def check_text(self, prompt: str) -> None:
        """Raise JoyJaxError for a prompt that is refused, before anything is computed."""

    def check_pixels(self, media: "Media") -> None:
        """Raise JoyJaxError for a result or a preview that is refused."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a family reads of a checkpoint besides its networks' weights."""

    tokenizer: Any
    processor: Any
    solver: Solver
    configs: Configs
    guard: Guard | None = None


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a request: valid and padded. `text` is the longest prompt's; `passes` is 2 with guidance."""

    text: tuple[int, int]
    target: tuple[int, int]
    references: tuple[int, int]
    passes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request with everything decided that needs no pixels: NumPy and tuples, some KB beside the request.

    Attributes:
        request: what is planned.
        size: frames, height and width of the result, in pixels.
        latents: the shape of the padded latents, `[tokens, numbers]`.
        lengths: tokens, valid and padded.
        shift: mu of a dynamic schedule; None: the scheduler's own.
        batch_key: what edits of one batch have in common, which is what its programs are compiled for: padded shapes,
            passes of each step, number of steps, cache rule. Never levels, seed or guidance scale.
        encode_key: all but seed and noise; requests that have it alike are encoded once.
        base: the reference that the result goes back into; None without references.
        crops: what was kept of each reference.
        notes: for the user.
        own: the family's.
    """

    request: Request
    size: tuple[int, int, int]
    latents: tuple[int, int]
    lengths: Lengths
    shift: float | None
    batch_key: Hashable
    encode_key: Any
    base: int | None
    crops: tuple[Crop, ...]
    notes: tuple[str, ...]
    own: Any


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A prepared request: the noise as padded tokens, and the family's own arrays, all on the host."""

    plan: Plan
    noise: Float[np.ndarray, "1 T P"]
    own: Any


@dataclasses.dataclass(frozen=True)
class Media:
    """Finished pixels."""

    pixels: UInt8[np.ndarray, "t h w c"]
    kind: Literal["picture"] = "picture"


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What a stage of one request needs: networks that it uses, and working memory besides their parameters."""

    stage: str
    parts: tuple[str, ...]
    working_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder that is no Diffusers folder and can be converted as if it were.

    `write_skeleton(folder, target)` writes everything of the Diffusers folder but the weights;
    `open_tensors(folder, component)` gives the tensors of a component under Diffusers' names.
    """

    recognises: Callable[[Path], bool]
    write_skeleton: Callable[[Path, Path], None]
    open_tensors: Callable[[Path, str], Tensors]


@dataclasses.dataclass(frozen=True)
class Published:
    """The real model of a family, so that nothing need be fetched to say whether it fits: bytes in bfloat16."""

    name: str
    resident_bytes: int
    staged_bytes: int
    working_bytes: int


@runtime_checkable
class Networks(Protocol):
    """The networks of a pipeline. What is in memory is decided here."""

    @property
    def mesh(self) -> Mesh | None:
        """The pipeline's mesh."""

    @property
    def configs(self) -> Configs:
        """The networks' configurations."""

    def use(self, part: str) -> contextlib.AbstractContextManager[Weights]:
        """Give a network's weights, on the devices for as long as the context lasts."""


@runtime_checkable
class Events(Protocol):
    """What a stage tells while it works."""

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a stage."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: plain functions, and the defaults of its reference pipeline.

    Attributes:
        name: as users know it.
        class_names: of model_index.json.
        components: its networks.
        tasks: what it does.
        references: the fewest and the most pictures of a request; None: any number.
        defaults: the family's own of options that a request leaves out (joyjax/options.py).
        without: options that this family does not have.
        denoiser: the component that the loop over steps runs.
        published: the real model.
        read: opens tokenizer, processor and solver, and checks that all parts are of one model.
        plan: cheap, without pixels; raises every error of a user's that needs none. The pipeline's mesh is in force.
        prepare: a plan to arrays, when its group's turn comes.
        encode: a group to the conditions of its requests, as the denoiser takes them: rows of passes on axis 0.
        guidance: how both predictions are put together.
        finish: latents, `[1, T, P]`, to pixels.
        natural_size: height and width of a result where none are given, from those of the last reference and base size.
        cost: the stages of a request of such lengths.
        usual: the lengths of an edit of one reference, or of a picture from words, at a base size.
        warmup: arguments of requests that compile every program once, for numbers of references, with long prompts too.
        layouts: of folders of the model's own repository.
        hints: what to do where an option cannot be given as it was, by the option.
    """

    name: str
    class_names: tuple[str, ...]
    components: tuple[Component, ...]
    tasks: frozenset[Task]
    references: tuple[int, int | None]
    defaults: Mapping[str, Any]
    published: Published
    read: Callable[[Path, Configs], Parts]
    plan: Callable[[Request, Parts], Plan]
    prepare: Callable[[Plan, Parts], Arrays]
    encode: Callable[[Networks, Sequence[Arrays], Events], list[Any]]
    guidance: Callable[[Parts], Guidance]
    finish: Callable[[Networks, Float[np.ndarray, "1 T P"], Plan, Events], Media]
    natural_size: Callable[[Size | None, int], Size]
    cost: Callable[[Configs, Lengths], tuple[StageCost, ...]]
    usual: Callable[[Configs, int], Lengths]
    warmup: Callable[[Parts, Sequence[int] | None, bool], Iterable[Mapping[str, Any]]]
    without: frozenset[str] = frozenset()
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    denoiser: str = "transformer"
    picture_mode: str = "RGB"

    def has(self, option: Option) -> bool:
        """Say whether the family has an option."""
        return option.name not in self.without if option.every_family else option.name in self.defaults
