"""Tests the transport between classes of predictions, and its cost."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_batch

import kddm_jax
from kddm_jax.testing import assert_distance_gradients

pytestmark = pytest.mark.usefixtures("x64")

RTOL = 1e-9
K = 5


@cache
def compiled(name, **options):
    return jax.jit(partial(getattr(kddm_jax, name), **options))


def predictions(n=6, k=K, seed=0):
    batch = make_batch(n, 3, k=k, seed=seed)
    return batch.logits_x, batch.logits_y


LABELS = np.array([0, 3, 1, 4, 0, 2])


def class_cost(k=K):
    """Makes symmetric costs in [0, 1] that satisfy the triangle inequality strictly."""
    points = np.random.default_rng(4).uniform(size=(k, 2))
    return np.sqrt(reference.squared_distances(points, points)) / 1.5


def wkd(s, t, labels=LABELS, **options):
    options = {"class_cost": class_cost(), "temperature": 2.0, **options}
    # arrays and numbers are traced; the number of iterations is part of the program
    static = {k: options.pop(k) for k in ("iterations", "compat") if k in options}
    fn = compiled("wkd_logits", **static)
    return fn(*map(jnp.asarray, (s, t, labels)), **options)


@pytest.mark.parametrize("iterations", [None, 1, 10])
def test_wkd(iterations):
    s, t = predictions()
    for labels in (LABELS, np.array([0, 3, -1, 4, -1, 2])):
        options = {"gamma": 3.0, "epsilon": 0.1, "temperature": 1.5}
        value = wkd(s, t, labels, iterations=iterations, **options)
        expected = reference.wkd_logits(
            *(s, t, labels), iterations=iterations, class_cost=class_cost(), **options
        )
        np.testing.assert_allclose(value, expected, rtol=1e-8)


def test_released_wkd_takes_ten_iterations():
    s, t = predictions()
    assert wkd(s, t, compat="released") == wkd(s, t, iterations=10)


def test_ten_iterations_may_fall_below_the_true_cost():
    s, t = predictions()
    s, t = 4 * s, 4 * t
    gammas = {"gamma": 1.0, "temperature": 1.0}
    target = float(wkd(s, t, **{**gammas, "gamma": 0.0}))
    true = []
    for a, b, label in zip(s, t, LABELS, strict=True):
        others = np.delete(np.arange(K), label)
        p, q = (reference.softmax(z[others]) for z in (a, b))
        cost = class_cost()[np.ix_(others, others)]
        true.append(reference.linear_programme(cost, p, q))
    transport = lambda **more: float(wkd(s, t, **gammas, **more)) - target
    assert transport(iterations=3) < np.mean(true) < transport()
    np.testing.assert_allclose(transport(epsilon=0.01), np.mean(true), rtol=1e-3)


def test_gamma_weighs_the_transport():
    s, t = predictions()
    a, b, c = (float(wkd(s, t, gamma=g)) for g in (0.0, 1.0, 5.0))
    np.testing.assert_allclose(c - a, 5 * (b - a), rtol=1e-10)
    p, q = (reference.softmax(z)[np.arange(6), LABELS] for z in (s, t))
    np.testing.assert_allclose(a, -np.mean(q * np.log(p)), rtol=RTOL)


def test_labels_column_takes_no_part_in_the_transport():
    # The costs of the label's class do not matter.
    s, t = predictions()
    cost = class_cost()
    cost[2, :] = cost[:, 2] = 0.9
    expected = wkd(s, t, np.full(6, 2))
    value = wkd(s, t, np.full(6, 2), class_cost=cost)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_gradient_follows_the_teacher():
    # In the released code the gradient was the same for all teachers.
    s, t = predictions()
    gradient = jax.jit(jax.grad(lambda s, t: wkd(s, t, gamma=100.0)))
    one, other = gradient(s, t), gradient(s, t[:, ::-1])
    assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [None, 10])
def test_gradient_is_that_of_the_value(iterations):
    s, t = predictions()
    assert_distance_gradients(
        lambda s, t: wkd(s, t, epsilon=0.2, gamma=5.0, iterations=iterations),
        *(s, t),
        argnums=(0, 1),
        rtol=1e-4,
        atol=1e-6,
    )


def test_confident_predictions_have_finite_gradients():
    # Probabilities are zero in single precision, on one side or on both.
    s, t = predictions()
    fn = jax.jit(jax.value_and_grad(wkd, argnums=(0, 1)))
    for a, b in [(300, 1), (1, 300), (300, 300), (0, 300), (0, 0)]:
        for opposite in (t, -s):
            value, gradients = fn(jnp.float32(a * s), jnp.float32(b * opposite))
            assert np.isfinite(value)
            assert all(np.isfinite(g).all() for g in gradients), (a, b)


def test_without_another_class_nothing_moves():
    """Classes are left out by -inf; the first image has its label's class only."""
    s, t = predictions()
    s[0, 1:], t[0, 1:] = -np.inf, -np.inf
    value, slope = jax.value_and_grad(wkd)(s, t)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[0], 0)
    others = jax.jit(lambda *a: 5 / 6 * wkd(*a))(s[1:], t[1:], LABELS[1:])
    np.testing.assert_allclose(value, others, rtol=1e-5)  # log 1 is 0


