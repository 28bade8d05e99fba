"""Divergences of predictions."""

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
