"""Rows of a study: which runs a row has, and what its title says."""

import copy

import pytest
from commands import small_results

from kddm_jax.experiment.report import rows, table

TITLES = {"student": "student", "w2": "W2 (E)", "l2": "paired L2", "kd": "KD"}


def made(name, accuracy_by_seed, weight=1.0, **settings):
    """The runs of a method, as in ``results.json``."""
    (run, *_) = small_results()["runs"]
    weight = 0.0 if name == "student" else weight
    more = {"name": name, "title": TITLES[name], "weight": weight}
    return [
        {**run, **more, "seed": seed, "accuracy": accuracy, "settings": settings}
        for seed, accuracy in accuracy_by_seed.items()
    ]


ALONE = made("student", {0: 80.0, 1: 82.0})


def study(*runs, **settings):
    """The results of a command."""
    results = copy.deepcopy(small_results())
    results["settings"].update(settings)
    results["teacher"]["digest"] = "abc"
    results["runs"] = [run for group in (ALONE, *runs) for run in group]
    return results


def cells(results, *names):
    """Some columns of the methods' rows."""
    columns = table.columns(results)
    chosen = [columns.index(name) for name in names]
    lines = table.table(results)
    methods = [line for line in lines if line[0] not in ("student", "teacher")]
    return [tuple(line[i] for i in chosen) for line in methods]


# ---------------------------------------------------------------------------
# Rows of one study.


def test_normalizations_are_a_column_if_they_differ():
    """KD compares no features: it has none."""
    same = study(made("w2", {0: 84.0}), made("kd", {0: 85.0}), normalization="unit")
    assert "normalization" not in table.columns(same)
    other = study(
        made("w2", {0: 84.0}, normalization="unit"),
        made("l2", {0: 84.0}, normalization=None),
        made("kd", {0: 85.0}, normalization="unit"),
    )
    assert cells(other, "", "normalization") == [
        *(("W2 (E)", "unit rows"), ("paired L2", "raw"), ("KD", "")),
    ]


def test_titles_say_what_distinguishes_a_method_s_rows():
    results = study(
        made("w2", {0: 84.0}, normalization="unit"),
        made("l2", {0: 84.0}, 1.0, normalization="unit"),
        made("l2", {0: 83.0}, 10.0, normalization="unit"),
        made("l2", {0: 82.0}, 10.0, normalization="teacher"),
        made("kd", {0: 85.0}, 0.3),
        made("kd", {0: 85.0}, 3.0),
    )
    assert cells(results, "", "λ") == [
        ("W2 (E)", "1"),
        ("paired L2, unit rows, λ = 1", "1"),
        ("paired L2, unit rows, λ = 10", "10"),
        ("paired L2, teacher scale", "10"),
        ("KD, λ = 0.3", "0.3"),
        ("KD, λ = 3", "3"),
    ]


@pytest.mark.parametrize(
    ("normalization", "words"),
    [
        *((None, "raw"), ("teacher", "teacher scale"), ("unit", "unit rows")),
        *(("centered", "centered"), ("standardized", "standardized")),
    ],
)
def test_a_normalization_has_words(normalization, words):
    results = study(made("w2", {0: 84.0}), normalization=normalization)
    (row,) = [row for row in rows.rows(results) if not row.alone]
    assert row.key.normalization == words


def test_results_of_earlier_versions_call_it_scale():
    results = study(made("w2", {0: 84.0}, scale="teacher"), scale="teacher")
    (row,) = [row for row in rows.rows(results) if not row.alone]
    assert row.key.normalization == "teacher scale"


@pytest.mark.parametrize(
    ("placebo", "words"),
    [
        ("pairs", "pairs shuffled within a class"),
        ("labels", "labels permuted"),
        ("gaussian", "Gaussian features"),
    ],
)
def test_placebos_are_called_so(placebo, words):
    sham = study(made("w2", {0: 81.0, 1: 82.0}), placebo=placebo)
    assert [row.title for row in rows.rows(sham)] == ["student", f"W2 (E), {words}"]
