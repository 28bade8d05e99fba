"""Tests docs/dependencies.md against pyproject.toml and against imports."""

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
    """Returns the distributions that a list of requirements declares."""
    return [re.match(r"[\w.-]+", text)[0] for text in requirements]


def rows(heading):
    """Returns the cells of the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


# Headings of the page's tables, and the requirements that they describe.
EXTRAS = dict(PROJECT["optional-dependencies"])
LIBRARY = {
    "The core": PROJECT["dependencies"],
    "The extra experiments": EXTRAS.pop("experiments"),
}


@pytest.mark.parametrize("heading", LIBRARY)
def test_every_dependency_has_its_row_and_no_other(heading):
    described = [name for cells in rows(heading) for name in quoted(cells[0])]
    assert sorted(described) == sorted(names(LIBRARY[heading]))


def test_the_core_is_what_the_losses_and_networks_need():
    core = {"jax", "flax", "optax", "ott-jax", "chex", "numpy"}
    assert set(names(PROJECT["dependencies"])) == core
    assert "kddm-jax[experiments,text]" in EXTRAS["test"]


def test_every_extra_has_its_rows_and_no_other():
    described = [
        (extra, name)
        for cells in rows("Extras")
        for extra in quoted(cells[0])
        for name in quoted(cells[1])
    ]
    declared = {
        (extra, name)
        for extra, requirements in EXTRAS.items()
        for name in names(requirements)
        if name != PROJECT["name"]  # an extra may include another
    }
    assert len(set(described)) == len(described)
    assert set(described) == declared


@pytest.mark.parametrize("heading", [*LIBRARY, "Extras"])
def test_no_cell_is_empty(heading):
    assert [cells for cells in rows(heading) if "" in cells] == []


def top_level_imports(path):
    """Yields the top-level packages that a file imports at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_imported_at_once_are_those_that_say_so():
    # The modules that the package itself imports; older versions of Optax import more.
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
    for cells in [cells for heading in LIBRARY for cells in rows(heading)]:
        for name in quoted(cells[0]):
            at_once = MODULES.get(name, name) in imported
            assert at_once == (cells[-1] == "at once"), name
