"""Tests report/weights.py, which renders the records of choose_weights.py."""

import json

import pytest

from kddm_jax.experiment import render
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.report import weights


def runs(name, accuracies, epochs=60, **choices):
    """Records of a candidate, one for each seed."""
    return [
        {"name": name, "seed": seed, "epochs": epochs, **choices, "accuracy": accuracy}
        for seed, accuracy in enumerate(accuracies)
    ]


def alone(lr, accuracies, epochs=60):
    return runs("student", accuracies, epochs, lr=lr, weight_decay=5e-4)


def of(name, normalization, weight, accuracies, epochs=60, lr=0.1):
    choices = {"lr": lr, "normalization": normalization, "weight": weight}
    return runs(name, accuracies, epochs, **choices)


def choice(*tried, lr=0.1, **settings):
    """Returns the content of a weights.json."""
    plain = {"dataset": "digits", "held_out": 300, "seeds": [0, 1], "epochs": 60}
    pairs = {(r["name"], r.get("normalization")) for group in tried for r in group}
    chosen = [
        {"name": n, "normalization": of, "lr": 0.1} for n, of in sorted(pairs, key=str)
    ]
    return {
        "settings": {**plain, **settings},
        "alone": {"lr": lr, "weight_decay": 5e-4, "accuracy": 50.0},
        "chosen": [row for row in chosen if row["name"] != "student"],
        "tried": sum(tried, []),
        "teacher": 90.0,
        "environment": {"device": "Some GPU", "jax": "1.2.3", "commit": "abc1234"},
    }


STUDENTS = (alone(0.1, [50, 52]), alone(0.03, [40, 41]), alone(0.1, [30], epochs=20))
L2 = (
    # The coarse grid, with one seed and fewer epochs, and the finer one.
    *(of("l2", None, w, [a], 20) for w, a in ((10.0, 0.0), (1.0, 20.0), (0.1, 25.04))),
    *(of("l2", "unit", w, [a], 20) for w, a in ((0.1, 70.0), (1.0, 35.0))),
    of("l2", "unit", 0.1, [60.0, 64.0]),
    of("l2", "unit", 0.32, [61.0, 65.5]),
    of("l2", "unit", 0.1, [99.0], lr=0.3),  # another rate than the chosen one
)
KD = (
    of("kd", None, 1.0, [0.0], 20),
    of("kd", None, 1.0, [55.0, 0.0]),
    of("mine:ROW", None, 1.0, [0.0], 20),
)


def test_runs_are_grouped_by_lambda():
    """Keeps the longer runs of a lambda that was trained twice."""
    found = weights.grids([choice(*STUDENTS, *L2)])
    assert list(found) == [("l2", None), ("l2", "unit")]
    counts = {w: [r["epochs"] for r in row] for w, row in found["l2", "unit"].items()}
    assert counts == {0.1: [60, 60], 0.32: [60, 60], 1.0: [20]}
    assert list(found["l2", None]) == [0.1, 1, 10]


def test_a_normalization_that_was_not_chosen_keeps_its_row():
    """Also if its runs are as long as those of the finer grid."""
    found = choice(*STUDENTS, *L2, of("l2", "centered", 1.0, [30.0]), lr=0.1)
    found["settings"]["lr"] = 0.1
    found["chosen"] = [r for r in found["chosen"] if r["normalization"] == "unit"]
    assert [*weights.grids([found])["l2", "centered"]] == [1.0]


