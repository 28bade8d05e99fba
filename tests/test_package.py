"""Tests conventions that are easy to forget: names, docstrings, dangerous calls."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path

import jax
import pytest

import kddm_jax
from kddm_jax import DISTANCES
from kddm_jax.losses import Features

# Found without importing, so that modules that fail to import are checked, too.
ROOT = Path(importlib.util.find_spec("kddm_jax").origin).parent
FILES = sorted(ROOT.rglob("*.py"))


def imports(source):
    """Yields the names of all modules that a source text imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


# ------------------------------------------------------------------- other's files

RUN_CODE = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNPACK = {"extract", "extractall", "unpack_archive"}


def dangers(source):
    """Returns calls that could execute the content of a file, or write to any path."""
    found = [name for name in imports(source) if name.split(".")[0] in RUN_CODE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = name == "torch.load" and keywords.get("weights_only") != "True"
            unsafe |= keywords.get("allow_pickle", "False") != "False"
            unsafe |= name in ("eval", "exec", "pd.read_pickle")
            unsafe |= name.rpartition(".")[2] in UNPACK
            found += [name] if unsafe else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_of_others_run_nothing_and_write_nothing(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=wanted)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "tar.extractall(path)",
        "shutil.unpack_archive(path)",
        "eval(text)",
    ],
)
def test_a_danger_is_found(source):
    assert len(dangers(source)) == 1


# ------------------------------------------------------------------ public names


# Options that depend on the teacher or the data set, so no default would be right.
REQUIRED = {"wkd_logits": {"temperature"}, "distill_loss": {"distance"}}
FUNCTIONS = [n for n in kddm_jax.__all__ if inspect.isfunction(getattr(kddm_jax, n))]
ARRAYS = (jax.Array, jax.Array | None, Features, Features | None)


def test_all_is_sorted_and_exists():
    assert kddm_jax.__all__ == sorted(set(kddm_jax.__all__))
    for name in kddm_jax.__all__:
        assert hasattr(kddm_jax, name), f"{name} is in __all__ but does not exist"


def test_every_public_import_is_in_all():
    source = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (types,) = (node for node in source.body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name
        for node in types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(kddm_jax.__all__)


@pytest.mark.parametrize("name", kddm_jax.__all__)
def test_every_public_name_has_a_docstring(name):
    if name != "DISTANCES":
        doc = inspect.getdoc(getattr(kddm_jax, name))
        assert doc
        assert doc.splitlines()[0].endswith(".")


def sections(doc):
    """Returns the sections of a Google docstring by their headings."""
    parts = re.split(r"^(\w+):$", doc, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    function = getattr(kddm_jax, name)
    parts = sections(inspect.getdoc(function))
    assert {"Args", "Returns", "Raises", "References", "Examples"} <= set(parts)
    assert ">>>" in parts["Examples"]
    documented = re.findall(r"^  \*{0,2}(\w+):", parts["Args"], flags=re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_formula_cost_gradient_and_limits(name):
    head = inspect.getdoc(getattr(kddm_jax, name)).split("\nArgs:\n")[0]
    assert ".. math:: " in head
    said = re.findall(r"(?:^|  )(Cost|Gradient|Not for): ", head, flags=re.MULTILINE)
    assert said == ["Cost", "Gradient", "Not for"]
    paragraph = " ".join(head.partition("Cost: ")[2].split())
    for key, row in DISTANCES.items():
        if row.fn is getattr(kddm_jax, name):
            cost = paragraph.split("Gradient: ")[0]
            assert re.search(re.escape(row.complexity) + r"(?![²³\w])", cost), key


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_are_positional_and_options_keyword_only(name):
    signature = inspect.signature(getattr(kddm_jax, name))
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.annotation in ARRAYS, f"{parameter} is not an array"
        elif parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.name in REQUIRED.get(name, ())
            assert (parameter.default is parameter.empty) == required, parameter
        else:
            assert parameter.kind is parameter.VAR_KEYWORD


# --------------------------------------------------------------------- catalogue


def test_catalogue_is_read_only():
    assert isinstance(DISTANCES, Mapping)
    with pytest.raises(TypeError):
        DISTANCES["mine"] = DISTANCES["l2"]
    for row in DISTANCES.values():
        with pytest.raises(FrozenInstanceError):
            row.title = "mine"


@pytest.mark.parametrize("name", DISTANCES)
def test_rows_are_complete(name):
    row = DISTANCES[name]
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert row.title
    assert row.complexity
    assert getattr(kddm_jax, row.fn.__name__) is row.fn
    assert row.fn.__name__ in kddm_jax.__all__
    kinds = {"features", "maps", "logits", "labels", "key"}
    kinds |= {"class_cost", "class_means"}
    assert set(row.inputs) <= kinds


@pytest.mark.parametrize("name", DISTANCES)
def test_rows_fit_their_functions(name):
    row = DISTANCES[name]
    parameters = inspect.signature(row.fn).parameters
    kinds = [p.kind for p in parameters.values()]
    pairs = sum(kind in ("features", "maps", "logits") for kind in row.inputs)
    arrays = [k for k in kinds if k is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert len(arrays) == len(row.inputs) + pairs
    for option in dict(row.options):
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
    assert row.diagnose == getattr(row.fn, "diagnose", None)


def test_rows_have_different_titles():
    titles = [row.title for row in DISTANCES.values()]
    assert len(set(titles)) == len(titles)
