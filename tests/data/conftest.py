"""Hides the data sets of this machine, and starts programs without JAX."""

import os

import pytest

from kddm_jax import data


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Hides data sets and caches of this machine, and returns the new home folder."""
    monkeypatch.delenv("KDDM_DATA_DIR", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def bare():
    """Returns the first lines of a program that imports parts of kddm_jax without JAX.

    They replace the package by an empty one, so that the program starts at once.
    """
    package = os.path.dirname(os.path.dirname(data.__file__))
    return (
        "import sys, types\n"
        "sys.modules['kddm_jax'] = package = types.ModuleType('kddm_jax')\n"
        f"package.__path__ = [{package!r}]\n"
    )
