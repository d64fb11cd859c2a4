"""Training: the loss falls, a killed run goes on bit by bit, held-out combinations never appear."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from joyjax.convert.export import export
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.manifest import is_converted
from joyjax.convert.source.model import DEMO
from joyjax.convert.wan_vae import VAE
from joyjax.families.joyimage import EDIT
from joyjax.families.joyimage_prompt import DROPPED, prompt_tokens
from joyjax.layers.weights import leaves
from joyjax.processors.text import control_token, decode, load_tokenizer, plain_tokens
from joyjax.processors.vision import vision_patches
from joyjax.runtime.load import load
from joyjax.shapes.edits import KINDS, apply, combination, held_out
from joyjax.sharding.mesh import parse_mesh
from joyjax.training import autoencoder, demo, flow
from joyjax.training.autoencoder import AutoencoderConfig
from joyjax.training.dataset import StreamConfig, make_chunk, make_stream
from joyjax.training.demo import fresh_parameters, read_files
from joyjax.training.flow import COMPONENTS, FlowConfig
from joyjax.training.optimizer import OptimizerConfig, average, make_optimizer, matrix_axes, schedule
from joyjax.training.plot import plot_metrics
from joyjax.training.recipe import Recipe, divide, read_parameters, train_demo, write_checkpoint
from joyjax.training.refine import RefineConfig
from joyjax.training.run import RunConfig, cast, make_step, place_parameters, run, start_state, with_fixed
from joyjax.training.tokenizer import save_tokenizer, train_tokenizer

STREAM = StreamConfig(batch=4, steps_per_chunk=3, scenes=6, edits=3)
OPTIMIZER = make_optimizer(OptimizerConfig(steps=30, warmup=2))


@pytest.fixture(scope="module")
def files():
    """The demo's, with a transformer and a text encoder of one layer."""
    files = read_files(DEMO)
    encoder = files.configs["text_encoder"]
    small = {
        **files.configs,
        "transformer": dataclasses.replace(files.configs["transformer"], num_layers=1),
        "text_encoder": dataclasses.replace(encoder, text=dataclasses.replace(encoder.text, num_hidden_layers=1)),
    }
    return dataclasses.replace(files, configs=small)


@pytest.fixture(scope="module")
def vae(files):
    return cast(read_parameters(DEMO, files, "vae"), VAE.abstract(files.configs["vae"], jnp.float32))


@pytest.fixture(scope="module")
def stream(files, vae):
    return make_stream(STREAM, files, vae, seed=0)


@pytest.fixture(scope="module")
def step(files):
    return make_step(flow.make_loss(FlowConfig(), files, jnp.float32, STREAM.kept), OPTIMIZER, ema=0.9, seed=0)


