"""The floors of docs/architecture.md, read from its table and held against every import in the package."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "convert", "sharding")  # folders at the top that are imported as joyjax.NAME
FILES = sorted(path.relative_to(ROOT) for folder in ("joyjax", *LINKED) for path in (ROOT / folder).rglob("*.py"))
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "orbax": "orbax-checkpoint",
    "jaxlib": "jax",  # which pins it
}  # where the name to import is not the name to install
HEAVY = ("jax", "flax", "orbax", "tensorstore", "transformers", "tokenizers", "numpy")
SPARED = ("transformers", "orbax", "tensorstore", "torch", "matplotlib", "huggingface_hub")  # an edit of the demo


def module(file: Path) -> str:
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "joyjax" else ("joyjax", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def imports(file: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def imported(file: Path) -> set[str]:
    """The modules that a file imports. `from joyjax import dtypes` is joyjax.dtypes, not joyjax."""
    names = set()
    for node in imports(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


def floors() -> dict[str, int]:
    """The table of docs/architecture.md: folder or file → floor."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Floors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", section, re.MULTILINE)
    table = [(place, int(number)) for number, places in rows for place in re.findall(r"`([^`]+)`", places)]
    assert len(dict(table)) == len(table), "a place stands in two rows"
    return dict(table)


def floor_of(file: Path) -> int:
    found = [number for place, number in floors().items() if file.as_posix() == place or _inside(file, place)]
    assert len(found) == 1, f"{file} stands on the floors {found}; docs/architecture.md should name one"
    return found[0]


def _inside(file: Path, place: str) -> bool:
    return place.endswith("/") and file.as_posix().startswith(place)


def test_the_table_names_what_there_is():
    top = max(floors().values())
    assert set(floors().values()) == set(range(1, top + 1))
    assert [place for place in floors() if not (ROOT / place).exists()] == []
    for file in FILES:
        assert 1 <= floor_of(file) <= top


def test_imports_go_down():
    faults = [
        f"{file} on floor {floor_of(file)} imports {name} from floor {floor_of(MODULES[name])}"
        for file in FILES
        for name in imported(file) & MODULES.keys()
        if floor_of(MODULES[name]) > floor_of(file)
    ]
    assert faults == []


def test_nothing_imports_in_a_circle():
    graph = {name: imported(file) & MODULES.keys() for name, file in MODULES.items() if name != "joyjax"}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_imports_are_absolute():
    """`joyjax.kernels`, never `kernels`, and nothing relative; each names a module that is there."""
    for file in FILES:
        assert not [node for node in imports(file) if isinstance(node, ast.ImportFrom) and node.level], file
        for name in imported(file):
            assert name.partition(".")[0] not in LINKED, f"{file} imports {name}"
            assert not name.startswith("joyjax.") or name in MODULES, f"{file} imports {name}"


def test_imports_are_declared():
    """Nothing but the dependencies in pyproject.toml is imported, so neither torch nor Diffusers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["heic"], *extras["train"]]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    assert not declared & {"torch", "diffusers"}
    used = {DISTRIBUTIONS.get(top, top) for file in FILES for name in imported(file) if (top := name.partition(".")[0])}
    assert used - sys.stdlib_module_names - {"joyjax"} == declared


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import joyjax", 0),
        ("import joyjax.cli", 0),
        ("import joyjax.cli; sys.argv[1:] = ['--help']; joyjax.cli.main()", 0),
        ("import joyjax.cli; sys.argv[1:] = ['edit', '--help']; joyjax.cli.main()", 0),
        ("import joyjax.cli; sys.argv[1:] = ['edit', '--stepps', '3']; joyjax.cli.main()", 2),
    ],
)
def test_nothing_heavy_is_imported_before_the_work(code, status, tmp_path):
    report = f"print('heavy:', *[name for name in {HEAVY} if name in sys.modules])"
    program = f"import sys, atexit; atexit.register(lambda: {report}); {code}"
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_an_edit_imports_what_it_needs(tmp_path):
    report = f"print('spared:', *[name for name in {SPARED} if name in sys.modules])"
    arguments = ["edit", "make the red circle blue", "--image", str(ROOT / "examples" / "shapes.png"), "--steps", "1"]
    program = (
        f"import sys; sys.argv[1:] = {arguments}; from joyjax.__main__ import main\ntry: main()\nfinally: {report}"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["edit.png", "spared:"]


def test_the_public_names_are_there():
    import joyjax

    assert [name for name in joyjax.__all__ if not hasattr(joyjax, name)] == []
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = joyjax.nothing
