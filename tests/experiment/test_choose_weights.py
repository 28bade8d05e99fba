"""choose_weights.py: what is tried, chosen, recorded and refused."""

import math

import jax
import numpy as np
import pytest
from commands import SMALL, unwanted_training

from kddm_jax.experiment import choose_weights
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.settings import Settings, change
from kddm_jax.experiment.training import methods, problems, runs, train


@pytest.fixture
def line(trained, tmp_path, monkeypatch):
    """Settings of a command whose teacher is trained already."""
    monkeypatch.setattr(problems, "evaluate", lambda *arguments: {"accuracy": 12.5})
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests need them
    line = (*SMALL, "--teacher", trained / "small", "--devices", 1, "--out", tmp_path)
    line = (*line, "--held-out", 100, "--teacher-saw-held-out", "--seeds", 1, 2)
    return [*map(str, line), "--compilation-cache", "None", "--distances", "w2"]


@pytest.fixture
def fake(monkeypatch):
    """Replaces training: ``fake(accuracy)`` returns the labels of what is trained.

    Results are written and read as by real training. A run diverges if its accuracy is
    None.
    """

    def begin(accuracy):
        ran = []

        def fake_train(problem, run, *_):
            if finished := train._begin(problem, run):
                return finished
            ran.append(run.label)
            found = accuracy(run)
            if found is None:
                raise RunError(f"{run.label}: loss not finite (loss inf); lower --lr")
            result = {"accuracy": float(found)}
            records.write_json(run.folder(problem.out) / "result.json", result)
            return result

        monkeypatch.setattr(train, "train", fake_train)
        return ran

    return begin


def near(value, best):
    return -10 * abs(math.log10(value / best))


def accuracy(run):
    """L2 needs unit features, KD a large lambda; MMD does not help."""
    optimizer, normalization = run.settings.optimizer, run.settings.method.normalization
    if run.name == "student":
        decay = near(optimizer.weight_decay, 5e-4)
        return 60 + near(optimizer.lr, 0.1) + decay + 0.5 * run.seed
    best = {"l2": 3.0, "kd": 100.0, "mmd_linear": 1.0}[run.name]
    rate = abs(math.log10(optimizer.lr / {"l2": 0.3}.get(run.name, 0.1)))
    level = {"l2": {None: 40, "unit": 80}[normalization], "kd": 70, "mmd_linear": 50}
    return level[run.name] + near(run.weight, best) + run.seed - rate


SEARCH = ("--normalizations", "None", "unit", "--first-epochs", "1")
RATES = ("--rates", "0.1", "0.3", "--decays", "5e-4", "5e-3")
ALONE = "student, lr {}, weight decay {}, {} epochs, seed {}"


