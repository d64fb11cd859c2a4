"""Help grouped by subject, and usage errors with a remedy.

Usage errors of click and typer are caught here and raised again with a remedy; the exit status is 2, as usual.
"""

import codecs
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from joyjax.errors import RequestError
from joyjax.options import BASIC, EDIT, SUBJECTS
from joyjax.reading import LOCALE, printable

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's class, which newer versions of typer bundle

MANY = 12
TEXTS = ("prompt", "prompt_option", "negative_prompt")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")


class Command(TyperCommand):
    """A command whose help is grouped by subject, and whose usage errors have a remedy."""

    allow_extra_args = True  # they are refused below, with a message of our own

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            RequestError: for an argument that the locale cannot decode.
        """
        written = list(args)
        check_decoded(written)
        long = {option for param in self.params for option in param.opts if option.startswith("--")}
        for argument in written[: written.index("--")] if "--" in written else written:
            if len(argument) > 2 and f"-{argument}" in long:  # click parses -image as -i mage
                raise _usage(f"No such option: {argument}; use -{argument}", ctx)
        try:
            super().parse_args(ctx, args)
        except UsageError as error:
            option = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and isinstance(option, str):
                raise _usage(self._unknown(option, written, ctx, error), ctx) from None
            raise
        check_decoded((ctx.params.get(name) for name in TEXTS), names=False)
        if ctx.args and not ctx.resilient_parsing:
            raise _usage(self._extra(ctx), ctx)
        given = any(ctx.params.get(name) is not None for name in ("prompt", "prompt_option", "recipe"))
        if self._has("prompt") and not given and (lost := next(filter(_is_lost_prompt, written), None)):
            raise _usage(_with_dash(lost), ctx)
        return ctx.args

    def _unknown(self, option: str, written: list[str], ctx: Any, error: Any) -> str:
        """Return the message for an unknown option, with a remedy."""
        full = next((argument for argument in written if argument.startswith(option)), option)
        if self._has("prompt") and (" " in full.partition("=")[0].strip() or full[1:2].isdigit()):
            return _with_dash(full)
        names = [full.partition("=")[0], option]  # of -steps, click reports -s
        remedies = (instead for name in names if (instead := remedy(name, self, _others(ctx))))
        message = f"No such option: {names[0] if full.startswith('-') else option}"
        return f"{message}; {found}" if (found := next(remedies, "")) else error.format_message()

    def _extra(self, ctx: Any) -> str:
        """Return the message for extra arguments."""
        extra = [str(argument) for argument in ctx.args]
        if self._has("prompt"):
            words = [*filter(None, [ctx.params.get("prompt")]), *extra]
            if files := [word for word in words if _is_picture(word)]:
                return f"pictures are named with --image, one for each: {' '.join(f'--image {file}' for file in files)}"
            return f'the prompt is several arguments; put it into quotes: joyjax edit "{" ".join(words)}"'
        return f"Got unexpected extra argument(s) ({' '.join(extra)})"

    def _has(self, name: str) -> bool:
        return any(param.name == name for param in self.params)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by subject, the basic ones first."""
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *SUBJECTS)}
        params = self.get_params(ctx)
        grouped = len(params) > MANY
        for param in params:
            record = param.get_help_record(ctx)
            if record is None:
                continue
            subject = (getattr(param, "rich_help_panel", None) or BASIC) if grouped else BASIC
            records["Arguments" if param.param_type_name == "argument" else subject].append(record)
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Program(TyperGroup):
    """The group of commands, whose usage errors have a remedy."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments before the command."""
        check_decoded(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            option = getattr(error, "option_name", None)
            if type(error).__name__ != "NoSuchOption" or not isinstance(option, str):
                raise
            if found := _having(option, self.commands) or remedy(option, self, self.commands):
                raise _usage(f"No such option before the command: {option}; {found}", ctx) from None
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command; the error for an unknown one suggests another."""
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        from joyjax.names import COMMANDS  # only needed for errors

        if meant := COMMANDS.get(name.lower()):
            raise _usage(f"No such command {name!r}; use joyjax {meant}", ctx)
        if " " in name.strip():
            raise _usage(f'No such command {name!r}; to edit, write joyjax edit "{name}" --image FILE', ctx)
        if _is_picture(name):
            raise _usage(f'No such command {name!r}; to edit it, write joyjax edit "…" --image {name}', ctx)
        try:
            return super().resolve_command(ctx, args)
        except UsageError as error:
            if len(args) > 1 and "Did you mean" not in str(error):
                raise _usage(
                    f'No such command {name!r}; to edit, write joyjax edit "the prompt" --image FILE', ctx
                ) from None
            raise


def remedy(option: str, command: Any, others: Mapping[str, Any]) -> str:
    """Return what to write instead of an unknown option; empty if there is no suggestion. `others`: other commands."""
    from joyjax.names import INSTEAD, normalized

    plain = normalized(option)
    dashed = _dashed(plain)
    own = _options(command)
    if dashed in own:
        return f"use {dashed}"
    instead = INSTEAD.get(plain)
    if instead is None:
        return _elsewhere(dashed, command, others)
    wanted = [instead.option] if instead.option else [_dashed(argument) for argument in instead.arguments]
    if wanted and all(one in own for one in wanted):
        note = "" if instead.option or not instead.note else f", {instead.note}"
        return f"use {' and '.join(wanted)}{note}"
    found = next(filter(None, (_elsewhere(one, command, others) for one in wanted)), "")
    return found or (instead.note if not wanted else f"use {' and '.join(instead.arguments)} of joyjax.edit in Python")


def _elsewhere(option: str, command: Any, others: Mapping[str, Any]) -> str:
    """Return where an option exists that this command does not have; empty if nowhere."""
    from joyjax.names import normalized

    argument = normalized(option)
    if command.name == "batch" and argument in EDIT and EDIT[argument].row:
        return f'a row of the requests has it, as "{argument}"'
    return _having(option, others)


def _having(option: str, commands: Mapping[str, Any]) -> str:
    name = next((name for name, command in commands.items() if option in _options(command)), None)
    return "" if name is None else f"joyjax {name} has {option}"


def _others(ctx: Any) -> Mapping[str, Any]:
    return {} if ctx.parent is None else getattr(ctx.parent.command, "commands", {})


def _options(command: Any) -> set[str]:
    return {option for param in command.params if param.param_type_name == "option" for option in param.opts}


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_lost_prompt(argument: str) -> bool:
    """Whether click parses a prompt that begins with "-" as a short option: `-make it red` as `-m "ake it red"`."""
    return argument[:1] == "-" and argument[1:2].isalpha() and " " in argument and not Path(argument[2:1000]).exists()


def _with_dash(prompt: str) -> str:
    quoted = prompt if " " in prompt else f"{prompt} …"
    return f'a prompt that begins with "-" is written --prompt="{quoted}"'


def _is_picture(word: str) -> bool:
    return word.lower().endswith(PICTURES) and " " not in word or Path(word[:1000]).is_file()


def _usage(message: str, ctx: Any) -> Exception:
    return UsageError(printable(message), ctx)


def check_decoded(texts: Iterable[object], *, names: bool = True) -> None:
    """Check that the locale could decode the arguments.

    With `names`, they may be file names, which may hold any bytes in a UTF-8 locale.

    Raises:
        RequestError: naming the encoding and the variable to set.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    if names and encoding == "utf-8":
        return
    for text in texts:
        if isinstance(text, str) and any("\udc80" <= letter <= "\udcff" for letter in text):
            remedy = "have the terminal send UTF-8" if encoding == "utf-8" else LOCALE
            raise RequestError(f"{text!r} cannot be read as {encoding}, the encoding of the locale; {remedy}")
