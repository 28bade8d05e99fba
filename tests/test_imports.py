"""Tests that imports run downwards and never in a circle.

Files are read, not imported. Imports inside functions count, and those below ``if
TYPE_CHECKING`` do not.
"""

import ast
import importlib.util
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

# Found without importing, so that a module that fails to import is checked, too.
PACKAGE = Path(importlib.util.find_spec("kddm_jax").origin).parent
ROOT = PACKAGE.parent
OUTSIDE = ("experiments", "benchmarks", "examples", "tests")

# A part may import the parts on the left of its "<", also indirectly. Parts are files
# and folders of the package. Files in experiment that are not named here are commands.
RULES = """
numerics < families < entry < distances < terms < losses < teachers < train_step
losses < testing
numerics < quality, probe
numerics < adapters < resnet < networks
extras < checkpoint < networks
extras < data
distances, losses < __init__
__init__, train_step, testing, quality, probe < experiment.machine
networks, checkpoint, data < experiment.machine
experiment.machine < experiment.published < experiment.settings
experiment.machine < experiment.options < experiment.settings < experiment.checks
experiment.checks < experiment.recipes < experiment.training
experiment.training < experiment.report < experiment.log < experiment.study
experiment.study < experiment < __main__
"""
# Imported only when they are needed.
HEAVY = ("ott", "jaxopt", "tensorflow", "tensorflow_datasets", "torch", "sklearn")
HEAVY += ("matplotlib", "orbax", "grain")
NAMELESS = {"utils", "util", "common", "misc", "helpers"}
MOST_LINES = 500

Graph = Mapping[str, set[str]]


# --------------------------------------------------------------------- reading


def modules(package: Path) -> dict[str, Path]:
    """Returns the files of a package by dotted name, packages as ``a.__init__``."""
    return {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
        for path in sorted(package.rglob("*.py"))
    }


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes except those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            for other in node.orelse:
                yield other
                yield from statements(other)
        else:
            yield node
            yield from statements(node)


