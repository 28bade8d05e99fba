"""Tests students that also see images without labels: which, when, and what of them."""

import signal

import jax
import numpy as np
import pytest
from commands import (
    KEEP,
    KILL,
    SMALL,
    TINY,
    assert_same_arrays,
    call,
    command,
    final_arrays,
    results_of,
    small_results,
    unwanted_training,
)

from kddm_jax import data, train_step
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import rows, table
from kddm_jax.experiment.settings import Settings
from kddm_jax.experiment.training import compute, optimizers, problems, runs, train

DIGITS = data.load("digits")
LINE = ("--student-images", "64", "--distances", "l2")


def planned(tmp_path, *line, devices=1):
    line = [*TINY, *LINE, "--compilation-cache", "None", *line]
    settings = parse([*line, "--devices", str(devices)])
    problem = problems.prepare(settings, tmp_path)
    return problem, list(runs.student_runs(problem, None))


def run_of(unlabelled, seed=0, name="l2"):
    return runs.Run(
        *(name, seed, 1.0, 2, np.arange(100, 170), Settings(), {}),
        unlabelled=np.arange(1000, 1000 + unlabelled),
    )


# ------------------------------------------------------------------ which images


def split(*line):
    given = ["--dataset", "digits", "--unlabelled-images", "0", *line]
    return problems.split(DIGITS, parse(given))


def test_unlabelled_images_are_the_teachers_and_not_the_students():
    line = ("--train-images", "800", "--student-images", "200", "--held-out", "300")
    parts = split(*line, "--unlabelled-images", "500")
    assert len(set(parts.unlabelled)) == 500
    assert set(parts.unlabelled) <= set(parts.teacher)
    assert not set(parts.unlabelled) & set(parts.student)
    # Fewer are the first of more, and the other images stay the same.
    few, none = split(*line, "--unlabelled-images", "100"), split(*line)
    np.testing.assert_array_equal(few.unlabelled, parts.unlabelled[:100])
    np.testing.assert_array_equal(none.student, parts.student)
    assert len(none.unlabelled) == 0
    # They are drawn without their labels, so classes do not occur equally often.
    assert np.ptp(np.bincount(DIGITS.train_labels[few.unlabelled])) > 1


def test_too_many_unlabelled_images_are_refused():
    line = ("--train-images", "800", "--student-images", "200", "--unlabelled-images")
    assert len(split(*line, "600").unlabelled) == 600
    with pytest.raises(UserError, match=r"^--unlabelled-images 601: 600 of the teac"):
        split(*line, "601")


# ----------------------------------------------------------------------- batches


def test_batches_alternate_between_labelled_and_unlabelled_images():
    order = runs.epoch_order(run_of(90), 0, 32)
    assert order.shape == (2, 64)  # the steps are those without unlabelled images
    assert order.dtype == np.int32
    plain = runs.epoch_order(run_of(0), 0, 32)
    np.testing.assert_array_equal(order[:, ::2], plain)
    unlabelled = order[:, 1::2]
    assert len(np.unique(unlabelled)) == 64  # none is repeated
    assert (unlabelled >= 1000).all()
    # Every device, of up to 32, has as many of both.
    for devices in (1, 2, 8, 32):
        shares = order.reshape(2, devices, -1) >= 1000
        assert (shares.mean(-1) == 0.5).all()


