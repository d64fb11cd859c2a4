"""The training loop: a pure step, a stream of batches numbered by step, checkpoints, metrics.

A batch is a function of its step's number and nothing else is random. A killed run that resumes from its last
checkpoint is therefore bit-equal to an uninterrupted one.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from joyjax.errors import MeshError
from joyjax.layers.weights import Weights, leaves
from joyjax.sharding.devices import devices
from joyjax.sharding.place import parameter_sharding
from joyjax.sharding.rules import mesh_axes, partition_spec
from joyjax.training.optimizer import Parameters, average

Loss = Callable[[Parameters, Any, Array], tuple[Array, dict[str, Array]]]  # of parameters, batch, key


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "parameters", "average", "optimizer"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run: the step's number, the parameters in float32, their average, the optimiser's state.

    The fields are pytrees of arrays, or of shapes with shardings to restore a checkpoint into.
    """

    step: Any
    parameters: Any
    average: Any
    optimizer: Any


def start_state(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step, sharded as the parameters are."""
    replicated = _replicated(parameters)

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        """Shard the optimiser's arrays of a parameter as the parameter; replicate scalars."""
        own = parameters.get(path[-1].key) if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        return own.sharding if own is not None and own.shape == leaf.shape else replicated

    shardings = jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, parameters))
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated),
        parameters=parameters,
        average=jax.tree.map(jnp.copy, parameters),
        optimizer=jax.jit(optimizer.init, out_shardings=shardings)(parameters),
    )


def _replicated(parameters: Parameters) -> Any:
    own = next(iter(parameters.values())).sharding
    return NamedSharding(own.mesh, PartitionSpec()) if isinstance(own, NamedSharding) else own


def place_parameters(weights: Weights, parameters: Mapping[str, Array], mesh: Mesh | None) -> Parameters:
    """Place the parameters of a network as inference does."""
    own, one = leaves(weights.state), devices()[0]
    return {
        path: jax.device_put(value, parameter_sharding(path, value.shape, own[path].axes, mesh) or one)
        for path, value in parameters.items()
    }


def make_step(loss: Loss, optimizer: optax.GradientTransformation, ema: float, seed: int) -> Callable[..., Any]:
    """Return the compiled function (state, batch) → (state, metrics)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, batch, key)
        updates, inner = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        # A smaller decay at first, so that the average forgets the initial weights.
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step)).astype(jnp.float32)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, parameters, average(state.average, parameters, decay), inner), metrics

    return step


def with_fixed(loss: Loss, fixed: Parameters) -> Loss:
    """Return the loss as a function of the other parameters; weight decay then leaves the fixed ones unchanged."""
    return lambda parameters, batch, key: loss({**fixed, **parameters}, batch, key)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of a run and how often it writes."""

    steps: int
    log_every: int = 20
    save_every: int = 500


def run(
    state: TrainState,
    step: Callable[..., Any],
    batches: Callable[[int], Any],
    config: RunConfig,
    folder: Path,
    *,
    mesh: Mesh | None = None,
    after: Callable[[int, TrainState], Mapping[str, float]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """Train to the end, resuming from the folder's last checkpoint if there is one.

    `batches` returns the batch of a step as host arrays; the next one is made while a step runs. `after` is called at
    each checkpoint and returns more metrics. Metrics go to `metrics.jsonl` in the folder, one json object per line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(ocp.CheckpointManager((folder / "state").absolute(), options=options))
        if manager.latest_step() is not None:
            state = _restore(manager, state)
            report(f"resuming from step {int(state.step)}")
        first = int(state.step)
        log = stack.enter_context(_open_metrics(folder / "metrics.jsonl", first))
        ahead = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        coming = ahead.submit(batches, first)
        sums: dict[str, Array] = {}
        started, seen = time.perf_counter(), 0
        for number in range(first, config.steps):
            batch = shard_batch(coming.result(), mesh)
            if number + 1 < config.steps:
                coming = ahead.submit(batches, number + 1)
            state, metrics = step(state, batch)
            sums = metrics if not seen else jax.tree.map(jnp.add, sums, metrics)
            seen, done, last = seen + 1, number + 1, number + 1 == config.steps
            save = last or done % config.save_every == 0
            if save or done % config.log_every == 0:
                row = {"step": done, "seconds": 0.0, **{name: float(value) / seen for name, value in sums.items()}}
                row["seconds"] = (time.perf_counter() - started) / seen
                if save:
                    manager.save(done, args=ocp.args.StandardSave(state))
                    if after is not None:
                        row |= after(done, state)
                log.write(json.dumps(row) + "\n")
                log.flush()
                report("  ".join(f"{name} {value:.5g}" for name, value in row.items()))
                started, sums, seen = time.perf_counter(), {}, 0
    return state


def _restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target))


def _open_metrics(path: Path, first: int) -> Any:
    """Open the log to append, without the rows of a killed run after its last checkpoint."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= first]
    path.write_text("".join(kept))
    return path.open("a")


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Shard a batch's rows over the mesh, or put them on the one device.

    Raises:
        MeshError: if the devices do not divide the rows.
    """

    def place(x: Any) -> Array:
        if mesh is None:
            return jnp.asarray(x)
        devices = math.prod(mesh.shape[name] for name in mesh_axes("batch", mesh.axis_names))
        if len(x) % devices:
            raise MeshError(f"{devices} devices of cfg and data do not divide a batch of {len(x)}; use fewer")
        spec = partition_spec(("batch", *(None,) * (x.ndim - 1)), mesh.axis_names)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, batch)


def cast(parameters: Parameters, abstract: Weights) -> Weights:
    """Return the network with these parameters, cast to the network's dtypes."""
    own = leaves(abstract.state)
    return abstract.filled({path: value.astype(own[path].dtype) for path, value in parameters.items()})
