"""Tests the theorem's chain on trained pairs, its constants, and batches' bias."""

import json
import re
from functools import cache

import estimates
import jax.numpy as jnp
import numpy as np
import pytest
import risks
import theorem
from commands import EXPERIMENTS, KEEP, SMALL
from flax import linen as nn
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import kddm_jax
from kddm_jax.adapters import Outputs
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import table
from kddm_jax.experiment.settings import GROUP_OF, Settings, as_json, renamed
from kddm_jax.experiment.training import problems, runs, train


def seen(rng, n=30, d=5, k=4, features=None):
    """Makes a network with random features and a random head."""
    if features is None:
        features = np.maximum(rng.normal(size=(n, d)), 0)
    kernel, bias = rng.normal(size=(features.shape[1], k)), rng.normal(size=k)
    return risks.Seen(features, features @ kernel + bias, kernel, bias)


@cache
def pair(seed):
    """Makes a student, and a teacher with similar features."""
    rng = np.random.default_rng(seed)
    student = seen(rng)
    near = student.features + 0.3 * rng.normal(size=student.features.shape)
    labels = rng.integers(0, 4, len(near)).astype(np.int32)
    return student, seen(rng, features=near + [0.5, 0, 0, 0, 0]), labels


def matched(cost):
    return cost[linear_sum_assignment(cost)].mean()


@pytest.mark.slow
def test_distances_are_the_assignments():
    student, teacher, labels = pair(0)
    x, y = student.features, teacher.features
    found = risks.distances(x, y, labels)
    squares = cdist(x, y, "sqeuclidean")
    assert found["w1"] == pytest.approx(matched(cdist(x, y)), rel=1e-12)
    assert found["w2"] == pytest.approx(matched(squares) ** 0.5, rel=1e-9)
    parts = [
        (labels == c).mean() * matched(squares[labels == c][:, labels == c])
        for c in np.unique(labels)
    ]
    assert found["cw2"] == pytest.approx(sum(parts) ** 0.5, rel=1e-9)
    assert found["paired"] == pytest.approx(np.trace(squares / len(x)) ** 0.5)
    assert found["size"] == pytest.approx(((x**2 + y**2).sum() / len(x)) ** 0.5)


def record(student, teacher, labels, **more):
    measured = risks.measure(student, teacher, labels)
    return {"run": "w2", "epoch": 3, **measured, **more}


@pytest.mark.parametrize("seed", range(5))
def test_chain_holds_on_random_pairs(seed):
    student, teacher, labels = pair(seed)
    found = record(student, teacher, labels)
    assert risks.violations([found]) == []
    assert len(list(risks.links(found))) == 6
    # No member is trivially zero.
    assert min(low for _, low, _, _ in risks.links(found)) > 1e-4
    # With the same network on both sides all are zero, up to roots of rounding errors.
    same = record(student, student, labels)
    assert risks.violations([same]) == []
    assert max(high for *_, high in risks.links(same)) < 1e-7
    assert same["accuracy"] == found["accuracy"]


@pytest.mark.parametrize("link", range(6))
def test_a_broken_link_is_found(link):
    found = record(*pair(0))
    small, low, large, high = list(risks.links(found))[link]
    names = ("w1", "w2", "cw2", "paired")

    def with_value(name, value):
        old = found["risks"]
        if name in names:
            return {**found, name: value}
        return {**found, "risks": {**old, name: {"normalised": value}}}

    slack = risks.TOLERANCE * found["size"]
    assert risks.violations([with_value(small, high + slack / 2)]) == [] or (
        small in names  # a distance may also break another link
    )
    said = risks.violations([with_value(small, high + 2 * slack)])
    assert any(line.startswith(f"w2, epoch 3: {small} ") for line in said)
    assert any(f"> {large} " in line for line in said)
    assert risks.violations([with_value(small, float("nan"))])


