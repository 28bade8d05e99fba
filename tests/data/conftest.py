"""Keeps the data of this machine out of reach, and starts programs without JAX."""

import os

import pytest

from kddm_jax import data


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Leaves no data and no cache of this machine within reach."""
    monkeypatch.delenv("KDDM_DATA_DIR", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def bare():
    """Begins a program with an empty package in place of kddm_jax, whose imports
    are another matter: without JAX it starts at once."""
    package = os.path.dirname(os.path.dirname(data.__file__))
    return (
        "import sys, types\n"
        "sys.modules['kddm_jax'] = package = types.ModuleType('kddm_jax')\n"
        f"package.__path__ = [{package!r}]\n"
    )
