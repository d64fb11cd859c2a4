"""What the tests stand on: where compiled programs are kept, and which tests wait for the night."""

from pathlib import Path
from types import SimpleNamespace

import compile_cache
import pytest


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JOYJAX_TEST_CACHE", str(tmp_path))
    return compile_cache.folder()


def test_entries_that_were_cut_off_are_removed(place):
    place.mkdir()
    for name in ("whole-cache", "whole-atime", "half-cache", "other"):
        (place / name).write_bytes(b"x")
    compile_cache.remove_incomplete()
    assert sorted(path.name for path in place.iterdir()) == ["other", "whole-atime", "whole-cache"]


def test_there_may_be_no_folder_yet(place):
    compile_cache.remove_incomplete()
    assert not place.exists()
    settings = compile_cache.settings()
    assert settings.keys() == set(compile_cache.SETTINGS)
    assert settings["JAX_COMPILATION_CACHE_DIR"] == str(place)


def test_nothing_is_kept_where_no_place_is_wanted(monkeypatch):
    monkeypatch.setenv("JOYJAX_TEST_CACHE", "")
    assert compile_cache.settings() == {}
    compile_cache.remove_incomplete()


def test_a_fresh_folder_hides_what_is_kept(place, tmp_path):
    environment = {"PATH": "/bin", **compile_cache.settings(), "XDG_CACHE_HOME": "elsewhere"}
    assert compile_cache.fresh(environment, tmp_path / "own") == {
        "PATH": "/bin",
        "XDG_CACHE_HOME": str(tmp_path / "own"),
    }


@pytest.mark.parametrize(
    ("expression", "arguments", "left"),
    [
        ("", ["tests"], ["quick"]),
        ("not slow", [], ["quick"]),
        ("nightly", [], ["quick", "long"]),  # pytest itself then leaves the quick one out
        ("nightly or not nightly", [], ["quick", "long"]),
        ("", ["tests/test_x.py::long"], ["quick", "long"]),
    ],
)
def test_nightly_tests_wait_until_they_are_asked_for(expression, arguments, left, request):
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    deselected = []
    config = SimpleNamespace(
        option=SimpleNamespace(markexpr=expression),
        args=arguments,
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(item.name for item in items)),
    )
    items = [
        SimpleNamespace(name=name, get_closest_marker=lambda marker, own=own: own == marker)
        for name, own in (("quick", "jax"), ("long", "nightly"))
    ]
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == left
    assert deselected == [name for name in ("quick", "long") if name not in left]
