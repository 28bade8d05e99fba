"""Tests normalizations: formulas, invariances, masks, and hostile features."""

from functools import cache

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kddm_jax.numerics.normalization import NORMALIZATIONS, normalize, teacher_factor
from kddm_jax.testing import assert_distance_gradients

N, D = 8, 3
BATCH = helpers.make_batch(N, D).map(np.float32)
NAMES = [name for name in NORMALIZATIONS if name is not None]
EVERY = pytest.mark.parametrize("name", NAMES)
OF_ONE_SIDE = pytest.mark.parametrize("name", ["unit", "centered", "standardized"])


def rms(z):
    return np.sqrt(np.mean(np.sum((z - z.mean(0)) ** 2, axis=1)))


def expected(x, y, name):
    """Computes the formulas in float64."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    of_side = {
        "teacher": lambda z: z / rms(y),
        "unit": lambda z: z / (np.linalg.norm(z, axis=1, keepdims=True) + (z == 0)),
        "centered": lambda z: (z - z.mean(0)) / rms(z),
        "standardized": lambda z: (z - z.mean(0)) / np.maximum(z.std(0), 1e-3 * rms(z)),
    }[name]
    return [of_side(x), of_side(y)]


@cache
def compiled(name):
    """Returns both sides, and the gradient of a weighted sum of the student's."""

    @jax.jit
    def fn(x, y, mask):
        slopes = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

        def pull(x):
            sides = normalize([x, y], [x, y], name, mask=mask)
            return jnp.sum(slopes * sides[0]), sides

        (_, sides), slope = jax.value_and_grad(pull, has_aux=True)(x)
        return *sides, slope

    return lambda x, y, mask=None: jax.device_get(
        fn(jnp.asarray(x), jnp.asarray(y), None if mask is None else jnp.asarray(mask))
    )


def assert_near(found, wanted, tolerance=1e-5):
    scale = max(np.max(np.abs(wanted)), 1e-30)
    np.testing.assert_allclose(found, wanted, atol=tolerance * scale, rtol=0)


# ------------------------------------------------------------ formulas, gradients


@EVERY
def test_formula(name):
    for found, wanted in zip(
        compiled(name)(BATCH.x, BATCH.y)[:2],
        expected(BATCH.x, BATCH.y, name),
        strict=True,
    ):
        assert_near(found, wanted)


def test_none_leaves_features_as_they_are():
    pair = [jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3))]
    assert all(a is b for a, b in zip(normalize(pair, pair, None), pair, strict=True))


def test_a_feature_that_hardly_varies_is_divided_by_the_floor():
    x = BATCH.x.copy()
    x[:, 1] = 5 + 1e-5 * np.arange(N)
    side = compiled("standardized")(x, x)[0]
    assert_near(side, expected(x, x, "standardized")[0], 1e-3)
    assert 0 < np.std(side[:, 1]) < 0.1
    np.testing.assert_allclose(np.std(side[:, [0, 2]], axis=0), 1, rtol=1e-5)


@OF_ONE_SIDE
def test_the_student_s_statistics_are_differentiated(name):
    slopes = np.cos(np.arange(N * D)).reshape(N, D)
    pull = lambda x, y: jnp.sum(slopes * normalize([x, y], [x, y], name)[0])
    assert_distance_gradients(pull, BATCH.x + 0.1, BATCH.y)  # so that no row is zero


@EVERY
def test_the_teacher_s_statistics_are_constants(name):
    x, y = jnp.asarray(BATCH.x), jnp.asarray(BATCH.y)
    weights = jnp.cos(jnp.arange(N * D)).reshape(N, D)
    pull = lambda y: jnp.sum(weights * normalize([x, y], [x, y], name)[1])
    slope = jax.grad(pull)(y)
    if name == "unit":  # has no statistics
        return
    of_feature = y.std(0) if name == "standardized" else rms(y)
    np.testing.assert_allclose(slope, weights / of_feature, rtol=1e-4)


# -------------------------------------------------------------------- invariances


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("teacher", lambda x, y: (7 * x, 7 * y)),
        ("centered", lambda x, y: (7 * x, 7 * y)),
        ("centered", lambda x, y: (7 * x - 2, 0.1 * y + 3)),
        ("unit", lambda x, y: (np.arange(1, N + 1)[:, None] * x, 0.1 * y)),
        ("standardized", lambda x, y: ([1, 2, 3] * x + [0, 5, -1], [0.1, 9, 1] * y)),
    ],
    ids=["teacher", "centered", "centered, each", "unit", "standardized"],
)
def test_invariance(name, change):
    # The float32 digits that are left after a shift.
    moved = [np.float32(z) for z in change(BATCH.x, BATCH.y)]
    for found, wanted in zip(
        compiled(name)(*moved)[:2], compiled(name)(BATCH.x, BATCH.y)[:2], strict=True
    ):
        assert_near(found, wanted, 1e-4)


# -------------------------------------------------------------------------- masks


@EVERY
def test_masked_rows_have_no_part(name):
    mask = np.array([1, 1, 0, 1, 1, 0, 1, 0])
    x, y = BATCH.x.copy(), BATCH.y.copy()
    x[mask == 0], y[mask == 0] = np.nan, np.inf
    found = compiled(name)(x, y, mask)
    kept = [z[mask == 1] for z in (x, y)]
    for side, wanted in zip(found[:2], expected(*kept, name), strict=True):
        assert_near(side[mask == 1], wanted)
        np.testing.assert_array_equal(side[mask == 0], 0)
    np.testing.assert_array_equal(found[2][mask == 0], 0)
    assert np.all(np.isfinite(found[2]))
    # A mask of True equals a mask of ones, which equals no mask.
    whole = compiled(name)(BATCH.x, BATCH.y)
    for a, b in zip(
        compiled(name)(BATCH.x, BATCH.y, np.ones(N, bool)), whole, strict=True
    ):
        assert_near(a, b)