def test_constant_of_the_heads_is_attained():
    """Tests the slope of ||softmax h - (1, 0)|| where both classes are as likely."""
    a, step = 3.0, 1e-4
    zero = np.zeros((1, 2))
    of = lambda z, kernel, bias: risks.Seen(np.array([[z]]), zero, kernel, bias)
    kernel = np.array([[a, -a]]) + 7.0  # softmax is invariant to the 7
    student = of(step, kernel, np.zeros(2))
    teacher = of(0.0, np.zeros((1, 2)), np.array([50.0, 0.0]))
    found = risks.heads_risk(student, teacher)
    assert found["lipschitz"] == pytest.approx(a / 2**0.5)
    assert found["normalised"] == pytest.approx(step, rel=1e-3)
    assert found["teacher"] == pytest.approx(2**0.5 / 2)


def test_constant_of_the_labels_is_attained():
    """Far on the wrong side, the cross-entropy increases at its maximal rate."""
    kernel, bias = np.array([[1.0, -1.0, 0.5], [2.0, 0.0, 0.0]]), np.zeros(3)
    direction = np.array([2.0, 2.0]) / 8**0.5  # w_0 - w_1
    of = lambda t: risks.Seen(-t * direction[None], np.zeros((1, 3)), kernel, bias)
    student, teacher = of(60.0), of(50.0)
    found = risks.label_risk(student, student, teacher, np.array([0]))
    assert found["lipschitz"] == pytest.approx(8**0.5)
    assert found["normalised"] == pytest.approx(10.0, rel=1e-9)


def test_risks_are_those_of_one_head_on_both_features():
    student, teacher, labels = pair(1)
    measured = risks.measure(student, teacher, labels)
    assert measured["risks"]["heads"] == risks.heads_risk(student, teacher)
    for head in (student, teacher):
        found = risks.label_risk(head, student, teacher, labels)
        for name, one in (("student", student), ("teacher", teacher)):
            logits = one.features @ head.kernel + head.bias
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            expected = -np.log(p[np.arange(len(labels)), labels]).mean()
            assert found[name] == pytest.approx(expected)
        of = "student" if head is student else "teacher"
        assert measured["risks"][f"labels, {of}'s head"] == found
        difference = abs(found["student"] - found["teacher"])
        assert found["normalised"] == pytest.approx(difference / found["lipschitz"])


def test_a_constant_head_has_no_difference():
    student, teacher, labels = pair(1)
    flat = [z._replace(kernel=np.zeros_like(z.kernel)) for z in (student, teacher)]
    assert risks.heads_risk(*flat)["normalised"] == 0.0
    assert risks.label_risk(flat[0], *flat, labels)["normalised"] == 0.0


# ---------------------------------------------------------------------------
# Batches.


@pytest.mark.parametrize("size", [5, 29])
def test_bias_of_the_means_is_the_textbooks(size):
    student, teacher, labels = pair(2)
    n, draws = len(labels), 1000
    found = estimates.of_batches(
        student,
        teacher,
        labels,
        batches=(size, n, 1000),
        draws=draws,
        names=("mmd_linear",),
    )[estimates.SAME]["mmd_linear"]
    assert list(found["batches"]) == [str(size)]
    apart = student.features - teacher.features
    whole = (apart.mean(0) ** 2).sum()
    assert found["whole"] == pytest.approx(whole, rel=1e-5)
    # The variance of a mean of `size` draws from n without replacement; with
    # replacement the last factor would be 1.
    added = apart.var(0).sum() / size * (n - size) / (n - 1)
    batch = found["batches"][str(size)]
    assert batch["spread"] > 0
    error = batch["spread"] / draws**0.5
    assert abs(batch["mean"] - whole - added) < 4 * error
    largest = apart.var(0).sum() / size
    assert largest > 10 * error  # otherwise the line above could not fail
    mean, spread = estimates.relative(found, str(size))
    assert mean == pytest.approx(batch["mean"] / whole, rel=1e-5)
    assert spread == pytest.approx(batch["spread"] / whole, rel=1e-5)
    assert estimates.relative({**found, "whole": 0.0}, str(size)) == (None, None)


