"""The table of options, and all that is made from it or written beside it: none may differ."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jaxtyping
import models_page
import numpy as np
import pytest
import typer
from invoke import invoke
from options_page import PAGE, page
from PIL import Image

import joyjax
from joyjax.cli import app
from joyjax.commands.options import COMPILING, DType, Form
from joyjax.errors import RequestError
from joyjax.families.registry import FAMILIES
from joyjax.families.request import Request
from joyjax.names import ARGUMENTS
from joyjax.option_types import OptionType, choice, number, or_null
from joyjax.options import BASIC, DTYPES, EDIT, EXACT, LOAD, REQUIRED, SAMPLING, SUBJECTS, CacheRule, Option
from joyjax.provenance.recipe import SETTING_DEFAULTS, SETTINGS
from joyjax.runtime.request import check_request
from joyjax.runtime.result import settings
from joyjax.storage.forms import FORMS

COMMANDS = typer.main.get_command(app).commands
# What a request has in the place of an option, and what only the command line has.
HELD_AS = {"image": ("pictures", "originals", "sources"), "mask": ("mask", "mask_source"), "callback": ()}
OF_COMMAND_ALONE = set(
    "prompt_option output recipe num_images distributed preview_dir quality allow_private_urls no_metadata timings "
    "profile debug".split()
)
PICTURE = Image.new("RGB", (48, 32))


@dataclasses.dataclass(frozen=True)
class Places:
    """Where an option of an edit stands."""

    table: Mapping[str, Option]
    signature: Mapping[str, inspect.Parameter]
    docstring: tuple[str, ...]
    request: tuple[str, ...]
    settings: Mapping[str, Any]
    setting_defaults: Mapping[str, Any]
    command: Mapping[str, Any]
    arguments: tuple[str, ...]


def places() -> Places:
    section = inspect.getdoc(joyjax.edit).partition("Args:\n")[2].partition("\n\n")[0]
    named = re.findall(r"^    ([\w, ]+): ", section, re.MULTILINE)
    return Places(
        table=EDIT,
        signature=inspect.signature(joyjax.edit).parameters,
        docstring=tuple(name for names in named for name in names.split(", ")),
        request=tuple(field.name for field in dataclasses.fields(Request)),
        settings=SETTINGS,
        setting_defaults=SETTING_DEFAULTS,
        command={param.name: param for param in COMMANDS["edit"].params},
        arguments=ARGUMENTS["edit"],
    )


def faults(at: Places) -> list[str]:
    """Return every difference between the places."""
    found, table = [], at.table

    def same(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            found.append(f"{what}: {ours} is not {theirs}")

    same("signature", list(at.signature), ["pipeline", *table])
    same("docstring", list(at.docstring), ["pipeline", *table])
    same("arguments", list(at.arguments), list(table))
    general = [name for name, option in table.items() if option.every_family]
    same("request", set(at.request), {"own", *(held for name in general for held in HELD_AS.get(name, (name,)))})
    same("settings", list(at.settings), [name for name, option in table.items() if option.in_recipe])
    missing = {name: option.missing for name, option in table.items() if option.in_recipe}
    same("defaults", dict(at.setting_defaults), {name: v for name, v in missing.items() if v is not REQUIRED})
    by_command = {name for name, option in table.items() if option.command_line}
    loading = {name for name, option in LOAD.items() if option.command_line}
    same("command", set(at.command), by_command | loading | OF_COMMAND_ALONE)
    for name, option in table.items():
        same("name", name, option.name)
        parameter, param = at.signature.get(name), at.command.get(name)
        if parameter is not None and name not in ("image", "prompt"):  # which are given by position
            same(f"default of {name}", parameter.default, option.default)
        if option.missing is not REQUIRED and name in at.settings:
            same(f"{name} in a recipe", at.settings[name][0](option.missing), True)
            same(f"what a recipe without {name} means", option.missing, option.default)
        if param is not None and name != "prompt":
            same(f"flags of {name}", set(param.opts), {option.flag, option.short} - {""})
            same(f"help of {name}", param.help.partition("  [default: ")[0], option.help)
            same(f"subject of {name}", param.rich_help_panel or BASIC, option.subject)
    return found


def test_every_place_has_the_same_options():
    assert faults(places()) == []


def without(mapping: Mapping, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}


def changed(option: str, **changes: Any):
    return lambda at: {"table": {**at.table, option: dataclasses.replace(at.table[option], **changes)}}


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lambda at: {"table": without(at.table, "fit")}, "signature"),
        (lambda at: {"table": {**at.table, "sharpness": Option("sharpness", choice("low"), "x")}}, "signature"),
        (lambda at: {"signature": without(at.signature, "fit")}, "signature"),
        (lambda at: {"signature": dict(reversed(at.signature.items()))}, "signature"),
        (lambda at: {"signature": {**at.signature, "fit": at.signature["seed"]}}, "default of fit"),
        (lambda at: {"docstring": tuple(name for name in at.docstring if name != "width")}, "docstring"),
        (lambda at: {"request": tuple(name for name in at.request if name != "vae_decode")}, "request"),
        (lambda at: {"request": (*at.request, "sharpness")}, "request"),
        (lambda at: {"settings": without(at.settings, "cache")}, "settings"),
        (lambda at: {"settings": {**at.settings, "cache": (lambda value: value == 1, "1")}}, "cache in a recipe"),
        (lambda at: {"setting_defaults": {**at.setting_defaults, "fit": "pad"}}, "defaults"),
        (lambda at: {"command": without(at.command, "steps")}, "command"),
        (lambda at: {"command": {**at.command, "noise": at.command["steps"]}}, "command"),
        (lambda at: {"command": {**at.command, "steps": at.command["height"]}}, "help of steps"),
        (lambda at: {"arguments": at.arguments[:-1]}, "arguments"),
        (changed("fit", default="pad"), "default of fit"),
        (changed("fit", missing="pad"), "what a recipe without fit means"),
        (changed("fit", in_recipe=False), "settings"),
        (changed("fit", command_line=False), "command"),
        (changed("fit", every_family=False), "request"),
        (changed("fit", name="fits"), "name"),
        (changed("fit", subject=SAMPLING), "subject of fit"),
        (changed("fit", short="-f"), "flags of fit"),
    ],
)
def test_a_planted_difference_is_found(plant, says):
    at = places()
    assert any(fault.startswith(says) for fault in faults(dataclasses.replace(at, **plant(at))))


def test_types_of_the_signature_are_those_of_the_table():
    for name, hint in get_type_hints(joyjax.edit).items():
        if get_origin(hint) is Literal:
            assert get_args(hint) == EDIT[name].type.choices
    literal = {name for name, hint in get_type_hints(joyjax.edit).items() if get_origin(hint) is Literal}
    assert literal == {"fit", "vae_encode", "vae_decode"}
    assert tuple(DType) == DTYPES == LOAD["dtype"].type.choices
    assert tuple(Form) == LOAD["quantize"].type.choices == LOAD["linear"].type.choices == (EXACT, *FORMS)


def test_the_table_is_sound():
    for option in {**EDIT, **LOAD}.values():
        assert option.subject in SUBJECTS
        assert option.help.endswith(".")
        assert not re.search("[Bb]ucket|[Jj]oy(AI|Image)|Qwen|Edit-Plus", option.help + option.type.expected)
        assert option.in_recipe or option.missing is REQUIRED
        if option.default not in (None, REQUIRED):
            assert option.check(option.default) == option.default
    for family in FAMILIES.values():
        assert {*family.defaults, *family.without, *family.hints} <= EDIT.keys()
        inherited = {name for name, option in EDIT.items() if option.inherited and family.has(option)}
        assert inherited <= family.defaults.keys()


def test_warmup_takes_what_compiles_another_program():
    assert COMPILING == (
        *("guidance_scale", "guidance_until", "cfg_normalize", "base_size", "layers", "vae_encode", "vae_decode"),
        "cache",
    )
    assert set(COMPILING) <= {param.name for param in COMMANDS["warmup"].params}


def test_the_page_is_made_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_page_of_models_is_made_from_the_registry():
    assert models_page.PAGE.read_text(encoding="utf-8") == models_page.page()


ONE_MORE = """
import contextlib, io, json, sys
from joyjax import options
from joyjax.option_types import number
options.EDIT["warmth"] = options.Option(
    "warmth", number("a number up to 9", lambda value: value <= 9), "How warm.", 0.5,
    every_family=False, in_recipe=True, missing=0.5, compiles=True, subject=options.SAMPLING,
)
from joyjax.batch.rows import read_rows
from joyjax.cli import app
from joyjax.commands.options import COMPILING
from joyjax.names import ARGUMENTS
from joyjax.provenance.recipe import read_recipe
import typer
print_help = io.StringIO()
with contextlib.redirect_stdout(print_help), contextlib.suppress(SystemExit):
    typer.main.get_command(app).commands["edit"].main(["--help"], prog_name="joyjax")
