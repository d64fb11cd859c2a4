"""The table of other programs' names: what it recommends exists, and what Diffusers' users type is in it."""

import inspect
import re

import pytest
import typer

import joyjax
from joyjax.cli import app
from joyjax.errors import RequestError
from joyjax.names import ARGUMENTS, COMMANDS, INSTEAD, checks_names, normalized, refusal

PROGRAM = typer.main.get_command(app)
OPTIONS = {option for param in PROGRAM.commands["edit"].params for option in param.opts}
IN_PYTHON_ONLY = {"noise", "callback", "progress"}
FUNCTIONS = {"edit": joyjax.edit, "load": joyjax.load, "edit_batch": joyjax.edit_batch}


@pytest.mark.parametrize("name", ["edit", "load", "edit_batch"])
def test_the_arguments_are_those_of_the_functions(name):
    assert ARGUMENTS.keys() == FUNCTIONS.keys()
    assert list(ARGUMENTS[name]) == [one for one in inspect.signature(FUNCTIONS[name]).parameters if one != "pipeline"]


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_recommended_exists(name):
    instead = INSTEAD[name]
    assert instead.arguments or instead.note, "no remedy"
    assert set(instead.arguments) <= {*ARGUMENTS["edit"], *ARGUMENTS["load"]}
    assert not instead.option or instead.option in OPTIONS
    for argument in set(instead.arguments) - IN_PYTHON_ONLY:
        assert "--" + argument.replace("_", "-") in OPTIONS
    assert set(re.findall(r"--[\w-]+", instead.note)) <= OPTIONS
    for command in re.findall(r"`joyjax (\w+)", instead.note):
        assert command in PROGRAM.commands
    assert "\n" not in instead.note


def test_names_are_written_alike_and_not_our_own():
    assert [name for name in INSTEAD if normalized(name) != name] == []
    assert set(INSTEAD) & {argument for arguments in ARGUMENTS.values() for argument in arguments} == set()
    assert set(COMMANDS) & set(PROGRAM.commands) == set()
    assert set(COMMANDS.values()) <= set(PROGRAM.commands)


def test_no_name_has_two_remedies():
    from joyjax.names import _TABLE

    names = [name for names, _ in _TABLE for name in names.split()]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parity
def test_every_argument_of_diffusers_pipelines_is_known():
    """Those of its JoyImage and Qwen-Image-Edit pipelines, and of `from_pretrained` as its documentation has them."""
    diffusers = pytest.importorskip("diffusers")
    known = {*ARGUMENTS["edit"], *INSTEAD}
    for name in (
        "JoyImageEditPipeline",
        "JoyImageEditPlusPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    ):
        theirs = set(inspect.signature(getattr(diffusers, name).__call__).parameters) - {"self"}
        assert theirs - known == set(), name
    inpaint = set(inspect.signature(diffusers.QwenImageEditInpaintPipeline.__call__).parameters) - {"self"}
    assert inpaint - known == set()
    usual = "torch_dtype variant revision device_map cache_dir use_safetensors low_cpu_mem_usage token local_files_only"
    assert set(usual.split()) <= set(INSTEAD)


@pytest.mark.parametrize(
    ("name", "function", "says"),
    [
        (
            "generator",
            "edit",
            "'generator' is not an argument of edit: use seed, a whole number; joyjax draws its own noise",
        ),
        ("strength", "edit", "every edit starts from noise, so there is no strength; leave it out"),
        ("size", "edit", "use height and width"),
        ("latents", "edit", "use noise, [1, height/8, width/8, channels], channels last"),
        ("n", "edit", "call edit once for each seed, or edit_batch with one request for each seed"),
        ("num_outputs", "edit", "call edit once for each seed"),
        ("image_path", "edit", "use image"),
        ("Guidance-Scale", "edit", "'Guidance-Scale' is not an argument of edit: use guidance_scale"),
        ("dtype", "edit", "use dtype of joyjax.load (--dtype on the command line)"),
        ("batch_size", "edit", "use batch_size of joyjax.edit_batch"),
        ("stepz", "edit", "'stepz' is not an argument of edit: did you mean steps?; choose from: image, prompt, "),
        ("frobnicate", "edit", "'frobnicate' is not an argument of edit; choose from: image, prompt, "),
        ("x" * 5000, "edit", "'" + "x" * 100 + "' is not an argument of edit; choose from: "),
        (7, "edit", "'7' is not an argument of edit; choose from: "),
        ("revision", "load", 'write it into the hub id of the model, as in "owner/name@main"'),
        ("device", "load", "JAX_PLATFORMS"),
        ("pretrained_model_name_or_path", "load", "use model"),
        ("num_inference_steps", "load", "use steps of joyjax.edit"),
        ("num_inference_steps", "edit_batch", "use steps of joyjax.edit"),
    ],
)
def test_what_is_said(name, function, says):
    said = refusal([name], function, ARGUMENTS[function])
    assert says in said
    assert "\n" not in said


def test_a_function_that_checks_names_keeps_its_signature():
    def plain(pipeline: str, *, steps: int = 4) -> int:
        """Return the steps."""
        return steps

    checked = checks_names(plain)
    assert inspect.signature(checked) == inspect.signature(plain)
    assert (checked.__doc__, checked.__name__) == (plain.__doc__, "plain")
    assert checked("p", steps=3) == 3
    for arguments, options, says in (
        (("p",), {"num_steps": 3}, "'num_steps' is not an argument of plain: use steps"),
        ((), {}, "joyjax.plain: missing a required argument: 'pipeline'; call it as joyjax.plain"),
        (("p", 3), {}, "joyjax.plain: too many positional arguments"),
    ):
        with pytest.raises(RequestError, match=re.escape(says)):
            checked(*arguments, **options)

    @checks_names
    def fails() -> None:
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        fails()


def test_the_public_functions_show_their_arguments():
    for name, function in FUNCTIONS.items():
        assert "kwargs" not in str(inspect.signature(function))
        assert function.__name__ == name
