"""Environment variables: a wrong value is named with what is expected, and right ones pass."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from invoke import start

import joyjax
from joyjax.commands import environment as checks
from joyjax.errors import JoyJaxError
from joyjax.sharding import devices


def refused(check, *arguments: object, says: str) -> None:
    with pytest.raises(JoyJaxError) as caught:
        check(*arguments)
    assert says in str(caught.value)
    assert "unset" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [checks.MEMORY, checks.OLDER_MEMORY])
def test_the_share_of_memory(name):
    for value in ("0.5", "1", ".75", "1e-1", ""):
        checks.check_memory({name: value})
    for value in ("0", "-1", "1.5", "75%", "0,5", "nan", "inf", "much"):
        refused(checks.check_memory, {name: value}, says=f"{name} is {value!r}; expected the share of a GPU's memory")
    checks.check_memory({name: "4.0", "TF_FORCE_UNIFIED_MEMORY": "1"})
    refused(checks.check_memory, {name: "4.0", "TF_FORCE_UNIFIED_MEMORY": "0"}, says=f"{name} is '4.0'")


def test_the_share_of_memory_has_one_name():
    both = {checks.MEMORY: "0.5", checks.OLDER_MEMORY: "0.6"}
    refused(checks.check_memory, both, says="is '0.5' and XLA_PYTHON_CLIENT_MEM_FRACTION, its older name, is '0.6'")
    checks.check_memory({**both, checks.OLDER_MEMORY: ""})


def test_visible_gpus():
    good = (
        "",
        "0",
        "0,1",
        " 1 , 0",
        "0,",
        "-1",
        "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
        "GPU-8932,0",
        "NoDevFiles",
    )
    for value in (None, *good, "MIG-GPU-8932f937-d72c/1/2", "MIG-8932f937-d72c-4106"):
        checks.check_gpus(value, 2)
    for value in ("abc", "all", "cuda:0", "0;1", "0 1", "0,x", ",", "1.0"):
        refused(checks.check_gpus, value, 0, says=f"CUDA_VISIBLE_DEVICES is {value!r}, and ")
    refused(checks.check_gpus, "0,9", 2, says="CUDA_VISIBLE_DEVICES is '0,9', and the GPUs here are 0 to 1")
    checks.check_gpus("9", 0)  # how many there are is not known


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_switches_of_the_hub(name):
    """Against the hub's own reading: what it takes for yes passes, and what it silently takes for no does not."""
    from huggingface_hub.constants import _is_true

    for value in ("1", "on", "ON", "yes", "True"):
        assert _is_true(value)
        checks.check_hub({name: value})
    for value in ("", "0", "off", "No", "false"):
        checks.check_hub({name: value})
    for value in ("y", "t", "ja", "2", " 1", "offline"):
        assert not _is_true(value)
        refused(checks.check_hub, {name: value}, says=f"{name} is {value!r}, which huggingface_hub takes for no")


def test_the_size_of_the_cache():
    for value in (None, "-1", "0", "2147483648", "2_000"):
        checks.check_cache_size(value)
    for value in ("2GiB", "", "1e9", "-5", "1.5"):
        refused(checks.check_cache_size, value, says=f"JAX_COMPILATION_CACHE_MAX_SIZE is {value!r}; expected a whole")