@pytest.mark.parametrize("count", [1, 10, 63, 64, 65])
def test_unlabelled_images_are_repeated_as_little_as_possible(count):
    drawn = runs.epoch_order(run_of(count), 0, 32)[:, 1::2].ravel() - 1000
    times = np.bincount(drawn, minlength=count)
    assert times.min() >= 64 // count
    assert times.max() <= -(-64 // count)


def test_unlabelled_images_are_drawn_by_seed_and_epoch():
    order = lambda seed, epoch: runs.epoch_order(run_of(90, seed), epoch, 32)[:, 1::2]
    np.testing.assert_array_equal(order(0, 1), order(0, 1))
    assert (order(0, 1) != order(0, 0)).any()
    assert (order(0, 1) != order(1, 1)).any()


@pytest.mark.parametrize("how", ["resident", "streamed", "views"])
def test_students_see_no_label_of_an_unlabelled_image(tmp_path, how):
    more = {"streamed": ("--stream-above", "0"), "views": ("--views", "2")}
    line = ("--unlabelled-images", "40", *more.get(how, ()))
    problem, (alone, run) = planned(tmp_path, *line, devices=2)
    assert (len(alone.unlabelled), len(run.unlabelled)) == (0, 40)
    whole, of_views = problem.dataset.train_labels, how == "views"
    images = order = runs.epoch_order(run, 0, 32)
    if of_views:
        order = problem.views.order(order, 0, 0)
        np.testing.assert_array_equal(problem.seen[order // 2], images)

    def labels_of(**options):
        """Returns the labels of each batch, from the shares of both devices."""
        for _, labels, own in problem.dispatches(order, 1, **options):
            labels, own = np.asarray(labels), own[:, 0]  # of the only step
            streamed = labels.ndim == 2
            shares = [labels[d] if streamed else labels for d in range(2)]
            yield np.concatenate([shares[d][own[d]] for d in range(2)])

    found = np.array([*labels_of(of_views=of_views, of_students=True)])
    np.testing.assert_array_equal(found[:, 1::2], -1)
    np.testing.assert_array_equal(found[:, ::2], whole[images[:, ::2]])
    if not of_views:  # the teacher learns from all labels
        np.testing.assert_array_equal(np.array([*labels_of()]), whole[images])


def test_views_of_labelled_images_are_the_same(tmp_path):
    views = ("--views", "3", "--degrees", "20")
    one, _ = planned(tmp_path, *views, "--unlabelled-images", "40")
    other, _ = planned(tmp_path, *views)
    images, labels = one.views.pair
    assert len(images) == 3 * (64 + 40)
    np.testing.assert_array_equal(images[: 3 * 64], other.views.pair[0])
    np.testing.assert_array_equal(labels[: 3 * 64], other.views.pair[1])
    np.testing.assert_array_equal(labels[3 * 64 :], -1)


# -------------------------------------------------------------------- identities


def test_students_alone_are_the_same_runs(tmp_path):
    _, plain = planned(tmp_path)
    _, more = planned(tmp_path, "--unlabelled-images", "40", "--no-predicted-labels")
    assert plain[0].identity == more[0].identity
    changed = {k for k, v in more[1].identity.items() if plain[1].identity[k] != v}
    assert changed == {"unlabelled_images", "predicted_labels"}


def test_a_distance_compares_both_kinds_of_images(tmp_path):
    assert planned(tmp_path, devices=2)[0].compared_images == 32
    line = ("--unlabelled-images", "40")
    problem, (_, whole) = planned(tmp_path, *line, devices=2)
    assert problem.compared_images == 64
    assert whole.identity["group_images"] is None
    problem, (_, group) = planned(tmp_path, *line, "--distance-group", "1", devices=2)
    assert problem.compared_images == group.identity["group_images"] == 32


def test_equal_compute_counts_the_unlabelled_images(tmp_path, monkeypatch):
    counts = {"teacher": 200.0, "student": 100.0}
    monkeypatch.setattr(compute, "operations", lambda who, *_: counts[who])

    def epochs(*line):
        problem, _ = planned(tmp_path, "--epochs", "30", *line)
        problem.teacher = problem.student
        return compute.longer_epochs(problem)

    assert epochs() == 50  # 30 (1 + 2 / 3)
    assert epochs("--unlabelled-images", "32") == 100  # of every batch, half
    # 30 + 3 * 2 / 3, and 60 + 3 (1 + 32 / 64) * 2 / 3
    assert epochs("--views", "3") == 32
    assert epochs("--views", "3", "--unlabelled-images", "32") == 63


def test_a_table_names_the_unlabelled_images():
    results = small_results()
    assert "unlabelled" not in table.markdown(results)
    results["settings"].update(unlabelled_images=40)
    assert "; distilled students also see 40 unlabelled images; " in table.caption(
        results
    )
    assert "--unlabelled-images 40" in table.caption(results)
    results["settings"]["predicted_labels"] = False
    assert "40 unlabelled images, no predicted classes; " in table.caption(results)
    assert "--no-predicted-labels" in table.caption(results)
    plain = small_results()
    titles = [row.title for row in rows.rows(plain)]
    merged = rows.merge({"a.json": results, "b.json": plain})
    both = rows.rows(merged)
    assert "40 unlabelled images, no predicted classes |" in table.markdown(merged)
    assert "distilled students also see" not in table.caption(merged)
    assert {row.title for row in both} > {*titles}  # rows of their own


# ---------------------------------------------------------------------- training


def history(out, name):
    (run,) = [run for run in results_of(out)["runs"] if run["name"] == name]
    return run["history"]


def test_unlabelled_images_from_end_to_end(trained, tmp_path, monkeypatch, capsys):
    """Trains with and without them, on two devices streamed, and resumes."""
    given = ("--teacher", trained / "small", *LINE, "--distances", "l2", "kd")
    line = (*SMALL, *KEEP, *given, "--weight", 1, "--devices", 1)
    more = ("--unlabelled-images", 40)
    plain, one, two = (tmp_path / name for name in ("plain", "one", "two"))
    assert call(*line, "--out", plain) == 0
    assert call(*line, *more, "--out", one) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "64 for students and 40 unlabelled ones for distilled ones" in said
    assert_same_arrays(*(final_arrays(out, "student") for out in (plain, one)))
    without, found = history(plain, "l2"), history(one, "l2")
    assert without[0]["l2"] != found[0]["l2"]
    step = lambda out: final_arrays(out, "l2")[0]
    assert step(plain) == step(one)  # as many steps
    # The order does not depend on the devices, nor on where the images are.
    parallel = ("--devices", 2, "--stream-above", 0)
    assert call(*line, *more, *parallel, "--out", two) == 0
    for name in ("l2", "kd"):
        for ours, theirs in zip(history(one, name), history(two, name), strict=True):
            for metric in ("loss", name, "task", "accuracy"):
                np.testing.assert_allclose(ours[metric], theirs[metric], rtol=1e-3)
    assert "also see 40 unlabelled images" in (one / "table.md").read_text()
    monkeypatch.setattr(train, "_train_program", unwanted_training)
    assert call(*line, *more, "--out", one) == 0
    assert call(*line, "--unlabelled-images", 41, "--out", one) == 2
    assert "unlabelled_images=40, this command says 41" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("views", [(), ("--views", 2)])
def test_a_killed_run_goes_on_with_the_same_images(trained, tmp_path, views):
    given = ("--teacher", trained / "small", *LINE, "--distances", "w2")
    line = (*SMALL, *KEEP, *given, "--devices", 1, "--unlabelled-images", 40, *views)
    assert call(*line, "--out", tmp_path / "whole") == 0
    line = (*line, "--out", tmp_path / "killed", "--checkpoint-seconds", 0)
    killed = command(*line, script=("-c", KILL), cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert call(*line) == 0
    arrays = (final_arrays(tmp_path / out, "w2") for out in ("whole", "killed"))
    assert_same_arrays(*arrays)


@pytest.mark.parametrize("who", ["teacher", "students"])
def test_the_teacher_has_labels_that_students_have_not(
    trained, tmp_path, monkeypatch, who
):
    seen = []

    def look(problem, order, length, *, of_views=False, of_students=False):
        labels = problem.student_labels if of_students else problem.dataset.train_labels
        seen.append(int(np.sum(labels < 0)))
        raise KeyboardInterrupt

    monkeypatch.setattr(problems.Problem, "dispatches", look)
    line = (*SMALL, *KEEP, *LINE, "--devices", 1, "--out", tmp_path)
    given = ("--teacher", trained / "small") if who == "students" else ()
    assert call(*line, *given, "--unlabelled-images", 40) == 130
    assert seen == [40 if who == "students" else 0]


def first_step(problem, run, teacher, **changes):
    """Returns the metrics of a run's first step."""
    model, method = problem.student, runs.method_of(problem, run.name, run.settings)
    tx = optimizers.make_optimizer(run.settings.optimizer, 0.1)
    program = train._train_program(problem, run, method, model, teacher, tx, 1)
    state = train._fresh(problem, run, model, method, tx)
    state = train_step.replicate(state, problem.devices)
    taught = train._what_teaches(problem, run, method, teacher)
    order = runs.epoch_order(run, 0, run.settings.optimizer.batch_size)
    of_views = problem.views is not None
    if of_views:
        order = problem.views.order(order, run.seed, 0)
    found = problem.dispatches(order, 1, of_views=of_views, of_students=True)
    return jax.device_get(program(state, taught, *next(found), {})[1])


@pytest.mark.parametrize("placebo", [None, "pairs", "gaussian"])
def test_predicted_labels_reach_the_distance(tmp_path, placebo):
    """It changes with them; cross-entropy and accuracy do not."""
    line = ["--views", "2", "--unlabelled-images", "40", "--distances", "cw2_gaussian"]
    line += ["--student-model", "small_network:Small", "--teacher-model"]
    line += ["small_network:Small", "--weight", "1"]
    line += ["--placebo", placebo] if placebo else []
    found = {}
    for labels in (("--no-predicted-labels",), ()):
        problem, (_, run) = planned(tmp_path / str(len(labels)), *line, *labels)
        model = problem.model("small_network:Small", 4)
        runs.check_distances(problem, model)
        variables = train_step.replicate(problem.init(model, 7), problem.devices)
        teacher = train.Teacher(model, 4, variables, "a", 50.0, None)
        found[labels] = first_step(problem, run, teacher)
    without, predicted = found.values()
    np.testing.assert_allclose(without["task"], predicted["task"], rtol=1e-6)
    assert without["accuracy"] == predicted["accuracy"]
    assert abs(without["cw2_gaussian"] / predicted["cw2_gaussian"] - 1) > 1e-3