@pytest.mark.slow
def test_every_estimate_is_of_its_row():
    student, teacher, labels = pair(3)
    both = estimates.of_batches(student, teacher, labels, batches=(8,), draws=2)
    found = both[estimates.SAME]
    assert list(found) == list(both[estimates.OTHER]) == list(estimates.ESTIMATES)
    x, y = (jnp.asarray(z.features, jnp.float32) for z in (student, teacher))
    s, t = (jnp.asarray(z.logits, jnp.float32) for z in (student, teacher))
    beta = float(cdist(student.features, teacher.features, "sqeuclidean").max())
    for name, expected in {
        "w2 exact": kddm_jax.wasserstein(x, y, solver="exact"),
        "w2": kddm_jax.wasserstein(x, y),
        "cw2": kddm_jax.class_wasserstein(x, y, labels),
        "jw2": kddm_jax.joint_wasserstein(x, y, s, t, beta=beta),
        "kl_gaussian": kddm_jax.gaussian_kl(x, y),
        "mmd_rbf": kddm_jax.mmd(x, y),
    }.items():
        assert found[name]["whole"] == pytest.approx(float(expected), rel=1e-4), name
    for name, one in found.items():
        batch = one["batches"]["8"]
        assert batch["spread"] > 0, name
        assert np.isfinite([one["whole"], *batch.values()]).all(), name
        assert both[estimates.OTHER][name]["whole"] == one["whole"], name
    # The debiased divergence is as biased by the sample as the exact value.
    exact, debiased = (
        found[name]["batches"]["8"]["mean"] for name in ("w2 exact", "w2")
    )
    assert exact > found["w2 exact"]["whole"]
    assert debiased == pytest.approx(exact, rel=0.1)
    assert estimates.title_of("w2 exact") == "W2 (E), exact"
    assert estimates.title_of("w2_gaussian") == "W2 (G)"


def test_images_that_both_see_are_nearer():
    found = estimates.of_batches(*pair(3), batches=(8,), draws=30, names=("w2 exact",))
    same, other = (
        found[kind]["w2 exact"]["batches"]["8"]
        for kind in (estimates.SAME, estimates.OTHER)
    )
    error = (same["spread"] ** 2 + other["spread"] ** 2) ** 0.5 / 30**0.5
    assert other["mean"] - same["mean"] > 4 * error


def test_one_draw_has_no_spread():
    found = estimates.of_batches(*pair(3), batches=(8,), draws=1, names=("mmd_linear",))
    for kind in (estimates.SAME, estimates.OTHER):
        assert found[kind]["mmd_linear"]["batches"]["8"]["spread"] == 0


def test_other_images_are_of_the_same_classes():
    labels = np.array([0, 1, 0, 2, 0, 1, 0])
    rng, rows = np.random.default_rng(0), np.array([6, 3, 1, 0])
    seen = set()
    for _ in range(50):
        others = estimates.of_the_same_classes(rows, labels, rng)
        np.testing.assert_array_equal(labels[others], labels[rows])
        assert len(set(others)) == 4
        seen |= set(others)
    assert seen == set(range(7))


# ---------------------------------------------------------------------------
# Networks, epochs, tables.


class Net(nn.Module):
    """Has a linear head, or one that is not."""

    bent: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.relu(nn.Dense(6)(images.reshape(len(images), -1)))
        logits = nn.Dense(10, name="fc")(features)
        return Outputs(nn.relu(logits) if self.bent else logits, features, {})


