"""The engine: requests in, jobs out.

    submit: plan each request on the host; nothing is on a device yet
    run:    group jobs by batch key → prepare a group → encode it → denoise it → finish each

All networks are used through `Networks`. One thread owns the devices: the one that runs the engine.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from joyjax.errors import JoyJaxError, RequestError
from joyjax.families.family import Arrays, Media, Plan
from joyjax.families.request import Request
from joyjax.kernels.choice import PLAIN, Kernels
from joyjax.media.dropped import dropped
from joyjax.media.framing import pasted_region
from joyjax.runtime.job import Callback, Clock, Job, StepEvent
from joyjax.runtime.load import Pipeline
from joyjax.runtime.networks import Networks
from joyjax.runtime.profile import profiled
from joyjax.runtime.result import make_result, shown
from joyjax.sampling.loop import Step, denoise
from joyjax.sampling.rows import stack_conditions
from joyjax.sampling.solver import Levels
from joyjax.sharding.hosts import peer_loss_as_error
from joyjax.sharding.place import replicate


class Engine:
    """Runs requests on a pipeline.

    `batch_size`: the most edits that are denoised together; None: no limit. `isolate`: an error ends only its own job
    and is stored there; otherwise it ends the run and is raised. `profile`: a folder for a profile of the denoising of
    one group.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        batch_size: int | None = None,
        isolate: bool = False,
        profile: Path | None = None,
    ):
        self.pipeline = pipeline
        self.networks = Networks.of(pipeline)
        self.batch_size = batch_size
        self.isolate = isolate
        self.profile = profile
        self.waiting: list[Job] = []
        self._numbers = itertools.count()
        self._encoded: dict[Hashable, Any] = {}  # the last condition, by its encode key

    def submit(self, request: Request, callback: Callback | None = None) -> Job:
        """Plan a request; it runs with the next `run`. Raises as `plan` does."""
        job = self.plan(request, callback)
        self.waiting.append(job)
        return job

    def plan(self, request: Request, callback: Callback | None = None) -> Job:
        """Return a request as a job, without running it.

        Raises:
            JoyJaxError: for every error of the request that shows without its pixels.
        """
        started = time.perf_counter()
        if (guard := self.pipeline.parts.guard) is not None:
            guard.check_text(request.prompt)
        with on_devices(self.pipeline):
            plan = self.pipeline.family.plan(request, self.pipeline.parts)
        check_return(plan)
        sees_alpha = self.pipeline.family.picture_mode == "RGBA"
        notes = dropped(request.originals, last_keeps_alpha=request.returned, sees_alpha=sees_alpha)
        notes += self.pipeline.advice(request)
        return Job(next(self._numbers), plan, time.perf_counter() - started, (*notes, *plan.notes), callback)

    def run(self, jobs: Sequence[Job] | None = None) -> Iterator[Job]:
        """Run these jobs, or all waiting ones, and yield each when it is done. Jobs of one batch key run together."""
        if jobs is None:
            jobs, self.waiting = self.waiting, []
        for group in together(jobs, self.batch_size or max(1, len(jobs))):
            try:
                self._run([job for job in group if not job.done])
            except _NoJobLeft:
                pass
            yield from group

    def _run(self, group: Sequence[Job]) -> None:
        """Run jobs of one batch key as one batch."""
        if not group:
            return
        clock = Clock()
        clock.seconds = {"prepare": sum(job.seconds for job in group), "prompt": 0.0, "references": 0.0}
        with on_devices(self.pipeline):
            with clock.stage("prepare"):
                arrays = [self.pipeline.family.prepare(job.plan, self.pipeline.parts) for job in group]
            conditions = self._encode(arrays, clock)
            with clock.stage("prepare"):
                kernels = self.networks.kernels(self.pipeline.family.denoiser, [job.plan.lengths for job in group])
            with clock.stage("denoise"):
                with profiled(self.profile):
                    latents, computed = self._denoise(group, arrays, conditions, kernels)
            media = {}
            with clock.stage("decode"):
                for row, job in enumerate(group):
                    if job.done:
                        continue
                    with self._errors_of(job):
                        media[job.number] = self._finish(job.plan, latents[row : row + 1], clock)
        seconds = {**clock.seconds, "total": sum(clock.seconds.values())}
        measured = () if self.pipeline.kernels is None else self.pipeline.kernels.take_notes()
        for job, steps in zip(group, computed, strict=True):
            if job.done:
                continue
            with self._errors_of(job):
                notes, measured = (*job.notes, *measured), ()  # in the first result only
                job.finished(
                    make_result(self.pipeline, job.plan, media[job.number], seconds, steps, notes, str(kernels))
                )

    def _encode(self, arrays: Sequence[Arrays], clock: Clock) -> list[Any]:
        """Return the condition of each request; requests with equal encode keys are encoded once."""
        conditions = dict(self._encoded)
        fresh = {each.plan.encode_key: each for each in arrays if each.plan.encode_key not in conditions}
        if fresh:
            encoded = self.pipeline.family.encode(self.networks, list(fresh.values()), clock)
            conditions.update(zip(fresh, encoded, strict=True))
        last = arrays[-1].plan.encode_key
        self._encoded = {last: conditions[last]}
        return [conditions[each.plan.encode_key] for each in arrays]

    def _denoise(
        self, group: Sequence[Job], arrays: Sequence[Arrays], conditions: Sequence[Any], kernels: Kernels = PLAIN
    ) -> tuple[Float[np.ndarray, "e T P"], list[int]]:
        """Return the latents of each job, and how many of its steps ran the whole network."""
        pipeline, requests = self.pipeline, [job.plan.request for job in group]
        family, solver, steps = pipeline.family, pipeline.parts.solver, requests[0].steps
        levels = [solver.levels(steps, job.plan.request.sigmas, job.plan.shift) for job in group]
        watched = any(job.callback for job in group)
        with self.networks.predictor(family.denoiser, len(group), requests[0].cache, kernels) as predictor:
            latents = denoise(
                predictor,
                solver,
                family.guidance(pipeline.parts, requests[0]),
                Levels.together(levels),
                np.array([request.guidance for request in requests], np.float32).T,
                np.concatenate([each.noise for each in arrays]),
                conditions[0] if len(group) == 1 else stack_conditions(list(conditions)),
                place=functools.partial(replicate, mesh=pipeline.mesh),
                watch=functools.partial(self._call_back, group) if watched else None,
            )
        for job, row in zip(group, latents, strict=True):
            with self._errors_of(job):
                if not np.isfinite(row[: job.plan.lengths.target[0]]).all():
                    raise not_finite(pipeline, f"the latents after {steps} steps")
        return latents, [int(count) for count in predictor.computed()]

    def _call_back(self, group: Sequence[Job], step: Step) -> None:
        """Call the callbacks of the unfinished jobs; end the loop if there are none."""
        for row, job in enumerate(group):
            if job.callback is None or job.done:
                continue
            before, after = (x[row : row + 1, : job.plan.lengths.target[0]] for x in (step.before, step.after))
            sigmas = float(step.level.sigma[row]), float(step.level.sigma_next[row])
            preview = functools.partial(self._preview, job.plan, before, after, sigmas)
            with self._errors_of(job):
                job.callback(StepEvent(step.number, step.steps, step.seconds, after, preview))
        if all(job.done for job in group):
            raise _NoJobLeft

    def _preview(
        self,
        plan: Plan,
        before: Float[np.ndarray, "1 T P"],
        after: Float[np.ndarray, "1 T P"],
        sigmas: tuple[float, float],
    ) -> Image.Image:
        """Decode the estimate of the clean latents at a step."""
        clean = self.pipeline.parts.solver.clean(before, after, *sigmas)
        return shown(self._finish(plan, clean, Clock()))

    def _finish(self, plan: Plan, latents: Float[np.ndarray, "1 T P"], clock: Clock) -> Media:
        """Return the pixels of a job's latents, unless the guard refuses them.

        Raises:
            JoyJaxError: if they are refused or not finite.
        """
        try:
            media = self.pipeline.family.finish(self.networks, latents, plan, clock)
        except FloatingPointError as error:
            raise not_finite(self.pipeline, str(error)) from None
        if (guard := self.pipeline.parts.guard) is not None:
            guard.check_pixels(media)
        return media

    @contextlib.contextmanager
    def _errors_of(self, job: Job) -> Iterator[None]:
        """Store an error in its job if jobs are isolated."""
        try:
            yield
        except Exception as error:
            if not self.isolate:
                raise
            job.cancel(error)


