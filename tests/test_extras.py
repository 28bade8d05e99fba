"""Tests that parts that need the extra raise a one-line error without it."""

import subprocess
import sys

import numpy as np
import pytest

from kddm_jax import checkpoint, data
from kddm_jax.data.stream import reads, stream
from kddm_jax.networks import bert, weights

INSTALL = 'pip install "kddm-jax\\[experiments\\]"'


@pytest.fixture
def without(monkeypatch):
    """Makes the import of a package fail, as if it were not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_data(without, tmp_path):
    without("sklearn.datasets")
    message = f"^kddm_jax.data needs sklearn.datasets: {INSTALL}$"
    with pytest.raises(ImportError, match=message):
        data.load("digits")


def test_folders(without, tmp_path):
    without("PIL")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"")
    (tmp_path / "test" / "ant").mkdir(parents=True)
    (tmp_path / "test" / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(ImportError, match=f"^kddm_jax.data needs PIL: {INSTALL}$"):
        data.load("folder", data_dir=tmp_path)


def test_streams(without):
    without("grain")
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int32)
    rows = reads(np.arange(4).reshape(2, 2), length=1, shares=range(1), of=1)
    with pytest.raises(ImportError, match=f"^kddm_jax.data needs grain: {INSTALL}$"):
        next(stream(images, labels, rows))


def test_checkpoints(without, tmp_path):
    without("orbax.checkpoint")
    message = f"^kddm_jax.checkpoint needs orbax.checkpoint: {INSTALL}$"
    with pytest.raises(ImportError, match=message):
        checkpoint.save(tmp_path / "run", 1, {"x": np.zeros(2)}, {})
    assert not (tmp_path / "run").exists()


def test_weights(without, tmp_path):
    without("safetensors.numpy")
    (tmp_path / "a.safetensors").write_bytes(b"")
    message = f"^.safetensors needs safetensors.numpy: {INSTALL}$"
    with pytest.raises(ImportError, match=message):
        weights.load(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ImportError, match=message):
        bert.load(tmp_path / "a.safetensors")


# Packages of the extra that no package of the core depends on.
PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
for name in ("grain", "sklearn", "safetensors", "tensorflow_datasets", "tyro", "PIL",
             "importlib_resources", "matplotlib", "jinja2", "tensorflow", "torch"):
    sys.modules[name] = None
import kddm_jax.adapters, kddm_jax.checkpoint, kddm_jax.data.augment, kddm_jax.quality
import kddm_jax.probe
import kddm_jax.data.stream, kddm_jax.networks.weights, kddm_jax.networks.surgery
import kddm_jax.networks.mlp, kddm_jax.networks.mobilenet, kddm_jax.networks.vit
import kddm_jax.networks.projectors, kddm_jax.networks.bert
import kddm_jax.train_step, kddm_jax.testing
print("all")
"""


def test_every_module_of_the_library_is_imported_without_the_extra():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr
