"""What a checkpoint says of itself: size and settings that are not its family's."""

import json
import shutil

import pytest

import joyjax
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.manifest import is_converted
from joyjax.convert.source.model import DEMO
from joyjax.errors import CheckpointError
from joyjax.families.joyimage import EDIT
from joyjax.runtime.load import load
from joyjax.runtime.request import check_request

ARGUMENTS = dict.fromkeys(("negative_prompt", "steps", "guidance_scale", "height", "width", "base_size", "noise"))


def settings(pipeline, **options):
    request = check_request(pipeline, None, "red", **{**ARGUMENTS, "seed": 0, "exact_size": False, **options})
    return request.base_size, request.steps, request.guidance_scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo with other settings, so that none is a default of the code."""
    folder = shutil.copytree(DEMO, tmp_path_factory.mktemp("native") / "model")
    (folder / "joyjax.json").write_text('{"base_size": 96, "steps": 3, "guidance_scale": 1.5}')
    return folder


def test_a_diffusers_folder_names_its_settings(folder):
    assert not is_converted(folder)
    pipeline = load(folder)
    assert pipeline.base_size == 96
    assert settings(pipeline) == (96, 3, 1.5)
    assert settings(pipeline, base_size=256, steps=7, guidance_scale=1.0) == (256, 7, 1.0)


def test_a_converted_folder_keeps_them(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "converted", EDIT.components)
    assert is_converted(tmp_path / "converted")
    assert settings(load(tmp_path / "converted")) == (96, 3, 1.5)


def test_without_them_the_family_decides(folder, tmp_path):
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "joyjax.json").unlink()
    assert settings(load(plain)) == (1024, 40, 4.0)
    (plain / "joyjax.json").write_text("{}")
    assert settings(load(plain)) == (1024, 40, 4.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"base_size": "128"}, "base_size is '128'; expected a positive whole number"),
        ({"base_size": 0}, "base_size is 0"),
        ({"base_size": 100}, "base_size is 100; expected a multiple of 16 from 32"),
        ({"base_size": True}, "base_size is True"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance_scale": "strong"}, "guidance_scale is 'strong'"),
        ({"guidance_scale": float("nan")}, "guidance_scale.* is nan"),
        ({"learned": "everything"}, "learned is 'everything'; expected null or one of shapes"),
    ],
)
def test_settings_that_cannot_be(folder, tmp_path, raw, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "joyjax.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        load(broken)


def test_the_demo_is_what_is_loaded_when_nothing_is_named():
    pipeline = joyjax.load()
    assert pipeline.source == str(DEMO)
    assert pipeline.generation_defaults == GenerationDefaults.read(DEMO)
    assert (pipeline.base_size, pipeline.generation_defaults.domain) == (128, "shapes")
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) <= 12e6
