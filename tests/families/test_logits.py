"""Tests divergences of predictions."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_batch

import kddm_jax

pytestmark = pytest.mark.usefixtures("x64")

RTOL = 1e-9
K = 5


@cache
def compiled(name, **options):
    return jax.jit(partial(getattr(kddm_jax, name), **options))


def predictions(n=6, k=K, seed=0):
    batch = make_batch(n, 3, k=k, seed=seed)
    return batch.logits_x, batch.logits_y


@pytest.mark.parametrize("direction", ["teacher||student", "student||teacher"])
@pytest.mark.parametrize("standardize", [False, True])
def test_kd(standardize, direction):
    s, t = predictions()
    words = {"standardize": standardize, "direction": direction}
    for temperature in (1.0, 4.0):
        value = compiled("kd", **words)(s, t, temperature=temperature)
        expected = reference.kd(s, t, temperature=temperature, **words)
        np.testing.assert_allclose(value, expected, rtol=RTOL)


def test_released_kd_is_reversed():
    s, t = predictions()
    expected = reference.kd(s, t, direction="student||teacher")
    value = compiled("kd", compat="released")(s, t)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    assert abs(value - reference.kd(s, t)) > 1e-2


def test_standardized_predictions_have_no_scale():
    s, t = predictions()
    fn = compiled("kd", standardize=True)
    np.testing.assert_allclose(fn(9 * s + 3, t), fn(s, t), rtol=1e-5)
    assert abs(fn(s, 3 * s + 1)) < 1e-10


def test_equal_logits_have_finite_gradients():
    flat, (_, t) = np.ones((6, K)), predictions()
    for standardize in (False, True):
        fn = jax.jit(jax.value_and_grad(partial(kddm_jax.kd, standardize=standardize)))
        for pair in [(flat, t), (t, flat), (flat, flat)]:
            value, gradient = fn(*pair)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


def test_equal_logits_have_no_direction():
    """A head of zeros must not take a step of order 1e6."""
    _, t = predictions()
    value = partial(kddm_jax.kd, standardize=True)
    for size in (0.0, 1.0, 1e4):
        flat = jnp.full((6, K), size, jnp.float32)
        slope = jax.grad(value)(flat, jnp.float32(t))
        np.testing.assert_array_equal(slope, 0)
    slope = jax.grad(value)(1e-3 * jnp.float32(t[::-1]), jnp.float32(t))
    assert np.abs(slope).max() > 1  # small logits have a direction


def test_one_class_has_distance_zero():
    one = np.ones((4, 1))
    assert compiled("kd")(one, 3 * one) == 0
    assert compiled("kd", standardize=True)(one, 3 * one) == 0


def test_unknown_direction():
    with pytest.raises(ValueError, match="direction must be one of .*'nonsense'"):
        kddm_jax.kd(*predictions(), direction="nonsense")


# ------------------------------------------------------------ classes without mass

INF = np.inf
DIRECTIONS = ("teacher||student", "student||teacher")


def test_a_class_at_minus_infinity_in_both_networks_contributes_nothing():
    s, t = np.array([[1.0, 0, -INF]]), np.array([[0, 1.0, -INF]])
    np.testing.assert_allclose(kddm_jax.kd(s, t), 0.4974, atol=5e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("standardize", [False, True])
def test_kd_of_masked_classes_is_that_of_the_others(standardize, direction):
    s, t = predictions(k=3)
    gone = np.full((len(s), 2), -INF)
    wide = [np.concatenate([gone[:, :1], z, gone[:, 1:]], axis=1) for z in (s, t)]
    fn = partial(kddm_jax.kd, standardize=standardize, direction=direction)
    fn = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    (expected, slopes), (value, grads) = fn(s, t), fn(*wide)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad[:, 1:-1], slope, rtol=1e-7, atol=1e-12)
        np.testing.assert_array_equal(grad[:, [0, -1]], 0)


def test_a_class_that_the_teacher_alone_leaves_out():
    """KL(t || s) of the other classes is log 3 - log 2 for a uniform student."""
    s, t = np.zeros((1, 3)), np.array([[0.0, 0.0, -INF]])
    fn = jax.value_and_grad(partial(kddm_jax.kd, temperature=1.0))
    value, grad = fn(s, t)
    np.testing.assert_allclose(value, np.log(1.5), rtol=RTOL)
    np.testing.assert_allclose(grad[0], [-1 / 6, -1 / 6, 1 / 3], rtol=RTOL)
    assert kddm_jax.kd(t, s) == INF  # the student alone leaves out a class


def test_nan_is_no_class_without_mass():
    s, t = predictions()
    for side in (0, 1):
        pair = [np.array(s), np.array(t)]
        pair[side][1, 2] = np.nan
        for standardize in (False, True):
            assert np.isnan(kddm_jax.kd(*pair, standardize=standardize))


def test_transport_with_masked_classes_is_that_of_the_others():
    """Tests label costs by probabilities and by KL, and transport between classes."""
    batch = make_batch(6, 3, k=3)
    gone = lambda z: np.concatenate([z, np.full((6, 1), -INF)], axis=1)
    wide = batch.map(gone, "logits_x", "logits_y")
    for cost in ("probs", "kl"):
        fn = partial(kddm_jax.joint_wasserstein, label_cost=cost, solver="exact")
        fn = jax.jit(jax.value_and_grad(fn, argnums=(0, 2)))
        expected, slopes = fn(batch.x, batch.y, batch.logits_x, batch.logits_y)
        value, grads = fn(wide.x, wide.y, wide.logits_x, wide.logits_y)
        np.testing.assert_allclose(value, expected, rtol=1e-7)
        np.testing.assert_allclose(grads[0], slopes[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(grads[1][:, :3], slopes[1], rtol=1e-6, atol=1e-9)
    fn = partial(kddm_jax.wkd_logits, temperature=2.0)
    fn = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    pair = lambda b: (b.logits_x, b.logits_y, b.labels % 3, b.class_cost)
    cost = np.zeros((4, 4))
    cost[:3, :3] = batch.class_cost
    expected, slopes = fn(*pair(batch))
    value, grads = fn(*pair(wide)[:3], cost)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad[:, :3], slope, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------- temperatures


def test_a_temperature_for_each_image():
    """The distance is the mean of T_i^2 KL_i."""
    s, t = predictions()
    temperatures = np.linspace(1.0, 6.0, len(s))
    rows = zip(s, t, temperatures, strict=True)
    one = lambda s, t, temperature: reference.kd(
        s[None], t[None], temperature=temperature
    )
    expected = np.mean([one(*row) for row in rows])
    fn = compiled("kd")
    np.testing.assert_allclose(fn(s, t, temperature=temperatures), expected, rtol=RTOL)
    same = fn(s, t, temperature=np.full(len(s), 4.0))
    np.testing.assert_allclose(same, fn(s, t, temperature=4.0), rtol=RTOL)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        ([[1.0], [4.0]], r"a number, or have shape \[n\]=\[6\], got \[2, 1\]"),
        (np.ones((6, 1)), r"a number, or have shape \[n\]=\[6\], got \[6, 1\]"),
        (np.ones(5), r"a number, or have shape \[n\]=\[6\], got \[5\]"),
        (np.arange(6.0), r"temperature must be positive, got 0\.0 among them"),
        (0.0, "temperature must be positive, got 0.0"),
        ("4", "temperature must be positive, got '4'"),
    ],
)
def test_messages_of_a_temperature(temperature, message):
    with pytest.raises(ValueError, match=message):
        kddm_jax.kd(*predictions(), temperature=temperature)


# ------------------------------------------------------- divergences, correlations


@pytest.mark.parametrize("beta", [1e-3, 0.3, 0.5, 0.9])
def test_jsd(beta):
    s, t = predictions()
    for temperature in (1.0, 4.0):
        options = {"beta": beta, "temperature": temperature}
        value = compiled("jsd")(s, t, **options)
        np.testing.assert_allclose(value, reference.jsd(s, t, **options), rtol=RTOL)


def test_limits_of_jsd_are_both_directions_of_kd():
    s, t = predictions()
    for beta, direction in ((1e-7, "teacher||student"), (1 - 1e-7, DIRECTIONS[1])):
        value = compiled("jsd")(s, t, beta=beta) / min(beta, 1 - beta)
        expected = reference.kd(s, t, temperature=1.0, direction=direction)
        np.testing.assert_allclose(value, expected, rtol=1e-4)


LABELS = np.array([0, 3, 1, 4, 0, 2])


@pytest.mark.parametrize("labels", [LABELS, np.array([0, -1, 1, -1, -1, 2])])
def test_dkd(labels):
    s, t = predictions()
    for options in ({}, {"alpha": 0.0}, {"beta": 0.0}, {"temperature": 1.0}):
        value = compiled("dkd")(s, t, labels, **options)
        expected = reference.dkd(s, t, labels, **options)
        np.testing.assert_allclose(value, expected, rtol=RTOL)


def test_kd_is_dkd_weighted_by_the_teacher_s_doubt():
    s, t = predictions(n=1)
    doubt = 1 - reference.softmax(t / 4.0)[0, 3]
    value = compiled("dkd")(s, t, np.array([3]), beta=doubt)
    np.testing.assert_allclose(value, reference.kd(s, t), rtol=RTOL)


def test_certain_predictions_are_finite():
    """Probabilities that round to 0 or 1 keep their logarithms."""
    s, t = np.float32([[90.0, 0, 0], [0, 900.0, 0]]), np.float32([[0, 90.0, 0]] * 2)
    for labels in ([0, 1], [1, 0], [2, 2]):
        fn = jax.jit(jax.value_and_grad(kddm_jax.dkd, argnums=(0, 1)))
        value, grads = fn(s, t, np.array(labels))
        assert np.isfinite(value)
        assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", ["jsd", "dkd", "dist"])
def test_masked_classes_in_other_losses(name):
    """Classes at -inf in both networks change nothing but the mean over classes."""
    s, t = predictions(k=3)
    labels = (LABELS % 3,) if name == "dkd" else ()
    gone = np.full((len(s), 2), -INF)
    wide = [np.concatenate([z, gone], axis=1) for z in (s, t)]
    options = {"gamma": 0.0} if name == "dist" else {}
    fn = partial(getattr(kddm_jax, name), **options)
    fn = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    (expected, slopes), (value, grads) = fn(s, t, *labels), fn(*wide, *labels)
    if name == "dist":  # there, a class without mass is a value of the series
        assert np.isfinite(value)
        assert all(np.isfinite(grad).all() for grad in grads)
        return
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad[:, :3], slope, rtol=1e-7, atol=1e-12)
        np.testing.assert_array_equal(grad[:, 3:], 0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist(temperature):
    s, t = predictions()
    for beta, gamma in ((1.0, 1.0), (2.0, 0.0), (0.0, 3.0)):
        options = {"beta": beta, "gamma": gamma, "temperature": temperature}
        value = compiled("dist")(s, t, **options)
        np.testing.assert_allclose(value, reference.dist(s, t, **options), rtol=RTOL)


def test_constant_predictions_in_dist():
    """1 - correlation is 1/2 if one side is constant, and 0 if both are."""
    (s, t), flat = predictions(), np.ones((6, K))
    fn = jax.jit(jax.value_and_grad(kddm_jax.dist))
    for pair, expected in (((flat, t), 1), ((s, flat), 1), ((flat, flat), 0)):
        for dtype in (np.float32, np.float64):
            value, grad = fn(*(np.asarray(z, dtype) for z in pair))
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            assert np.isfinite(grad).all()
    same = np.repeat(s[:1], 6, axis=0)  # every class is constant over images
    pair = np.float32(same), np.float32(t)
    value, grad = fn(*pair)
    assert np.isfinite(grad).all()
    expected = compiled("dist")(*pair, gamma=0.0) + 0.5
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    almost = np.nextafter(pair[0], np.float32([[0.0], [9.0]] * 3))  # by round-off
    np.testing.assert_allclose(fn(almost, pair[1])[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsd", {"beta": 1.0}, "beta must be less than 1, got 1.0; .* take kd"),
        ("jsd", {"beta": 0.0}, "beta must be positive, got 0.0; it must be less"),
        (
            "dist",
            {"gamma": -1.0},
            "gamma must be a number >= 0, got -1.0; it is 1.0 by",
        ),
        ("dist", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_messages_of_other_losses(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(kddm_jax, name)(*predictions(), **options)


def test_dkd_with_a_single_class_left():
    """Classes are left out by -inf; without another class the second term is zero."""
    s, t = (np.array([[z, -np.inf], [z, 0.3]]) for z in (1.0, 2.0))
    labels = np.array([0, 0])
    value = compiled("dkd")(s, t, labels)
    alone = compiled("dkd")(s[1:], t[1:], labels[1:])
    np.testing.assert_allclose(value, alone / 2, rtol=RTOL)
    for student in (s, np.where(np.isinf(s), -1e30, s)):
        grad = jax.grad(compiled("dkd"))(student, t, labels)
        assert np.isfinite(grad).all()


def test_messages_of_dkd():
    s, t = predictions()
    with pytest.raises(ValueError, match="alpha must be a number >= 0, got -1"):
        kddm_jax.dkd(s, t, LABELS, alpha=-1)
    with pytest.raises(ValueError, match="logits_x must have two classes at least"):
        kddm_jax.dkd(s[:, :1], t[:, :1], LABELS)