@pytest.fixture
def clean(monkeypatch, tmp_path) -> Path:
    """The environment without a cache of its own; what a check sets goes again."""
    for name in (checks.CACHE_DIR, checks.CACHE_SIZE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", [checks.CACHE_DIR, "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("kind", ["file", "below a file", "not writable"])
def test_an_unusable_cache_folder_is_one_note(clean, monkeypatch, capsys, name, kind):
    (clean / "file").touch()
    place = {"file": clean / "file", "below a file": clean / "file" / "x", "not writable": Path("/proc/none")}[kind]
    monkeypatch.setenv(name, str(place))
    checks.keep_compiled_programs()
    assert os.environ[checks.CACHE_DIR] == ""
    said = capsys.readouterr().err
    assert said.startswith(f"compiled programs are not kept: {place}")
    assert f"set {name} to another folder" in said
    assert said.count("\n") == 1


def test_cache_folders_that_are_used(clean, monkeypatch, capsys):
    checks.keep_compiled_programs()
    assert os.environ[checks.CACHE_DIR] == str(clean / ".cache" / "joyjax" / "compiled")
    for value in ("", "gs://bucket/programs"):
        monkeypatch.setenv(checks.CACHE_DIR, value)
        checks.keep_compiled_programs()
        assert os.environ[checks.CACHE_DIR] == value
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(clean)
    monkeypatch.setenv(checks.CACHE_DIR, "here/programs")
    checks.keep_compiled_programs()
    assert list((clean / "here" / "programs").iterdir()) == []
    monkeypatch.delenv(checks.CACHE_DIR)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    checks.keep_compiled_programs()
    assert os.environ[checks.CACHE_DIR] == str(clean / ".cache" / "joyjax" / "compiled")
    assert "XDG_CACHE_HOME is 'relative'; it must be an absolute path" in capsys.readouterr().err


XLA = {
    "--nonsense=1": "XLA does not know --nonsense=1",
    "--xla_force_host_platform_device_count=2 --no --such": "XLA does not know --no --such",
    "nonsense": "nonsense is neither a flag with -- nor a file",
    "--xla_force_host_platform_device_count=x": "the value x for flag xla_force_host_platform_device_count:",
}


def test_flags_that_xla_does_not_know():
    for flags, says in XLA.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XLA_FLAGS", flags)
            refused(checks._check_xla_flags, flags, says=f"XLA_FLAGS is {flags!r}; ")
            refused(checks._check_xla_flags, flags, says=says)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        checks._check_xla_flags("--xla_force_host_platform_device_count=2")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unusable_folder_of_the_hub(monkeypatch, tmp_path, offline):
    """It is named where a hub id is asked for, and only there."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    code = "from joyjax.convert.source.model import model_folder as find; find(None)\ntry:\n    find('some/one')\n"
    code += "except Exception as error:\n    print(error)"
    settings = {**os.environ, "HF_HUB_OFFLINE": offline}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=True)
    assert f"the folder of the hub's files cannot be used: {tmp_path / 'file'}" in done.stdout
    assert "set HF_HOME to a folder that can be written" in done.stdout


def test_devices_are_those_of_jax():
    assert devices.devices() == jax.devices()
    assert devices.cpu_device().platform == "cpu"


@pytest.mark.parametrize(
    ("values", "installed", "says"),
    [
        ({"JAX_PLATFORMS": "cuda"}, ["cpu"], "no NVIDIA GPU.*; installed: cpu; unset JAX_PLATFORMS, .*cuda13"),
        (
            {"JAX_PLATFORMS": "gpu"},
            ["cpu", "cuda"],
            r"no NVIDIA GPU.*\(no driver\); installed: cpu, cuda; unset [A-Z_]+$",
        ),
        ({"JAX_PLATFORMS": "cpu,nonsense"}, ["cpu"], "JAX has no platform 'nonsense' here; installed: cpu; unset"),
        ({"JAX_PLATFORMS": "CPU"}, ["cpu"], "JAX has no platform 'CPU' here"),
        ({"JAX_PLATFORM_NAME": "tpu"}, ["cpu"], "JAX_PLATFORM_NAME is 'tpu', but JAX has no platform 'tpu'"),
        ({}, ["cpu"], "JAX finds no device to run on: broken"),
    ],
)
def test_a_platform_that_is_not_here(monkeypatch, values, installed, says):
    """JAX's own answers are those of the processes below; here only what is said of them."""

    def fails() -> None:
        try:
            raise RuntimeError("no driver")
        except RuntimeError:
            devices.LOGGER.exception("a plugin failed")
        raise RuntimeError("broken")

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setattr(devices, "_installed", lambda: installed)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", values.get("JAX_PLATFORMS"))
    try:
        for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(JoyJaxError, match=says):
            devices.devices()
    finally:
        jax.config.update("jax_platforms", before)


def test_a_failing_plugin_is_one_line(monkeypatch, caplog):
    """JAX logs a traceback where, say, CUDA's plugin is installed and no GPU is there."""
    real = jax.devices

    def logs() -> list:
        try:
            raise RuntimeError("no\ndriver.")
        except RuntimeError:
            devices.LOGGER.exception("a plugin failed")
        return real()

    monkeypatch.setattr(jax, "devices", logs)
    with caplog.at_level(logging.WARNING):
        assert devices.devices() == real()
    [record] = caplog.records
    assert record.exc_info is None
    assert record.getMessage().endswith("other devices than cpu: no driver")


def test_the_library_names_a_platform_that_is_not_here():
    """In a process of its own, with JAX as it is: an assertion without a text becomes an error that says what to do."""
    code = "import joyjax\ntry:\n    joyjax.load()\nexcept joyjax.JoyJaxError as error:\n    print(error)"
    for value, says in (("nonsense", "JAX has no platform 'nonsense' here"), ("cuda", "JAX_PLATFORMS is 'cuda', but ")):
        if value == "cuda" and any(Path("/dev").glob("nvidia[0-9]*")):
            continue
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": value}
        )
        assert says in done.stdout, done
        assert "unset JAX_PLATFORMS" in done.stdout
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("JAX_PLATFORMS", "nonsense", "but JAX has no platform 'nonsense' here; installed: cpu"),
        ("JAX_PLATFORM_NAME", "nonsense", "but JAX has no platform 'nonsense' here; installed: cpu"),
        ("JAX_ENABLE_X64", "maybe", "expected one of y, yes, t, true, on, 1, n, no, f, false, off, 0"),
        ("JAX_NUM_CPU_DEVICES", "two", "JAX refuses it"),
        ("XLA_FLAGS", "--nonsense", "XLA does not know --nonsense"),
        ("CUDA_VISIBLE_DEVICES", "all", "'all' names no GPU"),
    ],
)
def test_the_program_ends_with_one_line(monkeypatch, tmp_path, name, value, says):
    if name == "JAX_PLATFORM_NAME":
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # a right one does not hide it
    monkeypatch.setenv(name, value)
    process = start("edit", "make the red circle blue", "--output", tmp_path / "a.png")
    out, said = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    [*stages, line] = said.splitlines()
    assert stages in ([], ["loading"])
    assert line.startswith(f"joyjax: {name} is {value!r}")
    assert says in line
    assert not (tmp_path / "a.png").exists()


def test_help_is_there_whatever_the_environment_says(monkeypatch):
    monkeypatch.setattr(checks, "check_memory", lambda *_: pytest.fail("checked"))
    for arguments in (["--help"], ["edit", "-h"], ["--version"], []):
        checks.check_environment(arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")
def test_the_picture_is_the_same_in_64_bits():
    """JAX_ENABLE_X64 changes the type of what has none; nothing in an edit is without."""
    pipeline, made, promotion = joyjax.load(), [], jax.config.jax_numpy_dtype_promotion
    try:
        jax.config.update("jax_numpy_dtype_promotion", "standard")  # a user's, not that of these tests
        for value in (False, True):
            jax.config.update("jax_enable_x64", value)
            result = joyjax.edit(pipeline, None, "a red circle", steps=1, height=64, width=64, exact_size=True)
            made.append(result.image.tobytes())
    finally:
        jax.config.update("jax_enable_x64", False)
        jax.config.update("jax_numpy_dtype_promotion", promotion)
    assert made[0] == made[1]
