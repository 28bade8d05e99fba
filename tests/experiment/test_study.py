"""Tests that every command opens its study in the same way."""

import choose_weights
import numpy as np
import pytest
import theorem
from commands import SMALL

from kddm_jax.experiment import distill
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.training import problems, runs, train

# By name: the command, its options before the settings, and its seeds.
COMMANDS = {
    "distill": (distill.main, [], [1]),
    "choose-weights": (choose_weights.main, ["--"], [1, 2]),
    "theorem": (theorem.main, ["--images", "60", "--"], [1]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_knows_the_class_cost(name, trained, tmp_path, monkeypatch):
    """A distance that needs an array of the teacher is never trained without it."""
    seen = []

    def train_none(problem, run, *_):
        seen.append(problem.of_teacher["class_cost"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", train_none)
    monkeypatch.setattr(problems, "evaluate", lambda *arguments: {"accuracy": 12.5})
    main, first, seeds = COMMANDS[name]
    line = [*SMALL, "--teacher", trained / "small", "--devices", 1, "--out", tmp_path]
    line += ["--distances", "wkd_logits", "--compilation-cache", "None"]
    line += ["--held-out", 100, "--teacher-saw-held-out", "--seeds", *seeds]
    assert main([*first, *map(str, line)]) == 130
    (cost,) = seen
    assert cost.shape == (10, 10)
    assert np.all(cost[~np.eye(10, dtype=bool)] > 0)


def test_no_run_is_trained_without_its_class_cost(tmp_path):
    line = [*SMALL, "--distances", "wkd_logits", "--compilation-cache", "None"]
    problem = problems.prepare(parse([*line, "--devices", "1"]), tmp_path)
    run = runs.Run(
        *("wkd_logits", 1, 1.0, 1, problem.parts.student, problem.settings, {})
    )
    with pytest.raises(RuntimeError, match="wkd_logits needs the teacher's class_cost"):
        train.teacher_data(problem, run)
