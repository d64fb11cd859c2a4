"""Types of option values: how a value is checked in Python, parsed from the command line, and stored in a recipe.

Plain functions, not pydantic: its strict number types refuse NumPy scalars, all its messages would have to be replaced,
and importing it takes 0.14 s.
"""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable
from typing import Any

from joyjax.errors import RequestError

JSONCheck = tuple[Callable[[Any], bool], str]  # a predicate of a JSON value, and what it expects


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


TEXT: JSONCheck = lambda value: isinstance(value, str), "a text"
YES_OR_NO: JSONCheck = lambda value: isinstance(value, bool), "true or false"
WHOLE: JSONCheck = lambda value: type(value) is int, "a whole number"
NUMBER: JSONCheck = _is_number, "a number"
LIST: JSONCheck = _is_list_of_numbers, "a list of numbers"
NUMBERS: JSONCheck = lambda value: _is_number(value) or _is_list_of_numbers(value), "a number or a list of numbers"


def or_null(check: JSONCheck) -> JSONCheck:
    """Return the check that also accepts null."""
    passes, expected = check
    return lambda value: value is None or passes(value), f"{expected} or null"


def _same(value: Any) -> Any:
    return value


def _unchecked(name: str, value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class OptionType:
    """A type of option values.

    Attributes:
        expected: accepted values, for documentation.
        check: takes an option's name and a value given in Python, and returns the value of the request; raises
            RequestError. Pictures and arrays are checked where they are read.
        json: the check of the value in a recipe.
        plain: converts the value of a request to JSON.
        cli: the Python type of the value on the command line.
        parse: converts the value on the command line to the one in Python; raises ValueError.
        metavar: placeholder of the value in help.
        bounds: lowest and highest whole number.
        choices: all allowed values.
    """

    expected: str
    check: Callable[[str, Any], Any] = _unchecked
    json: JSONCheck = TEXT
    plain: Callable[[Any], Any] = _same
    cli: type = str
    parse: Callable[[Any], Any] = _same
    metavar: str | None = None
    bounds: tuple[int, int] | None = None
    choices: tuple[str | int, ...] = ()


def text() -> OptionType:
    """Any text."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise RequestError(f"{name} is a {type(value).__name__}; expected a str")
        return value

    return OptionType("text", check, metavar="TEXT")


def switch() -> OptionType:
    """True or False; an option without a value on the command line."""

    def check(name: str, value: Any) -> bool:
        from numpy import bool_

        if not isinstance(value, bool | bool_):
            raise RequestError(f"{name} is {value!r:.200}; expected True or False")
        return bool(value)

    return OptionType("True or False", check, YES_OR_NO, cli=bool)


def whole(lowest: int, highest: int) -> OptionType:
    """A whole number within bounds."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            shown = " ".join(repr(value).split())  # an array's has several lines
            raise RequestError(f"{name} is {shown[:200]}; expected a whole number")
        if not lowest <= int(value) <= highest:
            raise RequestError(f"{name} is {value}; expected a number from {lowest} to {highest}")
        return int(value)

    expected = f"whole number from {lowest} to {highest}"
    return OptionType(expected, check, WHOLE, cli=int, metavar="N", bounds=(lowest, highest))


def seed() -> OptionType:
    """A seed. Generators and keys of other libraries are refused: joyjax draws the noise itself."""
    number = whole(0, 2**64 - 1)

    def check(name: str, value: Any) -> int:
        module, kind = type(value).__module__.partition(".")[0], type(value).__name__
        if module != "builtins" and not isinstance(value, numbers.Integral):
            known = ", such as the one that the generator was seeded with" if "Generator" in kind else ""
            raise RequestError(
                f"{name} is a {module} {kind}; expected a whole number{known}: joyjax draws its own noise from it, and "
                "noise of your own is given as noise"
            )
        return number.check(name, value)

    def parse(written: str) -> int | str:
        if written != "random" and not written.isdecimal():
            raise ValueError(f"{written!r} is not a whole number from 0, nor `random`")
        return written if written == "random" else int(written)

    expected = "whole number from 0 to 2⁶⁴ - 1; on the command line and in a row also `random`"
    return OptionType(expected, check, WHOLE, parse=parse, metavar="N|random")


def number(expected: str, accepts: Callable[[float], bool], remedy: str = "") -> OptionType:
    """A number that `accepts` returns True for; `remedy` is advice for the error."""

    def check(name: str, value: Any) -> float:
        return _accepted(name, _number(name, value), accepts, f"{expected}{remedy and '; '}{remedy}")

    return OptionType(expected, check, NUMBER, cli=float, metavar="X")


def number_or_one_a_step(expected: str, accepts: Callable[[float], bool]) -> OptionType:
    """A number, or a list with one value per step, which is a tuple in the request."""

    def check(name: str, value: Any) -> float | tuple[float, ...]:
        several = _is_sequence(value)
        values = _numbers(name, value) if several else (_number(name, value),)
        checked = tuple(_accepted(name, one, accepts, expected) for one in values)
        return checked if several else checked[0]

    def parse(written: str) -> float | list[float]:
        values = _parsed_numbers(written)
        return values if len(values) > 1 else values[0]

    return OptionType(f"{expected}; or a list, one for each step", check, NUMBERS, _plain_list, str, parse, "X")


def falling_levels(most: int) -> OptionType:
    """Up to `most` noise levels, each below the one before, from at most 1 to above 0."""
    expected = f"1 to {most} falling levels from at most 1 to above 0"

    def check(name: str, value: Any) -> tuple[float, ...]:
        levels = _numbers(name, value)
        falling = all(a > b for a, b in itertools.pairwise(levels))
        if not levels or not falling or not 0 < levels[-1] <= levels[0] <= 1 or len(levels) > most:
            raise RequestError(f"{name} are {value!r:.200}; expected {expected}")
        return levels

    return OptionType(f"list of {expected}", check, LIST, _plain_list, str, _parsed_numbers, "X,…")


def choice(*choices: str | int) -> OptionType:
    """One of several texts, or one of several whole numbers."""
    kind = type(choices[0])

    def check(name: str, value: Any) -> str | int:
        fits = isinstance(value, str if kind is str else numbers.Integral) and not isinstance(value, bool)
        if not fits or value not in choices:
            colon = ":" if kind is str else ""
            raise RequestError(f"{name} is {value!r}; choose one of{colon} {', '.join(map(str, choices))}")
        return kind(value)

    shown = ", ".join(f"`{one}`" for one in choices)
    return OptionType(shown, check, TEXT if kind is str else WHOLE, parse=kind, choices=choices)


def files(expected: str) -> OptionType:
    """Pictures: file names on the command line and in rows, pictures in Python."""
    return OptionType(expected, metavar="FILE")


def function(expected: str) -> OptionType:
    """A function; only in Python."""

    def check(name: str, value: Any) -> Callable:
        if not callable(value):
            raise RequestError(f"{name} is {value!r}; expected a {expected}, or None")
        return value

    return OptionType(expected, check)


def _accepted(name: str, value: float, accepts: Callable[[float], bool], expected: str) -> float:
    if not accepts(value):  # a comparison with NaN is False
        raise RequestError(f"{name} is {value:g}; expected {expected}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} is {value!r:.200}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise RequestError(f"{name} is {value!r:.40}…; expected a number that fits into 64 bits") from None


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not _is_sequence(values):
        raise RequestError(f"{name} is {values!r:.200}; expected a list of numbers")
    return tuple(_number(name, value) for value in values)


def _is_sequence(value: Any) -> bool:
    from numpy import ndarray

    return isinstance(value, list | tuple | ndarray)


def _parsed_numbers(written: str) -> list[float]:
    try:
        return [float(part) for part in written.split(",")]
    except ValueError:
        raise ValueError(f"{written!r} is not a number, nor numbers with commas between them") from None


def _plain_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
