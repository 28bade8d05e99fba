"""Tests distances between a batch and a bank of other images' features."""

from functools import partial

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
from kddm_jax.testing import assert_distance_gradients
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
    given = {"labels_y": jnp.asarray(LABELS_Y), "num_classes": K, **options}
    return fn(jnp.asarray(x), jnp.asarray(y), jnp.asarray(labels), **given)


@pytest.mark.parametrize("kind", PAIRS)
def test_it_is_the_mean_over_classes_on_both_sides(kind):
    by_class, of_one = PAIRS[kind]
    each = [of_one(X[c == LABELS], Y[c == LABELS_Y]) for c in (0, 1)]
    np.testing.assert_allclose(to_bank(by_class), np.mean(each), rtol=1e-5)
    total = to_bank(by_class, reduction="sum")
    np.testing.assert_allclose(total, np.sum(each), rtol=1e-5)
    sizes = [np.sum(c == LABELS) for c in (0, 1)]
    weighted = np.average(each, weights=sizes)
    found = to_bank(by_class, reduction="weighted")
    np.testing.assert_allclose(found, weighted, rtol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_same_images_as_a_bank_give_the_same_distance(kind):
    by_class, _ = PAIRS[kind]
    y = X[::-1] + 1
    plain = by_class(jnp.asarray(X), jnp.asarray(y), jnp.asarray(LABELS))
    found = to_bank(by_class, y=y, labels_y=jnp.asarray(LABELS))
    np.testing.assert_allclose(found, plain, rtol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_weight_of_two_is_the_row_twice(kind):
    by_class, _ = PAIRS[kind]
    weights = 1 + np.arange(M) % 2
    again = np.repeat(np.arange(M), weights)
    twice = to_bank(by_class, y=Y[again], labels_y=jnp.asarray(LABELS_Y[again]))
    found = to_bank(by_class, weights_y=jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, twice, rtol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_are_those_of_the_value(kind):
    by_class, _ = PAIRS[kind]
    tight = {} if kind in ("gaussian", "diagonal") else {"threshold": 1e-6}
    fn = lambda x: to_bank(
        by_class, x=x, weights_y=jnp.asarray(WEIGHTS), **tight
    )  # fmt: skip
    assert_distance_gradients(fn, jnp.asarray(X))


@pytest.mark.parametrize("kind", PAIRS)
def test_what_has_no_label_or_is_masked_may_hold_anything(kind):
    by_class, _ = PAIRS[kind]
    x, y = X.copy(), Y.copy()
    x[-1], y[LABELS_Y < 0] = np.nan, np.nan
    value = lambda x, **more: to_bank(by_class, x=x, y=y, **more)
    found, grad = jax.value_and_grad(value)(jnp.asarray(x))
    np.testing.assert_allclose(found, to_bank(by_class), rtol=1e-5)
    assert np.isfinite(grad).all()
    mask = jnp.arange(N) != 0
    left_out = to_bank(by_class, labels=np.where(mask, LABELS, -1))
    x[0] = np.nan
    np.testing.assert_allclose(value(x, mask=mask), left_out, rtol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_without_a_common_class_it_is_zero(kind):
    by_class, _ = PAIRS[kind]
    labels = np.full(N, 2, np.int32)
    found, grad = jax.value_and_grad(lambda x: to_bank(by_class, x=x, labels=labels))(
        jnp.asarray(X)
    )
    assert found == 0
    assert not np.asarray(grad).any()


SIZES = [name for name, row in DISTANCES.items() if "sizes" in row.promises]


@pytest.mark.parametrize("name", SIZES)
def test_repeated_rows_change_nothing(name):
    row = DISTANCES[name]
    # The default bandwidth depends on the number of pairs.
    fixed = {"bandwidth": 1.0} if name == "mmd_rbf" else {}
    options = {**dict(row.options), **fixed}
    if "labels" in row.inputs:
        options |= {"labels_y": jnp.asarray(LABELS_Y), "num_classes": K}
    again = np.concatenate([np.arange(M)] * 2)

    def value(y, labels_y):
        own = {**options, **({"labels_y": labels_y} if "labels_y" in options else {})}
        kinds = {
            "features": (jnp.asarray(X), y),
            "labels": (jnp.asarray(LABELS),),
            "key": (jax.random.key(0),),
        }
        return row.fn(*(z for kind in row.inputs for z in kinds[kind]), **own)

    once = value(jnp.asarray(Y), jnp.asarray(LABELS_Y))
    twice = value(jnp.asarray(Y[again]), jnp.asarray(LABELS_Y[again]))
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


# ------------------------------------------------------------------- the loss


BANK = Bank(jnp.asarray(Y), jnp.asarray(LABELS_Y))
LOGITS = jnp.zeros((N, K))


def loss(term, bank=BANK, **options):
    data = {"bank": bank}
    given = (jnp.asarray(X), None, jnp.asarray(LABELS), LOGITS)
    return distill_loss(*given, distance=term, teacher_data=data, **options)


def test_a_term_compares_with_its_bank():
    _, terms = loss([Term(name, bank="bank") for name in ("cw2", "w2")])
    np.testing.assert_allclose(terms["cw2"], to_bank(class_wasserstein), rtol=1e-6)
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


labelled = Distance(lambda x, y, labels: jnp.sum(x), inputs=("features", "labels"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Term("l2", bank="bank"), "takes no bank"),
        (lambda: Term("kd", bank="bank"), "takes no bank"),
        (lambda: loss(Term("cw2", bank="other")), "teacher_data={'other'"),
        (lambda: loss(Term("cw2", bank="bank"), normalization="teacher"), "unit"),
        (
            lambda: loss(Term("w2", bank="bank"), BANK._replace(weights=WEIGHTS)),
            "without weights",
        ),
        (lambda: loss(Term("w2", bank="bank"), mask=jnp.ones(N)), "takes labels"),
        (lambda: to_bank(class_wasserstein, weights_y=-WEIGHTS), "must be >= 0"),
        (lambda: Term(labelled, bank="bank"), "keyword arguments labels_y"),
        (lambda: loss("cw2", weight=1.0), "empty or None"),
        (lambda: to_bank(class_wasserstein, solver="exact"), "entropic"),
        (lambda: to_bank(class_wasserstein, num_classes=None), "num_classes"),
        (lambda: to_bank(class_wasserstein, num_classes=3), "labels_y must lie below"),
        (
            lambda: to_bank(class_wasserstein, labels_y=None, weights_y=WEIGHTS),
            "needs labels_y",
        ),
        (
            lambda: to_bank(class_gaussian_wasserstein, weights_y=WEIGHTS[:3]),
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

    def step(bank):
        variables = {"params": {"w": jnp.ones((4, D)) / 9}}
        make = make_train_step(
            student,
            None,
            optax.sgd(0.1),
            augment=lambda key, image: image / 255,
            distance=Term("cw2", bank="bank"),
            weight=1.0,
            axis_name=None,
        )
        images = jnp.asarray(RNG.integers(0, 255, (8, 2, 2, 1)), jnp.uint8)
        state = create_state(variables, optax.sgd(0.1))
        return make(
            state, None, images, jnp.arange(8, dtype=jnp.int32) % K, {"bank": bank}
        )

    state, metrics = step(BANK)
    assert metrics["cw2"] > 0
    assert "teacher_finite" not in metrics
    moved, _ = step(BANK._replace(features=BANK.features + 1))
    assert not np.array_equal(state.params["w"], moved.params["w"])
    with pytest.raises(ValueError, match="teacher_apply is None"):
        make_train_step(
            student,
            None,
            optax.sgd(0.1),
            augment=lambda key, image: image,
            distance=(Term("cw2", bank="bank"), Term("l2")),
        )
