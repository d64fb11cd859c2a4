"""The choice of kernels: measured, kept, shared by processes, and part of a program's key. Kernels are interpreted."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from compilations import counting
from invoke import invoke, succeed
from PIL import Image
from two_processes import run_two

import joyjax
from joyjax.commands.replay import read_replay
from joyjax.errors import RequestError
from joyjax.families.family import Lengths
from joyjax.kernels import measure, modulate_pallas
from joyjax.kernels.cases import Shape, cases
from joyjax.kernels.choice import OPERATIONS, PLAIN, SELECTING, Kernels
from joyjax.kernels.measure import Measured
from joyjax.models.qwen_image import QwenImageConfig
from joyjax.provenance.recipe import read_recipe
from joyjax.runtime import kernel_cache, kernel_choice
from joyjax.runtime.kernel_choice import KernelChooser, kernel_of, step_shape

pytestmark = [pytest.mark.jax, pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")]

PROGRAM = Path(__file__).parents[1] / "kernel_processes.py"
SHAPE = Shape(rows=2, images=5, texts=3, heads=4, width=64, channels=256)
NORM, RESIDUAL, ROTATION = OPERATIONS
QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": [2, 2, 4],
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
EDIT = {"image": PICTURE, "prompt": "make it red", "steps": 1, "guidance_scale": 2.0}


def case(operation=NORM, dtype="bfloat16"):
    return cases("", SHAPE, dtype, [operation])[0]


def chooser(folder, setting="auto", kernel="triton"):
    return KernelChooser(setting, jax.devices()[0], "bfloat16", kernel=kernel, folder=folder)


def timed(monkeypatch, xla, own):
    """Replace the clock by these microseconds; on a CPU an interpreted kernel is never the faster form."""
    monkeypatch.setattr(measure, "seconds_of", lambda case, kernel, _: {"reference": [xla / 1e6], kernel: [own / 1e6]})


def wrong(monkeypatch, by):
    right = modulate_pallas.modulate
    monkeypatch.setattr(modulate_pallas, "modulate", lambda *args, **options: [x + by for x in right(*args, **options)])


def raising(*_, **__):
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kernel_that_is_right_and_faster_is_chosen(operation, dtype, monkeypatch):
    timed(monkeypatch, 30, 20)
    assert measure.measure(case(operation, dtype), "triton") == Measured(operation, "triton", True, "", 30.0, 20.0)


def test_a_kernel_that_is_slower_is_not_chosen(monkeypatch):
    found = measure.measure(case(), "triton")  # by the clock: interpreted
    assert not found.chosen
    assert found.xla_us < found.kernel_us
    timed(monkeypatch, 101.9, 100)
    assert measure.measure(case(), "triton").reason == "1.02 × XLA's speed, below 1.02"
    timed(monkeypatch, 102, 100)
    assert measure.measure(case(), "triton").chosen


@pytest.mark.parametrize("by", [0.5, np.nan])
def test_a_kernel_that_is_wrong_is_not_timed(by, monkeypatch):
    wrong(monkeypatch, by)
    monkeypatch.setattr(measure, "seconds_of", lambda *_: pytest.fail("it was timed"))
    found = measure.measure(case(), "triton")
    assert (found.chosen, found.xla_us) == (False, None)
    assert "its result is off by" in found.reason


def test_only_defined_tokens_are_compared():
    """Behind the text of a row there is padding, which the two forms fill differently."""
    shape = dataclasses.replace(SHAPE, images=9)
    [joint] = cases("", shape, "float32", [ROTATION])
    assert measure.error_of(joint, "triton") < 1e-5
    arguments = measure.draw(joint.arguments, longest=9)
    defined = np.asarray(measure._defined(joint, arguments))
    assert defined.sum(axis=1).tolist() == (np.asarray(arguments[-1]) + shape.texts).tolist()
    assert not defined.all()


def test_a_kernel_that_raises_is_not_chosen(monkeypatch):
    monkeypatch.setattr(modulate_pallas, "modulate", raising)
    found = measure.measure(case(), "triton")
    assert found == Measured(NORM, "triton", False, "RuntimeError: no such instruction")


def test_the_choice_is_measured_once_and_kept(tmp_path, monkeypatch):
    timed(monkeypatch, 30, 20)
    first = chooser(tmp_path)
    chosen = first.choose(SHAPE)
    assert chosen == Kernels("triton", "triton", "triton")
    (note,) = first.take_notes()
    assert note.startswith("kernels: measured in ")
    assert "triton for layer_norm_scale_shift 1.50 ×, " in note
    monkeypatch.setattr(kernel_choice, "measure", lambda *_: pytest.fail("measured again"))
    assert first.choose(SHAPE) == chosen
    second = chooser(tmp_path)
    assert second.choose(SHAPE) == chosen
    assert second.take_notes() == ()
    (file,) = tmp_path.iterdir()
    held = json.loads(file.read_text())["key"]
    assert held == {
        "device": "cpu",
        "driver": kernel_cache.driver(jax.devices()[0]),
        "jax": jax.__version__,
        "joyjax": joyjax.__version__,
        "dtype": "bfloat16",
        "kernel": "triton",
        "shape": dataclasses.asdict(SHAPE),
    }


@pytest.mark.parametrize("field", ["device", "driver", "jax", "joyjax", "dtype", "kernel", "shape"])
def test_another_key_is_measured(field, tmp_path):
    key = kernel_cache.Key.of(jax.devices()[0], "bfloat16", "triton", SHAPE)
    kernel_cache.write(key, [Measured(NORM, "triton", True)], tmp_path)
    other = dataclasses.replace(SHAPE, images=6) if field == "shape" else "another"
    assert kernel_cache.read(dataclasses.replace(key, **{field: other}), tmp_path) is None
    assert kernel_cache.read(key, tmp_path) == [Measured(NORM, "triton", True)]


def damaged(text: str) -> list[str]:
    """Return files that are cut, empty, of another form, or name things that do not exist."""
    held = json.loads(text)
    row = held["rows"][0]
    other = [
        {**held, "key": {**held["key"], "device": "H100"}},
        {"key": held["key"]},
        {**held, "rows": 3},
        {**held, "rows": [3]},
        *({**held, "rows": [{**row, **more}]} for more in ({"kernel": "cuda"}, {"chosen": "yes"}, {"more": 1})),
        [],
    ]
    return [text[:40], "", "\0", *map(json.dumps, other)]


def test_a_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    timed(monkeypatch, 30, 20)
    chosen = chooser(tmp_path).choose(SHAPE)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    row = Measured(NORM, "triton", True, "", 3.0, 2.0)
    monkeypatch.setattr(kernel_choice, "measure", lambda case, _: dataclasses.replace(row, operation=case.operation))
    for text in damaged(whole):
        file.write_text(text)
        again = chooser(tmp_path)
        assert again.choose(SHAPE) == chosen, text
        assert len(again.take_notes()) == 1, text
        assert [read["xla_us"] for read in json.loads(file.read_text())["rows"]] == [3.0] * 3
    file.unlink()
    file.mkdir()  # cannot be read, nor written
    assert chooser(tmp_path).choose(SHAPE) == chosen


def test_a_full_memory_is_not_kept(tmp_path, monkeypatch):
    """With less beside it in memory the next process may measure."""
    monkeypatch.setattr(
        kernel_choice, "measure", lambda case, kernel: Measured(case.operation, kernel, False, "RESOURCE_EXHAUSTED: 1")
    )
    assert chooser(tmp_path).choose(SHAPE) == PLAIN
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_fails_ends_an_edit(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_choice, "cases", raising)
    assert chooser(tmp_path).choose(SHAPE) == PLAIN
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    timed(monkeypatch, 30, 20)
    assert chooser(tmp_path / "file").choose(SHAPE) != PLAIN  # a folder that cannot be written


def test_shipped_measurements(tmp_path, monkeypatch):
    """Of a device, whatever its driver."""
    for entry in kernel_cache.MEASURED:
        fields = {name: value for name, value in entry.items() if name != "rows"}
        key = kernel_cache.Key(**{**fields, "shape": Shape(**fields["shape"]), "driver": "any", "joyjax": "0"})
        rows = kernel_cache.read(key, tmp_path)
        assert [row.operation for row in rows] == list(OPERATIONS)
        assert all(row.chosen == (row.ratio >= measure.WORTH) for row in rows)
        assert kernel_cache.read(dataclasses.replace(key, jax="0.1"), tmp_path) is None
    key = kernel_cache.Key.of(jax.devices()[0], "bfloat16", "triton", SHAPE)
    entry = {name: value for name, value in key.plain().items() if name not in ("driver", "joyjax")}
    rows = [dataclasses.asdict(Measured(name, "triton", name == ROTATION)) for name in OPERATIONS]
    monkeypatch.setattr(kernel_cache, "MEASURED", ({**entry, "rows": rows},))
    monkeypatch.setattr(kernel_choice, "measure", lambda *_: pytest.fail("measured"))
    assert str(chooser(tmp_path).choose(SHAPE)) == "qk_norm_rope=triton"


def test_a_cpu_does_not_measure(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = KernelChooser.of("auto", jax.devices()[0], "bfloat16", None)
    assert (found.kernel, found.choose(SHAPE), found.take_notes()) == (None, PLAIN, ())
    assert not (tmp_path / "joyjax").exists()


@dataclasses.dataclass
class Device:
    """A device that is not here."""

    platform: str
    device_kind: str
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        (Device("gpu", "NVIDIA H100", "9.0"), "mosaic"),
        (Device("gpu", "NVIDIA A100", "8.0"), "triton"),
        (Device("gpu", "Tesla V100", "7.0"), None),
        (Device("gpu", "AMD Instinct MI300X", "gfx942"), None),
        (Device("tpu", "TPU v6 lite"), None),
    ],
)
def test_the_kernel_of_a_device(device, kernel):
    assert kernel_of(device) == kernel
    assert KernelChooser.of("auto", device, "bfloat16", None).kernel == kernel
    if kernel is None:
        with pytest.raises(RequestError, match=f"kernels is 'pallas', which needs .* 8.0 .*{device.device_kind}"):
            KernelChooser.of("pallas", device, "bfloat16", None)
        assert KernelChooser.of("auto", device, "bfloat16", None).choose(SHAPE) == PLAIN


def test_pallas_names_what_it_cannot_run(tmp_path):
    asked = chooser(tmp_path, "pallas", "mosaic")
    assert asked.choose(dataclasses.replace(SHAPE, heads=5, width=32, channels=160)) == Kernels("mosaic", "mosaic")
    notes = asked.take_notes()
    assert notes[0].startswith("kernels: qk_norm_rope is left to XLA: ValueError: mosaic: 5 heads of 32 channels; the ")
    assert "interpreted" in notes[1]
    assert asked.choose(dataclasses.replace(SHAPE, channels=8192)) == Kernels(None, None, "mosaic")
    assert "tokens of 8192 channels; the kernel takes up to 6144" in asked.take_notes()[0]


@pytest.mark.parametrize("setting", ["auto", "pallas"])
def test_where_tokens_select_those_operations_are_measured(setting, tmp_path, monkeypatch):
    """And not the plain ones, which only the text runs then."""
    timed(monkeypatch, 20, 10)
    chosen = chooser(tmp_path, setting).choose(dataclasses.replace(SHAPE, modulations=2))
    assert chosen == Kernels(**dict.fromkeys(SELECTING, "triton"))
    assert (chosen.layer_norm_scale_shift, chosen.residual_gate_layer_norm_scale_shift) == (None, None)
    if setting == "auto":
        [(key, rows)] = kernel_cache.kept(tmp_path)
        assert key["shape"]["modulations"] == 2
        assert [row.operation for row in rows] == list(SELECTING)
        assert chooser(tmp_path).choose(SHAPE) == Kernels(**dict.fromkeys(OPERATIONS, "triton"))  # measured anew


def test_an_unknown_choice_is_refused():
    with pytest.raises(RequestError, match="kernels is 'fast'; choose one of: auto, xla, pallas"):
        joyjax.load(kernels="fast")


def test_the_shape_of_a_step():
    config = joyjax.load().parts.configs["transformer"]
    lengths = [Lengths((7, 64), (16, 16), (16, 32), 2), Lengths((70, 256), (16, 16), (16, 16), 1)]
    assert step_shape(config, lengths, 2) == Shape(4, 48, 256, 5, 32, 160)
    mesh = jax.make_mesh((2, 4), ("cfg", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert step_shape(config, lengths, 2) == Shape(2, 12, 64, 5, 32, 160)
    raw = {**QWEN_IMAGE, "zero_cond_t": True}
    assert step_shape(QwenImageConfig.from_diffusers(raw), lengths, 2) == Shape(4, 48, 256, 2, 8, 16, modulations=2)


@pytest.fixture(scope="module")
def plain():
    return joyjax.load(dtype="float32", kernels="xla")


@pytest.fixture(scope="module")
def kernels():
    return joyjax.load(dtype="float32", kernels="pallas")


def test_an_edit_with_kernels_is_that_without(plain, kernels):
    """Two choices of one model in one process: each has its own program, and the pictures agree."""
    jax.clear_caches()
    with counting() as compiled:
        expected, found = (joyjax.edit(pipeline, **EDIT) for pipeline in (plain, kernels))
    assert compiled["predict"] == 2
    with counting() as compiled:
        again = [joyjax.edit(pipeline, **{**EDIT, "seed": 1}) for pipeline in (kernels, plain)]
    assert compiled["predict"] == 0
    for one, other in ((expected, found), again):
        off = np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image))
        assert off.max() <= 1
    assert expected.settings["kernels"] == "xla"
    assert found.settings["kernels"] == ", ".join(f"{name}=triton" for name in OPERATIONS)
    assert any("interpreted" in note for note in found.notes)


def test_a_recipe_holds_the_choice(plain, tmp_path):
    """A picture without kernels is made again without; they would change its pixels by rounding."""
    result = joyjax.edit(plain, None, "a red circle", steps=1)
    result.save(tmp_path / "plain.png")
    chosen = dataclasses.replace(result, settings={**result.settings, "kernels": "qk_norm_rope=mosaic"})
    chosen.save(tmp_path / "kernels.png")
    files = [tmp_path / name for name in ("plain.png", "kernels.png")]
    assert [read_recipe(file)["model"]["kernels"] for file in files] == ["xla", "qk_norm_rope=mosaic"]
    assert [read_replay(file, None, None, None).kernels for file in files] == ["xla", None]


def test_two_choices_are_two_programs(plain):
    weights = plain.weights["transformer"]
    chosen = dataclasses.replace(weights, kernels=Kernels(qk_norm_rope="triton"))
    assert (str(weights.kernels), str(chosen.kernels)) == ("xla", "qk_norm_rope=triton")
    keys = {jax.tree.structure(each) for each in (weights, chosen, dataclasses.replace(weights))}
    assert len(keys) == 2
    assert chosen.filled({path: leaf.get_value() for path, leaf in joyjax.layers.weights.leaves(weights.state).items()})


def test_a_measured_choice_in_an_edit(plain, tmp_path, monkeypatch):
    """`auto` where there is a kernel: measured at the first edit, said once, and in the result's settings."""
    monkeypatch.setattr(
        kernel_choice,
        "measure",
        lambda case, kernel: Measured(case.operation, kernel, case.operation == NORM, "", 3.0, 2.0),
    )
    measured = dataclasses.replace(plain, kernels=chooser(tmp_path))
    with pytest.warns(joyjax.AdviceWarning, match="kernels: measured in .* s: triton for layer_norm_scale_shift"):
        first = joyjax.edit(measured, **EDIT)
    assert first.settings["kernels"] == "layer_norm_scale_shift=triton"
    second = joyjax.edit(measured, **{**EDIT, "seed": 2})
    assert not [note for note in second.notes if "measured" in note]


