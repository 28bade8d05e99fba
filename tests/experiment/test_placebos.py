"""Placebos: what they keep of the teacher's outputs, and what they remove."""

import numpy as np
import pytest
from commands import KEEP, SMALL, TINY, call, results_of

from kddm_jax import adapters
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report.rows import PLACEBOS
from kddm_jax.experiment.training import placebos, problems, runs, train
from kddm_jax.experiment.training import views as fixed_views

VIEWS = 3
LABELS = np.array([2, 0, 1, 0, 2, 1, 0, 2, 1, 1], np.int32)
OF_VIEWS = np.repeat(LABELS, VIEWS)


def outputs_of(labels=LABELS, views=VIEWS, seed=0):
    draw = np.random.default_rng(seed).normal
    n = len(labels) * views
    maps = {"map": draw(size=(n, 2, 2, 3)).astype(np.float32)}
    logits, features = draw(size=(n, 4)), draw(size=(n, 5))
    return adapters.Outputs(*(logits.astype("f4"), features.astype("f4"), maps))


def sources(outputs, placebo):
    """The row that each row of the placebo had before; all arrays agree on it."""
    found = []
    pairs = [(outputs.features, placebo.features), (outputs.logits, placebo.logits)]
    for before, after in [*pairs, (outputs.maps["map"], placebo.maps["map"])]:
        same = (
            before.reshape(len(before), 1, -1) == after.reshape(1, len(after), -1)
        ).all(-1)
        assert (same.sum(0) == 1).all()
        found.append(same.argmax(0))
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    return found[0]


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_every_image_has_the_outputs_of_another(kind):
    outputs = outputs_of()
    rows = sources(outputs, placebos.replace(kind, outputs, LABELS, VIEWS))
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(rows)))
    assert (rows // VIEWS != np.arange(len(rows)) // VIEWS).all()  # no own image
    # Views move together: view v of one image becomes view v of another.
    np.testing.assert_array_equal(rows % VIEWS, np.arange(len(rows)) % VIEWS)
    by_image = rows.reshape(-1, VIEWS) // VIEWS
    assert (by_image == by_image[:, :1]).all()
    assert (OF_VIEWS[rows] == OF_VIEWS).all() == (kind == "pairs")


def test_every_view_has_the_outputs_of_the_next():
    outputs = outputs_of()
    rows = sources(outputs, placebos.replace("views", outputs, LABELS, VIEWS))
    by_image = rows.reshape(-1, VIEWS)
    expected = np.arange(len(LABELS))[:, None] * VIEWS + [1, 2, 0]
    np.testing.assert_array_equal(by_image, expected)


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_share_of_each_class_is_exchanged(kind):
    labels = np.repeat(np.arange(4), [40, 8, 9, 6])
    labels, before = np.random.default_rng(1).permutation(labels), set()
    for share, counts in {
        0.25: [10, 2, 2, 2],  # halves are rounded up
        0.5: [20, 4, 5, 3],
        0.75: [30, 6, 7, 5],
        1.0: [40, 8, 9, 6],
    }.items():
        others = placebos.partners(kind, labels, share)
        np.testing.assert_array_equal(np.sort(others), np.arange(len(labels)))
        moved = np.flatnonzero(others != np.arange(len(labels)))
        np.testing.assert_array_equal(np.bincount(labels[moved]), counts)
        assert before < set(moved)  # smaller shares are among larger ones
        before = set(moved)
        assert (labels[others] == labels).all() == (kind == "pairs")
    np.testing.assert_array_equal(others, placebos.partners(kind, labels))


def test_the_other_images_keep_their_outputs():
    outputs, labels = outputs_of(np.repeat(LABELS, 2)), np.repeat(LABELS, 2)
    placebo = placebos.replace("pairs", outputs, labels, VIEWS, 0.5)
    rows = sources(outputs, placebo).reshape(-1, VIEWS)
    others = placebos.partners("pairs", labels, 0.5)
    np.testing.assert_array_equal(rows // VIEWS, np.repeat(others[:, None], VIEWS, 1))
    assert 0 < np.sum(others == np.arange(len(labels))) < len(labels)


def test_pairs_keep_the_moments_of_each_class():
    outputs = outputs_of()
    placebo = placebos.replace("pairs", outputs, LABELS, VIEWS)
    for label in range(3):
        before, after = (o.features[label == OF_VIEWS] for o in (outputs, placebo))
        assert (before != after).all()
        # The same rows in another order have the same moments, to the last bit.
        order = lambda rows: rows[np.lexsort(rows.T)]
        np.testing.assert_array_equal(order(before), order(after))


def test_labels_are_as_good_as_chance():
    labels = np.repeat(np.arange(4), 500)
    same = labels[placebos.partners("labels", labels)] == labels
    assert 0.2 < same.mean() < 0.3


def test_a_placebo_is_the_same_for_all_seeds():
    outputs = outputs_of()
    for kind in ("pairs", "labels", "views", "gaussian"):
        first, again = (placebos.replace(kind, outputs, LABELS, VIEWS) for _ in "ab")
        np.testing.assert_array_equal(first.features, again.features)


def test_gaussian_features_have_the_moments_of_each_class():
    rng, n = np.random.default_rng(0), 40_000
    labels = np.arange(n) % 2
    mixing = rng.normal(size=(2, 2, 4))  # covariances of rank two
    skewed = rng.exponential(size=(n, 2))
    features = np.einsum("ni,nij->nj", skewed, mixing[labels]) + 3 * labels[:, None]
    drawn = placebos.gaussian(features.astype(np.float32), labels)
    for label in (0, 1):
        before, after = features[labels == label], drawn[labels == label]
        size = np.sqrt(np.trace(np.cov(before.T)))
        # Both are moments of n / 2 draws: errors are of order size / sqrt(n / 2).
        np.testing.assert_allclose(before.mean(0), after.mean(0), atol=0.03 * size)
        covariances = np.cov(before.T), np.cov(after.T)
        np.testing.assert_allclose(*covariances, atol=0.05 * size**2)
        # A Gaussian has no skewness; exponential variables have skewness 2.
        skewness = lambda x: np.abs(np.mean(((x - x.mean(0)) / x.std(0)) ** 3, 0)).max()
        assert skewness(before) > 1
        assert skewness(after) < 0.1
    one, other = drawn[labels == 0], drawn[labels == 1]
    assert (
        abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.05
    )  # not one noise for all


def test_gaussian_features_come_alone():
    outputs = outputs_of()
    placebo = placebos.replace("gaussian", outputs, LABELS, VIEWS)
    assert placebo.maps == {}
    assert placebo.logits is outputs.logits  # for --predicted-labels only
    assert placebo.features.dtype == np.float32
    assert placebo.features.shape == outputs.features.shape
    assert len(np.unique(placebo.features, axis=0)) == len(placebo.features)


def test_an_image_without_another_is_refused():
    with pytest.raises(UserError, match="a single image of class 2, .*--student-ima"):
        placebos.partners("pairs", np.array([0, 1, 0, 2, 1]))
    assert len(placebos.partners("labels", np.array([0, 1, 2]))) == 3
    few = np.repeat([0, 1], 6)
    with pytest.raises(UserError, match="share 0.2 exchanges 1 of 6 images of class 0"):
        placebos.partners("pairs", few, 0.2)
    with pytest.raises(UserError, match=r"share 0.05 exchanges 0 of 12 images, which"):
        placebos.partners("labels", few, 0.05)


# -------------------------------------------------------------------- settings


def planned(tmp_path, *line):
    line = [*TINY, "--compilation-cache", "None", "--devices", "1", *line]
    problem = problems.prepare(parse(line), tmp_path)
    return problem, list(runs.student_runs(problem, None))


def test_a_placebo_needs_views():
    with pytest.raises(UserError, match="--placebo pairs .* add --views, such as"):
        parse(["--placebo", "pairs"])
    with pytest.raises(UserError, match="unknown placebo 'none'; known: None, pairs"):
        parse(["--placebo", "none", "--views", "2"])
    with pytest.raises(UserError, match="--placebo views .* --views 1 has a single"):
        parse(["--placebo", "views", "--views", "1"])
    parse(["--placebo", "views", "--views", "2"])


@pytest.mark.parametrize("kind", [None, "views", "gaussian"])
def test_only_exchanged_images_have_a_share(kind):
    line = ["--views", "2", "--placebo", str(kind)]
    parse(line)
    with pytest.raises(UserError, match=f"--placebo-share 0.5 .* placebo is {kind}"):
        parse([*line, "--placebo-share", "0.5"])


def test_a_placebo_is_another_run(tmp_path):
    line = ("--views", "2", "--distances", "l2")
    (alone, plain), (alone_too, pairs), (_, labels) = (
        planned(tmp_path, *line, *more)[1]
        for more in ((), ("--placebo", "pairs"), ("--placebo", "labels"))
    )
    assert alone.identity == alone_too.identity
    _, half = planned(tmp_path, *line, "--placebo", "pairs", "--placebo-share", "0.5")[
        1
    ]
    changed = {k for k, v in half.identity.items() if pairs.identity[k] != v}
    assert changed == {"placebo_share"}
    kinds = [run.identity["placebo"] for run in (plain, pairs, labels)]
    assert kinds == [None, "pairs", "labels"]
    assert plain.title == "paired L2"
    assert pairs.title == plain.title  # tables add the placebo
    assert alone_too.title == "student"
    # Folders of earlier versions do not have the setting.
    new = ("placebo", "placebo_share", "unlabelled_images", "predicted_labels")
    older = {k: v for k, v in plain.identity.items() if k not in new}
    plain.folder(tmp_path).mkdir(parents=True)
    records.write_json(plain.folder(tmp_path) / "run.json", older)
    runs.check_folder(plain, tmp_path)
    with pytest.raises(UserError, match="placebo=None, this command says pairs"):
        runs.check_folder(pairs, tmp_path)


@pytest.mark.parametrize(
    ("line", "compared"),
    [
        ("kd", "kd compares logits"),
        ("jw2", "jw2 compares logits"),
        ("l2 l2+kd", "l2\\+kd compares logits"),
        ("nst", "nst compares maps"),
        ("l2 --layers stem:stem --positions each", "l2 compares maps"),
        ("feature_only --layers stem:stem", "feature_only compares maps"),
        ("w2 --layers logits:logits", "w2 compares logits"),
        ("l2", None),
        ("w2 --layers features:features", None),
        ("feature_only --layers features:features", None),
    ],
)
def test_gaussian_features_are_for_distances_of_features(tmp_path, line, compared):
    line = ("--views", "2", "--distances", *line.split())

    def check(kind):
        problem, _ = planned(tmp_path, *line, "--placebo", kind)
        runs.check_distances(problem, problem.student)

    check("pairs")
    if compared is None:
        check("gaussian")
        return
    with pytest.raises(UserError, match=f"gaussian draws pooled .*{compared}; leave"):
        check("gaussian")


@pytest.mark.parametrize(
    ("kind", "images", "of"), [("pairs", 10, "class 0"), ("labels", 1, "the data set")]
)
def test_a_placebo_without_partners_is_refused_before_training(
    tmp_path, kind, images, of
):
    line = ("--views", "2", "--distances", "l2", "--student-images", str(images))
    problem, _ = planned(tmp_path, *line, "--batch-size", "1")
    runs.check_distances(problem, problem.student)
    problem, _ = planned(tmp_path, *line, "--batch-size", "1", "--placebo", kind)
    with pytest.raises(UserError, match=f"--placebo {kind}: .* a single image of {of}"):
        runs.check_distances(problem, problem.student)


# -------------------------------------------------------------------- training


def test_students_learn_from_the_placebo(tmp_path, monkeypatch):
    line = ("--views", "2", "--distances", "l2")
    problem, _ = planned(tmp_path, *line)
    labels = problem.dataset.train_labels[problem.parts.student]
    outputs = outputs_of(labels, views=2)
    monkeypatch.setattr(fixed_views.Views, "outputs", lambda *_: outputs)
    runs.check_distances(problem, problem.student)

    def taught(*more):
        settings = parse([*TINY, *line, *more])
        run = runs.student_run(problem, None, "l2", 0, settings=settings)
        method = runs.method_of(problem, "l2", settings)
        return np.asarray(train._what_teaches(problem, run, method, None).features)

    # One study may have runs with and without a placebo.
    np.testing.assert_array_equal(
        taught().reshape(outputs.features.shape), outputs.features
    )
    shares = [("pairs", 1.0), ("pairs", 0.5), ("labels", 1.0)]
    for kind, share in [*shares, ("views", 1.0), ("gaussian", 1.0)]:
        expected = placebos.replace(kind, outputs, labels, 2, share).features
        found = taught("--placebo", kind, "--placebo-share", str(share))
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    np.testing.assert_array_equal(
        taught().reshape(outputs.features.shape), outputs.features
    )


@pytest.mark.slow
def test_placebos_from_end_to_end(tmp_path):
    line = (*SMALL, *KEEP, "--devices", 1, "--views", 2, "--weight", 1, "--epochs", 8)
    first = tmp_path / "none"
    assert call(*line, "--out", first, "--distances", "l2") == 0
    last = {None: results_of(first)["runs"][-1]["history"][-1]["l2"]}
    for kind in ("pairs", "gaussian"):
        out = tmp_path / kind
        given = ("--teacher", first / "teacher" / "seed0", "--placebo", kind)
        assert call(*line, *given, "--out", out, "--distances", "l2") == 0
        last[kind] = results_of(out)["runs"][-1]["history"][-1]["l2"]
        assert f"| paired L2, {PLACEBOS[kind]} |" in (out / "table.md").read_text()
    # Features of another image, or of none, are farther from the student's.
    assert last["pairs"] > last[None]
    assert last["gaussian"] > last[None]
