"""Rows of one study and of several: which runs a row has, and what its title says."""

import copy
import json

import pytest
from commands import small_results

from kddm_jax.experiment import render
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.report import page as page_module
from kddm_jax.experiment.report import rows, table

TITLES = {"student": "student", "w2": "W2 (E)", "l2": "paired L2", "kd": "KD"}
TITLES |= {"feature_only": "features only", "nst": "NST", "l2+kd": "paired L2 + KD"}


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
    ("placebo", "share", "words"),
    [
        ("pairs", 1.0, "pairs shuffled within a class"),
        ("pairs", None, "pairs shuffled within a class"),  # of an earlier version
        ("pairs", 0.25, "pairs shuffled within a class for 25 % of images"),
        ("labels", 1.0, "labels permuted"),
        ("labels", 0.125, "labels permuted for 12.5 % of images"),
        ("views", 1.0, "views of an image exchanged"),
        ("gaussian", 1.0, "Gaussian features"),
    ],
)
def test_placebos_are_called_so(placebo, share, words):
    real = study(made("w2", {0: 84.0, 1: 85.0}))
    settings = {"placebo": placebo, "placebo_share": share}
    settings = {name: value for name, value in settings.items() if value is not None}
    sham = study(made("w2", {0: 81.0, 1: 82.0}), **settings)
    assert [row.title for row in rows.rows(sham)] == ["student", f"W2 (E), {words}"]
    both = rows.merge({"a.json": real, "b.json": sham})
    assert cells(both, "", "accuracy %") == [
        ("W2 (E)", "84.50 ± 0.71"),
        (f"W2 (E), {words}", "81.50 ± 0.71"),
    ]


def test_shares_of_a_placebo_have_rows_of_their_own():
    studies = {
        f"{share}.json": study(
            made("w2", {0: 100 * share}), placebo="pairs", placebo_share=share
        )
        for share in (0.25, 0.5)
    }
    found = cells(rows.merge(studies), "", "accuracy %")
    assert [(title.split(" for ")[1], number) for title, number in found] == [
        *(("25 % of images", "25.00"), ("50 % of images", "50.00")),
    ]


# ---------------------------------------------------------------------------
# Several studies.


def test_seeds_of_two_files_are_one_row(tmp_path, capsys):
    """By hand: seeds 0 to 2, differences 4, 4 and 1; t is 4.303, the error 1."""
    one = study(made("w2", {0: 84.0, 1: 86.0}), made("kd", {0: 87.0}), seeds=[0, 1])
    other = study(made("student", {2: 81.0}), made("w2", {2: 82.0}), seeds=[2])
    other["runs"] = other["runs"][2:]
    other["environment"]["command"] = "kddm distill --seeds 2"
    (tmp_path / "a.json").write_text(json.dumps(one))
    (tmp_path / "b.json").write_text(json.dumps(other))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: a.json b.json -->\nold\n<!-- /table -->\n")
    text = render.fill(page)
    assert text.splitlines()[1:7] == [
        "|  | accuracy % | difference to alone | gap closed | λ | seeds | seconds |",
        "|---|---|---|---|---|---|---|",
        "| student | 81.00 ± 1.00 |  |  |  | 3 | 10 |",
        "| teacher | 90.00 |  |  |  |  | 61 |",
        "| W2 (E) | 84.00 ± 2.00 | +3.0 [-1.3, +7.3] | 33 % | 1 | 3 | 10 |",
        "| KD | 87.00 | +7.0 | 78 % | 1 | 1 | 10 |",
    ]
    assert "; 1 to 3 seeds; " in text
    assert text.splitlines()[-4:-1] == [
        "",
        "- `python experiments/cifar.py --dataset digits --seeds 0 1`",
        "- `kddm distill --dataset digits --seeds 2`",
    ]
    for name, results in (("a", one), ("b", other)):  # a folder is its results.json
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    for names in (("a.json", "b.json"), ("a", "b"), ("a", "b.json")):
        assert render.main([str(tmp_path / name) for name in names]) == 0
        assert capsys.readouterr().out.strip() == "\n".join(text.splitlines()[1:-1])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]


