"""Tests ``kddm export``: the file, and its one-line errors."""

import jax
import numpy as np
import pytest
import safetensors

from kddm_jax import __main__ as kddm
from kddm_jax import checkpoint
from kddm_jax.networks import weights
from kddm_jax.resnet import ResNet9


def save(folder, network, **run):
    """Saves a checkpoint of a run with random variables, and returns these."""
    image = np.zeros((1, 8, 8, 3), np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), image)
    run = {"dataset": "digits", "epochs": 2, **run}
    meta = {"run": run, "history": [{}, {}], "num_classes": 3, "channels": 3}
    meta |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    checkpoint.save(folder / "checkpoints", 2, variables, meta)
    return variables


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns the folder of a ResNet's run and its variables."""
    folder = tmp_path_factory.mktemp("run")
    network = ResNet9(num_classes=3, stem="cifar", width=2)
    return folder, save(folder, network, student_model="ResNet9")


def test_the_file_has_the_runs_arrays(exported, tmp_path, capsys):
    folder, variables = exported
    path = tmp_path / "student.safetensors"
    assert kddm.main(["export", str(folder), "--to", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{folder} -> {path}: ResNet9, width 2, cifar stem, 3 channels, 3 classes\n"
    )
    tensors = weights.read_safetensors(path)
    assert tensors["layer1.0.conv1.weight"].shape == (2, 2, 3, 3)
    kernel = np.asarray(variables["params"]["fc"]["kernel"])
    np.testing.assert_array_equal(tensors["fc.weight"], kernel.T)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safetensors.safe_open(path, "np") as file:
        about = file.metadata()
    assert about == {
        "format": "pt",
        "mean": "[0.1, 0.2, 0.3]",
        "std": "[0.4, 0.5, 0.6]",
    }


def test_a_run_that_is_not_finished_is_named(tmp_path, capsys):
    network = ResNet9(num_classes=3, stem="cifar", width=2)
    path = tmp_path / "teacher.safetensors"
    save(tmp_path, network, teacher_model="ResNet9", teacher_epochs=100)
    assert kddm.main(["export", str(tmp_path), "--to", str(path)]) == 0
    assert capsys.readouterr().out.endswith(" 3 classes, after 2 of 100 epochs\n")


def test_a_file_is_replaced_only_if_asked_for(exported, tmp_path, capsys):
    folder, _ = exported
    path = tmp_path / "student.safetensors"
    path.write_text("kept")
    line = ["export", str(folder), "--to", str(path)]
    assert kddm.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} exists; choose another name, or ")
    assert (error.count("\n"), path.read_text()) == (1, "kept")
    assert kddm.main([*line, "--force"]) == 0
    assert "fc.weight" in weights.read_safetensors(path)


MISTAKES = {
    "suffix": ("a.npz", "--to {to} does not end in .safetensors; rename it"),
    "empty": ("a.safetensors", "no checkpoint in {run}; pass a run's folder"),
    "known": (
        "a.safetensors",
        "{run} is a ViT, and only ResNet9, ResNet18, ",
    ),
    "small": ("a.safetensors", "is a ResNet20, and only ResNet9, ResNet18, ResNet34 "),
    "own": ("a.safetensors", "the 4-d tensor conv1.weight is not in "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, capsys):
    run, (name, message) = tmp_path / "run", MISTAKES[mistake]
    models = {"known": "ViT", "small": "ResNet20", "own": "nets:Small"}
    if mistake in models:
        dense = {"params": {"head": {"bias": np.zeros(3, np.float32)}}}
        meta = {"run": {"dataset": "digits", "student_model": models[mistake]}}
        checkpoint.save(run / "checkpoints", 2, dense, meta)
    assert kddm.main(["export", str(run), "--to", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message.format(run=run, to=tmp_path / name) in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / name).exists()