def drawn(part, config, seed=0):
    """Like `fresh_parameters`, which compiles for half a minute."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path in ("out.kernel", "time_out.kernel") or path.endswith("bias"):
            return np.zeros(shape)
        return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape) if len(shape) > 1 else np.ones(shape)

    own = leaves(part.abstract(config, jnp.float32).state)
    return {path: jnp.asarray(draw(path, leaf.shape), jnp.float32) for path, leaf in own.items()}


def start(files, mesh=None):
    flat = {}
    for name, part in COMPONENTS.items():
        config = files.configs[name]
        placed = place_parameters(part.abstract(config, jnp.float32), drawn(part, config), mesh)
        flat |= {f"{name}.{path}": value for path, value in placed.items()}
    return start_state(flat, OPTIMIZER)


def same(ours, theirs) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


@pytest.mark.jax
def test_the_loss_falls(files, stream, step, tmp_path):
    state = run(
        start(files), step, lambda number: stream(number % 2), RunConfig(30, log_every=1, save_every=30), tmp_path
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    errors = [row["error"] for row in rows]
    assert np.mean(errors[-4:]) < 0.8 * np.mean(errors[:4]), errors
    assert int(state.step) == 30
    picture = plot_metrics(tmp_path / "metrics.jsonl")
    assert Image.open(picture).width > 500


class Killed(Exception):
    pass


@pytest.mark.jax
def test_a_killed_run_goes_on_bit_by_bit(files, stream, step, tmp_path):
    config = RunConfig(8, log_every=2, save_every=4)
    whole = run(start(files), step, stream, config, tmp_path / "whole")

    def dies(number):
        if number == 6:
            raise Killed
        return stream(number)

    with pytest.raises(Killed):
        run(start(files), step, dies, config, tmp_path / "killed")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "loss"')  # a line that the kill cut off
    lines = []
    again = run(start(files), step, stream, config, tmp_path / "killed", report=lines.append)
    assert lines[0] == "resuming from step 4"
    same(again, whole)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    numbers = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert numbers[0] == numbers[1]


def test_the_same_seed_repeats(files, stream, step, tmp_path):
    config = RunConfig(3)
    runs = [run(start(files), step, stream, config, tmp_path / name) for name in "ab"]
    same(*runs)


def test_another_seed_draws_other_values():
    """So does another step; that the model's loss draws by its key is seen below."""

    def loss(parameters, batch, key):
        return jax.random.normal(key) * parameters["out.bias"].sum(), {}

    def drawn_in_two_steps(seed):
        step, found = make_step(loss, OPTIMIZER, 0.9, seed), []
        state = start_state({"out.bias": jnp.ones(2)}, OPTIMIZER)
        for _ in range(2):
            state, metrics = step(state, None)
            found.append(float(metrics["gradient_norm"]))
        return found

    numbers = drawn_in_two_steps(0)
    assert numbers == drawn_in_two_steps(0)
    assert len({*numbers, *drawn_in_two_steps(1)}) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("axes", ["data=4"])
def test_a_mesh_changes_nothing_but_rounding(files, stream, step, tmp_path, axes):
    one = run(start(files), step, stream, RunConfig(2), tmp_path / "one")
    mesh = parse_mesh(axes)
    many = run(start(files, mesh), step, stream, RunConfig(2), tmp_path / "many", mesh=mesh)
    for path, value in one.average.items():
        np.testing.assert_allclose(many.average[path], value, atol=1e-3, rtol=1e-2, err_msg=path)


def test_held_out_combinations_are_never_trained_on(vae):
    chunk = make_chunk(dataclasses.replace(STREAM, scenes=60), vae, (2, 2), seed=0, number=0)
    found = [(kind, *row) for kind, rows in chunk.pairs.items() for row in rows]
    assert {kind for kind, *_ in found} == set(KINDS)
    assert not [combination(pair) for _, _, _, pair in found if held_out(pair)]
    for kind, source, target, pair in found:
        assert kind == pair.edit.kind
        assert apply(pair.source, pair.edit) == pair.target
        assert 0 <= source < len(chunk.pictures)
        assert 0 <= target < len(chunk.pictures)
        assert source != target


def test_a_chunk_holds_the_pictures_of_its_pairs(vae):
    from joyjax.models.autoencoder.stages import encode_images
    from joyjax.shapes.draw import render

    chunk = make_chunk(STREAM, vae, (2, 2), seed=0, number=1)
    for rows in chunk.pairs.values():
        for source, target, pair in rows:
            np.testing.assert_array_equal(chunk.pictures[source], render(pair.source))
            np.testing.assert_array_equal(chunk.pictures[target], render(pair.target))
    alone = encode_images(vae, jnp.asarray(chunk.pictures[3:4]), patch=(2, 2))
    np.testing.assert_allclose(chunk.tokens[3], alone[0], atol=1e-4)