@EVERY
def test_a_batch_without_samples_is_zero(name):
    nothing = np.full((N, D), np.nan, np.float32)
    for array in compiled(name)(nothing, nothing, np.zeros(N, int)):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_statistics_of_the_whole_batch(name):
    """A part of a batch is normalized as in the whole batch, with masks or without."""
    pair = [jnp.asarray(BATCH.x), jnp.asarray(BATCH.y)]
    mask = jnp.arange(N) != 1
    for one in (None, mask):
        whole = normalize(pair, pair, name, mask=one)
        half = None if one is None else one[:4]
        parts = normalize([z[:4] for z in pair], pair, name, mask=half, whole_mask=one)
        for part, side in zip(parts, whole, strict=True):
            np.testing.assert_allclose(part, side[:4], rtol=1e-6)


# -------------------------------------------------------------- hostile features


@EVERY
def test_features_of_any_size(name):
    for size in (1e-30, 1e-4, 1e4, 1e30):
        x, y = (np.float32(size * z) for z in (BATCH.x, BATCH.y))
        *sides, slope = compiled(name)(x, y)
        for found, wanted in zip(sides, expected(x, y, name), strict=True):
            assert_near(found, wanted)
        assert_near(slope * np.float32(size), compiled(name)(BATCH.x, BATCH.y)[2], 1e-4)


@OF_ONE_SIDE
def test_sides_of_very_different_size(name):
    found = compiled(name)(np.float32(1e20) * BATCH.x, np.float32(1e-20) * BATCH.y)
    for side, wanted in zip(found, compiled(name)(BATCH.x, BATCH.y), strict=False):
        if side is not found[2]:
            assert_near(side, wanted, 1e-4)


@EVERY
def test_features_without_deviation(name):
    """Constant or zero features and single samples give zeros with zero gradients."""
    ones, zeros = np.full((N, D), 0.3, np.float32), np.zeros((N, D), np.float32)
    for x, y in [(ones, ones), (zeros, zeros), (BATCH.x, ones), (ones, BATCH.y)]:
        *sides, slope = compiled(name)(x, y)
        assert all(np.all(np.isfinite(z)) for z in (*sides, slope))
        for z, side in zip((x, y), sides, strict=True):
            alone = {"teacher": y is not BATCH.y, "unit": z is zeros}
            if alone.get(name, z is ones or z is zeros):
                np.testing.assert_array_equal(side, 0)
        if name in ("centered", "standardized") and x is ones:
            np.testing.assert_array_equal(slope, 0)
    *sides, slope = compiled(name)(BATCH.x[:1], BATCH.y[:1])
    assert all(np.all(np.isfinite(z)) for z in (*sides, slope))
    if name != "unit":
        assert not any(np.any(z) for z in (*sides, slope))


def test_rows_of_zeros_have_no_direction():
    x = BATCH.x + np.float32(0.1)
    x[2], x[5] = 0, 1e-42  # a subnormal number
    side, _, slope = compiled("unit")(x, BATCH.y)
    for row in (2, 5):
        np.testing.assert_array_equal(side[row], 0)
        np.testing.assert_array_equal(slope[row], 0)
    others = np.setdiff1d(np.arange(N), (2, 5))
    np.testing.assert_allclose(np.linalg.norm(side[others], axis=1), 1, rtol=1e-6)
    assert np.all(np.isfinite(slope))


@EVERY
def test_a_teacher_that_is_not_finite_is_nan(name):
    """NaN is in the teacher's row with "unit", and everywhere with batch statistics."""
    for wrong in (np.nan, np.inf, -np.inf):
        y = BATCH.y.copy()
        y[1, 2] = wrong
        x, found, slope = compiled(name)(BATCH.x, y)
        assert np.all(np.isnan(found[1] if name == "unit" else found))
        if name == "teacher":
            assert np.all(np.isnan(x))
            assert np.isnan(teacher_factor(jnp.asarray(y)))


@EVERY
def test_half_precision_is_widened_first(name):
    pair = [jnp.asarray(z, jnp.bfloat16) for z in (BATCH.x, BATCH.y)]
    wide = [np.asarray(z.astype(jnp.float32)) for z in pair]
    found = normalize(pair, pair, name)
    assert all(side.dtype == jnp.float32 for side in found)
    for side, wanted in zip(found, expected(*wide, name), strict=True):
        assert_near(side, wanted)


@EVERY
def test_under_strict_promotion(name, strict):
    pair = [jnp.asarray(BATCH.x), jnp.asarray(BATCH.y)]
    fn = lambda x, y: normalize([x, y], [x, y], name, mask=jnp.ones(N, bool))
    jax.eval_shape(jax.jacfwd(fn), *pair)


@EVERY
def test_what_is_no_matrix_of_features_is_refused(name):
    for wrong, message in [
        (jnp.ones(3), "must have shape .samples, features., got .3."),
        (jnp.ones((3, 0)), "got .3, 0."),
        (jnp.ones((3, 2), int), "student_features must be floating, got int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            normalize([wrong, wrong], [wrong, wrong], name)