def test_every_method_is_tuned(line, fake, tmp_path, monkeypatch, capsys):
    """The student alone; a coarse grid with one seed; a fine one with all seeds."""
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    ran = fake(accuracy)
    command = [*SEARCH, *RATES, "--", *line[:-1], "l2", "kd"]
    assert choose_weights.main(command) == 0
    rates = [(0.1, 0.0005), (0.3, 0.0005), (0.033, 0.0005), (0.1, 0.005), (0.1, 5e-5)]
    expected = [ALONE.format(*pair, 2, seed) for pair in rates for seed in (1, 2)]
    expected += [
        f"l2, {normalization}, λ = {weight}, lr 0.02, 1 epoch, seed 1"
        for normalization in ("raw features", "unit")
        for weight in ("0.1", "1", "10")
    ]
    expected += ["student, lr 0.02, weight decay 0.0005, 1 epoch, seed 1"]
    # Raw features are worse than the student alone.
    of_l2 = "l2, unit, λ = {}, lr {}, 2 epochs, seed {}"
    expected += [of_l2.format(1, lr, 1) for lr in (0.1, 0.3, 0.9)]
    fine = [(w, seed) for w in ("0.32", 1, 3.2, 10) for seed in (1, 2)]
    expected += [of_l2.format(w, 0.3, seed) for w, seed in fine if (w, seed) != (1, 1)]
    coarse = "kd, λ = {}, lr 0.02, 1 epoch, seed 1"
    expected += [coarse.format(w) for w in (0.1, 1, 10, 100, 1000)]
    of_kd = "kd, λ = {}, lr {}, 2 epochs, seed {}"
    expected += [of_kd.format(100, lr, 1) for lr in (0.1, 0.3, 0.033)]
    fine = [(w, seed) for w in (32, 100, 320) for seed in (1, 2)]
    expected += [
        of_kd.format(w, 0.1, seed) for w, seed in fine if (w, seed) != (100, 1)
    ]
    assert ran == expected
    assert len(cleared) == 3

    found = records.read_json(tmp_path / "weights.json")
    assert found["alone"] == {
        "lr": 0.1, "weight_decay": 5e-4, "accuracy": 60.75, "at_edge": [],
    }  # fmt: skip
    row = {"seeds": 2, "epochs": 2, "at_edge": False, "best": True, "lr_at_edge": False}
    unit = {"name": "l2", "normalization": "unit", "weight": 3.2, "lr": 0.3}
    unit["accuracy"] = pytest.approx(81.5 + near(3.2, 3))
    kd = {"name": "kd", "normalization": None, "weight": 100.0, "accuracy": 71.5}
    kd["lr"] = 0.1
    raw = {"name": "l2", "normalization": None, "weight": 1.0, "seeds": 1, "epochs": 1}
    raw |= {"accuracy": pytest.approx(41 + near(1, 3) - math.log10(15)), "lr": 0.02}
    raw |= {"at_edge": False, "best": False, "lr_at_edge": False}
    assert found["chosen"] == [raw, {**unit, **row}, {**kd, **row}]
    assert len(found["tried"]) == len(ran)
    assert found["tried"][0] == {
        "name": "student", "seed": 1, "epochs": 2, "lr": 0.1, "weight_decay": 5e-4,
        "place": "epochs-2-lr-0.1-weight_decay-0.0005", "accuracy": 60.5,
    }  # fmt: skip
    record = {"name": "l2", "seed": 1, "epochs": 1, "lr": 0.02, "normalization": "unit"}
    record |= {"weight": 10.0, "accuracy": 81 + near(10, 3) - math.log10(0.3 / 0.02)}
    record |= {"place": "epochs-1-lr-0.02-normalization-unit-weight-10"}
    assert pytest.approx(record["accuracy"]) in [
        r["accuracy"] for r in found["tried"] if r["place"] == record["place"]
    ]

    said = capsys.readouterr().out
    decay = "--weight-decay 0.0005"
    raw = f"--lr 0.02 {decay} --normalization None --distances l2 --weights l2 1"
    kd = f"--lr 0.1 {decay} --normalization None --distances kd --weights kd 100"
    unit = f"--lr 0.3 {decay} --normalization unit --distances l2 --weights l2 3.2"
    alone = f"--lr 0.1 {decay} --distances"
    assert said.endswith("".join(f"  {line}\n" for line in (alone, raw, unit, kd)))
    assert "l2, normalization None: worse than the student alone after 1 epoch" in said
    assert "edge" not in said
    assert f"{tmp_path}/weights.json" in said

    # Once more: every result is read again, and gives the same choice.
    ran.clear()
    assert choose_weights.main(command) == 0
    assert ran == []
    again = records.read_json(tmp_path / "weights.json")
    assert {**again, "environment": None} == {**found, "environment": None}
    # Other distances use what is known.
    assert choose_weights.main([*command[:-2], "kd", "mmd_linear"]) == 0
    assert {label.partition(",")[0] for label in ran} == {"mmd_linear"}


def test_a_value_at_the_edge_is_named(line, fake, tmp_path, capsys):
    """Here the grid could be extended for ever."""

    def rising(run):
        if run.name == "student":
            return 50 + math.log10(run.settings.optimizer.lr)
        return 60 + math.log10(run.weight)

    fake(rising)
    assert choose_weights.main(["--rates", "0.1", "1", "--", *line]) == 0
    found = records.read_json(tmp_path / "weights.json")
    assert (found["alone"]["lr"], found["alone"]["at_edge"]) == (1e4, ["lr"])
    (row,) = found["chosen"]
    # 4 values are added to the coarse grid up to 1e5, and as many to the finer one.
    assert (row["weight"], row["at_edge"]) == (3e7, True)
    said = capsys.readouterr().out
    assert "│ 3e+07 (edge) │" in said
    assert "w2, normalization teacher: λ = 3e+07 is at the edge of its grid" in said
    assert "student alone: --lr 10000 is at the edge of its grid" in said