def test_info_lists_the_measurements(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "no kernels have been measured here" in succeed("info", "--kernels").stdout
    assert json.loads(succeed("info", "--kernels", "--json").stdout) == []
    rows = [
        Measured(NORM, "mosaic", True, "", 132.0, 117.0),
        Measured(RESIDUAL, "mosaic", False, "RuntimeError: no such \x1b[31m instruction"),
        Measured(ROTATION, "mosaic", False, "0.99 × XLA's speed, below 1.02", 99.0, 100.0),
    ]
    key = dataclasses.replace(kernel_cache.Key.of(jax.devices()[0], "bfloat16", "mosaic", SHAPE), device="H100")
    kernel_cache.write(key, rows, kernel_cache.cache_folder())
    (kernel_cache.cache_folder() / "damaged.json").write_text("{")
    lines = succeed("info", "--kernels").stdout.splitlines()
    assert lines[0].startswith("H100, driver ")
    assert lines[1] == "bfloat16, 2 × (5 + 3) tokens of 256 channels, 4 heads of 64"
    assert [line.split()[:4] for line in lines[3:]] == [
        [NORM, "132.0", "117.0", "mosaic"],
        [RESIDUAL, "–", "–", "xla"],
        [ROTATION, "99.0", "100.0", "xla"],
    ]
    assert [line.split(maxsplit=4)[4] for line in lines[3:]] == [
        "1.13 × XLA's speed",
        "RuntimeError: no such \\x1b[31m instruction",
        "0.99 × XLA's speed, below 1.02",
    ]
    [held] = json.loads(succeed("info", "--kernels", "--json").stdout)
    assert held == {**key.plain(), "rows": [dataclasses.asdict(row) for row in rows]}
    for more in (["x"], ["--verify"], ["--mesh", "tensor=2"]):
        assert invoke("info", "--kernels", *more).exit_code == 2
    assert invoke("info").exit_code == 2


def test_bench_and_warmup_measure(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "kernel_of", lambda device: "triton")
    monkeypatch.setattr(
        kernel_choice, "measure", lambda case, kernel: Measured(case.operation, kernel, False, "slow", 2.0, 3.0)
    )
    done = succeed("bench", "-n", 1, "--steps", 1, "--dtype", "float32")
    assert done.stderr.count("kernels: measured in 0.0 s: XLA for all") == 1
    assert "float32, kernels xla\n" in done.stdout
    assert "measured" not in succeed("bench", "-n", 1, "--steps", 1, "--dtype", "float32").stderr
    done = succeed("warmup", "--references", 0, "--dtype", "float32")  # another shape
    assert done.stderr.count("kernels: measured in 0.0 s: XLA for all") == 1


def test_two_processes_follow_the_first(tmp_path):
    first, second = run_two(PROGRAM, lambda rank: [str(tmp_path / str(rank))])
    assert first["chosen"] == second["chosen"] == [", ".join(f"{name}=triton" for name in OPERATIONS)] * 2
    assert first["measured"] == list(OPERATIONS)
    assert second["measured"] == second["notes"] == []
    assert len(first["notes"]) == 1
    assert not (tmp_path / "1").exists()
