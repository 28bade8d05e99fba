"""Tests distances of geometry: textbook forms, invariances, and their blind spots."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_batch, relu_features

import kddm_jax
from kddm_jax.testing import assert_distance_gradients

pytestmark = pytest.mark.usefixtures("x64")

RTOL = 1e-9


@cache
def compiled(name, **options):
    return jax.jit(partial(getattr(kddm_jax, name), **options))


def call(name, *arrays, **options):
    return float(compiled(name, **options)(*map(jnp.asarray, arrays)))


def clouds(n=9, d_x=5, d_y=12, seed=0):
    rng = np.random.default_rng(seed)
    return relu_features(rng, n, d_x), relu_features(rng, n, d_y) + 0.3


def maps(b=2, size_x=(5, 4), size_y=(5, 4), c_x=3, c_y=3, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(b, *size_x, c_x)) + 0.4,
        2 * rng.normal(size=(b, *size_y, c_y)),
    )


def rotation(d, seed=3):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


# ------------------------------------------------------------------ definitions

FEATURES = [
    ("procrustes", {}),
    ("procrustes", {"unit_norm": False}),
    ("feature_gram", {}),
    ("feature_gram", {"unit_norm": False}),
    ("cka", {}),
    ("cka", {"debiased": True}),
    ("similarity_preserving", {}),
]
SHAPES = [(9, 5, 12), (9, 12, 5), (20, 6, 6)]  # n, width of student, of teacher


@pytest.mark.parametrize(("name", "options"), FEATURES)
def test_definition(name, options):
    for shape in SHAPES:
        x, y = clouds(*shape)
        expected = getattr(reference, name)(x, y, **options)
        np.testing.assert_allclose(call(name, x, y, **options), expected, rtol=RTOL)


@pytest.mark.parametrize("shape", [(20, 6, 9), (20, 9, 6)])
def test_linear_projection(shape):
    x, y = clouds(*shape)
    expected = reference.linear_projection(x, y)
    np.testing.assert_allclose(call("linear_projection", x, y), expected, rtol=RTOL)
    # A dead feature and a repeated one add nothing.
    wide = np.concatenate([x, 0 * x[:, :1], x[:, :1]], axis=1)
    np.testing.assert_allclose(call("linear_projection", wide, y), expected, rtol=RTOL)


@pytest.mark.parametrize("kernel", ["poly", "linear", "rbf"])
@pytest.mark.parametrize(
    "shape",
    [
        {"c_y": 4},  # more positions than channels
        {"size_x": (2, 2), "size_y": (5, 3), "c_x": 6},  # the larger map is pooled
        {"size_x": (3, 5), "size_y": (4, 2)},  # each map is pooled along one axis
    ],
    ids=str,
)
def test_nst(shape, kernel):
    pair = maps(**shape)
    expected = reference.nst(*pair, kernel=kernel)
    np.testing.assert_allclose(call("nst", *pair, kernel=kernel), expected, rtol=RTOL)


def test_poly_nst_by_moments_is_the_one_by_products():
    # With 4 positions the distance uses second moments, with 25 products of positions,
    # most of which are repeated here.
    f, g = maps(size_x=(2, 2), size_y=(2, 2), c_x=5, c_y=6)
    repeat = lambda z: z.repeat(4, axis=1).repeat(4, axis=2)
    expected = call("nst", f, g)
    np.testing.assert_allclose(call("nst", repeat(f), repeat(g)), expected, rtol=RTOL)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (1, {}),
        (2, {}),  # does not divide 5, so cells overlap
        (3, {"size_y": (4, 7)}),
        (5, {}),  # single pixels, and cells smaller than a pixel
    ],
)
def test_wkd_features(grid, shape):
    pair = maps(**shape)
    for ratio in (2.0, 0.0):
        options = {"grid": grid, "ratio": ratio}
        expected = reference.wkd_features(*pair, **options)
        value = call("wkd_features", *pair, **options)
        np.testing.assert_allclose(value, expected, rtol=RTOL)


def test_wkd_features_of_one_pixel_compares_means():
    f, g = maps(size_x=(1, 1), size_y=(1, 1))
    expected = 3 * ((f - g) ** 2).sum() / len(f)
    value = call("wkd_features", f, g, ratio=3.0)
    np.testing.assert_allclose(value, expected, rtol=RTOL)


# ------------------------------------------------------------------- invariances

NORMALISED = [
    ("procrustes", {}),
    ("feature_gram", {}),
    ("cka", {}),
    ("cka", {"debiased": True}),
]
GEOMETRIES = pytest.mark.parametrize(("name", "options"), NORMALISED)


@GEOMETRIES
def test_each_side_may_move_turn_and_grow(name, options):
    x, y = clouds()
    expected = call(name, x, y, **options)
    moved = 7.0 * x @ rotation(x.shape[1]) + np.linspace(-3, 5, x.shape[1])
    np.testing.assert_allclose(call(name, moved, y, **options), expected, rtol=1e-8)
    turned = 0.1 * y @ rotation(y.shape[1]) - 2
    np.testing.assert_allclose(call(name, x, turned, **options), expected, rtol=1e-8)
    np.testing.assert_allclose(call(name, y, x, **options), expected, rtol=1e-8)
    # Additional features that are zero change nothing.
    padded = np.pad(x, [(0, 0), (0, 7)])
    np.testing.assert_allclose(call(name, padded, y, **options), expected, rtol=1e-8)
    # Any other linear map changes the distance.
    stretched = x * np.linspace(0.2, 3, x.shape[1])
    assert abs(call(name, stretched, y, **options) - expected) > 1e-3


@GEOMETRIES
def test_range(name, options):
    most = 1 if (name, options) == ("cka", {}) else 2
    for seed in range(20):
        value = call(name, *clouds(seed=seed), **options)
        assert 0 < value < most
    x, _ = clouds()
    assert abs(call(name, x, 5 * x @ rotation(5) + 1, **options)) < 1e-12


def test_largest_distance():
    # Orthogonal over samples, with nothing in common.
    x, y = np.eye(8)[:, :2] - np.eye(8)[:, 2:4], np.eye(8)[:, 4:6] - np.eye(8)[:, 6:]
    np.testing.assert_allclose(call("procrustes", x, y), 2, rtol=1e-12)
    np.testing.assert_allclose(call("cka", x, y), 1, rtol=1e-12)
    np.testing.assert_allclose(call("feature_gram", x, y), 1, rtol=1e-12)


def test_triangle_inequality_of_procrustes():
    for seed in range(10):
        (x, y), (z, _) = clouds(seed=seed), clouds(seed=seed + 100)
        d = lambda a, b: np.sqrt(call("procrustes", a, b))
        assert d(x, y) <= d(x, z) + d(z, y) + 1e-12


def test_procrustes_is_the_bures_distance_of_gram_matrices():
    x, y = clouds(9, 11, 13)  # Gram matrices of full rank, except for the centring
    grams = [reference.normalized(z) @ reference.normalized(z).T for z in (x, y)]
    expected = float(jax.jit(kddm_jax.bures)(*map(jnp.asarray, grams)))
    # The reference takes roots of an eigenvalue that is zero up to rounding.
    np.testing.assert_allclose(call("procrustes", x, y), expected, rtol=1e-6)


def test_feature_gram_and_cka_share_their_inner_product():
    x, y = clouds()
    k, l = (reference.normalized(z) @ reference.normalized(z).T for z in (x, y))
    inner, norms = (k * l).sum(), ((k**2).sum(), (l**2).sum())
    distance = call("feature_gram", x, y)
    np.testing.assert_allclose(distance + 2 * inner, sum(norms), rtol=1e-12)
    alignment = inner / np.sqrt(norms[0] * norms[1])
    np.testing.assert_allclose(call("cka", x, y), 1 - alignment, rtol=1e-12)


def test_debiased_cka_of_independent_features_is_one():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(200, 2, 10, 30))
    biased, debiased = (
        np.mean(
            jax.jit(jax.vmap(partial(kddm_jax.cka, debiased=d)))(*pairs.swapaxes(0, 1))
        )
        for d in (False, True)
    )
    assert abs(debiased - 1) < 0.02
    assert biased < 0.5  # biased by ten samples of thirty features


def test_linear_projection_forgives_every_invertible_map():
    x, y = clouds(20, 6, 9)
    expected = call("linear_projection", x, y)
    mixed = x @ np.random.default_rng(1).normal(size=(6, 6))
    np.testing.assert_allclose(call("linear_projection", mixed, y), expected, rtol=1e-8)


def test_channels_may_grow_and_change_places():
    f, g = maps(c_y=4)
    expected = call("nst", f, g)
    changed = (f * np.array([3.0, 0.1, 7.0]))[..., ::-1]
    np.testing.assert_allclose(call("nst", changed, g), expected, rtol=1e-9)


# ------------------------------------------- what alignment of kernels ignores


def antiparallel_groups(delta, n=64, moved=16, width=17):
    """Makes two antiparallel groups; a few samples move along another direction."""
    signs = np.repeat([1.0, -1.0], n // 2)
    student = np.zeros((n, 2))
    student[:, 0] = signs
    teacher = np.zeros((n, width))
    teacher[:, 0] = signs
    teacher[np.arange(moved), 1 + np.arange(moved)] = delta
    return student, teacher


# Computed by NumPy in float64: delta, 1 - CKA, D_P^2, D_FG.
THEOREM_1 = [
    (0.0, 0.0, 0.0, 0.0),
    (0.5, 0.00011800409439166604, 0.057875100299940696, 0.05884888902196671),
    (1.0, 0.0018721236317964518, 0.20484804740229134, 0.20052897293692157),
    (2.0, 0.028117174631444253, 0.5691806212913555, 0.5036908847785658),
]


@pytest.mark.parametrize(("delta", "alignment", "procrustes", "gram"), THEOREM_1)
def test_aligned_kernels_of_different_geometry(delta, alignment, procrustes, gram):
    pair = antiparallel_groups(delta)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12)
    close(call("cka", *pair), alignment)
    close(call("procrustes", *pair), procrustes)
    close(call("feature_gram", *pair), gram**2)


def test_a_perfect_linear_projection_of_different_geometry():
    rng = np.random.default_rng(0)
    student = rng.normal(size=(64, 5))
    teacher = student @ rng.normal(size=(5, 17))
    assert call("linear_projection", student, teacher) < 1e-24
    assert call("procrustes", student, teacher) > 0.01
    assert call("feature_gram", student, teacher) > 0.01


# --------------------------------------------------------------------- gradients

SMOOTH = [
    ("procrustes", {}),
    ("procrustes", {"unit_norm": False}),
    ("feature_gram", {}),
    ("cka", {}),
    ("cka", {"debiased": True}),
    ("similarity_preserving", {}),
    ("linear_projection", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), SMOOTH)
def test_gradient_for_unequal_widths(name, options):
    x, y = clouds(7, 3, 4)
    x = x + 0.5  # rows near zero have too large second derivatives
    assert_distance_gradients(
        getattr(kddm_jax, name), x, y, argnums=(0, 1), rtol=1e-4, atol=1e-6, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nst", {}),
        ("nst", {"kernel": "linear"}),
        ("wkd_features", {"grid": 2}),
    ],
)
def test_gradient_of_maps(name, options):
    f, g = maps(b=2, size_x=(3, 3), size_y=(3, 3), c_x=2, c_y=2)
    assert_distance_gradients(
        getattr(kddm_jax, name), f, g, argnums=(0, 1), rtol=1e-4, atol=1e-6, **options
    )


def test_dead_and_constant_maps_have_finite_gradients():
    f, g = maps()
    dead, flat = f.copy(), np.ones_like(f)
    dead[..., 1] = 0
    for name, options in [
        ("nst", {}),
        ("nst", {"kernel": "rbf"}),
        ("wkd_features", {"grid": 3}),
    ]:
        fn = jax.jit(jax.value_and_grad(partial(getattr(kddm_jax, name), **options)))
        for pair in [(dead, g), (flat, g), (g, flat), (0 * f, g), (flat, flat), (f, f)]:
            value, gradient = fn(*map(jnp.asarray, pair))
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


def test_constant_features_have_no_direction():
    # Their mean has a rounding error, and the rest must not be scaled to norm one.
    x, y = np.full((9, 5), 0.1, np.float32), np.float32(clouds()[1])
    np.testing.assert_allclose(call("procrustes", x, y), 1, rtol=1e-6)
    np.testing.assert_allclose(call("cka", x, y), 0.5, rtol=1e-6)


def test_flat_cells_of_an_uneven_map_have_no_deviation():
    # Variances are zero up to rounding errors of either sign.
    rng = np.random.default_rng(0)
    values = 1e4 * rng.normal(size=(3, 2, 2, 50))
    f = jnp.float32(values).repeat(3, axis=1).repeat(3, axis=2)
    fn = partial(kddm_jax.wkd_features, grid=2, ratio=0.0)
    value, gradient = jax.jit(jax.value_and_grad(fn))(f, 0 * f)
    # In single precision, a deviation of 1e-3 of the map's is a rounding error.
    assert 0 <= value < 50 * 10**2
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------------------ errors


def refuses(message, fn, *arrays, **options):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *a: fn(*a, **options), *map(jnp.asarray, arrays))


def test_linear_projection_refuses_small_batches():
    message = "x has 7 samples of 6 features.*kddm_jax.networks.projectors"
    refuses(message, kddm_jax.linear_projection, np.ones((7, 6)), np.ones((7, 2)))
    jax.eval_shape(kddm_jax.linear_projection, np.ones((8, 6)), np.ones((8, 2)))


def test_messages():
    f, g = maps(c_y=4)
    refuses("3 and 4; .*kddm_jax.networks.projectors", kddm_jax.wkd_features, f, g)
    refuses("same images, got 2 and 1", kddm_jax.nst, f, g[:1])
    refuses(r"maps_y must have shape .* \[5, 4, 4\]", kddm_jax.nst, f, g[0])
    refuses("grid must be at least 1, got 0", kddm_jax.wkd_features, f, f, grid=0)
    refuses("ratio must be .*-1", kddm_jax.wkd_features, f, f, ratio=-1.0)
    refuses("needs at least 4 samples, got 3", kddm_jax.cka, *clouds(3), debiased=True)


def test_values_are_those_of_single_precision():
    batch = make_batch(32, 64, seed=7)
    x, y = batch.x[:, :20], batch.y
    for name, options in [*FEATURES, ("linear_projection", {})]:
        expected = getattr(reference, name)(x, y, **options)
        single = compiled(name, **options)(jnp.float32(x), jnp.float32(y))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-6)