def test_head_is_read_from_the_network():
    problem = problems.prepare(parse(["--compilation-cache", "None"]), None)
    images = problem.parts.eval_images[:7]
    model = Net()
    variables = problem.init(model, 0)
    found = theorem.seen_by(problem, model, variables, images, "student")
    assert found.features.shape == (7, 6)
    np.testing.assert_allclose(found.head(found.features), found.logits, rtol=1e-4)
    bent = Net(bent=True)
    with pytest.raises(UserError, match="logits must be a linear map 'fc'"):
        theorem.seen_by(problem, bent, variables, images, "teacher")


def test_epochs_are_kept(tmp_path):
    run = runs.Run("w2", 4, 0.1, 1, np.arange(3), Settings(), {})
    kept = theorem.Epochs(run, tmp_path, 30)
    student, teacher, _ = pair(0)
    kept.write(0, student)
    with pytest.raises(UserError, match="w2/seed4/seen-30/epoch-0001.npz is missing"):
        kept.check()
    kept.write(1, teacher)
    kept.check()
    epochs, found = zip(*kept.read(), strict=True)
    assert epochs == (0, 1)
    for one, expected in zip(found, (student, teacher), strict=True):
        for a, b in zip(one, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_epochs_of_the_table():
    assert theorem.shown_epochs(2) == [0, 1, 2]
    assert theorem.shown_epochs(15) == [0, 1, 2, 4, 8, 15]
    assert theorem.shown_epochs(30) == [0, 1, 2, 4, 8, 16, 30]


def test_several_tables_share_a_command():
    tables = [
        {"columns": ("", "a"), "rows": [("x", "1")], "caption": "First."},
        {"columns": ("", "b"), "rows": [("y", "2")], "caption": "Second."},
    ]
    text = table.markdown({"tables": tables, "command": "python it"})
    assert text == (
        "|  | a |\n|---|---|\n| x | 1 |\n\nFirst.\n\n"
        "|  | b |\n|---|---|\n| y | 2 |\n\nSecond. `python it`\n"
    )


# ---------------------------------------------------------------------------
# The command.


def call(*arguments):
    return theorem.main([str(argument) for argument in arguments])


RECORD = EXPERIMENTS / "results" / "theorem-digits.json"


def test_the_recorded_command_makes_its_table():
    """Its settings are those of the record, whatever the recipe's are by now."""
    record = json.loads(RECORD.read_text())
    _, line = record["command"].split(" -- ")
    made = json.loads(json.dumps(as_json(theorem.own_settings(line.split()))))
    recorded = renamed(record["settings"])
    decisive = {n for n in made if GROUP_OF[n] != "run" or n == "seeds"} & {*recorded}
    assert len(decisive) > 40
    assert {n: made[n] for n in decisive} == {n: recorded[n] for n in decisive}


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("", ""),
        ("--epochs 100 --normalization unit", " --normalization unit --epochs 100"),
        ("--equal-compute", " --equal-compute"),
        ("--recipe strong", " --recipe strong"),
        ("--recipe strong --normalization unit", " --recipe strong --normalization un"),
    ],
)
def test_a_command_has_what_is_no_default(line, written):
    """Even if the recipe has the same value."""
    settings, options = theorem.own_settings(line.split()), theorem.parse_options([])
    command = theorem.command_of(settings, options)
    start = "python experiments/theorem.py -- --dataset digits"
    assert command.startswith(start + written)
    assert theorem.own_settings(command.split(" -- ")[1].split()) == settings


OWN = ("--images", 60, "--batches", 8, 32, 64, "--draws", 3)