def test_normalizations_of_two_files_are_two_rows():
    """A method that compares no features is one row, in the order of the files."""
    settings = lambda value: {"normalization": value, "data": None, "lr": 0.1}
    one = study(
        made("l2", {0: 84.0, 1: 85.0}, **settings("unit")),
        made("kd", {0: 85.0}, **settings("unit")),
        normalization="unit",
    )
    other = study(
        made("w2", {0: 70.0}, 0.3, **settings(None)),
        made("l2", {0: 83.0}, 0.3, **settings(None)),
        made("kd", {1: 85.0}, **settings(None)),
        normalization=None,
    )
    merged = rows.merge({"a.json": one, "b.json": other})
    assert cells(merged, "", "normalization", "λ", "seeds") == [
        ("paired L2, unit rows", "unit rows", "1", "2"),
        ("KD", "", "1", "2"),
        ("W2 (E)", "raw", "0.3", "1"),
        ("paired L2, raw", "raw", "0.3", "1"),
    ]
    page = page_module.render(merged)
    assert "paired L2, unit rows" in page


def test_a_run_that_is_in_both_files_counts_once():
    one, other = study(made("w2", {0: 84.0})), study(made("l2", {0: 85.0}))
    other["runs"][0]["timing"] = {"seconds": 99.0}
    merged = rows.merge({"a.json": one, "b.json": other})
    assert [len(row.runs) for row in rows.rows(merged)] == [2, 1, 1]


def test_the_trained_teacher_has_its_seconds():
    one, other = study(made("w2", {0: 84.0})), study(made("l2", {0: 85.0}))
    one["teacher"].update(small_results(given=True)["teacher"])
    merged = rows.merge({"a.json": one, "b.json": other})
    assert table.table(merged)[1][-1] == "61"


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("dataset", ("digits", "mnist"), "dataset (digits and mnist)"),
        ("student_images", (128, None), "student_images (128 and None)"),
        ("train_images", (128, None), "train_images (128 and None)"),
        ("views", (None, 4), "views (None and 4)"),
        ("width", (16, 32), "width (16 and 32)"),
        ("student_model", ("ResNet18", "ResNet9"), "student_model (ResNet18 and"),
        ("epochs", (15, 30), "epochs (15 and 30)"),
        ("batch_size", (128, 256), "batch_size (128 and 256)"),
        ("optimizer", ("sgd", "adamw"), "optimizer (sgd and adamw)"),
        ("momentum", (0.9, 0.5), "momentum (0.9 and 0.5)"),
        ("held_out", (0, 300), "held_out (0 and 300)"),
        ("distance_group", (None, 2), "distance_group (None and 2)"),
    ],
)
def test_studies_of_other_settings_are_no_table(name, values, said):
    one, other = (study(made("w2", {0: 84.0}), **{name: value}) for value in values)
    with pytest.raises(UserError, match="^a.json and b.json differ in ") as error:
        rows.merge({"a.json": one, "b.json": other})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_images_are_compared_and_not_their_settings():
    """None means all, which may be the number that the other command names."""
    counts = {"student_images": 128, "test_images": 100}
    one = study(made("w2", {0: 84.0}, **counts), **counts)
    missing = dict.fromkeys(counts)
    other = study(made("w2", {1: 85.0}, **missing), **missing)
    one["student_images"] = other["student_images"] = 128
    merged = rows.merge({"a.json": one, "b.json": other})
    assert [len(row.runs) for row in rows.rows(merged)] == [2, 2]
    other["student_images"] = 1437
    with pytest.raises(UserError, match=r"differ in student_images \(128 and 1437\)"):
        rows.merge({"a.json": one, "b.json": other})


def test_a_missing_setting_had_its_default():
    """Earlier versions did not record every setting."""
    one, other = study(made("w2", {0: 84.0})), study(made("l2", {0: 85.0}), epochs=15)
    assert "epochs" not in one["settings"]
    rows.merge({"a.json": one, "b.json": other})


@pytest.mark.parametrize(
    "settings",
    [
        {"seeds": [3]},
        {"eval_every": 5},
        {"weights": {"l2": 3.0}},
        {"teacher": "elsewhere", "teacher_epochs": 99},
        {"devices": 2, "data_dir": "elsewhere"},
    ],
)
def test_settings_that_a_table_shows_or_does_not_need_may_differ(settings):
    one, other = study(made("w2", {0: 84.0})), study(made("l2", {0: 85.0}), **settings)
    merged = rows.merge({"a.json": one, "b.json": other})
    assert [row.title for row in rows.rows(merged)] == [
        "student",
        "W2 (E)",
        "paired L2",
    ]


def test_another_teacher_or_test_set_is_no_table():
    one, other = study(made("w2", {0: 84.0})), study(made("l2", {0: 85.0}))
    other["teacher"]["digest"] = "def"
    with pytest.raises(UserError, match=r"the teacher's digest \(abc and def\)"):
        rows.merge({"a.json": one, "b.json": other})
    other["teacher"]["digest"] = "abc"
    other["eval_images"] = 50
    with pytest.raises(UserError, match=r"evaluation images \(100 and 50\)"):
        rows.merge({"a.json": one, "b.json": other})