def test_batches_are_those_of_inference(files, stream):
    """Ids, positions and patches are what `prepare` gives for the same picture and prompt."""
    batch = stream(0)
    pad = control_token(files.tokenizer, "<|endoftext|>")
    for row in range(STREAM.batch):
        length = int(batch.lengths[row]) + DROPPED
        ids = np.asarray(batch.ids[row])
        assert (ids[length:] == pad).all()
        image = files.configs["text_encoder"].image_token_id
        words = ids[:length]
        middle = words[np.flatnonzero(words == image)[-1] + 2 : -5]
        prompt = decode(files.tokenizer, middle)
        assert list(words) == prompt_tokens(files.tokenizer, prompt, [16])
        assert (prompt == "") == bool(batch.dropped[row])
        np.testing.assert_array_equal(np.flatnonzero(batch.image_token_index[row] >= 0), np.flatnonzero(words == image))
        assert int(batch.image_token_index[row].max()) == 16 * row + 15
    ours = flow.vision_inputs(batch.pictures, files)
    for row, picture in enumerate(np.asarray(batch.pictures)):
        patches, grid = vision_patches(Image.fromarray(picture), files.processor)
        assert grid == (8, 8)
        np.testing.assert_allclose(ours.patches[row], patches, atol=1e-6)


def test_the_template_leaves_the_whole_prompt():
    """The reference drops a fixed number of tokens; with this tokenizer too they are the system turn exactly."""
    tokenizer = read_files(DEMO).tokenizer
    ids = prompt_tokens(tokenizer, "make the red circle blue", [16])
    start = control_token(tokenizer, "<|im_start|>")
    assert [place for place, token in enumerate(ids) if token == start][1] == DROPPED - 1
    assert decode(tokenizer, ids[DROPPED:]).startswith("user\n")


