"""Training the demo model: the autoencoder, then text encoder and transformer, then the decoder again.

Each stage has a folder under the work folder, with checkpoints, `metrics.jsonl` and a plot, and resumes from there when
the same command runs again.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from joyjax import dtypes
from joyjax.convert import stream
from joyjax.convert.export import export
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.safetensors import Tensors
from joyjax.convert.wan_vae import VAE
from joyjax.families.family import Parts
from joyjax.families.joyimage import EDIT
from joyjax.layers.weights import Weights, leaves
from joyjax.models.autoencoder.wan import WanVAEConfig
from joyjax.runtime.load import Pipeline
from joyjax.score import score
from joyjax.training import autoencoder, flow, refine
from joyjax.training.autoencoder import AutoencoderConfig
from joyjax.training.dataset import StreamConfig, make_stream
from joyjax.training.demo import fresh_parameters, read_files, vae_config, write_skeleton
from joyjax.training.flow import COMPONENTS, FlowConfig, split
from joyjax.training.optimizer import OptimizerConfig, Parameters, make_optimizer
from joyjax.training.plot import plot_metrics
from joyjax.training.refine import RefineConfig
from joyjax.training.run import RunConfig, TrainState, cast, make_step, place_parameters, run, start_state, with_fixed

STATISTICS = 200  # batches of whole pictures for mean and standard deviation of the latents


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a training. `ema`: decay of the averaged parameters; `dtype`: that of matrix products."""

    steps: int = 12000
    seed: int = 0
    dtype: str = "float32"
    ema: float = 0.998
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    stream: StreamConfig = StreamConfig()
    flow: FlowConfig = FlowConfig()
    refine: RefineConfig = RefineConfig()
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    decay: float = 0.5
    log_every: int = 20
    save_every: int = 500
    checked: int = 64  # number of edits that are scored at each checkpoint


