"""The environment variables of JAX, XLA, CUDA and the hub: defaults of joyjax, and checks of the user's values.

Some wrong values end the process inside XLA, some raise errors without a message, and some are ignored. The platform is
checked where JAX's devices are first used (joyjax/sharding/devices.py); JAX checks its other variables at import.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from joyjax.errors import JoyJaxError

KEEP = "JOYJAX_KEEP_PROGRAMS"
CACHE_DIR, CACHE_SIZE = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
MEMORY, OLDER_MEMORY = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
TRUE, FALSE = ("1", "on", "yes", "true"), ("0", "off", "no", "false", "")
JAX_BOOLEANS = ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0")  # jax._src.config.bool_env
GPU = re.compile(r"-?\d+|(GPU|MIG)-[\w/-]+|NoDevFiles")  # NoDevFiles: what Slurm sets for a job without GPUs
XLA_ERRORS = (
    (re.compile(r"Unknown flags? in XLA_FLAGS: (.*)"), "XLA does not know {}"),
    (
        re.compile(r'Could not open file "(.*?)" to read flags'),
        "{} is neither a flag with -- nor a file",
    ),
    (re.compile(r"Couldn't interpret value (.*? for flag \S+?)\.?$", re.MULTILINE), "XLA cannot read the value {}"),
)


def check_environment(arguments: Sequence[str]) -> None:
    """Set joyjax's defaults of variables that the user did not set, and check the user's values.

    Nothing is checked if `arguments` ask for help. Call it before JAX is imported.

    Raises:
        JoyJaxError: for the first variable with a wrong value.
    """
    if not arguments or {"--help", "-h", "--version"} & set(arguments):
        return
    check_memory(os.environ)
    check_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), _gpus_here())
    check_hub(os.environ)
    check_cache_size(os.environ.get(CACHE_SIZE))
    if os.environ.get("XLA_FLAGS", "").strip():
        _check_xla_flags(os.environ["XLA_FLAGS"])
    # JAX's default is three quarters of a GPU's memory, which is too little for the larger models.
    if not os.environ.get(OLDER_MEMORY):
        os.environ.setdefault(MEMORY, "0.95")
    keep_compiled_programs()


def check_memory(environment: os._Environ | dict[str, str]) -> None:
    """Raise JoyJaxError unless JAX's share of a GPU's memory is given at most once, as a valid number."""
    given = {name: environment[name] for name in (MEMORY, OLDER_MEMORY) if environment.get(name)}
    if len(given) > 1:
        raise JoyJaxError(
            f"{MEMORY} is {given[MEMORY]!r} and {OLDER_MEMORY}, its older name, is {given[OLDER_MEMORY]!r}; JAX takes "
            f"one of them: unset {OLDER_MEMORY}"
        )
    unified = environment.get("TF_FORCE_UNIFIED_MEMORY", "0").lower() not in FALSE  # host memory may be used, too
    for name, value in given.items():
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not 0 < share <= (sys.float_info.max if unified else 1):
            raise JoyJaxError(
                f"{name} is {value!r}; expected the share of a GPU's memory, above 0 and up to 1, such as 0.75: "
                "correct it, or unset it"
            )


def check_gpus(value: str | None, gpus: int) -> None:
    """Raise JoyJaxError unless CUDA can parse CUDA_VISIBLE_DEVICES; `gpus` is the number of GPUs, 0 if unknown.

    CUDA itself ignores a name that it cannot parse and all after it, and the edit would run on the CPU.
    """
    if not value:  # no GPU is visible
        return
    for name in value.removesuffix(",").split(","):
        if not GPU.fullmatch(name.strip()):
            raise JoyJaxError(
                f"CUDA_VISIBLE_DEVICES is {value!r}, and {name.strip()!r} names no GPU; expected numbers from 0, as in "
                "0,1, or names as `nvidia-smi -L` prints them, GPU-… or MIG-…; -1 hides all; or unset it"
            )
        if gpus and name.strip().isdecimal() and int(name) >= gpus:
            raise JoyJaxError(
                f"CUDA_VISIBLE_DEVICES is {value!r}, and the GPUs here are 0 to {gpus - 1}: correct it, or unset it"
            )


def _gpus_here() -> int:
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def check_hub(environment: os._Environ | dict[str, str]) -> None:
    """Raise JoyJaxError for a misspelt switch of the hub, which the hub would read as "off"."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        value = environment.get(name, "")
        if value.lower() not in TRUE + FALSE:
            raise JoyJaxError(
                f"{name} is {value!r}, which huggingface_hub takes for no; expected {', '.join(TRUE)}, or {FALSE[0]}: "
                "correct it, or unset it"
            )