def test_unrelated_predictions_of_a_hundred_classes_converge():
    s, t = predictions(32, 100)
    labels = np.arange(32) * 3
    cost = class_cost(100)
    fn = jax.jit(
        partial(kddm_jax.wkd_logits.diagnose, class_cost=cost, temperature=2.0)
    )
    _, stats = fn(s, t, labels)
    assert stats["converged"] == 1
    assert stats["iterations"] < 80  # twice as many without over-relaxation
    single = fn(jnp.float32(s), jnp.float32(t), labels)
    assert single[1]["converged"] == 1
    np.testing.assert_allclose(single[0], fn(s, t, labels)[0], rtol=1e-4)


def test_an_image_is_solved_alike_in_every_batch():
    # Devices have parts of a batch, some of which need more iterations than others.
    s, t = predictions()
    s[0], t[0] = 5 * s[0], 5 * t[0]
    options = {"class_cost": class_cost(), "temperature": 2.0, "gamma": 100.0}
    fn = jax.jit(jax.value_and_grad(partial(kddm_jax.wkd_logits, **options)))
    value, gradient = fn(s, t, LABELS)
    alone = [fn(s[i : i + 1], t[i : i + 1], LABELS[i : i + 1]) for i in range(6)]
    np.testing.assert_allclose(np.mean([v for v, _ in alone]), value, rtol=1e-12)
    apart = np.concatenate([g for _, g in alone]) / 6
    # Products of one row and of six round differently.
    np.testing.assert_allclose(apart, gradient, atol=1e-12 * np.abs(gradient).max())


# ------------------------------------------------------------------- class cost


@pytest.mark.parametrize("shape", [(4, 6, 9), (4, 9, 3)], ids=["n<d", "n>d"])
def test_class_cost(shape):
    features = np.random.default_rng(0).normal(size=shape)
    for kappa in (1.0, 2.5):
        cost = compiled("class_cost_cka", kappa=kappa)(features)
        expected = reference.class_cost_cka(features, kappa=kappa)
        np.testing.assert_allclose(cost, expected, atol=1e-12)
    np.testing.assert_array_equal(np.diagonal(cost), 0)
    assert (cost >= 0).all()


def test_class_cost_of_a_constant_class_is_finite():
    features = np.random.default_rng(0).normal(size=(3, 5, 4))
    features[1] = 7.0
    cost = compiled("class_cost_cka")(jnp.float32(features))
    assert np.isfinite(cost).all()
    np.testing.assert_allclose(cost[1, [0, 2]], 1 - np.exp(-1), rtol=1e-6)


# ----------------------------------------------------------------------- errors


def refuses(message, **options):
    s, t = predictions()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda s, t: wkd_eager(s, t, **options), s, t)


def wkd_eager(s, t, labels=LABELS, **options):
    options = {"class_cost": class_cost(), "temperature": 2.0, **options}
    return kddm_jax.wkd_logits(s, t, labels, **options)


def test_messages():
    refuses(
        r"class_cost must have shape \[k, k\]=\[5, 5\].*\[4, 4\]", class_cost=np.eye(4)
    )
    refuses("epsilon=0.0001 is too small for class_cost.* take at least", epsilon=1e-4)
    refuses("temperature must be positive, got 0", temperature=0)
    refuses("iterations must be at least 1, got 0", iterations=0)
    refuses(
        "released.*means iterations=10, got iterations=7",
        iterations=7,
        compat="released",
    )
    refuses("compat must be None or \"released\", got 'paper'", compat="paper")
    refuses("labels must lie below num_classes=5, got 5", labels=jnp.array(LABELS + 1))
    refuses("gamma must be a number >= 0", gamma=-1.0)
    with pytest.raises(ValueError, match=r"features must have shape \[classes"):
        kddm_jax.class_cost_cka(np.ones((3, 4)))
    with pytest.raises(ValueError, match="two classes at least, got 1"):
        wkd_eager(np.ones((6, 1)), np.ones((6, 1)), class_cost=np.zeros((1, 1)))