def train_demo(
    recipe: Recipe,
    work: Path,
    target: Path,
    *,
    start: Path | None = None,
    mesh: Mesh | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Train in the folder `work` and write the checkpoint, in Diffusers format and bfloat16, to `target`.

    `start` is a checkpoint to continue from: its autoencoder and tokenizer are kept, its other networks trained on.
    """
    dtype = dtypes.by_name(recipe.dtype)
    skeleton = work / "skeleton"
    if start is not None:
        parts = read_files(start)
        parameters = {name: read_parameters(start, parts, name) for name in (*COMPONENTS, "vae")}
        _copy_skeleton(start, skeleton)
    else:
        vae_parameters, mean, std = train_autoencoder(recipe, work, dtype, mesh, report)
        if not (skeleton / "model_index.json").is_file():
            write_skeleton(skeleton, mean, std)
        parts = read_files(skeleton)
        parameters = {
            name: fresh_parameters(component, parts.configs[name], recipe.seed)
            for name, component in COMPONENTS.items()
        } | {"vae": vae_parameters}
    trained = train_flow(
        recipe, work / "flow", parts, GenerationDefaults.read(skeleton), parameters, dtype, mesh, report
    )
    trained = train_decoder(recipe, work / "results", parts, GenerationDefaults.read(skeleton), trained, mesh, report)
    write_checkpoint(skeleton, parts, trained, target)
    report(f"wrote {target}")


def train_autoencoder(
    recipe: Recipe, work: Path, dtype: DTypeLike, mesh: Mesh | None, report: Callable[[str], None]
) -> tuple[Parameters, list[float], list[float]]:
    """Return the autoencoder's parameters, and mean and standard deviation of its latent channels."""
    config, settings = WanVAEConfig.from_diffusers(vae_config([0.0] * 16, [1.0] * 16)), recipe.autoencoder
    abstract = VAE.abstract(config, dtypes.FLOAT32)
    parameters = place_parameters(abstract, fresh_parameters(VAE, config, recipe.seed), mesh)
    stages: tuple[tuple[str, int, tuple[float, float], float | None], ...] = (
        ("autoencoder", settings.steps, (0.02, 2e-3), None),
        ("decoder", settings.decoder_steps, (0.006, 1e-3), settings.noise),
    )
    for number, (name, steps, rates, noise) in enumerate(stages):
        optimizer = make_optimizer(OptimizerConfig(steps, *rates, decay=recipe.decay))
        loss = autoencoder.make_loss(config, dtype, kl=settings.kl, noise=noise)
        free, fixed = divide(parameters, autoencoder.DECODER if name == "decoder" else "")
        state = run(
            start_state(free, optimizer),
            make_step(with_fixed(loss, fixed), optimizer, recipe.ema, recipe.seed + number),
            autoencoder.make_batches(settings, recipe.seed + number, whole=noise is not None),
            RunConfig(steps, recipe.log_every, recipe.save_every),
            work / name,
            mesh=mesh,
            report=report,
        )
        plot_metrics(work / name / "metrics.jsonl")
        parameters = fixed | state.average
    pictures = autoencoder.make_batches(settings, recipe.seed + 2, whole=True)
    vae = cast(parameters, abstract).module()
    mean, std = autoencoder.latent_statistics(vae, (pictures(number) for number in range(STATISTICS)))
    return parameters, list(mean), list(std)


def train_flow(
    recipe: Recipe,
    folder: Path,
    parts: Parts,
    defaults: GenerationDefaults,
    parameters: Mapping[str, Parameters],
    dtype: DTypeLike,
    mesh: Mesh | None,
    report: Callable[[str], None],
) -> dict[str, Parameters]:
    """Train text encoder and transformer; return the averaged parameters of all three networks."""
    abstract = {part.folder: part.abstract(parts.configs[part.folder], dtypes.FLOAT32) for part in EDIT.components}
    vae = cast(parameters["vae"], abstract["vae"])
    flat: Parameters = {}
    for name in COMPONENTS:
        placed = place_parameters(abstract[name], parameters[name], mesh)
        flat |= {f"{name}.{path}": value for path, value in placed.items()}
    optimizer = make_optimizer(OptimizerConfig(recipe.steps, recipe.muon_rate, recipe.adam_rate, decay=recipe.decay))
    loss = flow.make_loss(recipe.flow, parts, dtype, recipe.stream.kept)

    def networks(state: TrainState) -> dict[str, Weights]:
        return {name: cast(split(state.average, name), abstract[name]) for name in COMPONENTS} | {"vae": vae}

    def check(step: int, state: TrainState) -> dict[str, float]:
        pipeline = Pipeline(EDIT, parts, networks(state), "float32", mesh, defaults, "training")
        result = score(pipeline, recipe.checked, seed=1)  # other edits than those of `joyjax score`
        plot_metrics(folder / "metrics.jsonl")
        return {test: result.rate(test).share for test in ("pixel", "strict")} | {"psnr": result.psnr()}

    state = run(
        start_state(flat, optimizer),
        make_step(loss, optimizer, recipe.ema, recipe.seed),
        make_stream(recipe.stream, parts, vae, recipe.seed),
        RunConfig(recipe.steps, recipe.log_every, recipe.save_every),
        folder,
        mesh=mesh,
        after=check,
        report=report,
    )
    return {name: split(state.average, name) for name in COMPONENTS} | {"vae": parameters["vae"]}


def train_decoder(
    recipe: Recipe,
    folder: Path,
    parts: Parts,
    defaults: GenerationDefaults,
    parameters: Mapping[str, Parameters],
    mesh: Mesh | None,
    report: Callable[[str], None],
) -> dict[str, Parameters]:
    """Train the decoder on the other networks' results; return the parameters of all three."""
    settings = recipe.refine
    abstract = {part.folder: part.abstract(parts.configs[part.folder], dtypes.FLOAT32) for part in EDIT.components}
    networks = {name: cast(parameters[name], weights) for name, weights in abstract.items()}
    seed = recipe.seed + 1  # other pictures than before
    stream = make_stream(dataclasses.replace(recipe.stream, batch=settings.batch), parts, networks["vae"], seed)
    placed = place_parameters(abstract["vae"], parameters["vae"], mesh)
    decoder, fixed = divide(placed, autoencoder.DECODER)
    rates = settings.muon_rate, settings.adam_rate
    optimizer = make_optimizer(OptimizerConfig(settings.steps, *rates, decay=recipe.decay))
    state = run(
        start_state(decoder, optimizer),
        make_step(with_fixed(refine.make_loss(parts, dtypes.FLOAT32), fixed), optimizer, recipe.ema, seed),
        refine.make_results(
            settings,
            parts,
            networks,
            stream,
            text=recipe.stream.kept,
            steps=defaults.steps or EDIT.defaults["steps"],
            seed=seed,
        ),
        RunConfig(settings.steps, recipe.log_every, recipe.save_every),
        folder,
        mesh=mesh,
        report=report,
    )
    plot_metrics(folder / "metrics.jsonl")
    return {**parameters, "vae": fixed | state.average}


def divide(parameters: Parameters, prefixes: str | tuple[str, ...]) -> tuple[Parameters, Parameters]:
    """Return the parameters whose paths have one of the prefixes, and the others."""
    chosen = {path: value for path, value in parameters.items() if path.startswith(prefixes)}
    return chosen, {path: value for path, value in parameters.items() if path not in chosen}


def read_parameters(folder: Path, parts: Parts, name: str) -> Parameters:
    """Return the parameters of one network of a Diffusers checkpoint, in float32."""
    component = next(part for part in EDIT.components if part.folder == name)
    weights = stream.fill(component, parts.configs[name], Tensors.open(folder / name), np.float32)
    return {path: jnp.asarray(leaf[...]) for path, leaf in leaves(weights.state).items()}


def write_checkpoint(skeleton: Path, parts: Parts, parameters: Mapping[str, Parameters], target: Path) -> None:
    """Write a whole checkpoint beside `target` and rename it; the model card of an old target is kept."""
    beside = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    _copy_skeleton(skeleton, beside)
    for component in EDIT.components:
        name = component.folder
        export(component, parts.configs[name], parameters[name], beside, dtypes.by_name("bfloat16"))
    for kept in target.glob("*.md"):
        shutil.copy(kept, beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def _copy_skeleton(source: Path, target: Path) -> None:
    """Copy everything of a checkpoint but its weights and its card."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.md", ".*"), dirs_exist_ok=True)
