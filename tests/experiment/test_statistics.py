"""Tests students that learn from statistics of a teacher, and the files of these."""

import json
import sys

import numpy as np
import pytest
from commands import KEEP, SMALL, call, results_of

from kddm_jax.experiment import choose_weights, outputs
from kddm_jax.experiment.report import table
from kddm_jax.experiment.training import statistics

KINDS = {
    "gaussian": ("gaussian", "class covariances"),
    "diagonal": ("diagonal", "class variances"),
    "means": ("means", "class means"),
    "centroids-3": ("centroids", "3 centroids of each class"),
    "rows-5": ("rows", "5 images of each class"),
}


def store(kind, *arguments, count=None):
    """Runs ``kddm outputs`` in this process."""
    own = ("--statistics", kind, *(("--count", str(count)) if count else ()))
    try:
        return outputs.main([*own, "--", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of every kind, of one teacher."""
    out = tmp_path_factory.mktemp("statistics")
    for name, (kind, _) in KINDS.items():
        count = int(name.partition("-")[2] or 0)
        given = (*SMALL, *KEEP, "--normalization", "unit", "--out", out)
        assert store(kind, *given, count=count) == 0
    return out


def file_of(made, name):
    return made / f"statistics-{name}-unit.npz"


def test_files_hold_what_their_name_says(made):
    read = {name: statistics.read(file_of(made, name)) for name in KINDS}
    rows = read["rows-5"].bank
    assert np.bincount(rows.labels).tolist() == [5] * 10
    np.testing.assert_allclose(np.linalg.norm(rows.features, axis=1), 1, rtol=1e-5)
    means = read["means"].bank.features
    sums = lambda bank: (
        np.add.at(total := np.zeros_like(means), bank.labels, bank.features)
        or total / np.bincount(bank.labels)[:, None]
    )
    for name in ("gaussian", "diagonal"):
        np.testing.assert_allclose(sums(read[name].bank), means, atol=1e-5)
    centroids = read["centroids-3"].bank
    total = np.zeros_like(means)
    share = centroids.weights[:, None]
    np.add.at(total, centroids.labels, share * centroids.features)
    np.testing.assert_allclose(total, means, atol=1e-5)  # weighted by their images
    full, diagonal = (read[name].bank for name in ("gaussian", "diagonal"))
    variances = [b.features[b.labels == 4].var(0) for b in (full, diagonal)]
    np.testing.assert_allclose(*variances, rtol=1e-3, atol=1e-6)
    for name, (kind, words) in KINDS.items():
        about = read[name].about
        assert (about["kind"], read[name].words) == (kind, words)
        assert about["normalization"] == "unit"
    assert len({found.about["teacher"] for found in read.values()}) == 1


def test_statistics_of_another_setting_are_not_replaced(made, capsys):
    file, teacher = file_of(made, "means"), made / "teacher" / "seed0"
    before = file.read_bytes()
    given = (*SMALL, *KEEP, "--normalization", "unit", "--out", made)
    assert store("means", *given) == 0  # the same again
    for other in (("--views", 2), ("--dtype", "bfloat16")):
        assert store("means", *given, *other) == 2
        assert "choose another --out" in capsys.readouterr().err
    assert file.read_bytes() == before
    views = (*given[:-1], made / "views", "--views", 2, "--teacher", teacher)
    assert store("means", *views) == 0
    assert store("means", *views, "--degrees", 30) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert statistics.parse(file, before).about == statistics.read(file).about


def train(out, file, *arguments):
    given = ("--normalization", "unit", "--teacher-statistics", file, "--out", out)
    return call(*SMALL, *KEEP, *given, *arguments)


def test_a_student_trains_from_the_file_alone(made, tmp_path):
    file = tmp_path / "given.npz"
    file.write_bytes(file_of(made, "gaussian").read_bytes())
    weights = ("--weight", 1, "--distances", "cw2_gaussian", "cw2", "kl_gaussian")
    assert train(tmp_path / "out", file, *weights) == 0
    found = results_of(tmp_path / "out")
    # No teacher runs, so a student alone has the compute of a distilled one already.
    names = [run["name"] for run in found["runs"]]
    assert names == ["student", "cw2_gaussian", "cw2", "kl_gaussian"]
    assert not (tmp_path / "out" / "teacher").exists()
    about = statistics.read(file).about
    assert found["teacher"]["digest"] == about["teacher"]
    assert found["teacher"]["accuracy"] == about["accuracy"]
    assert "CW2 (G), from class covariances" in table.markdown(found)
    alone, *others = (run["history"][-1] for run in found["runs"])
    assert "loss" in alone
    assert all(run["loss"] != alone["loss"] for run in others)
    settings = [run["settings"] for run in found["runs"]]
    assert "statistics" not in settings[0]
    digest = statistics.read(file).digest
    assert {own["statistics_digest"] for own in settings[1:]} == {digest}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--distances", "l2"), "same images"),
        (("--distances", "kd"), "same images"),
        (("--distances", "feature_only"), "same images"),
        (("--distances", "w2", "--layers", "map:map"), "--layers"),
        (("--distances", "w2", "--normalization", "None"), "--normalization unit"),
        (("--distances", "w2", "--placebo", "pairs", "--views", 2), "--placebo pairs"),
        (("--distances", "w2", "--width", 2), "projector"),
        (("--distances", "w2", "--held-out", 100), "--teacher-saw-held-out"),
        (("--distances", "w2", "--test-images", 20), "pass --test-images "),
        (("--distances", "cw2", "--teacher", "runs/x"), "--teacher runs/x"),
    ],
)
def test_errors_come_before_training(made, tmp_path, capsys, change, words):
    file = file_of(made, "gaussian")
    assert train(tmp_path / "out", file, "--weight", 1, *change) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


OWN = """
import jax.numpy as jnp
from kddm_jax import Distance

def cosine(x, y, labels):
    return jnp.sum(x * y)

COSINE = Distance(cosine, inputs=("features", "labels"))
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("COSINE", "needs the keyword arguments labels_y, weights_y, num_classes"),
        ("cosine", "needs labels; wrap it in Distance(fn, inputs=('features', 'label"),
    ],
)
def test_own_distances_without_a_bank_are_one_line(
    made, tmp_path, monkeypatch, capsys, name, words
):
    (tmp_path / "own_of_labels.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file, given = file_of(made, "gaussian"), ("--distances", f"own_of_labels:{name}")
    assert train(tmp_path / "out", file, *given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: distance own_of_labels:{name}: ")
    assert words in error
    assert error.count("\n") == 1


def test_a_missing_weight_does_not_lead_to_another_normalization(
    made, tmp_path, capsys
):
    given = ("--distances", "cw2_gaussian")
    assert train(tmp_path / "out", file_of(made, "gaussian"), *given) == 2
    assert capsys.readouterr().err == (
        "error: cw2_gaussian has no default weight with --normalization unit; pass "
        "--weights cw2_gaussian NUMBER\n"
    )


def test_no_other_normalization_is_tuned(made, tmp_path, capsys):
    given = ("--normalization", "unit", "--teacher-statistics", file_of(made, "means"))
    more = ("--held-out", 100, "--teacher-saw-held-out", "--seeds", 1, 2)
    line = [*SMALL, *KEEP, *given, *more, "--distances", "cw2", "--out", tmp_path / "o"]
    own = ["--normalizations", "None", "unit", "--"]
    assert choose_weights.main([*own, *map(str, line)]) == 2
    assert "leave --normalizations out" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_files_of_something_else_are_refused(made, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(file_of(made, "means").read_bytes()[:-100])
    other = tmp_path / "other.npz"
    np.savez(other, features=np.zeros(3))
    empty, array = tmp_path / "empty.npz", tmp_path / "array.npz"
    empty.write_bytes(b"")
    with array.open("wb") as open_file:
        np.save(open_file, np.zeros(3))
    fashion = tmp_path / "fashion.npz"
    with np.load(file_of(made, "means")) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    about = {**json.loads(str(kept.pop("about"))), "dataset": "fashion_mnist"}
    statistics.write(fashion, kept, about)
    of_outputs = tmp_path / "outputs.npz"
    statistics.write(of_outputs, {}, {"drawn": "0"})
    for file, words in (
        (of_outputs, "holds outputs; pass it as --teacher-outputs"),
        (broken, "damaged"),
        (empty, "damaged"),
        (array, "damaged"),
        (other, "no file of kddm outputs"),
        (tmp_path / "none.npz", "No such file"),
        (fashion, "fashion_mnist"),
    ):
        assert train(tmp_path / "out", file, "--distances", "w2", "--weight", 1) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "count", "change", "words"),
    [
        ("gaussian", 3, (), "leave it out"),
        ("rows", 10_000, (), "lower it"),
        ("means", None, ("--normalization", "teacher"), "standardized"),
        ("means", None, ("--teacher-statistics", "x.npz"), "pass --teacher instead"),
    ],
)
def test_what_has_no_statistics(made, capsys, kind, count, change, words):
    given = (*SMALL, *KEEP, "--normalization", "unit", "--out", made, *change)
    assert store(kind, *given, count=count) == 2
    assert words in capsys.readouterr().err
