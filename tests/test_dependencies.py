"""docs/dependencies.md names what pyproject.toml declares, and when it is imported."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
if not PYPROJECT.is_file():
    pytest.skip("installed without its checkout", allow_module_level=True)
PROJECT = tomllib.loads(PYPROJECT.read_text())["project"]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()

MODULES = {
    "ott-jax": "ott",
    "orbax-checkpoint": "orbax",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "tensorflow-datasets": "tensorflow_datasets",
}


def names(requirements):
    """Distributions that a list of requirements declares."""
    return [re.match(r"[\w.-]+", text)[0] for text in requirements]


def rows(heading):
    """The cells of the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_every_dependency_has_its_row_and_no_other():
    described = [name for cells in rows("The library") for name in quoted(cells[0])]
    assert sorted(described) == sorted(names(PROJECT["dependencies"]))


def test_every_extra_has_its_rows_and_no_other():
    described = [
        (extra, name)
        for cells in rows("Extras")
        for extra in quoted(cells[0])
        for name in quoted(cells[1])
    ]
    declared = {
        (extra, name)
        for extra, requirements in PROJECT["optional-dependencies"].items()
        for name in names(requirements)
    }
    assert len(set(described)) == len(described)
    assert set(described) == declared


@pytest.mark.parametrize("heading", ["The library", "Extras"])
def test_no_cell_is_empty(heading):
    assert [cells for cells in rows(heading) if "" in cells] == []


def top_level_imports(path):
    """First names of what a file imports at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_imported_at_once_are_those_that_say_so():
    # What the package itself imports: older versions of Optax bring others along.
    code = (
        "import sys; from kddm_jax import *; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n[:9] == 'kddm_jax.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    files = [Path(name) for name in done.stdout.split()]
    assert len(files) > 5
    imported = {name for path in files for name in top_level_imports(path)}
    for cells in rows("The library"):
        for name in quoted(cells[0]):
            at_once = MODULES.get(name, name) in imported
            assert at_once == (cells[-1] == "at once"), name
