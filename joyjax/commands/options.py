"""Options of the command line, declared from the table of options, and loading a model with them."""

import enum
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joyjax.errors import RequestError
from joyjax.options import EDIT, LOAD, RECORDS, Option

if TYPE_CHECKING:
    from joyjax.runtime.load import Pipeline

TABLE: Mapping[str, Option] = {**EDIT, **LOAD}
OF_EDIT = tuple(name for name, option in EDIT.items() if option.command_line)
COMPILING = tuple(name for name in OF_EDIT if EDIT[name].compiles)
OF_LOAD = tuple(name for name, option in LOAD.items() if option.command_line)


def declared(name: str, **more: Any) -> Any:
    """Return typer's declaration of an option of the table; `more` overrides arguments of typer.Option."""
    option = TABLE[name]
    default = option.shown_default()
    lowest, highest = option.type.bounds or (None, None)
    declaration = {
        "help": option.help + (f"  [default: {default}]" if default else ""),
        "metavar": option.metavar or option.type.metavar,
        "rich_help_panel": option.subject,
        "show_default": False,
        **({"min": lowest, "max": highest} if option.type.cli is int else {}),
    }
    return typer.Option(*filter(None, (option.flag, option.short)), **{**declaration, **more})


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options of the table to a command, as keyword arguments with their values in Python, or None.

    Options in the command's signature keep their position and declaration, and the value that typer reads.
    """

    def declare(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        more = [name for name in names if name not in signature.parameters]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
            for name in more
        ]

        @functools.wraps(command)
        def read(**arguments: Any) -> None:
            command(**{name: parsed(name, value) if name in more else value for name, value in arguments.items()})

        read.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined] # typer reads it
        return read

    return declare


@functools.cache
def _annotation(name: str) -> Any:
    option = TABLE[name]
    choices = {str(choice): str(choice) for choice in option.type.choices}
    kind: Any = option.type.cli
    if choices:
        kind = enum.StrEnum(option.name, choices)  # type: ignore[misc,no-redef] # known at run time
    return Annotated[kind | None, declared(name)]


def parsed(name: str, value: Any) -> Any:
    """Convert the value of an option from typer to Python.

    Raises:
        typer.BadParameter: if the value is invalid.
    """
    if value is None:
        return None
    option = TABLE[name]
    try:
        return option.type.parse(value.value if isinstance(value, enum.Enum) else value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option.flag) from None


def given(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the options that the user gave."""
    return {name: options[name] for name in names if options.get(name) is not None}


def quantized_form(options: Mapping[str, Any]) -> str | None:
    """Return the form given by --quantize or --linear; None if neither is given.

    Raises:
        typer.BadParameter: if they contradict each other.
    """
    forms = given(options, ("quantize", "linear"))
    if len(set(forms.values())) > 1:
        raise typer.BadParameter(
            f"is {forms['quantize']}, and --linear, another name of it, is {forms['linear']}; give one of them",
            param_hint="--quantize",
        )
    return next(iter(forms.values()), None)


def load_pipeline(folder: Path, options: Mapping[str, Any], form: str | None) -> "Pipeline":
    """Load a model with a progress bar, by a command's options; None stands for the default of `joyjax.load`.

    `form` is that of `quantized_form`, which a command calls before it reads anything.
    """
    import joyjax.runtime.load
    from joyjax.commands.collector import settle
    from joyjax.commands.progress import loading
    from joyjax.sharding.mesh import parse_mesh

    settle()
    with loading("loading") as advance:
        return joyjax.load(
            folder,
            dtype=options["dtype"] or LOAD["dtype"].default,
            mesh=None if options["mesh"] is None else parse_mesh(options["mesh"]),
            progress=advance,
            quantize=form,
            kernels=options["kernels"] or LOAD["kernels"].default,
        )


class DType(enum.StrEnum):
    """The dtypes of the table, for commands with another help text."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Form(enum.StrEnum):
    """The forms of stored kernels, for commands with another help text."""

    EXACT = "exact"
    FLOAT8 = "float8"


Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.", rich_help_panel=RECORDS)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=RECORDS)]
AllowPrivateURLs = Annotated[
    bool,
    typer.Option(
        "--allow-private-urls",
        help="Also fetch pictures from URLs of private and loopback addresses: your own network, or this machine.",
        rich_help_panel=RECORDS,
    ),
]


def make_folder(option: str, folder: Path) -> None:
    """Create a folder for results if it is missing.

    Raises:
        RequestError: naming the option, if it is not a folder, cannot be created, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{option} is {folder}, which is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{option} is {folder}, which cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{option} is {folder}, which is not writable; name another folder")