def imported(source: str, module: str = "") -> Iterator[tuple[str, str | None]]:
    """Yields a module and the name imported from it, for every import of a file."""
    package = module.split(".")[:-1]  # the same for a.__init__
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((origin, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            is_text = isinstance(name, ast.Constant) and isinstance(name.value, str)
            if called in ("import_module", "__import__") and is_text:
                yield name.value, None


def import_graph(package: Path) -> dict[str, set[str]]:
    """Returns the files of a package that each of its files imports."""
    files, graph = modules(package), {}
    for module, path in files.items():
        graph[module] = set()
        for origin, name in imported(path.read_text(encoding="utf-8"), module):
            candidates = (f"{origin}.{name}", f"{origin}.{name}.__init__", origin)
            found = next(
                (c for c in (*candidates, f"{origin}.__init__") if c in files), None
            )
            if found:
                graph[module].add(found)
            elif origin.split(".")[0] == package.name:
                graph[module].add(f"{origin} (which does not exist)")
    return graph


# ----------------------------------------------------------------------- rules


def below(rules: str) -> dict[str, set[str]]:
    """Returns the parts that each part may import, which the rules put below it."""
    lower = defaultdict(set)
    for line in rules.strip().splitlines():
        groups = [[part.strip() for part in g.split(",")] for g in line.split("<")]
        for left, right in zip(groups, groups[1:], strict=False):
            for part in right:
                lower[part] |= set(left)
            for part in left:
                lower[part] |= set()
    for _ in lower:  # at least as many times as the longest chain is long
        for part in lower:
            lower[part] |= set().union(*(lower[other] for other in lower[part]))
    return dict(lower)


def part_of(module: str, parts: Mapping[str, object]) -> str | None:
    """Returns the part of the package that a file belongs to, or None."""
    _, *names = module.split(".")
    return next((p for p in (".".join(names[:2]), names[0]) if p in parts), None)


def upward(graph: Graph, rules: str = RULES) -> list[str]:
    """Returns imports that the rules do not allow, and files that have no part."""
    lower, found = below(rules), []
    for module, others in graph.items():
        part = part_of(module, lower)
        if part is None:
            found.append(f"{module} has no place: write it into RULES")
        for other in sorted(others):
            of = part_of(other, lower)
            if part is not None and of != part and of not in lower[part]:
                found.append(f"{module} imports {other}")
    return found


def circle(graph: Graph) -> list[str] | None:
    """Returns a circle of imports, or None."""
    done: set[str] = set()

    def search(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in graph if (found := search(node, []))), None)


def folders(graph: Graph) -> dict[str, set[str]]:
    """Returns the graph of imports between folders.

    Files next to folders, such as ``losses.py`` next to ``numerics/``, are nodes of
    their own. A file that only marks a folder as a package is none.
    """
    parents = {module.rpartition(".")[0] for module in graph}
    outer = {parent.rpartition(".")[0] for parent in parents}

    def node(module):
        folder = module.rpartition(".")[0]
        return module if folder in outer else folder

    between = defaultdict(set)
    for module, others in graph.items():
        between[node(module)] |= {node(other) for other in others} - {node(module)}
    return dict(between)


# Ways to import files from another folder.
TRICKS = tuple(f"sys.path.{change}" for change in ("append", "insert", "extend"))
TRICKS += ("syspath_prepend", "addsitedir", "run_path", "spec_from_file_location")
# These are allowed: the working folder has users' networks, and a checkout the package.
HARMLESS = ("Path.cwd()", "sys.path.append(str(Path(__file__).resolve().parents[1]))")


def path_tricks(source: str) -> list[str]:
    """Returns changes of ``sys.path``, and other imports of a file by its path."""
    found = []
    for node in ast.walk(ast.parse(source)):
        trick = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(TRICKS)
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            trick = ast.unparse(target).partition("[")[0] == "sys.path"
        if trick and not any(words in ast.unparse(node) for words in HARMLESS):
            found.append(ast.unparse(node))
    return found


# ------------------------------------------------------------------ the package

GRAPH = import_graph(PACKAGE)
SCRIPTS = {
    folder: sorted((ROOT / folder).rglob("*.py"))
    for folder in OUTSIDE
    if (ROOT / folder).is_dir() and (ROOT / "pyproject.toml").is_file()
}


def test_imports_run_downwards():
    assert upward(GRAPH) == []


def test_no_circle_of_files():
    assert circle(GRAPH) is None


def test_no_circle_of_folders():
    assert circle(folders(GRAPH)) is None


def test_only_sinkhorn_imports_ott():
    found = {
        module
        for module, path in modules(PACKAGE).items()
        for origin, _ in imported(path.read_text(encoding="utf-8"), module)
        if origin.split(".")[0] in ("ott", "jaxopt")
    }
    assert found <= {"kddm_jax.numerics.sinkhorn"}


def test_the_package_imports_nothing_around_it():
    found = [
        f"{module} imports {origin}"
        for module, path in modules(PACKAGE).items()
        for origin, _ in imported(path.read_text(encoding="utf-8"), module)
        if origin.split(".")[0] in OUTSIDE
    ]
    assert found == []


@pytest.mark.parametrize("folder", SCRIPTS)
def test_scripts_import_no_circle_and_no_other_folder(folder):
    """Scripts import their neighbours and the package; tests also what they test."""
    own = {path.stem for path in SCRIPTS[folder]}
    others = {p.stem for other in SCRIPTS if other != folder for p in SCRIPTS[other]}
    graph = {}
    for path in SCRIPTS[folder]:
        origins = {o.split(".")[0] for o, _ in imported(path.read_text("utf-8"))}
        assert folder == "tests" or not origins & (others - own), path
        assert not origins & set(OUTSIDE), path
        graph[path.stem] = origins & own
    assert circle(graph) is None


def test_nobody_imports_through_sys_path():
    paths = [*modules(PACKAGE).values(), *(p for ps in SCRIPTS.values() for p in ps)]
    tricks = {path: path_tricks(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: found for path, found in tricks.items() if found} == {}


@pytest.mark.parametrize("module", GRAPH)
def test_files_are_short_and_named_by_their_idea(module):
    parts = module.split(".")
    assert not NAMELESS & set(parts)
    lines = modules(PACKAGE)[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=ROOT,
    ).stdout.strip()


def test_import_is_light():
    program = (
        "import sys, warnings; warnings.simplefilter('ignore'); import kddm_jax; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run(program) == "[]"


# ------------------------------------------------------- the checks can also fail

MADE_UP = {
    "__init__": "from made_up.losses import loss",
    "losses": "from made_up.numerics.algebra import matmul",
    "numerics.__init__": "",
    "numerics.algebra": "",
    "families.__init__": "",
    "families.gaussian": "from made_up.numerics import algebra",
}
MADE_UP_RULES = "numerics < families < losses < __init__"


@pytest.fixture
def graph_of(tmp_path):
    """Writes a package, and returns its graph of imports."""

    def write(**changes):
        files = {**MADE_UP, **{k.replace("__in__", "."): v for k, v in changes.items()}}
        for module, source in files.items():
            path = tmp_path / "made_up" / (module.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return import_graph(tmp_path / "made_up")

    return write


def test_a_tidy_package_passes(graph_of):
    graph = graph_of(
        families__in__gaussian="from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from made_up.losses import Loss"
    )
    assert upward(graph, MADE_UP_RULES) == []
    assert circle(graph) is None
    assert circle(folders(graph)) is None
    assert graph["made_up.losses"] == {"made_up.numerics.algebra"}


@pytest.mark.parametrize(
    "source",
    [
        "import made_up.losses",
        "import made_up.losses as l",
        "from made_up.losses import loss",
        "from made_up import losses",
        "from .. import losses",
        "from ..losses import loss",
        "def f():\n    from made_up import losses",
        "import importlib\nimportlib.import_module('made_up.losses')",
        "from made_up import loss",  # imports from the package
        "from made_up.families import gaussian",
        "from made_up import no_such_module as n",
    ],
)
def test_an_upward_import_is_found(graph_of, source):
    graph = graph_of(numerics__in__algebra=source)
    (found,) = upward(graph, MADE_UP_RULES)
    assert found.startswith("made_up.numerics.algebra imports made_up.")


def test_a_file_without_a_place_is_found(graph_of):
    graph = graph_of(odd="", numerics__in__algebra="from made_up import odd")
    assert upward(graph, MADE_UP_RULES) == [
        "made_up.numerics.algebra imports made_up.odd",
        "made_up.odd has no place: write it into RULES",
    ]


def test_a_circle_of_files_is_found(graph_of):
    graph = graph_of(
        numerics__in__algebra="from made_up.numerics import checks",
        numerics__in__checks="def f():\n    from .algebra import matmul",
    )
    assert upward(graph, MADE_UP_RULES) == []
    assert circle(graph) == [
        "made_up.numerics.algebra",
        "made_up.numerics.checks",
        "made_up.numerics.algebra",
    ]


def test_a_circle_of_folders_is_found(graph_of):
    graph = graph_of(
        numerics__in__algebra="from made_up.families import kernels",
        families__in__kernels="",
    )
    assert circle(graph) is None
    assert circle(folders(graph)) == [
        "made_up.numerics",
        "made_up.families",
        "made_up.numerics",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "sys.path.insert(0, str(EXPERIMENTS))",
        "sys.path.append('../benchmarks')",
        "sys.path += [folder]",
        "sys.path[:0] = [folder]",
        "sys.path = [folder, *sys.path]",
        "monkeypatch.syspath_prepend(BENCHMARKS)",
        "site.addsitedir(folder)",
        "importlib.util.spec_from_file_location('cifar', path)",
    ],
)
def test_a_path_trick_is_found(source):
    assert path_tricks(source) == [source]


@pytest.mark.parametrize(
    "source",
    [
        "sys.path.append(str(Path.cwd()))",
        "sys.path.append(str(Path(__file__).resolve().parents[1]))",
        "found = list(sys.path)",
    ],
)
def test_no_path_trick(source):
    assert path_tricks(source) == []