def check_cache_size(value: str | None) -> None:
    """Raise JoyJaxError unless JAX can parse the size limit of its compilation cache."""
    try:
        good = value is None or int(value) >= -1
    except ValueError:
        good = False
    if not good:
        raise JoyJaxError(
            f"{CACHE_SIZE} is {value!r}; expected a whole number of bytes, such as {2**31} for 2 GiB, or -1 for no "
            "limit: correct it, or unset it"
        )


def _check_xla_flags(flags: str) -> None:
    """Raise JoyJaxError for flags that end the process inside XLA; a subprocess tries them, in half a second."""
    tried = subprocess.run(
        [sys.executable, "-c", "import jaxlib.xla_client as client; client.make_cpu_client()"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    for pattern, reason in XLA_ERRORS if tried.returncode else ():
        if found := pattern.search(tried.stderr):
            raise JoyJaxError(f"XLA_FLAGS is {flags!r}; {reason.format(found[1])}: correct it, or unset XLA_FLAGS")


def refused_by_jax(error: Exception) -> str | None:
    """Return the reason if JAX raised an error about one of its variables at import; None for other errors."""
    found = re.search(r"(?:JAX flag|environment) '?(jax_\w+)", str(error), re.IGNORECASE)
    name = "" if found is None or not isinstance(error, ValueError) else found[1].upper()
    if name not in os.environ:
        return None
    expected = f"expected one of {', '.join(JAX_BOOLEANS)}" if "truth value" in str(error) else "JAX refuses it"
    return f"{name} is {os.environ[name]!r}; {expected}: correct it, or unset it"


def keep_compiled_programs() -> None:
    """Enable JAX's persistent compilation cache, unless the user has set its variables.

    If the folder is not writable, a note is printed and the cache is off.
    """
    os.environ.setdefault(CACHE_SIZE, str(2**31))  # bytes; least recently used programs are removed first
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault(KEEP, "1")  # programs of the stages, without tracing: joyjax/programs/
    named, cache = CACHE_DIR, os.environ.get("XDG_CACHE_HOME", "")
    if cache and not os.path.isabs(cache):
        _note(f"XDG_CACHE_HOME is {cache!r}; it must be an absolute path: ~/.cache is used")
        cache = ""
    if CACHE_DIR not in os.environ:
        named = "XDG_CACHE_HOME" if cache else "HOME"
        os.environ[CACHE_DIR] = os.path.join(cache or os.path.expanduser("~/.cache"), "joyjax", "compiled")
    folder = os.environ[CACHE_DIR]
    # Empty: the user turned the cache off. JAX writes to URLs such as gs://… too.
    fault = _folder_fault(folder) if folder and "://" not in folder else None
    if fault is not None:
        other = "" if named == CACHE_DIR else f", or {CACHE_DIR}"
        _note(
            f"compiled programs are not kept: {folder} cannot be written ({fault}); "
            f"set {named} to another folder{other}"
        )
        os.environ[CACHE_DIR] = ""


def _folder_fault(folder: str) -> str | None:
    """Return why a folder is not writable, or None; the folder is created if missing."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as tried:
            tried.write(bytes(2**16))
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _note(text: str) -> None:
    from joyjax.commands.console import note

    note(text)
