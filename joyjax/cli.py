"""The `joyjax` program: its commands, exit statuses, and one-line errors.

0: done. 1: the work failed, with the reason on standard error. 2: wrong usage. Results go to standard output, progress
and notes to standard error. Nothing heavy is imported before a command runs.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from joyjax.commands import batch, bench, convert, edit, info, score, train_demo, warmup
from joyjax.commands.cancel import finish
from joyjax.commands.collector import leave
from joyjax.commands.environment import check_environment, refused_by_jax
from joyjax.commands.usage import Command, Program
from joyjax.errors import Cancelled, JoyJaxError
from joyjax.reading import printable

app = typer.Typer(
    name="joyjax",
    cls=Program,
    help="Edit and make pictures with open diffusion models, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: brackets in it are text
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("edit", cls=Command)(edit.command)
app.command("batch", cls=Command)(batch.command)
app.command("convert", cls=Command)(convert.command)
app.command("info", cls=Command)(info.command)
app.command("score", cls=Command)(score.command)
app.command("warmup", cls=Command)(warmup.command)
app.command("bench", cls=Command)(bench.command)
app.command("train-demo", cls=Command)(train_demo.command)


def _show_version(value: bool) -> bool:
    if value:
        import joyjax

        typer.echo(joyjax.__version__)
        raise typer.Exit
    return value


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Edit and make pictures with open diffusion models, in JAX."""


def main() -> None:
    """Run the program and leave with its status."""
    debug = "--debug" in sys.argv[1:]
    try:
        check_environment(sys.argv[1:])
        app()  # leaves by itself: 0 when done, 2 on wrong usage
    except Cancelled:
        _fail("cancelled", debug)
    except JoyJaxError as error:
        _fail(str(error), debug)
    except (OSError, MemoryError) as error:
        _fail(f"{type(error).__name__}: {error}", debug)
    except Exception as error:  # a user gets one line; --debug shows the rest
        internal = f"internal error, {type(error).__name__}: {error} (--debug shows where)"
        _fail(refused_by_jax(error) or internal, debug)
    finally:
        finish()
        leave()


def _fail(reason: str, debug: bool) -> NoReturn:
    shown = f"joyjax: {reason}"
    if debug:
        import traceback

        shown = f"{traceback.format_exc()}{shown}"
    typer.echo(printable(shown), err=True)  # a reason may quote a file
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # cleanup is done; do not wait for work that is still queued on the devices
