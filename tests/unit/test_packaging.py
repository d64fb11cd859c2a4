"""What pyproject.toml puts into a wheel is what lies in the folders."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import joyjax

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "convert", "sharding")  # folders at the top that are imported as joyjax.NAME
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Every folder that holds Python files, by the name of its package."""
    folders = {path.parent.relative_to(ROOT) for top in ("joyjax", *LINKED) for path in (ROOT / top).rglob("*.py")}
    return {".".join(("joyjax", *folder.parts)).replace("joyjax.joyjax", "joyjax"): folder for folder in folders}


def test_packages_are_the_folders():
    """A folder that is missing here works in an editable install and is not in the wheel."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders())
    assert SETUPTOOLS["package-dir"] == {"joyjax": "joyjax", **{f"joyjax.{name}": name for name in LINKED}}
    for folder in package_folders().values():
        assert (ROOT / folder / "__init__.py").is_file()


@pytest.mark.parametrize("name", LINKED)
def test_links_for_tools_that_do_not_install(name):
    link = ROOT / "joyjax" / name
    assert link.is_symlink(), "a checkout without links: everything works but type checkers and uninstalled use"
    assert link.readlink() == Path("..", name)
    assert (link / "__init__.py").is_file()


def test_kernels_is_a_docstring_only():
    """Beside an installed distribution called kernels, other libraries look at what this folder says it is."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0].value, ast.Constant)


def test_data_and_version():
    assert SETUPTOOLS["package-data"].keys() == {"joyjax"}
    patterns = SETUPTOOLS["package-data"]["joyjax"]
    named = {path for pattern in patterns for path in (ROOT / "joyjax").glob(pattern) if path.is_file()}
    others = {
        path
        for folder in ("joyjax", *LINKED)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others == named
    assert PROJECT["project"]["version"] == joyjax.__version__
    assert PROJECT["project"]["scripts"] == {"joyjax": "joyjax.__main__:main"}


def test_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a build writes beside what it builds
    for name in ("joyjax", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta; setuptools.build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-P", "-c", build, tmp_path]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in package_folders().items()
        for path in (ROOT / folder).glob("*.py")
    }
    demo = {path.relative_to(ROOT).as_posix() for path in (ROOT / "joyjax" / "demo").rglob("*") if path.is_file()}
    assert "joyjax/demo/transformer/diffusion_pytorch_model.safetensors" in demo
    assert held == files | {"joyjax/py.typed"} | demo