def test_the_best_normalization_is_that_of_all_seeds(line, fake, tmp_path):
    """The first seed prefers unit features, both together raw ones."""

    def both(run):
        if run.name == "student":
            return 10
        unit = run.settings.method.normalization == "unit"
        return (
            50 + near(run.weight, 1) + (10 if unit == (run.seed == 1) else -20 * unit)
        )

    fake(both)
    choose_weights.main([*SEARCH, "--", *line])
    found = records.read_json(tmp_path / "weights.json")
    rows = {row["normalization"]: row for row in found["chosen"]}
    assert [rows[n]["accuracy"] for n in (None, "unit")] == [55, 45]
    assert [rows[n]["best"] for n in (None, "unit")] == [True, False]


def test_a_run_that_diverges_stops_no_other(line, fake, tmp_path, capsys):
    """It counts as 0 and is not tried again, unless by skipping such steps."""

    def some(run):
        if run.name == "student":
            return 50
        return None if run.weight > 5 else 60 + near(run.weight, 1)

    ran = fake(some)
    command = ["--", *line]
    label = "w2, teacher, λ = 10, lr 0.02, 2 epochs, seed 1"
    for expected in (True, False):
        ran.clear()
        assert choose_weights.main(command) == 0
        assert (label in ran) == expected == bool(ran)
        said = capsys.readouterr().out
        place = "epochs-2-lr-0.02-normalization-teacher-weight-10"
        folder = tmp_path / place / "w2" / "seed1"
        assert (
            f"{label}: loss not finite (loss inf); counts as 0 %; delete "
            f"{folder}/diverged.json to try it again"
        ) in said
        found = records.read_json(tmp_path / "weights.json")
        tried = {(r["weight"], r["seed"]): r["accuracy"] for r in found["tried"][2:]}
        assert tried[10.0, 1] == 0
        assert found["chosen"][0]["weight"] == 1
    # A result is a result, and skipping such steps is another way.
    skipping = [*command, "--on-nonfinite", "skip"]
    choose_weights.main(skipping)
    assert ran == [label]
    records.write_json(folder / "result.json", {"accuracy": 30.0})
    ran.clear()
    choose_weights.main(skipping)
    assert ran == []
    assert f"{label}: 30.00 % of held-out images" in capsys.readouterr().out


def test_a_method_that_diverges_for_each_lambda_is_not_recommended(
    line, fake, tmp_path, capsys
):
    fake(lambda run: 50 if run.name == "student" else None)
    assert choose_weights.main(["--", *line]) == 0
    said = capsys.readouterr().out
    assert "diverged" in said
    assert said.rstrip().endswith(
        "results.json):\n  --lr 0.02 --weight-decay 0.0005 --distances"
    )
    (row,) = records.read_json(tmp_path / "weights.json")["chosen"]
    assert (row["accuracy"], row["seeds"]) == (0, 1)
    # Smaller lambdas were tried, too.
    assert (tmp_path / "epochs-2-lr-0.02-normalization-teacher-weight-1e-05").exists()


@pytest.mark.parametrize(
    ("rates", "fix"), [((), "--lr"), (("--rates", "1", "3"), "values of --rates")]
)
def test_a_student_alone_that_diverges_ends_the_search(line, fake, rates, fix, capsys):
    fake(lambda run: None)
    assert choose_weights.main([*rates, "--", *line]) == 2
    error = f"error: every student alone diverged; pass a smaller {fix}\n"
    assert capsys.readouterr().err == error


def test_the_student_alone_can_be_tuned_without_distances(line, fake, tmp_path, capsys):
    ran = fake(accuracy)
    assert choose_weights.main(["--rates", "0.1", "0.3", "--", *line[:-1]]) == 0
    assert {label.partition(",")[0] for label in ran} == {"student"}
    found = records.read_json(tmp_path / "weights.json")
    assert (found["alone"]["lr"], found["chosen"]) == (0.1, [])
    assert capsys.readouterr().out.endswith(
        "\n  --lr 0.1 --weight-decay 0.0005 --distances\n"
    )


# ---------------------------------------------------------------------------
# Mistakes.