print(json.dumps({
    "help": print_help.getvalue(), "arguments": ARGUMENTS["edit"], "compiling": COMPILING,
    "row": read_rows(__import__("pathlib").Path(sys.argv[1]))[0].error, "recipe": read_recipe(sys.argv[2])["settings"],
}))
"""


def test_one_entry_adds_an_option(tmp_path):
    """Help, names, warmup, rows and recipes have it, those of recipes written before with its default."""
    (tmp_path / "r.jsonl").write_text('{"prompt": "x", "warmth": 3}')
    old = PAGE.parents[1] / "tests" / "data" / "edit-0.1.0.png"
    command = [sys.executable, "-P", "-c", ONE_MORE, str(tmp_path / "r.jsonl"), str(old)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sampling = found["help"].partition("\nSampling:\n")[2].partition("\n\n")[0]
    assert re.search(r"--warmth X +How warm\.  \[default: 0\.5\]", sampling)
    assert "warmth" in found["arguments"]
    assert "warmth" in found["compiling"]
    assert found["row"] is None
    assert found["recipe"]["warmth"] == 0.5


@pytest.fixture
def as_users_run_it():
    """Without the type checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def demo():
    return joyjax.load(dtype="float32")


def planned(pipeline, **options):
    return pipeline.family.plan(check(pipeline, **options), pipeline.parts)


