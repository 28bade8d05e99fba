"""Tests choose_weights.py: runs that diverge, and folders that it refuses."""

import pytest
from commands import SMALL, unwanted_training

from kddm_jax.experiment import choose_weights
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import RunError
from kddm_jax.experiment.training import problems, train


@pytest.fixture
def line(trained, tmp_path, monkeypatch):
    """Returns settings of a command with a trained teacher."""
    monkeypatch.setattr(problems, "evaluate", lambda *arguments: 12.5)
    line = (*SMALL, "--teacher", trained / "small", "--devices", 1, "--out", tmp_path)
    line = (*line, "--held-out", 100, "--teacher-saw-held-out", "--distances", "w2")
    return [*map(str, line), "--compilation-cache", "None"]


def test_a_run_that_diverges_stops_no_other(line, tmp_path, monkeypatch, capsys):
    """The run counts as 0. It is tried again only with ``--on-nonfinite skip``."""
    ran = []

    def fake_train(problem, run, *_):
        ran.append(run.weight)
        run.folder(problem.out).mkdir(parents=True, exist_ok=True)
        if run.weight in (2, 4):
            raise RunError("w2: loss not finite at step 1 (loss inf); lower --lr")
        return {"accuracy": 10 * run.weight}

    monkeypatch.setattr(train, "train", fake_train)
    command = ["--grid", "1", "2", "3", "4", "--", *line]
    for expected in ([1, 2, 3, 4], [1, 3]):
        ran.clear()
        assert choose_weights.main(command) == 0
        assert ran == expected
        said = capsys.readouterr().out
        assert "w2 λ = 2 seed 1: loss not finite at step 1 (loss inf); counts" in said
        chosen = records.read_json(tmp_path / "weights.json", "")
        row = {"1": 10, "2": 0, "3": 30, "4": 0}
        assert chosen["held_out_accuracy"]["w2"] == row
        assert chosen["weights"] == {"w2": 3.0}
    # A result takes precedence over diverged.json. With ``skip``, diverged runs are
    # repeated.
    (tmp_path / "weight-2" / "w2" / "seed1" / "result.json").write_text("{}")
    ran.clear()
    choose_weights.main(command)
    assert ran == [1, 2, 3]
    ran.clear()
    choose_weights.main([*command, "--on-nonfinite", "skip"])
    assert ran == [1, 2, 3, 4]


def test_lambdas_that_share_a_folder_are_refused(line, capsys):
    command = ["--grid", "0.1", "0.1234567", "0.1234568", "--", *line]
    assert choose_weights.main(command) == 2
    error = capsys.readouterr().err
    assert "--grid: 0.1234567 and another are one number to six digits" in error


def test_a_grid_is_refused_before_it_begins(line, tmp_path, monkeypatch, capsys):
    """The last folder has other settings, and the first ones are not created."""
    monkeypatch.setattr(train, "train", unwanted_training)
    command = ["--grid", "1", "5", "--", *line]
    folder = tmp_path / "weight-5" / "w2" / "seed1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"dataset": "mnist"}')
    assert choose_weights.main(command) == 2
    error = capsys.readouterr().err
    assert f"{folder} was made with dataset=mnist, this command says digits" in error
    assert not (tmp_path / "weight-1").exists()
    (tmp_path / "file").touch()
    command[command.index(str(tmp_path))] = str(tmp_path / "file")
    assert choose_weights.main(command) == 2
    assert f"--out {tmp_path / 'file'}" in capsys.readouterr().err
