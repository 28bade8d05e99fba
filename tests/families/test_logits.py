"""Tests divergences of predictions."""

from functools import cache, partial

import jax
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