# By name: options before --, settings after it, parts of the error.
REFUSED = {
    "no held-out images": ("", "--held-out 0", ["--held-out is 0", "--held-out 300"]),
    "one seed": ("", "--seeds 3", ["--seeds names only 3", "--seeds 0 1"]),
    "lambda": ("", "--weight 3", ["--weight: this command", "--grid"]),
    "lambdas": ("", "--weights w2 3", ["--weights: this command", "--grid"]),
    "one lambda": ("--grid 2", "", ["--grid 2: pass at least two"]),
    "lambda of zero": ("--grid 0 1 2", "", ["--grid", "positive and", "got 0 1 2"]),
    "infinite": ("--rates 1 inf", "", ["--rates", "finite", "got 1 inf"]),
    "no number": ("--grid 1 nan", "", ["--grid", "finite", "got 1 nan"]),
    "one rate": ("--rates 0.1", "", ["--rates 0.1: pass at least two"]),
    "negative": ("--decays -1 1", "", ["--decays", "zero or positive", "got -1 1"]),
    "one decay": ("--decays 0 1e-3", "", ["--decays 0 0.001: pass at least two pos"]),
    "close": (
        "--grid 0.1 0.1234567 0.1234568",
        "",
        ["--grid: 0.1 and 0.1234567 are too close", "factor of at least 1.25"],
    ),
    "normalization": (
        "--normalizations None units",
        "",
        ["unknown normalization 'units'", "None, teacher, unit"],
    ),
    "no epoch": ("--first-epochs 0", "", ["--first-epochs must be at", "got 0"]),
    "epochs": ("--first-epochs 3", "", ["at most --epochs, which is 2; got 3"]),
    "zero": (
        "--normalizations centered standardized",
        "--distances w2 mmd_linear",
        ["mmd_linear is zero with each of --normalizations centered standardized"],
    ),
    "distance": ("", "--distances nowhere:THIS", ["'nowhere:THIS'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_training(
    name, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "train", unwanted_training)
    before, after, said = REFUSED[name]
    command = [*before.split(), "--", *line, *after.split()]
    assert choose_weights.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in said:
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_a_distance_is_traced_with_each_normalization(line, monkeypatch, capsys):
    """Before any training; those with which it is zero are left out."""
    monkeypatch.setattr(train, "train", unwanted_training)
    traced, check = [], methods.check

    def checked(name, method, *shapes):
        check(name, method, *shapes)
        traced.append((name, method.options["normalization"]))
        if traced[-1] == ("w2", "unit"):
            raise UserError("this does not work")

    monkeypatch.setattr(methods, "check", checked)
    names = ("centered", "None", "unit")
    command = ["--normalizations", *names, "--", *line[:-1], "mmd_linear", "kd", "w2"]
    assert choose_weights.main(command) == 2
    assert capsys.readouterr().err == "error: this does not work\n"
    settings = ["teacher"] * 3
    assert traced == [
        *zip(("mmd_linear", "kd", "w2"), settings, strict=True),
        *(("mmd_linear", n) for n in (None, "unit")),
        *(("w2", n) for n in ("centered", None, "unit")),
    ]


def test_a_folder_of_other_settings_is_refused(line, fake, tmp_path, capsys):
    fake(accuracy)
    folder = tmp_path / "epochs-2-lr-0.02-weight_decay-0.0005" / "student" / "seed1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"dataset": "mnist"}')
    assert choose_weights.main(["--", *line]) == 2
    error = capsys.readouterr().err
    assert f"{folder} was made with dataset=mnist, this command says digits" in error
    (tmp_path / "file").touch()
    line[line.index(str(tmp_path))] = str(tmp_path / "file")
    assert choose_weights.main(["--", *line]) == 2
    assert f"--out {tmp_path / 'file'}" in capsys.readouterr().err


# ---------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize(
    ("name", "changes", "label"),
    [
        ("student", {}, "student, lr 0.3, weight decay 0, 3 epochs, seed 7"),
        ("l2", {}, "l2, raw features, λ = 0.5, lr 0.3, 3 epochs, seed 7"),
        (
            "l2",
            {"normalization": "unit"},
            "l2, unit, λ = 0.5, lr 0.3, 3 epochs, seed 7",
        ),
        ("kd", {"normalization": "unit"}, "kd, λ = 0.5, lr 0.3, 3 epochs, seed 7"),
        (
            "feature_only",
            {},
            "feature_only, raw features, λ = 0.5, lr 0.3, 3 epochs, seed 7",
        ),
    ],
)
def test_a_candidate_is_named_by_what_it_tries(name, changes, label):
    settings = change(Settings(), lr=0.3, **changes)
    run = runs.Run(name, 7, 0.5, 3, np.arange(2), settings, {}, place="somewhere")
    assert run.label == label
    assert runs.Run(name, 7, 0.5, 3, np.arange(2), settings, {}).label == (
        f"{name} seed 7"
    )