def test_several_files_are_one_table(tmp_path):
    """One seed is in italics, and never better than all seeds."""
    files = {"a.json": choice(*STUDENTS, *L2), "b.json": choice(*STUDENTS[:1], *KD)}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: a.json b.json -->\nold\n<!-- /table -->\n")
    assert render.fill(page).splitlines()[1:-1] == [
        "| student alone: learning rate | weight decay | accuracy % | seeds |",
        "|---|---|---|---|",
        "| 0.03 | 0.0005 | 40.5 | 2 |",
        "| 0.1 | 0.0005 | **51.0** | 2 |",
        "",
        "|  | normalization | learning rate | λ = 0.1 | λ = 0.32 | λ = 1 | λ = 10 |",
        "|---|---|---|---|---|---|---|",
        "| paired L2 | raw | 0.1 | ***25.0*** |  | *20.0* | *diverged* |",
        "| paired L2 | unit | 0.1 | 62.0 | **63.2** | *35.0* |  |",
        "| KD | – | 0.1 |  |  | **27.5** |  |",
        "| mine:ROW | raw | 0.1 |  |  | *diverged* |  |",
        "",
        "digits: accuracy on 300 held-out training images, mean of 2 seeds after 60 "
        "epochs (in italics: one seed after 20 epochs); a run that diverged counts as "
        "0; teacher 90.00; Some GPU, JAX 1.2.3, commit abc1234.",
    ]


def test_a_student_alone_is_a_table():
    text = weights.markdown([choice(alone(0.1, [50, 52]), teacher_saw_held_out=True)])
    assert text.splitlines() == [
        "| student alone: learning rate | weight decay | accuracy % | seeds |",
        "|---|---|---|---|",
        "| 0.1 | 0.0005 | **51.0** | 2 |",
        "",
        "digits: accuracy on 300 held-out training images, which the teacher has seen, "
        "mean of 2 seeds after 60 epochs; teacher 90.00; Some GPU, JAX 1.2.3, commit "
        "abc1234.",
    ]


def test_a_lambda_of_several_files_is_once():
    """Each file is a command that found other runs of the same distance."""
    low, high = L2[3:], (of("l2", "unit", 3.2, [62.0, 63.0]), L2[5])
    text = weights.markdown([choice(*STUDENTS, *low), choice(*STUDENTS, *high)])
    assert "| paired L2 | unit | 0.1 | 62.0 | **63.2** | *35.0* | 62.5 |" in text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (choice(*STUDENTS, seeds=[0, 1, 2]), "seeds=.0, 1. and seeds=.0, 1, 2."),
        (choice(*STUDENTS, lr=0.03), "lr=0.1 and lr=0.03"),
        (choice(*STUDENTS, views=4), "the grids differ in views .None and 4."),
        (choice(*STUDENTS, placebo="pairs"), "differ in placebo .None and pairs."),
        (choice(*STUDENTS, placebo_share=0.5), "differ in placebo_share .1.0 and 0.5"),
        (choice(*STUDENTS, student_images=9), "differ in student_images .None and 9."),
        (choice(*STUDENTS, projector="dense"), "differ in projector .None and dense."),
        (choice(*STUDENTS, teacher_statistics="a.npz"), "differ in teacher_statistics"),
        ({**choice(*STUDENTS), "teacher": 80.0}, "teacher=90.0 and teacher=80.0"),
    ],
)
def test_other_settings_are_no_table(other, said):
    with pytest.raises(UserError, match=said):
        weights.markdown([choice(*STUDENTS), other])


def test_a_run_with_two_accuracies_is_refused():
    other = choice(*STUDENTS, of("l2", "unit", 0.1, [62.0, 61.0]))
    with pytest.raises(UserError, match="l2, λ = 0.1, seed . has accuracy .* in anot"):
        weights.markdown([choice(*STUDENTS, *L2), other])


def test_a_teacher_is_known_by_its_digest():
    """Two teachers may have the same accuracy, and one two, by rounding."""
    one = {**choice(*STUDENTS), "teacher_digest": "abc"}
    weights.markdown([one, {**one, "teacher": 90.01}])
    with pytest.raises(UserError, match="teacher=abc and teacher=def"):
        weights.markdown([one, {**one, "teacher_digest": "def"}])


def test_settings_that_a_candidate_changes_may_differ():
    """The rate and the normalization of the settings are not those of the runs."""
    pair = choice(*STUDENTS), choice(*STUDENTS, lr=0.1, normalization="unit")
    pair[1]["settings"]["lr"] = 3.0
    assert weights.markdown(pair) == weights.markdown(pair[:1])
