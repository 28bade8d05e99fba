"""Tests distances between a batch and a bank of other images' features."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kddm_jax import (
    DISTANCES,
    Bank,
    Distance,
    Term,
    class_gaussian_wasserstein,
    class_wasserstein,
    distill_loss,
    gaussian_wasserstein,
    wasserstein,
)
from kddm_jax.adapters import Outputs
from kddm_jax.numerics.bank import gaussian_bank
from kddm_jax.train_step import create_state, make_train_step

N, M, D, K = 14, 30, 5, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = RNG.normal(size=(M, D)).astype(np.float32) + 1
LABELS = np.array([0, 1, 0, 2, 1, 0, 0, 1, 2, 0, 1, 1, 0, -1], np.int32)  # no 3
LABELS_Y = np.arange(M, dtype=np.int32) % K
LABELS_Y[LABELS_Y == 2] = -1  # the bank has no row of class 2
WEIGHTS = RNG.uniform(0.1, 1, M).astype(np.float32)
PAIRS = {
    "entropic": (
        partial(class_wasserstein, solver="entropic", epsilon=0.3),
        partial(wasserstein, solver="entropic", epsilon=0.3),
    ),
    "sinkhorn": (
        partial(class_wasserstein, epsilon=0.3),
        partial(wasserstein, epsilon=0.3),
    ),
    "gaussian": (class_gaussian_wasserstein, gaussian_wasserstein),
    "diagonal": (
        partial(class_gaussian_wasserstein, covariance="diag"),
        partial(gaussian_wasserstein, covariance="diag"),
    ),
}


def to_bank(fn, x=X, y=Y, labels=LABELS, **options):
    given = {"labels_y": LABELS_Y, "num_classes": K, **options}
    return jax.jit(lambda x, y, labels: fn(x, y, labels, **given))(x, y, labels)


def refusal(fn, **options):
    """Calls a distance with numbers, not tracers, which it can check."""
    given = {"labels_y": LABELS_Y, "num_classes": K, **options}
    return fn(X, Y, LABELS, **given)


def tight(kind):
    """Returns options with which an iteration is as exact as double precision needs."""
    return {} if kind in ("gaussian", "diagonal") else {"threshold": 1e-8}


@cache
def program(kind, reduction="mean"):
    """Returns value and gradient by x, in double precision and compiled once."""
    by_class, _ = PAIRS[kind]

    @jax.jit
    def call(x, y, labels, labels_y, weights_y, mask):
        given = {"labels_y": labels_y, "weights_y": weights_y, "mask": mask}
        given |= {"num_classes": K, "reduction": reduction, **tight(kind)}
        return jax.value_and_grad(by_class)(x, y, labels, **given)

    return call


def found(kind, reduction="mean", **changed):
    given = {"x": X, "y": Y, "labels": LABELS, "labels_y": LABELS_Y}
    given |= {"weights_y": np.ones(M), "mask": np.ones(N, bool), **changed}
    floats = {k: np.asarray(given[k], float) for k in ("x", "y", "weights_y")}
    return program(kind, reduction)(**{**given, **floats})


KINDS = pytest.mark.parametrize("kind", PAIRS)


@KINDS
def test_it_is_the_mean_over_classes_on_both_sides(kind, x64):
    of_one = jax.jit(partial(PAIRS[kind][1], **tight(kind)))
    pairs = [(X[c == LABELS], Y[c == LABELS_Y]) for c in (0, 1)]
    each = [of_one(*(np.asarray(z, float) for z in pair)) for pair in pairs]
    np.testing.assert_allclose(found(kind)[0], np.mean(each), rtol=1e-6)
    # In single precision, with the default threshold, and without weights and mask.
    single = to_bank(PAIRS[kind][0])
    assert single.dtype == np.float32
    rtol = 2e-3 if tight(kind) else 1e-5
    np.testing.assert_allclose(single, np.mean(each), rtol=rtol)
    if kind in ("entropic", "diagonal"):  # the two ways of weighting classes
        total, _ = found(kind, "sum")
        np.testing.assert_allclose(total, np.sum(each), rtol=1e-6)
        sizes = [np.sum(c == LABELS) for c in (0, 1)]
        weighted, _ = found(kind, "weighted")
        np.testing.assert_allclose(weighted, np.average(each, weights=sizes), rtol=1e-6)


@KINDS
def test_the_same_images_as_a_bank_give_the_same_distance(kind, x64):
    x = np.asarray(X, float)
    y = x[::-1] + 1
    plain = jax.jit(partial(PAIRS[kind][0], **tight(kind)))(x, y, LABELS)
    rows = np.concatenate([y, np.zeros((M - N, D))])  # of which the last have no label
    labels_y = np.concatenate([LABELS, np.full(M - N, -1, np.int32)])
    value, _ = found(kind, y=rows, labels_y=labels_y)
    np.testing.assert_allclose(value, plain, rtol=1e-6)


@KINDS
def test_a_weight_of_two_is_the_row_twice(kind, x64):
    rows = np.arange(M) % 20  # the first ten rows are there twice
    twice = found(kind, y=Y[rows], labels_y=LABELS_Y[rows])
    once = found(
        kind,
        weights_y=np.where(np.arange(M) < 10, 2, 1),
        labels_y=np.where(np.arange(M) < 20, LABELS_Y, -1),
    )
    np.testing.assert_allclose(once[0], twice[0], rtol=1e-5)
    np.testing.assert_allclose(once[1], twice[1], atol=1e-5)


@KINDS
def test_gradients_are_those_of_the_value(kind, x64):
    step = 1e-5 * np.cos(np.arange(X.size)).reshape(X.shape)
    given = {"weights_y": WEIGHTS}
    (above, _), (below, _) = (found(kind, x=X + s * step, **given) for s in (1, -1))
    _, grad = found(kind, **given)
    slope = np.vdot(grad, step)
    assert abs(slope) > 1e-7
    np.testing.assert_allclose((above - below) / 2, slope, rtol=1e-4)


@KINDS
def test_what_has_no_label_or_is_masked_may_hold_anything(kind, x64):
    x, y = X.copy(), Y.copy()
    x[-1], y[LABELS_Y < 0] = np.nan, np.nan
    value, grad = found(kind, x=x, y=y)
    np.testing.assert_allclose(value, found(kind)[0], rtol=1e-6)
    assert np.isfinite(grad).all()
    mask = np.arange(N) != 0
    left_out, _ = found(kind, labels=np.where(mask, LABELS, -1))
    x[0] = np.nan
    np.testing.assert_allclose(found(kind, x=x, y=y, mask=mask)[0], left_out, rtol=1e-6)


@KINDS
def test_without_a_common_class_it_is_zero(kind, x64):
    value, grad = found(kind, labels=np.full(N, 2, np.int32))
    assert value == 0
    assert not np.asarray(grad).any()


SIZES = [name for name, row in DISTANCES.items() if "sizes" in row.promises]


@pytest.mark.parametrize("name", SIZES)
def test_repeated_rows_change_nothing(name):
    row = DISTANCES[name]
    # The default bandwidth depends on the number of pairs.
    fixed = {"bandwidth": 1.0} if name == "mmd_rbf" else {}
    options = {**dict(row.options), **fixed}
    again = np.concatenate([np.arange(M)] * 2)

    @jax.jit
    def value(x, y, labels, labels_y):
        own = dict(options)
        if "labels" in row.inputs:
            own |= {"labels_y": labels_y, "num_classes": K}
        kinds = {"features": (x, y), "labels": (labels,), "key": (jax.random.key(0),)}
        return row.fn(*(z for kind in row.inputs for z in kinds[kind]), **own)

    once = value(X, Y, LABELS, LABELS_Y)
    twice = value(X, Y[again], LABELS, LABELS_Y[again])
    # An iterative solver starts elsewhere, and stops at its threshold.
    np.testing.assert_allclose(twice, once, rtol=5e-3)


@pytest.mark.parametrize("full", [True, False])
def test_a_gaussian_bank_has_the_given_moments(full):
    root = RNG.normal(size=(K, D, D - 1))  # of rank d - 1
    covariances = root @ np.swapaxes(root, 1, 2)
    given = covariances if full else np.einsum("kii->ki", covariances)
    wanted = covariances if full else given[:, :, None] * np.eye(D)
    means = RNG.normal(size=(K, D))
    bank = gaussian_bank(means, given)
    assert bank.weights is None
    for c in range(K):
        rows = np.asarray(bank.features, np.float64)[bank.labels == c]
        np.testing.assert_allclose(rows.mean(0), means[c], atol=1e-6)
        found = np.cov(rows.T, bias=True)
        np.testing.assert_allclose(found, wanted[c], atol=1e-5 * np.abs(wanted).max())


def test_covariances_with_negative_eigenvalues_are_refused():
    covariances = np.stack([np.eye(D), -np.eye(D)])
    with pytest.raises(ValueError, match="semidefinite, got the eigenvalue -1; pass"):
        gaussian_bank(np.zeros((2, D)), covariances)
    # Of rank one in float32; round-off gives eigenvalues below zero.
    x = RNG.normal(size=(2, 64, 1)).astype(np.float32)
    gaussian_bank(np.zeros((2, 64)), x @ np.swapaxes(x, 1, 2))


# ------------------------------------------------------------------- the loss


BANK = Bank(jnp.asarray(Y), jnp.asarray(LABELS_Y))
LOGITS = jnp.zeros((N, K))


def loss(term, bank=BANK, **options):
    @jax.jit
    def call(x, bank):
        given = {"distance": term, "teacher_data": {"bank": bank}, **options}
        return distill_loss(x, None, LABELS, LOGITS, **given)

    return call(X, bank)


def test_a_term_compares_with_its_bank():
    _, terms = loss([Term(name, bank="bank") for name in ("cw2_gaussian", "w2")])
    wanted = to_bank(class_gaussian_wasserstein)
    np.testing.assert_allclose(terms["cw2_gaussian"], wanted, rtol=1e-6)
    np.testing.assert_allclose(terms["w2"], wasserstein(X, Y), rtol=1e-6)
    weighted = BANK._replace(weights=jnp.asarray(WEIGHTS))
    _, terms = loss(Term("cw2", bank="bank"), weighted)
    wanted = to_bank(class_wasserstein, weights_y=jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(terms["cw2"], wanted, rtol=1e-6)


def test_a_normalization_transforms_the_student_only():
    _, terms = loss(Term("cw2_gaussian", bank="bank"), normalization="unit")
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    wanted = to_bank(class_gaussian_wasserstein, x=unit)
    np.testing.assert_allclose(terms["cw2_gaussian"], wanted, rtol=1e-5)


def test_a_mask_leaves_out_samples_of_the_batch():
    mask = jnp.arange(N) != 0
    _, terms = loss(Term("cw2", bank="bank"), mask=mask)
    wanted = to_bank(class_wasserstein, mask=mask)
    np.testing.assert_allclose(terms["cw2"], wanted, rtol=1e-6)


def test_a_distance_of_your_own_gets_the_labels_of_its_bank():
    def shares(x, y, labels, *, labels_y, weights_y, num_classes):
        assert (len(labels), num_classes) == (N, K)
        return jnp.sum(y[:, 0] * labels_y) + (0 if weights_y is None else 1000)

    own = Term(Distance(shares, inputs=("features", "labels")), bank="bank")
    _, terms = loss(own)
    wanted = np.sum(Y[:, 0] * LABELS_Y)
    np.testing.assert_allclose(terms["shares"], wanted, rtol=1e-5)
    _, terms = loss(own, BANK._replace(weights=jnp.asarray(WEIGHTS)))
    np.testing.assert_allclose(terms["shares"], wanted + 1000, rtol=1e-5)


labelled = Distance(lambda x, y, labels: jnp.sum(x), inputs=("features", "labels"))
no_weights = Distance(
    lambda x, y, labels, *, labels_y, num_classes: jnp.sum(x),
    inputs=("features", "labels"),
)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Term("l2", bank="bank"), "takes no bank"),
        (lambda: Term("kd", bank="bank"), "takes no bank"),
        (lambda: loss(Term("cw2", bank="other")), "teacher_data={'other'"),
        (
            lambda: loss(Term("cw2", bank="bank"), normalization="teacher"),
            'take "unit" and a bank of unit rows, or None in distill_loss',
        ),
        (
            lambda: loss(Term("w2", bank="bank"), BANK._replace(weights=WEIGHTS)),
            "without weights",
        ),
        (lambda: loss(Term("w2", bank="bank"), mask=jnp.ones(N)), "takes labels"),
        (lambda: refusal(class_wasserstein, weights_y=-WEIGHTS), "must be >= 0"),
        (lambda: Term(labelled, bank="bank"), "keyword arguments labels_y"),
        (lambda: Term(no_weights, bank="bank"), "labels_y, weights_y, num_classes; a"),
        (lambda: loss("cw2", weight=1.0), "empty or None"),
        (lambda: refusal(class_wasserstein, solver="exact"), "entropic"),
        (lambda: refusal(class_wasserstein, num_classes=None), "num_classes"),
        (lambda: refusal(class_wasserstein, num_classes=3), "labels_y must lie below"),
        (
            lambda: refusal(class_wasserstein, labels_y=None, weights_y=WEIGHTS),
            "needs labels_y",
        ),
        (
            lambda: refusal(class_gaussian_wasserstein, weights_y=WEIGHTS[:3]),
            r"weights_y must have shape \[m\]=\[30\]",
        ),
    ],
)
def test_errors_name_the_cause(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_step_needs_no_teacher():
    def student(variables, images, *, train):
        del train
        x = images.reshape(len(images), -1) @ variables["params"]["w"]
        return Outputs(x[:, :K], x, {}), {}

    make = partial(
        make_train_step, student, None, optax.sgd(0.1), augment=lambda key, image: image
    )
    program = make(distance=Term("cw2", bank="bank"), weight=1.0, axis_name=None)
    images = RNG.integers(0, 255, (8, 2, 2, 1)).astype(np.float32) / 255

    @jax.jit
    def step(bank):
        state = create_state({"params": {"w": jnp.ones((4, D)) / 9}}, optax.sgd(0.1))
        return program(state, None, images, np.arange(8) % K, {"bank": bank})

    state, metrics = step(BANK)
    assert metrics["cw2"] > 0
    assert "teacher_finite" not in metrics
    moved, _ = step(BANK._replace(features=BANK.features + 1))
    assert not np.array_equal(state.params["w"], moved.params["w"])
    with pytest.raises(ValueError, match="teacher_apply is None"):
        make(distance=(Term("cw2", bank="bank"), Term("l2")))