def test_two_accuracies_of_one_run_are_no_table():
    one = study(made("w2", {0: 84.0, 1: 85.0}))
    other = study(made("w2", {1: 85.5}))
    with pytest.raises(
        UserError, match=r"seed 1 \(85.00 and 85.50 %\); copy the folder w2"
    ):
        rows.merge({"a.json": one, "b.json": other})


def test_runs_of_a_row_differ_in_their_seed_only():
    """Such as one's own distance, whose file was edited."""
    one = study(made("w2", {0: 84.0}, distance_source="old"))
    other = study(made("w2", {1: 85.5}, distance_source="new"))
    with pytest.raises(UserError, match=r"distance_source of W2 \(E\) \(old and new\)"):
        rows.merge({"a.json": one, "b.json": other})


def test_learning_rates_and_layers_distinguish_rows():
    """A student alone and a method may each have their own rate."""
    results = small_results()
    for run in results["runs"]:
        run["settings"] = {**run.get("settings", {}), "lr": 0.1, "layers": []}
    other = [dict(run) for run in results["runs"]]
    for run in other:
        run["settings"] = {**run["settings"], "lr": 0.3, "layers": ["released"]}
    results["runs"] += other
    found = [(row.title, row.key.rate) for row in rows.rows(results)]
    assert found == [
        ("student, learning rate 0.1", "0.1"),
        ("student, learning rate 0.3", "0.3"),
        ("W2 (E), learning rate 0.1", "0.1"),
        ("W2 (E), learning rate 0.3, layers released", "0.3"),
    ]
    assert "learning rate" in table.columns(results)


def test_weight_decays_of_two_files_are_rows():
    """Such as KD with RepDistiller's weights, which has another weight decay."""
    rate = lambda lr, decay: {"lr": lr, "weight_decay": decay}
    one = study(made("kd", {0: 84.0, 1: 85.0}), **rate(0.05, 5e-4))
    other = study(made("kd", {0: 86.0, 1: 86.5}), **rate(0.05, 5e-3))
    merged = rows.merge({"a.json": one, "b.json": other})
    assert [(row.title, row.key.decay) for row in rows.rows(merged)] == [
        ("student, weight decay 0.0005", "0.0005"),
        ("student, weight decay 0.005", "0.005"),
        ("KD, weight decay 0.0005", "0.0005"),
        ("KD, weight decay 0.005", "0.005"),
    ]
    assert cells(merged, "weight decay", "accuracy %")[-1] == ("0.005", "86.25 ± 0.35")
    assert "weight decay" not in table.columns(one)


def test_a_student_alone_of_fewer_seeds_is_no_reference():
    """Its one seed may be lucky, and would leave one pair of each method."""
    results = small_results()
    lucky = {**results["runs"][0], "accuracy": 99.0, "settings": {"lr": 0.7}}
    for run in results["runs"]:
        run["settings"] = {**run.get("settings", {}), "lr": 0.1}
    results["runs"].append(lucky)
    assert rows.reference(rows.rows(results)).key.rate == "0.1"


def test_released_layers_are_not_normalized():
    """The setting of the recipe does not apply to them."""
    layers = lambda *names: {"normalization": "unit", "layers": list(names)}
    results = study(
        made("feature_only", {0: 84.0}, **layers("released")),
        made("feature_only", {0: 85.0}, **layers()),
        made("feature_only", {0: 86.0}, **layers("a:b")),
    )
    assert cells(results, "", "normalization") == [
        ("features only, raw, layers released", "raw"),
        ("features only, unit rows", "unit rows"),
        ("features only, unit rows, layers a:b", "unit rows"),
    ]


def test_predictions_have_no_layers():
    """They are one row of two commands, one of which names layers for its features."""
    methods = ("kd", "nst", "l2", "l2+kd")
    one = study(*(made(name, {0: 84.0}, layers=["a:b"]) for name in methods))
    other = study(*(made(name, {1: 85.0}, layers=[]) for name in methods))
    found = rows.rows(rows.merge({"a.json": one, "b.json": other}))
    assert [(row.title, [*row.accuracy]) for row in found if not row.alone] == [
        ("KD", [0, 1]),
        *(("NST, layers a:b", [0]), ("paired L2, layers a:b", [0])),
        ("paired L2 + KD, layers a:b", [0]),
        *(("NST", [1]), ("paired L2", [1]), ("paired L2 + KD", [1])),
    ]