@pytest.mark.slow
def test_the_command(shared, tmp_path, capsys, monkeypatch):
    out, path = tmp_path / "out", tmp_path / "theorem.json"
    line = [*OWN, "--json", path, "--", *SMALL, "--out", out, "--no-progress"]
    line += [*KEEP, "--checkpoint-seconds", "0"]
    line += ["--distances", "w2"]

    # Stop within the second epoch of the distilled student, and resume.
    write = theorem.Epochs.write

    def stop(self, epoch, what):
        if (self.folder.parts[-3], epoch) == ("w2", 2):
            raise KeyboardInterrupt
        write(self, epoch, what)

    monkeypatch.setattr(theorem.Epochs, "write", stop)
    assert call(*line) == 130
    monkeypatch.setattr(theorem.Epochs, "write", write)
    assert call(*line) == 0
    captured = capsys.readouterr()
    assert "36 inequalities hold" in captured.out
    record = json.loads(path.read_text())
    assert table.markdown(record) in captured.out

    assert record["images"] == 60
    assert [(one["run"], one["epoch"]) for one in record["chain"]] == [
        (name, epoch) for name in ("student", "w2") for epoch in range(3)
    ]
    start, *_ = (one for one in record["chain"] if one["run"] == "w2")
    alone, *_ = record["chain"]
    assert {**start, "run": 0, "title": 0} == {**alone, "run": 0, "title": 0}
    assert record["chain"][2]["w2"] != alone["w2"]
    assert list(record["bias"][estimates.SAME]["w2"]["batches"]) == ["8", "32"]
    assert [len(table["rows"]) for table in record["tables"]] == [6, 12, 12]
    assert record["command"].startswith(
        "python experiments/theorem.py --images 60 --batches 8 32 64 --draws 3 -- "
        "--dataset digits "
    )
    assert " --distances w2 " in record["command"]
    assert str(tmp_path) not in record["command"]
    picture = path.with_suffix(".png")
    assert picture.stat().st_size < 120_000
    with Image.open(picture) as image:
        assert len(image.getcolors(256)) > 10

    # Run again, the command trains nothing and measures the same. A broken chain gives
    # status 1.
    before = path.read_text()
    monkeypatch.setattr(train.train_step, "make_train_step", None)
    distances = risks.distances

    def broken(*arrays):
        found = distances(*arrays)
        return {**found, "w2": found["w2"] / 2}

    assert call(*line) == 0
    timeless = lambda text: re.sub(r'"environment".*', "", text, flags=re.DOTALL)
    assert timeless(path.read_text()) == timeless(before)
    monkeypatch.setattr(risks, "distances", broken)
    capsys.readouterr()
    assert call(*line) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the chain fails: student, epoch 0: w1 ")
    assert "> w2 " in error
    assert error.count("\n") == 1

    # Students that were not observed in training cannot be measured.
    assert call("--images", 50, *line[line.index("--") :]) == 2
    error = capsys.readouterr().err
    assert "seen-50/epoch-0000.npz is missing" in error
    assert "--images" in error


MISTAKES = {
    "images": ("--images 1", ["--images", "at least 2", "1"]),
    "draws": ("--draws 0", ["--draws", "at least 1"]),
    "batches": ("--batches 16 1", ["--batches", "at least 2, got 1"]),
    "seeds": ("-- --seeds 0 1", ["--seeds (0, 1)", "pass one"]),
    "projector": ("-- --projector dense", ["--projector", "unchanged features"]),
    "features only": ("-- --distances feature_only", ["feature_only"]),
    "nothing to distil": ("-- --distances", ["--distances is empty", "cw2"]),
    "unknown distance": ("-- --distances w3", ["unknown distance 'w3'"]),
    "processes": ("-- --processes 2", ["--coordinator"]),
    "a file of outputs": (
        "-- --views 2 --teacher-outputs a.npz",
        ["the teacher's network; pass --teacher instead"],
    ),
    "widths": (
        "-- --distances procrustes --width 4 --teacher-width 6",
        ["width 32", "48", "--teacher-width"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, capsys, monkeypatch):
    line, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    line = line if "--" in line.split() else f"{line} --"
    assert call(*line.split(), "--compilation-cache", "None") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in said:
        assert part in captured.err
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        theorem.parse_options(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ("images", "batches", "draws", "json"):
        assert f"--{name}" in text
    for value in theorem.DEFAULTS.values():
        assert f"(default {' '.join(map(str, np.atleast_1d(value)))})" in text
