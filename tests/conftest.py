"""Set-up before JAX starts, and the checkpoints that several tests share."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import compile_cache

os.environ.update(compile_cache.settings())
os.environ[compile_cache.KEEP] = "0"

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile("same", derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("same")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Optional real configs, tokenizer and photographs, beside this checkout; tests that need them are skipped otherwise.
REFERENCE = Path(os.environ.get("JOYJAX_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))


def relative_error(ours, theirs) -> float:
    """Return the largest difference over the largest value of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="session")
def error():
    """The error measure of parity tests: largest difference over the largest value of the reference."""
    return relative_error


@pytest.fixture(scope="session")
def reference_files() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip(
            f"the model's own configs and tokenizer are not at {REFERENCE} (JOYJAX_REFERENCE names another folder)"
        )
    return REFERENCE


@pytest.fixture(scope="session", autouse=True)
def _no_gradients():
    """The reference is only ever run forward."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_grad_enabled(False)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Give subprocesses of tests a cache folder of the test run."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def reference():
    """Diffusers' own pipeline on a tiny checkpoint with strong random weights, float32."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import random_checkpoint

        return random_checkpoint.make_pipeline("tiny")


@pytest.fixture(scope="session")
def checkpoint(reference, tmp_path_factory) -> Path:
    """The folder of the tiny checkpoint, as Diffusers writes it."""
    import random_checkpoint

    return random_checkpoint.save(reference, tmp_path_factory.mktemp("tiny"))


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # once, before any worker starts
        compile_cache.remove_incomplete()


def pytest_collection_modifyitems(config, items) -> None:
    """Deselect the nightly tests, unless `-m` mentions them or a test is selected by its name."""
    if "nightly" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def pytest_report_header() -> str:
    return f"python {sys.version.split()[0]}, jax {jax.__version__}"


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The tiny checkpoint in joyjax, float32."""
    import joyjax

    return joyjax.load(checkpoint, dtype="float32")


def qwen_reference_of(make: str, *args, **options):
    """A pipeline of Diffusers by this function of qwen_checkpoint.py."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import qwen_checkpoint

        return getattr(qwen_checkpoint, make)(*args, **options)


@pytest.fixture(scope="session")
def qwen_reference():
    """Diffusers' own Qwen-Image pipeline on a tiny checkpoint with strong random weights, float32."""
    return qwen_reference_of("make_pipeline")


@pytest.fixture(scope="session")
def qwen_folder(qwen_reference, tmp_path_factory) -> Path:
    """The folder of the tiny Qwen-Image checkpoint, as Diffusers writes it."""
    from qwen_checkpoint import save

    return save(qwen_reference, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def qwen_loaded(qwen_folder):
    """The tiny Qwen-Image checkpoint in joyjax, float32."""
    import joyjax

    return joyjax.load(qwen_folder, dtype="float32")


@pytest.fixture(scope="session")
def layered_reference(qwen_reference):
    """Diffusers' own Qwen-Image-Layered pipeline, tiny, with strong random weights, float32."""
    import layered_checkpoint

    return layered_checkpoint.make_pipeline(qwen_reference)


@pytest.fixture(scope="session")
def layered_folder(layered_reference, tmp_path_factory) -> Path:
    """The folder of the tiny Qwen-Image-Layered checkpoint, as Diffusers writes it."""
    import layered_checkpoint

    return layered_checkpoint.save_layered(layered_reference, tmp_path_factory.mktemp("layered"))


@pytest.fixture(scope="session")
def layered_loaded(layered_folder):
    """The tiny Qwen-Image-Layered checkpoint in joyjax, float32."""
    import joyjax

    return joyjax.load(layered_folder, dtype="float32")


@pytest.fixture(scope="session")
def qwen_edit_reference():
    """Diffusers' own Qwen-Image-Edit pipeline on a tiny checkpoint with strong random weights, float32."""
    return qwen_reference_of("make_edit_pipeline", "edit")


@pytest.fixture(scope="session")
def qwen_edit_folder(qwen_edit_reference, tmp_path_factory) -> Path:
    """The folder of the tiny Qwen-Image-Edit checkpoint, as Diffusers writes it."""
    from qwen_checkpoint import save

    return save(qwen_edit_reference, tmp_path_factory.mktemp("qwen-edit"))


@pytest.fixture(scope="session")
def qwen_edit_loaded(qwen_edit_folder):
    """The tiny Qwen-Image-Edit checkpoint in joyjax, float32."""
    import joyjax

    return joyjax.load(qwen_edit_folder, dtype="float32")


@pytest.fixture(scope="session")
def qwen_plus_reference():
    """Diffusers' own Qwen-Image-Edit-Plus pipeline on a tiny checkpoint with strong random weights, float32."""
    return qwen_reference_of("make_edit_pipeline", "edit-plus", seed=3)


@pytest.fixture(scope="session")
def qwen_plus_folder(qwen_plus_reference, tmp_path_factory) -> Path:
    """The folder of the tiny Qwen-Image-Edit-Plus checkpoint, as Diffusers writes it."""
    from qwen_checkpoint import save

    return save(qwen_plus_reference, tmp_path_factory.mktemp("qwen-plus"))


@pytest.fixture(scope="session")
def qwen_plus_loaded(qwen_plus_folder):
    """The tiny Qwen-Image-Edit-Plus checkpoint in joyjax, float32."""
    import joyjax

    return joyjax.load(qwen_plus_folder, dtype="float32")


@pytest.fixture(scope="session")
def qwen_2511_reference():
    """Diffusers' own Qwen-Image-Edit-Plus pipeline of the version 2511: references are at time 0."""
    return qwen_reference_of("make_edit_pipeline", "edit-plus", seed=5, zero_cond_t=True)


@pytest.fixture(scope="session")
def qwen_2511_loaded(qwen_2511_reference, tmp_path_factory):
    """The same in joyjax, float32."""
    import qwen_checkpoint

    import joyjax

    folder = qwen_checkpoint.save(qwen_2511_reference, tmp_path_factory.mktemp("qwen-2511"))
    return joyjax.load(folder, dtype="float32")