class _NoJobLeft(Exception):  # noqa: N818 - not an error: ends the loop over steps
    """Every job of a batch was cancelled or has failed."""


@contextlib.contextmanager
def on_devices(pipeline: Pipeline) -> Iterator[None]:
    """Set the pipeline's mesh, and convert the loss of another process of the run to a JoyJaxError."""
    with peer_loss_as_error(), jax.set_mesh(pipeline.mesh) if pipeline.mesh is not None else contextlib.nullcontext():
        yield


def together(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
    """Yield groups of at most `batch_size` jobs with equal batch keys, in the order of their first jobs."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.plan.batch_key, []).append(job)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def check_return(plan: Plan) -> None:
    """Raise an error before the first step if the result cannot be pasted back into the original."""
    request = plan.request
    if not request.returned or plan.base is None:
        return
    crop, (height, width) = plan.crops[plan.base], plan.size[1:]
    if crop.size != (height, width):
        name = "mask" if request.mask is not None else "paste_back"
        raise RequestError(
            f"{name} needs a result of the last reference's own size, {crop.size[1]} × {crop.size[0]}, not "
            f"{width} × {height}; leave out height and width"
        )
    pasted_region(crop, request.mask)


def not_finite(pipeline: Pipeline, what: str) -> JoyJaxError:
    """Build the error for NaN or infinite values."""
    return JoyJaxError(
        f"{what} are not finite in {pipeline.dtype}: the weights are damaged or do not belong to this model; "
        "check them with `joyjax info`, or try --dtype float32"
    )