def test_a_tokenizer_gives_every_text_back(tmp_path):
    """Before it is written and when it is read again."""
    made = train_tokenizer(["make the red circle blue"] * 10, 300)
    save_tokenizer(made, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == made.get_vocab()
    assert tokenizer.get_vocab_size() <= 300
    for text in ("make the red circle blue", "déjà vu, 猫!", "  two  spaces\n"):
        assert decode(tokenizer, plain_tokens(tokenizer, text)) == text


def test_matrices_inside_go_to_muon_and_the_rest_to_adam(files):
    flat = start(files).parameters
    muon = {path for path, value in flat.items() if matrix_axes(path, value.shape)}
    assert muon.isdisjoint(path for path, value in flat.items() if value.ndim < 2)
    for path in ("blocks.0.img.qkv", "blocks.0.txt.down", "blocks.0.img.out"):
        assert f"transformer.{path}.kernel" in muon
    for path in ("transformer.img_in", "transformer.out", "transformer.time_out", "text_encoder.visual.patch"):
        assert f"{path}.kernel" not in muon
    assert "text_encoder.language.embed.table" not in muon
    assert "transformer.blocks.0.img.table" not in muon
    kernels = {path for path in flat if path.endswith(".kernel") and (".blocks." in path or ".layers." in path)}
    assert kernels <= muon
    convolutions = drawn(VAE, files.configs["vae"])
    inner = {path for path in convolutions if path.startswith(("encoder", "decoder")) and path.endswith(".kernel")}
    assert all(matrix_axes(path, convolutions[path].shape) for path in inner)


def test_training_begins_with_no_prediction(files):
    part, config = COMPONENTS["transformer"], files.configs["transformer"]
    parameters = fresh_parameters(part, config, 0)
    assert {path: value.shape for path, value in parameters.items()} == {
        path: leaf.shape for path, leaf in leaves(part.abstract(config, jnp.float32).state).items()
    }
    assert not np.any(parameters["out.kernel"])
    assert np.std(parameters["blocks.0.img.up.kernel"]) == pytest.approx(config.hidden_size**-0.5, rel=0.05)
    again, other = (fresh_parameters(part, config, seed)["img_in.kernel"] for seed in (0, 1))
    np.testing.assert_array_equal(again, parameters["img_in.kernel"])
    assert not np.array_equal(other, again)


def test_the_rate_rises_holds_and_falls_to_zero():
    rate = schedule(OptimizerConfig(steps=100, warmup=10, decay=0.4), 2.0)
    assert [float(rate(n)) for n in (0, 5, 10, 59, 80, 100)] == pytest.approx([0, 1, 2, 2, 1, 0])


def test_the_average_follows():
    mean = average({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, jnp.float32(0.75))
    np.testing.assert_allclose(mean["a"], 0.25)


def test_changed_tokens_weigh_more_and_dropped_prompts_do_not(files, stream):
    batch = dataclasses.replace(stream(0), dropped=jnp.zeros(STREAM.batch))
    parameters = start(files).parameters

    def losses(config, batch, seed=0):
        loss = flow.make_loss(config, files, jnp.float32, STREAM.kept)
        return {name: float(value) for name, value in jax.jit(loss)(parameters, batch, jax.random.key(seed))[1].items()}

    plain, weighted = (losses(FlowConfig(change_weight=weight), batch) for weight in (0.0, 4.0))
    assert plain["loss"] == pytest.approx(plain["error"])
    assert weighted["error"] == pytest.approx(plain["error"])
    assert weighted["loss"] > 1.1 * plain["loss"]
    assert losses(FlowConfig(change_weight=0.0), batch, seed=1)["loss"] != pytest.approx(plain["loss"])
    dropped = dataclasses.replace(batch, dropped=jnp.ones(STREAM.batch))
    assert losses(FlowConfig(change_weight=4.0), dropped)["loss"] == pytest.approx(plain["loss"])


@pytest.mark.nightly
def test_bfloat16_trains_float32_parameters(files, stream):
    step = make_step(flow.make_loss(FlowConfig(), files, jnp.bfloat16, STREAM.kept), OPTIMIZER, ema=0.9, seed=0)
    state, metrics = step(start(files), stream(0))
    assert {value.dtype.name for value in state.parameters.values()} == {"float32"}
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.slow
def test_the_autoencoder_learns_and_its_encoder_is_left_alone_in_the_end(files, tmp_path):
    numbers = AutoencoderConfig(batch=2, crop=32, whole_batch=1, steps=12, whole_from=0.9)
    config = dataclasses.replace(files.configs["vae"], dim_mult=(1, 2), temperal_downsample=(True,))  # compiles sooner
    optimizer = make_optimizer(OptimizerConfig(steps=12, warmup=1))
    parameters = place_parameters(VAE.abstract(config, jnp.float32), drawn(VAE, config), None)
    first_output = {path: np.asarray(value) for path, value in parameters.items()}
    step = make_step(autoencoder.make_loss(config, jnp.float32, kl=1e-4, noise=None), optimizer, 0.9, 0)
    batches = autoencoder.make_batches(numbers, 0, whole=False)
    assert batches(0).shape == (2, 32, 32, 3)
    assert batches(11).shape == (1, 128, 128, 3)
    state = run(
        start_state(parameters, optimizer), step, lambda n: batches(0), RunConfig(12, log_every=1), tmp_path / "a"
    )
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    learned = {path: np.asarray(value) for path, value in state.parameters.items()}
    assert not np.array_equal(learned["encoder.conv_in.kernel"], first_output["encoder.conv_in.kernel"])

    free, fixed = divide({path: jnp.asarray(value) for path, value in learned.items()}, autoencoder.DECODER)
    assert all(path.startswith(("encoder", "quant")) for path in fixed)
    late = make_optimizer(OptimizerConfig(steps=2, warmup=0))
    loss = autoencoder.make_loss(config, jnp.float32, kl=1e-4, noise=0.35)
    moved = jax.jit(jax.grad(lambda parameters: loss(parameters, jnp.asarray(batches(11)), jax.random.key(0))[0]))(
        free | fixed
    )
    assert not any(np.any(moved[path]) for path in fixed)
    state, _ = make_step(with_fixed(loss, fixed), late, 0.9, 0)(start_state(free, late), jnp.asarray(batches(11)))
    assert state.parameters.keys() == free.keys()
    for path, value in state.parameters.items():
        assert not np.array_equal(value, learned[path]), path


def test_a_checkpoint_comes_back_as_it_was_written(files, tmp_path):
    parameters = {part.folder: drawn(part, files.configs[part.folder], 5) for part in EDIT.components}
    skeleton = shutil.copytree(DEMO, tmp_path / "skeleton", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("transformer", "text_encoder"):  # one layer, as `files`
        file = skeleton / name / "config.json"
        raw = json.loads(file.read_text())
        (raw if name == "transformer" else raw["text_config"])[
            "num_layers" if name == "transformer" else "num_hidden_layers"
        ] = 1
        file.write_text(json.dumps(raw))
    target = tmp_path / "model"
    target.mkdir()
    (target / "README.md").write_text("a card")
    (target / "old").write_text("")
    write_checkpoint(skeleton, files, parameters, target)
    assert (target / "README.md").read_text() == "a card"
    assert not (target / "old").exists()
    pipeline = load(target, dtype="float32")
    assert pipeline.base_size == 128
    for part in EDIT.components:
        for path, leaf in leaves(pipeline.weights[part.folder].state).items():
            expected = parameters[part.folder][path].astype(jnp.bfloat16).astype(jnp.float32)
            np.testing.assert_array_equal(leaf[...], expected, err_msg=path)


def test_export_wants_all_parameters_and_no_other(files, tmp_path):
    parameters = drawn(VAE, files.configs["vae"])
    parameters.pop("quant.bias")
    with pytest.raises(ValueError, match="quant.bias"):
        export(VAE, files.configs["vae"], parameters, tmp_path, jnp.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_the_whole_recipe_further_from_a_checkpoint(tmp_path):
    """`train-demo --start`: two steps on the bundled model give a checkpoint that loads and differs."""
    recipe = Recipe(
        steps=2, stream=dataclasses.replace(STREAM, batch=2), refine=RefineConfig(2, batch=2), save_every=2, checked=8
    )
    train_demo(recipe, tmp_path / "work", tmp_path / "model", start=DEMO)
    pipeline, demo = load(tmp_path / "model", dtype="float32"), load(dtype="float32")
    pairs = [(leaves(p.weights["transformer"].state)["out.kernel"][...]) for p in (pipeline, demo)]
    assert not np.array_equal(*pairs)
    ours, theirs = (leaves(p.weights["vae"].state) for p in (pipeline, demo))
    learned = {path for path, leaf in ours.items() if not np.array_equal(leaf[...], theirs[path][...])}
    assert learned
    assert all(path.startswith(autoencoder.DECODER) for path in learned)  # the transformer knows the encoder's latents
    assert pipeline.generation_defaults == demo.generation_defaults
    row = json.loads((tmp_path / "work" / "flow" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= row["strict"] <= 1


def test_a_new_checkpoint_has_the_demo_s_settings(tmp_path):
    demo.write_skeleton(tmp_path, [0.0] * 16, [1.0] * 16)
    assert GenerationDefaults.read(tmp_path) == demo.SETTINGS
    assert not is_converted(tmp_path)


@pytest.mark.nightly
def test_the_whole_recipe_from_nothing(tmp_path):
    """`train-demo`: a few steps of every stage give a whole checkpoint, with latents normalised by its own numbers."""
    recipe = Recipe(
        steps=1,
        autoencoder=AutoencoderConfig(steps=2, batch=1, crop=32, whole_batch=1, decoder_steps=1),
        stream=dataclasses.replace(STREAM, batch=2),
        refine=RefineConfig(1, batch=2),
        checked=8,
    )
    train_demo(recipe, tmp_path / "work", tmp_path / "model")
    pipeline = load(tmp_path / "model", dtype="float32")
    vae = pipeline.parts.configs["vae"]
    assert len(set(vae.latents_std)) == vae.z_dim
    assert pipeline.generation_defaults.domain == "shapes"
    for stage in ("autoencoder", "decoder", "flow"):
        assert len((tmp_path / "work" / stage / "metrics.jsonl").read_text().splitlines()) == 1
