"""The protocol of a model family, and the values that pass between it and the engine.

A request is planned, prepared, encoded, denoised and finished. `plan` and `prepare` run on the host and put nothing on
a device. `encode` and `finish` use networks through `Networks`, which alone decides what is in memory.
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
from joyjax.options import BASE_SIZES, Option
from joyjax.sampling.guidance import Guidance
from joyjax.sampling.solver import Solver

Configs = Mapping[str, Any]  # the networks' configurations, by component
Task = Literal["edit", "text-to-image", "layers"]


@runtime_checkable
class Guard(Protocol):
    """A safety filter. Where it raises, no pixels leave the engine, previews included."""

    def check_text(self, prompt: str) -> None:
        """Raise JoyJaxError for a prompt that is refused, before anything is computed."""

    def check_pixels(self, media: "Media") -> None:
        """Raise JoyJaxError for a result or a preview that is refused."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a family reads from a checkpoint besides its networks' weights."""

    tokenizer: Any
    processor: Any
    solver: Solver
    configs: Configs
    guard: Guard | None = None


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of a request: (valid, padded). `text` is the longest prompt's; `passes` is 2 with guidance."""

    text: tuple[int, int]
    target: tuple[int, int]
    references: tuple[int, int]
    passes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A planned request: everything that can be decided without pixels. NumPy and tuples, some KB beside the request.

    Attributes:
        request: the request.
        size: frames or layers, height and width of the result, in pixels.
        latents: the shape of the padded latents, `[tokens, channels]`.
        lengths: numbers of tokens, valid and padded.
        shift: mu of a dynamic schedule; None: the scheduler's own shift.
        batch_key: edits with equal keys share a batch and its compiled programs: padded shapes, passes of each step,
            number of steps, cache rule. Never levels, seed or guidance scale.
        encode_key: everything that the condition depends on; requests with equal keys are encoded once.
        base: index of the reference that the result is pasted back into; None without references.
        crops: the part of each reference that is used.
        notes: for the user.
        own: the family's own data.
    """

    request: Request
    size: tuple[int, int, int]
    latents: tuple[int, int]
    lengths: Lengths
    shift: float | None
    batch_key: Hashable
    encode_key: Hashable
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
    """Finished pixels: one picture, or "layers", RGBA and bottom first."""

    pixels: UInt8[np.ndarray, "t h w c"]
    kind: Literal["picture", "layers"] = "picture"


@dataclasses.dataclass(frozen=True)
class StageCost:
    """The cost of a stage for one request: the networks that it uses, and working memory besides their parameters."""

    stage: str
    parts: tuple[str, ...]
    working_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of folders other than Diffusers' that `convert` can read.

    `write_skeleton(folder, target)` writes everything of the Diffusers folder but the weights;
    `open_tensors(folder, component)` returns the tensors of a component under Diffusers' names.
    """

    recognises: Callable[[Path], bool]
    write_skeleton: Callable[[Path, Path], None]
    open_tensors: Callable[[Path, str], Tensors]


@dataclasses.dataclass(frozen=True)
class Published:
    """Sizes of a family's published model in bytes, in bfloat16, so that its fit is known without a download."""

    name: str
    resident_bytes: int
    staged_bytes: int
    working_bytes: int


@runtime_checkable
class Networks(Protocol):
    """The networks of a pipeline. Decides which are in memory."""

    @property
    def mesh(self) -> Mesh | None:
        """The pipeline's mesh."""

    @property
    def configs(self) -> Configs:
        """The networks' configurations."""

    def use(self, part: str) -> contextlib.AbstractContextManager[Weights]:
        """Return a context with a network's weights, which are on the devices until it ends."""


@runtime_checkable
class Events(Protocol):
    """The events of a stage while it runs."""

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a stage."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: plain functions, and the defaults of its reference pipeline.

    Attributes:
        name: shown to users.
        class_names: pipeline classes in model_index.json.
        components: its networks.
        tasks: what it can do.
        references: the fewest and the most pictures of a request; None: any number.
        defaults: the family's defaults of options (joyjax/options.py).
        without: options that this family does not have.
        denoiser: the component that the loop over steps runs.
        published: the published model.
        read: opens tokenizer, processor and solver, and checks that all parts belong to one model.
        plan: cheap, without pixels; raises every user error that needs none. The pipeline's mesh is in force.
        prepare: a plan to host arrays, when its group runs.
        encode: a group to the conditions of its requests, as the denoiser takes them: rows of passes on axis 0.
        guidance: how the two predictions of a request are combined; a batch shares it.
        finish: latents, `[1, T, P]`, to pixels.
        natural_size: default height and width of a result, from those of the last reference and the base size.
        cost: the stages of a request of these lengths.
        usual: the lengths of a typical request at a base size: an edit of one reference, or text to image.
        warmup: arguments of requests that compile every program once, for numbers of references, and long prompts.
        layouts: of folders in the model's own repository.
        picture_mode: of the pictures in a request, "RGB" or "RGBA".
        base_sizes: the choices of the option `base_size`, besides the checkpoint's own.
        hints: advice for errors about an option, by the option's name.
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
    guidance: Callable[[Parts, Request], Guidance]
    finish: Callable[[Networks, Float[np.ndarray, "1 T P"], Plan, Events], Media]
    natural_size: Callable[[Size | None, int], Size]
    cost: Callable[[Configs, Lengths], tuple[StageCost, ...]]
    usual: Callable[[Configs, int], Lengths]
    warmup: Callable[[Parts, Sequence[int] | None, bool], Iterable[Mapping[str, Any]]]
    without: frozenset[str] = frozenset()
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    denoiser: str = "transformer"
    picture_mode: Literal["RGB", "RGBA"] = "RGB"
    base_sizes: tuple[int, ...] = BASE_SIZES

    def has(self, option: Option) -> bool:
        """Return whether the family has an option."""
        return option.name not in self.without if option.every_family else option.name in self.defaults