def with_family(pipeline, **changes):
    return dataclasses.replace(pipeline, family=dataclasses.replace(pipeline.family, **changes))


def check(pipeline, image=None, **options):
    return check_request(pipeline, image, "a red star", **options)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_option_that_the_family_does_not_have(demo):
    """Its neutral value is taken, as rows and recipes may name it; another is an error that says what to do."""
    lacking = frozenset({"image", "mask", "paste_back", "fit", "vae_encode", "base_size", "negative_prompt"})
    plain = with_family(
        demo,
        name="Painter",
        without=lacking,
        hints={"image": "an editing model takes one"},
        defaults={"steps": 50, "guidance_scale": 4.0},
    )
    neutral = {"fit": "crop", "mask": None, "paste_back": np.False_, "vae_encode": "exact", "base_size": None}
    request = check(dataclasses.replace(plain, generation_defaults=type(demo.generation_defaults)()), **neutral)
    assert (request.steps, request.base_size, request.negative_prompt) == (50, 0, "")
    for options, says in (
        ({"image": PICTURE}, "image is given, but Painter has no such option; an editing model takes one"),
        ({"image": [PICTURE]}, "image is given, but Painter has no such option"),
        ({"mask": PICTURE}, "mask is given, but Painter has no such option; leave it out"),
        ({"fit": "pad"}, "fit is 'pad', but Painter has no such option; leave it out"),
        ({"paste_back": True}, "paste_back is True, but Painter has no such option; leave it out"),
        ({"vae_encode": "tiled"}, "vae_encode is 'tiled', but Painter has no such option; leave it out"),
        ({"base_size": 512}, "base_size is 512, but Painter has no such option; leave it out"),
        ({"negative_prompt": "blue"}, "negative_prompt is 'blue', but Painter has no such option; leave it out"),
    ):
        with pytest.raises(RequestError, match=re.escape(says)):
            check(plain, **options)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_option_that_only_some_families_have(demo, monkeypatch):
    """A family that names a default has it: its requests and recipes too; others refuse it."""
    warmth = number("a number up to 9", lambda value: value <= 9)
    option = Option("warmth", warmth, "How warm.", inherited=True, every_family=False, in_recipe=True, missing=None)
    monkeypatch.setitem(EDIT, "warmth", option)
    monkeypatch.setitem(SETTINGS, "warmth", or_null(warmth.json))
    warm = with_family(demo, defaults={**demo.family.defaults, "warmth": 0.5})
    assert check(warm).own == {"warmth": 0.5}
    assert check(warm, warmth=2).own == {"warmth": 2.0}
    assert check(demo).own == {}
    assert settings(warm, planned(warm, warmth=2))["warmth"] == 2.0
    assert "warmth" not in settings(demo, planned(demo))
    for pipeline, value, says in (
        (demo, 2, "warmth is 2.0, but JoyImage-Edit has no such option; leave it out"),
        (warm, 10, "warmth is 10; expected a number up to 9"),
        (warm, "hot", "warmth is 'hot'; expected a number"),
    ):
        with pytest.raises(RequestError, match=re.escape(says)):
            check(pipeline, warmth=value)


