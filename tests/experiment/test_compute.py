"""The student alone with the compute of a distilled run: its epochs, runs and rows."""

import io

import figures
import jax
import pytest
from commands import (
    KEEP,
    SMALL,
    TINY,
    call,
    results_of,
    small_results,
    timeless,
    unwanted_training,
)
from flax import linen as nn
from rich.console import Console

from kddm_jax.adapters import Outputs
from kddm_jax.experiment import distill, render
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import curves, page, table
from kddm_jax.experiment.settings import LONGER
from kddm_jax.experiment.training import compute, models, problems, runs, train

TITLE = "student alone, compute of a distilled run"


class OneConvolution(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(6, (3, 3), padding="VALID", use_bias=False)(images)
        return Outputs(nn.Dense(self.num_classes)(x[:, 0, 0]), x[:, 0, 0], {})


def test_operations_are_those_of_the_products():
    model = OneConvolution(10)
    found = compute.operations("student", model, (8, 8, 5), 16)
    # A product and a sum for each tap of each output, and a bias.
    expected = 2 * 6 * 6 * 9 * 5 * 6 + 2 * 6 * 10 + 10
    assert found == pytest.approx(expected, rel=1e-3)
    assert compute.operations("student", model, (8, 8, 5), 48) == pytest.approx(found)


@pytest.mark.parametrize("name", ["ResNet9", "ViT", "small_network:SmallNNX"])
def test_operations_of_every_kind_of_network(name):
    build = lambda width: models.build(name, num_classes=10, stem="cifar", width=width)
    narrow, wide = (
        compute.operations("student", build(width), (8, 8, 1), 8) for width in (16, 32)
    )
    # The hidden products grow by four, or in one hidden layer by two.
    assert 1.9 < wide / narrow < 4.1
    assert narrow > 1000


def planned(tmp_path, *line):
    line = [*TINY, "--compilation-cache", "None", "--devices", "1", *line]
    problem = problems.prepare(parse(line), tmp_path)
    runs.check_distances(problem, problem.model("ResNet18", 4))
    return problem, list(runs.student_runs(problem, None))


@pytest.mark.parametrize(
    ("line", "epochs"),
    [
        (("--epochs", "10"), 17),  # 10 (1 + 2 / 3) = 16.67
        (("--epochs", "30"), 50),  # exactly
        (("--epochs", "10", "--views", "4"), 13),  # 10 + 4 * 2 / 3 = 12.67
    ],
)
def test_epochs_of_equal_compute(tmp_path, monkeypatch, line, epochs):
    counts = {"teacher": 200.0, "student": 100.0}
    monkeypatch.setattr(compute, "operations", lambda who, *_: counts[who])
    problem, found = planned(tmp_path, "--equal-compute", *line)
    assert compute.longer_epochs(problem) == epochs
    assert [run.name for run in found] == ["student", LONGER, "w2", "w2_gaussian"]
    alone, longer, w2, _ = found
    assert [run.epochs for run in (alone, w2)] == [int(line[1])] * 2
    assert longer.epochs == longer.settings.optimizer.epochs == epochs
    # Nothing but the number of epochs is different, and it belongs to the identity.
    assert longer.identity == {**alone.identity, "epochs": epochs}
    assert (longer.weight, longer.title) == (0.0, TITLE)
    assert (longer.indices == alone.indices).all()
    assert longer.folder(tmp_path) == tmp_path / "student_longer" / "seed1"


def test_a_student_alone_of_another_command_has_equal_compute(tmp_path, monkeypatch):
    counts = {"teacher": 200.0, "student": 100.0}
    monkeypatch.setattr(compute, "operations", lambda who, *_: counts[who])
    _, found = planned(tmp_path, "--equal-compute", "--distances")
    assert [run.name for run in found] == ["student", LONGER]


def test_there_is_no_longer_run_if_nothing_asks_for_it(tmp_path, monkeypatch):
    names = lambda *line: [run.name for run in planned(tmp_path, *line)[1]]
    monkeypatch.setattr(compute, "operations", unwanted_training)  # not even counted
    assert names() == ["student", "w2", "w2_gaussian"]
    assert parse([]).run.equal_compute


def test_operations_that_xla_does_not_count(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    with pytest.raises(UserError, match="of the teacher, .*; pass --no-equal-compute"):
        compute.operations("teacher", OneConvolution(10), (8, 8, 5), 16)


# ------------------------------------------------------------------ rows and pages


def results_with_longer(accuracy):
    results = small_results()
    added = [
        {**run, "name": LONGER, "title": TITLE, "accuracy": accuracy}
        for run in results["runs"][:2]
    ]
    results["runs"][2:2] = added
    return results


def test_the_longer_run_has_a_row_without_lambda_and_gap():
    rows = {row[0]: row for row in table.table(results_with_longer(83.0))}
    assert rows[TITLE][1:5] == ("83.00 ± 0.00", "", "", "")  # others refer to it
    assert rows["W2 (E)"][2] == "+1.6 [-6.0, +9.2]"
    assert rows["W2 (E)"][4] == "0.0001"


def test_the_longer_run_is_not_a_distilled_one():
    results = results_with_longer(95.0)
    cards = page._summary(results)
    assert [card[0] for card in cards] == [TITLE, "teacher", "W2 (E)"]
    assert figures.distilled(results, None, None) == ("w2", 0)
    lambdas = [row[2] for row in page.run_rows(results)[1:]]
    assert lambdas == ["", "", "", "", "0.0001", "0.0001"]
    figure = curves.of_runs(results)
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert (styles["student"], styles[TITLE]) == ("--", ":")
    curves.plt.close(figure)


@pytest.mark.parametrize("accuracy", [83.0, 95.0])
def test_a_teacher_worse_than_the_longer_run_is_weak(accuracy):
    file = io.StringIO()
    distill._warn_of_weak_teacher(results_with_longer(accuracy), Console(file=file))
    assert ("there is nothing to distil" in " ".join(file.getvalue().split())) == (
        accuracy > 90
    )


@pytest.mark.parametrize("recipe", ["paper", "crd"])
def test_imagenet_weights_are_advice_for_the_paper_recipe(recipe):
    file, results = io.StringIO(), results_with_longer(95.0)
    results["settings"]["recipe"] = recipe
    distill._warn_of_weak_teacher(results, Console(file=file))
    assert ("needs ImageNet weights" in " ".join(file.getvalue().split())) == (
        recipe == "paper"
    )


def test_equal_compute_from_end_to_end(trained, tmp_path, monkeypatch):
    """Trains, renders and resumes; teacher and student are of one shape."""
    out = tmp_path / "out"
    line = (*SMALL, *KEEP, "--devices", 1, "--out", out, "--distances", "l2")
    line = (*line, "--teacher", trained / "small", "--equal-compute", "--epochs", 3)
    assert call(*line) == 0
    first = results_of(out)
    epochs = {run["name"]: len(run["history"]) for run in first["runs"]}
    assert epochs == {"student": 3, LONGER: 4, "l2": 3}
    assert first["settings"]["equal_compute"] is True
    # The cosine of the rate ends later.
    rates = {run["name"]: [r["lr"] for r in run["history"]] for run in first["runs"]}
    assert rates[LONGER] != rates["student"]
    assert rates[LONGER][2] > rates["student"][2]
    assert f"| {TITLE} |" in (out / "table.md").read_text()
    assert TITLE in (out / "report.html").read_text()

    monkeypatch.setattr(train, "_train_program", unwanted_training)
    assert call(*line) == 0
    assert timeless(results_of(out)) == timeless(first)
    (out / "report.html").unlink()
    assert render.main([str(out)]) == 0
    assert TITLE in (out / "report.html").read_text()
    # Without the option the same folder still has its other runs.
    assert call(*line, "--no-equal-compute") == 0
    assert [run["name"] for run in results_of(out)["runs"]] == ["student", "l2"]
