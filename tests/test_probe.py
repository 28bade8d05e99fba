"""The linear probe: its regression against scikit-learn, its split, its errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from kddm_jax import probe
from kddm_jax.probe import probe_accuracy


def clusters(n=200, d=8, classes=4, spread=0.1, seed=0):
    """Samples around the centres of their classes, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    x = np.eye(classes, d)[labels] + spread * rng.normal(size=(n, d))
    return x.astype(np.float32), labels


def held_out(labels):
    """True for the second, seventh, twelfth, ... sample of each class."""
    places = [np.count_nonzero(labels[:i] == labels[i]) for i in range(len(labels))]
    return np.array(places) % 5 == 1


def test_separable_classes_are_read():
    x, labels = clusters()
    assert probe_accuracy(x, labels) == 1.0
    assert probe_accuracy(jnp.asarray(x, jnp.bfloat16), labels) == 1.0
    assert probe_accuracy(x.reshape(-1, 2, 2, 2), 7 - 2 * labels) == 1.0


def test_features_without_classes_are_at_chance():
    x, _ = clusters(2000)
    labels = np.random.default_rng(1).integers(0, 4, 2000)
    np.testing.assert_allclose(probe_accuracy(x, labels), 0.25, atol=0.07)  # 3 sigma


def test_only_held_out_samples_are_counted():
    """Held-out samples at the place of another class are all wrong."""
    x, labels = clusters()
    moved = np.roll(x, 1, axis=1)  # to the centre of the next class
    tested = held_out(labels)[:, None]
    assert probe_accuracy(np.where(tested, moved, x), labels) == 0.0
    assert probe_accuracy(moved, labels) == 1.0


@pytest.mark.parametrize(("n", "d"), [(60, 5), (60, 100)])
def test_regression_is_that_of_scikit_learn(n, d):
    """Same penalty by the leave-one-out error, and the same predictions."""
    rng = np.random.default_rng(0)
    x, queries = rng.normal(size=(n, d)) + 3, rng.normal(size=(7, d)) + 3
    targets = x[:, :2] + rng.normal(size=(n, 2))
    squares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    penalties = probe._PENALTIES * squares.mean()
    expected = RidgeCV(penalties).fit(x, targets)
    assert penalties[0] < expected.alpha_ < penalties[-1]
    found = probe._ridge(x, targets, queries)
    np.testing.assert_allclose(found, expected.predict(queries), rtol=1e-6)


def test_units_do_not_matter():
    x, labels = clusters(spread=0.6)
    wanted = probe_accuracy(x, labels)
    assert 0.3 < wanted < 1
    assert probe_accuracy(1e4 * x + 5, labels) == wanted
    assert probe_accuracy(1e-4 * x, labels) == wanted


def test_noisy_features_are_penalized(monkeypatch):
    """More features than samples: a fit without penalty reads the noise."""
    x, labels = clusters(100, 90, spread=0.5)
    chosen = probe_accuracy(x, labels)
    monkeypatch.setattr(probe, "_PENALTIES", np.array([1e-9]))
    assert chosen > probe_accuracy(x, labels) + 0.1


def test_constant_features_read_nothing():
    _, labels = clusters()
    assert probe_accuracy(np.ones((200, 3), np.float32), labels) == 0.25


def test_samples_without_a_label_are_left_out():
    x, labels = clusters(spread=0.6)
    kept = labels != 3
    wanted = probe_accuracy(x[kept], labels[kept])
    assert probe_accuracy(x, np.where(kept, labels, -1)) == wanted


X, LABELS = clusters(8, classes=2)
BAD = np.where(np.arange(8)[:, None] == 3, np.float32(np.nan), X)


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (X, np.zeros(8, int), r"^labels must hold two classes .*got 1; add samples"),
        (X, np.arange(8), r"^labels must give .* class 0 has one; take more"),
        (X, LABELS[:-1], r"^labels must have shape \[n\]=\[8\]"),
        (X[:, 0], LABELS, r"^features must have shape \[n, ...\], got \[8\]"),
        (np.ones((8, 3), int), LABELS, r"^features must be floating, got int"),
        (BAD, LABELS, r"^features must be finite"),
    ],
)
def test_wrong_arguments_raise(x, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        probe_accuracy(x, labels)
    assert "\n" not in str(error.value)