@pytest.mark.usefixtures("as_users_run_it")
def test_settings_keep_the_neutral_value_of_an_option_that_the_family_lacks(demo):
    plan = planned(demo)
    found = settings(with_family(demo, without=frozenset({"base_size", "fit"})), plan)
    assert (found["base_size"], found["fit"]) == (None, "crop")
    assert settings(demo, plan)["base_size"] == 128


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_argument_of_a_request(demo):
    with pytest.raises(RequestError, match="'sharpness' is not an argument of edit"):
        check(demo, sharpness=3)


@pytest.mark.parametrize("name", [name for name, option in EDIT.items() if option.in_recipe and name != "noise"])
def test_what_a_request_has_is_plain_in_a_recipe(name):
    """It passes the check of the recipe, also from JSON and back, and gives the same request again."""
    values: dict[str, Any] = {
        **dict.fromkeys(("prompt", "negative_prompt"), "x"),
        **{"steps": 3, "sigmas": [1.0, 0.5], "guidance_scale": [2, 1.0], "guidance_until": 0.5, "seed": np.uint64(7)},
        **{"height": np.int32(64), "width": 64, "exact_size": np.True_, "base_size": 256, "fit": "pad"},
        **{"layers": 3, "cfg_normalize": np.True_},
        **{"paste_back": True, "vae_encode": "auto", "vae_decode": "tiled", "cache": "first-block:0.05"},
    }
    option = EDIT[name]
    held = option.check(values[name])
    plain = json.loads(json.dumps(option.type.plain(held)))
    assert SETTINGS[name][0](plain)
    assert option.check(plain) == held


def test_types_hold_no_state():
    assert [
        field.name for field in dataclasses.fields(OptionType) if field.default_factory is not dataclasses.MISSING
    ] == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        EDIT["fit"].name = "x"
    assert str(CacheRule.parse("taylor:0.1")) == "taylor:0.1"


LOADING = [("edit", "x"), ("batch", "r.jsonl", "-o", "out"), ("warmup",), ("bench",), ("score",)]


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The options of each call of `joyjax.load` by a command, which goes no further."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "cache")
    (tmp_path / "r.jsonl").write_text('{"prompt": "x"}')
    found: list[dict[str, Any]] = []

    def load(*_: Any, **options: Any) -> None:
        found.append(options)
        raise joyjax.JoyJaxError("far enough")

    monkeypatch.setattr(joyjax, "load", load)
    return found


@pytest.mark.parametrize("command", LOADING, ids=lambda command: command[0])
def test_quantize_and_its_other_name(command, loaded):
    """Both reach `joyjax.load`; not given, neither does; unlike, they are wrong usage, before anything is read."""
    for more in ([], ["--quantize", "float8"], ["--linear", "exact"], ["--quantize", "float8", "--linear", "float8"]):
        assert str(invoke(*command, *more).exception) == "far enough"
    assert [options.get("quantize", options.get("linear")) for options in loaded] == [None, "float8", "exact", "float8"]
    done = invoke(*command, "--quantize", "float8", "--linear", "exact")
    assert done.exit_code == 2
    assert "--quantize: is float8, and --linear, another name of it, is exact" in " ".join(done.stderr.split())
    assert invoke(*command, "--quantize", "int3").exit_code == 2
    assert len(loaded) == 4


@pytest.mark.parametrize("command", LOADING, ids=lambda command: command[0])
def test_kernels_reach_loading(command, loaded):
    for more in ([], ["--kernels", "xla"], ["--kernels", "pallas"]):
        assert str(invoke(*command, *more).exception) == "far enough"
    assert [options["kernels"] for options in loaded] == ["auto", "xla", "pallas"]
    assert invoke(*command, "--kernels", "mosaic").exit_code == 2
