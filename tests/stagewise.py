"""Runs a request stage by stage, each stage on first use."""

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

import joyjax
from joyjax.families import encoding
from joyjax.families.family import Arrays, Plan
from joyjax.families.request import Request
from joyjax.runtime.engine import Engine
from joyjax.runtime.job import Clock
from joyjax.runtime.networks import Networks


def stages_of(pipeline: joyjax.Pipeline) -> Any:
    """The module of the family's stages."""
    return importlib.import_module(pipeline.family.prepare.__module__)


class Stages:
    def __init__(self, pipeline: joyjax.Pipeline, request: Request):
        self.pipeline, self.request = pipeline, request
        self.networks = Networks.of(pipeline)

    @functools.cached_property
    def plan(self) -> Plan:
        return self.pipeline.family.plan(self.request, self.pipeline.parts)

    @functools.cached_property
    def arrays(self) -> Arrays:
        return self.pipeline.family.prepare(self.plan, self.pipeline.parts)

    @functools.cached_property
    def txt(self) -> Any:
        return encoding.encode_text(self.networks, self.arrays)

    @functools.cached_property
    def references(self) -> Any:
        return encoding.encode_references(self.networks, self.arrays)

    @functools.cached_property
    def condition(self) -> Any:
        return stages_of(self.pipeline).condition(self.arrays, self.txt, self.references)

    @functools.cached_property
    def latents(self) -> np.ndarray:
        """The target's tokens after the last step, without padding."""
        engine = Engine(self.pipeline)
        job = engine.plan(self.request)
        found, _ = engine._denoise([job], [self.arrays], [self.condition])
        return found[:, : self.plan.lengths.target[0]]

    @functools.cached_property
    def picture(self) -> np.ndarray:
        return self.decode(self.latents)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The pixels, `[1, h, w, 3]`, of latents."""
        return self.pipeline.family.finish(self.networks, np.asarray(latents), self.plan, Clock()).pixels

    @property
    def noise(self) -> Any:
        """The noise as tokens, with padding."""
        return jnp.asarray(self.arrays.noise)


def inputs_of(pipeline: joyjax.Pipeline, request: Request) -> SimpleNamespace:
    """The prepared inputs of a request, in one flat namespace."""
    stages = Stages(pipeline, request)
    plan, own = stages.plan, stages.arrays.own
    return SimpleNamespace(
        plan=plan,
        height=plan.size[1],
        width=plan.size[2],
        crops=plan.crops,
        noise=stages.arrays.noise,
        first=np.array(plan.own.text.first),
        prompt_lengths=np.array(plan.own.text.lengths),
        **vars(own),
    )
