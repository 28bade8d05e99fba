"""Compares gradients of all distances with differences and with closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import (
    FIXED,
    arguments,
    bound,
    fixed_of,
    float_arguments,
    identical,
    make_batch,
    options_of,
    parameters,
    with_zeros,
)

import kddm_jax
from kddm_jax import DISTANCES, Distance
from kddm_jax.testing import (
    assert_distance_gradients,
    assert_finite_gradients,
    assert_loss_gradients,
)

pytestmark = pytest.mark.usefixtures("x64")

# n < d and n > d; classes are unbalanced, with a class of one sample and padding.
TINY = {
    "n<d": make_batch(6, 8, labels=[0, 0, 1, 1, 1, 2]),
    "n>d": make_batch(7, 3, labels=[0, 0, 1, 1, 1, 2, -1], seed=6),  # no tiny row
}
CLOUDS = pytest.mark.parametrize("batch", TINY.values(), ids=TINY)

# Options that change the derivative. Labels become costs before the transport, so any
# solver shows if their gradient is right, and the exact one is the fastest.
VARIANTS = [
    {},
    {"solver": "exact"},
    {"solver": "entropic"},
    {"solver": "exact", "pairing": 0.5},
    {"label_cost": "logits", "solver": "exact"},
    {"label_cost": "kl", "solver": "exact"},
    {"covariance": "full"},
    {"covariance": "diag"},
    {"direction": "teacher||student"},
    {"covariance": "full", "direction": "teacher||student"},
    {"kernel": "linear"},
]


def is_new(row, variant):
    """Tells if a distance has the options of a variant, with other defaults."""
    known = parameters(row)
    if not variant.keys() <= known.keys():
        return False
    usual = {**{k: p.default for k, p in known.items()}, **dict(row.options)}
    return not variant or any(usual[k] != word for k, word in variant.items())


CASES = [
    pytest.param(
        *(name, variant, batch),
        id="-".join([name, *map(str, variant.values()), shape]),
    )
    for name, row in DISTANCES.items()
    for variant in VARIANTS
    if is_new(row, variant)
    for shape, batch in TINY.items()
    # Solvers see only the cost, so the shapes of the samples do not matter.
    if "threshold" not in parameters(row) or (shape == "n<d") == bool(variant)
]


def double(array):
    return jnp.asarray(array, jnp.float64)


# ------------------------------------------------- against numerical gradients


def of_one_matrix(row, batch, **options):
    """Returns a distance as a function of one matrix, which compiles only once."""
    arrays, at = arguments(row, batch, jnp.float64), float_arguments(row)
    shapes = [arrays[i].shape for i in at]
    matrices = [arrays[i].reshape(len(arrays[i]), -1) for i in at]
    ends = np.cumsum([matrix.shape[1] for matrix in matrices])[:-1]

    @jax.jit
    def fn(matrix):
        parts = jnp.split(matrix, ends, axis=1)
        filled = list(arrays)
        for i, part, shape in zip(at, parts, shapes, strict=True):
            filled[i] = part.reshape(shape)
        return row.fn(*filled, **options)

    return fn, jnp.concatenate(matrices, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant", "batch"), CASES)
def test_gradient_is_that_of_the_value(name, variant, batch):
    row = DISTANCES[name]
    options = options_of(row, **{**fixed_of(row, **variant), **variant})
    fn, matrix = of_one_matrix(row, batch, **options)
    # With steps of 1e-5 and variances of 0.1, central differences have this error.
    assert_distance_gradients(fn, matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_gradient_along_one_direction(name):
    """Compares directional derivatives with differences, for all distances."""
    row = DISTANCES[name]
    fn, matrix = of_one_matrix(row, TINY["n<d"], **options_of(row, **fixed_of(row)))
    value_and_gradient = jax.jit(jax.value_and_grad(fn))
    direction = np.random.default_rng(0).normal(size=matrix.shape)
    step = 1e-5
    (after, _), (before, _) = (
        value_and_gradient(matrix + sign * step * direction) for sign in (1, -1)
    )
    _, gradient = value_and_gradient(matrix)
    expected = np.vdot(gradient, direction)
    assert abs(expected) > 1e-3  # so a zero gradient would fail
    np.testing.assert_allclose((after - before) / (2 * step), expected, rtol=1e-4)


@jax.custom_jvp
def distorted(x, y, factor):
    return kddm_jax.paired_l2(x, y)


@distorted.defjvp
def _(primals, tangents):
    x, y, factor = primals
    value, tangent = jax.jvp(lambda x: kddm_jax.paired_l2(x, y), (x,), tangents[:1])
    return value, factor * tangent


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (16, 8)])
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.9, 1.1, 2.0, jnp.nan])
def test_helper_fails_on_a_wrong_gradient(factor, shape):
    x, y = np.random.default_rng(0).normal(size=(2, *shape))
    with pytest.raises(AssertionError):
        assert_distance_gradients(lambda x, y: distorted(x, y, factor), x, y)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_helper_judges_alike_at_all_scales(scale):
    x, y = scale * np.random.default_rng(0).normal(size=(2, 4, 3))
    assert_distance_gradients(lambda x, y: distorted(x, y, 1.0), x, y)
    with pytest.raises(AssertionError):
        assert_distance_gradients(lambda x, y: distorted(x, y, 0.95), x, y)


def test_helper_fails_on_one_wrong_entry():
    @jax.custom_jvp
    def one_dead_entry(x, y):
        return kddm_jax.paired_l2(x, y)

    @one_dead_entry.defjvp
    def _(primals, tangents):
        x, y = primals
        tangent = tangents[0].at[1, 1].set(0.0)
        return jax.jvp(lambda x: kddm_jax.paired_l2(x, y), (x,), (tangent,))

    x, y = np.random.default_rng(0).normal(size=(2, 6, 4))
    with pytest.raises(AssertionError):
        assert_distance_gradients(one_dead_entry, x, y)


def test_helper_fails_on_a_wrong_second_argument():
    stopped = lambda x, y: distorted(y, x, 0.5)
    x, y = np.random.default_rng(0).normal(size=(2, 6, 4))
    with pytest.raises(AssertionError):
        assert_distance_gradients(stopped, x, y, argnums=(1,))


def loss_of_network(params, x, labels, distance="l2", **options):
    """Returns distill_loss of a network with a counter among its parameters."""
    features = jnp.tanh(x @ params["net"]["w"]) + params["b"]
    arrays = features, x[:, :2], labels, features
    return kddm_jax.distill_loss(*arrays, distance=distance, weight=0.5, **options)


def test_loss_helper_checks_parameters():
    rng = np.random.default_rng(0)
    params = {"net": {"w": rng.normal(size=(3, 2))}, "b": np.ones(2), "count": 3}
    x, labels = rng.normal(size=(6, 3)), np.array([0, 1, 0, 1, 1, -1])
    fn = partial(loss_of_network, normalization="teacher")
    assert_loss_gradients(fn, params, x, labels)
    assert_loss_gradients(lambda *a: loss_of_network(*a)[0], params, x, labels)
    wrong = {
        "factor": lambda x, y: distorted(x, y, 0.5),
        "constant": lambda x, y: kddm_jax.paired_l2(jax.lax.stop_gradient(x), y),
    }
    for distance in wrong.values():
        fn = partial(loss_of_network, distance=distance)
        with pytest.raises(AssertionError):
            assert_loss_gradients(fn, params, x, labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_fails(bad):
    """NaN is equal to NaN in comparisons of arrays."""
    with pytest.raises(AssertionError):
        assert_loss_gradients(lambda x: jnp.sum(x) * bad, np.ones((2, 2)))


@pytest.mark.parametrize("argnums", [(2,), (-3,), (0, 5)])
def test_arguments_that_do_not_exist_are_refused(argnums):
    with pytest.raises(ValueError, match="there are 2 arguments; number them from 0"):
        assert_loss_gradients(
            lambda x, y: jnp.sum(x * y), np.ones(2), np.ones(2), argnums=argnums
        )


def test_helper_takes_a_key_a_row_and_a_callable():
    x, y = np.random.default_rng(0).normal(size=(2, 5, 3))
    assert_distance_gradients("l2", x, y)
    assert_distance_gradients(Distance(kddm_jax.paired_l2), x, y)
    assert_distance_gradients(kddm_jax.paired_l2, x, y)
    assert_distance_gradients("w2_gaussian", x, y, argnums=(0, 1), covariance="diag")


# ---------------------------------------------------------------- closed forms


def gradient(name, *arrays, argnum=0, **options):
    fn = jax.jit(
        jax.grad(lambda *a: getattr(kddm_jax, name)(*a, **options), argnums=argnum)
    )
    moved = [double(a) if a.dtype == np.float64 else jnp.asarray(a) for a in arrays]
    return np.asarray(fn(*moved))


@CLOUDS
def test_exact_wasserstein_pulls_to_the_partner(batch):
    x, y = batch.x, batch.y
    cost = reference.squared_distances(x, y)
    _, partner = reference.linear_sum_assignment(cost)
    expected = 2 * (x - y[partner]) / len(x)
    got = gradient("wasserstein", x, y, solver="exact")
    np.testing.assert_allclose(got, expected, atol=1e-12)
    back = gradient("wasserstein", x, y, argnum=1, solver="exact")
    np.testing.assert_allclose(back[partner], -expected, atol=1e-12)


@CLOUDS
def test_exact_class_wasserstein_pulls_to_the_partner_in_the_class(batch):
    x, y, labels = batch.x, batch.y, batch.labels
    expected = np.zeros_like(x)
    present = reference.classes(labels)
    for c in present:
        members = np.flatnonzero(labels == c)
        cost = reference.squared_distances(x[members], y[members])
        _, partner = reference.linear_sum_assignment(cost)
        pull = 2 * (x[members] - y[members][partner])
        expected[members] = pull / len(members) / len(present)
    got = gradient("class_wasserstein", x, y, labels, solver="exact")
    np.testing.assert_allclose(got, expected, atol=1e-12)


@CLOUDS
def test_entropic_wasserstein_pulls_to_the_plan(batch):
    x, y = batch.x, batch.y
    epsilon = 0.3 * reference.squared_distances(x, y).mean()
    plan = reference.sinkhorn_plan(reference.squared_distances(x, y), epsilon)
    expected = 2 * (plan.sum(1)[:, None] * x - plan @ y)
    options = {"epsilon": epsilon, "threshold": 1e-10}
    got = gradient("wasserstein", x, y, solver="entropic", **options)
    np.testing.assert_allclose(got, expected, atol=1e-8)
    # With debiasing, the student's pull on itself is subtracted.
    own = reference.sinkhorn_plan(reference.squared_distances(x, x), epsilon)
    expected = expected - 2 * (own.sum(1)[:, None] * x - own @ x)
    got = gradient("wasserstein", x, y, solver="sinkhorn", **options)
    np.testing.assert_allclose(got, expected, atol=1e-8)


@CLOUDS
def test_joint_wasserstein_pulls_features_and_probabilities(batch):
    x, y, s, t = batch.x, batch.y, batch.logits_x, batch.logits_y
    n, beta = len(x), 5.0
    cost = reference.joint_cost(x, y, s, t, beta=beta, label_cost="probs")
    _, partner = reference.linear_sum_assignment(cost)
    options = {"solver": "exact", "beta": beta}
    got = gradient("joint_wasserstein", x, y, s, t, **options)
    np.testing.assert_allclose(got, 2 * (x - y[partner]) / n, atol=1e-12)
    p, q = reference.softmax(s), reference.softmax(t)[partner]
    pull = 2 * beta * (p - q) / n
    expected = p * (pull - (p * pull).sum(1, keepdims=True))
    got = gradient("joint_wasserstein", x, y, s, t, argnum=2, **options)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_labels_pull_nothing_at_beta_zero():
    b = TINY["n<d"]
    arrays = (b.x, b.y, b.logits_x, b.logits_y)
    for solver in ("exact", "sinkhorn"):
        got = gradient("joint_wasserstein", *arrays, argnum=2, beta=0.0, solver=solver)
        np.testing.assert_array_equal(got, 0)


def brenier_map(x, y):
    """T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2, which maps N(0, A) to N(0, B)."""
    cov_x, cov_y = reference.covariance(x), reference.covariance(y)
    root = reference.sqrtm(cov_x)
    inverse = np.linalg.inv(root)
    return inverse @ reference.sqrtm(root @ cov_y @ root) @ inverse


def test_gaussian_wasserstein_pulls_to_the_brenier_map():
    batch = make_batch(16, 4)
    x, y = batch.x, batch.y
    image = y.mean(0) + (x - x.mean(0)) @ brenier_map(x, y)
    expected = 2 * (x - image) / len(x)
    np.testing.assert_allclose(
        gradient("gaussian_wasserstein", x, y), expected, atol=1e-9
    )


@CLOUDS
def test_diagonal_gaussian_wasserstein_pulls_to_the_scaled_cloud(batch):
    x, y = batch.x, batch.y
    image = y.mean(0) + (x - x.mean(0)) * y.std(0) / x.std(0)
    expected = 2 * (x - image) / len(x)
    got = gradient("gaussian_wasserstein", x, y, covariance="diag")
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_bures_pulls_to_the_inverse_map():
    batch = make_batch(16, 4)
    cov_x, cov_y = reference.covariance(batch.x), reference.covariance(batch.y)
    # d Bures(A, B) / dA = I - T, where T maps A to B.
    expected = np.eye(4) - brenier_map(batch.x, batch.y)
    got = gradient("bures", cov_x, cov_y)
    np.testing.assert_allclose((got + got.T) / 2, expected, atol=1e-9)


def test_linear_mmd_pulls_the_mean():
    x, y = TINY["n<d"].x, TINY["n<d"].y
    expected = np.broadcast_to(2 * (x.mean(0) - y.mean(0)) / len(x), x.shape)
    got = gradient("mmd", x, y, kernel="linear")
    np.testing.assert_allclose(got, expected, atol=1e-12)


@CLOUDS
def test_rbf_mmd_by_hand(batch):
    x, y = batch.x, batch.y
    sigma = reference.mean_distance(x, y)

    def pull(a, b):
        kernel = np.exp(-reference.squared_distances(a, b) / (2 * sigma**2))
        return ((b[None] - a[:, None]) * kernel[..., None]).sum(1) / sigma**2

    n, m = len(x), len(y)
    expected = 2 * pull(x, x) / n**2 - 2 * pull(x, y) / (n * m)
    # The default bandwidth is computed from the data, but it is a constant.
    np.testing.assert_allclose(gradient("mmd", x, y), expected, atol=1e-12)
    got = gradient("mmd", x, y, bandwidth=sigma)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.slow
@CLOUDS
@pytest.mark.parametrize("name", ["w2", "w2_gaussian", "jw2", "l2", "mmd_linear"])
def test_gradients_add_up_to_the_pull_of_the_mean(name, batch):
    row = DISTANCES[name]
    arrays = arguments(row, batch, jnp.float64)
    options = options_of(row, epsilon=FIXED["epsilon"], threshold=1e-9)
    grads = jax.jit(jax.grad(lambda *a: row.fn(*a, **options)))(*arrays)
    expected = 2 * (batch.x.mean(0) - batch.y.mean(0))
    np.testing.assert_allclose(grads.sum(0), expected, atol=1e-6)


@CLOUDS
@pytest.mark.parametrize("name", ["cw2", "cw2_gaussian", "ckl_gaussian", "cmmd_rbf"])
def test_padding_gets_no_gradient(name, batch):
    row = DISTANCES[name]
    batch = batch._replace(labels=np.where(batch.labels == 1, -1, batch.labels))
    arrays = arguments(row, batch, jnp.float64)
    for grad in jax.jit(jax.grad(bound(row), argnums=(0, 1)))(*arrays):
        np.testing.assert_array_equal(grad[batch.labels < 0], 0)
        assert np.abs(grad[batch.labels >= 0]).max() > 0


CONSTANTS = [
    ("w2", {"epsilon": lambda x, y: 0.02 * reference.squared_distances(x, y).mean()}),
    ("jw2", {"beta": reference.largest_feature_cost}),
    ("kl_gaussian", {"ridge": lambda x, y: 1e-3 * y.var(0).mean()}),
    ("mmd_rbf", {"bandwidth": reference.mean_distance}),
]


@pytest.mark.slow
@CLOUDS
@pytest.mark.parametrize(("name", "derived"), CONSTANTS, ids=lambda c: "".join(c))
def test_numbers_made_of_the_data_are_constants(name, derived, batch):
    row = DISTANCES[name]
    arrays = arguments(row, batch, jnp.float64)
    explicit = {option: make(batch.x, batch.y) for option, make in derived.items()}
    at = float_arguments(row)
    # Exact solvers, because iterations would differ by their rounding of epsilon.
    solver = {"threshold": 1e-7}
    if name == "jw2":
        solver["solver"] = "exact"
    fn = lambda **more: jax.jit(
        jax.grad(lambda *a: row.fn(*a, **options_of(row, **solver, **more)), argnums=at)
    )(*arrays)
    for default, given in zip(fn(), fn(**explicit), strict=True):
        np.testing.assert_allclose(default, given, atol=1e-9)


# ------------------------------------------------------------ rank deficiency


def wide(case):
    batch = make_batch(16, 40, labels=[0] * 6 + [1] * 5 + [2] * 4 + [3])
    if case == "dead features":
        return batch.map(with_zeros(np.s_[:12]), "x", "y")
    if case == "collapsed student":
        return batch.map(lambda x: x[:1] + 1e-9 * x, "x")
    if case == "repeated samples":
        return batch.map(lambda x: np.concatenate([x[:8], x[:8]]), "x")
    return batch


@pytest.mark.parametrize("name", ["w2_gaussian", "cw2_gaussian"])
@pytest.mark.parametrize("case", ["generic", "dead features", "repeated samples"])
def test_gradient_in_single_precision_follows_double(name, case):
    # Directions of zero variance have no gradient. If their rounding errors were kept,
    # half of the gradient would be arbitrary.
    row, batch = DISTANCES[name], wide(case)
    fn = jax.jit(jax.grad(bound(row)))
    expected = fn(*arguments(row, batch, jnp.float64))
    got = fn(*arguments(row, batch, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 40), (16, 5)], ids=["n<d", "n>d"])
def test_collapsed_student_is_pulled_by_its_mean_alone(shape):
    # The covariance of a point is zero, so the minimal-norm gradient is that of the
    # mean.
    batch = make_batch(*shape)
    x, y = np.broadcast_to(batch.x[:1], batch.x.shape), batch.y
    expected = np.broadcast_to(2 * (x.mean(0) - y.mean(0)) / len(x), x.shape)
    for dtype in (np.float32, np.float64):
        pull = jax.jit(jax.grad(kddm_jax.gaussian_wasserstein))
        got = pull(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["w2_gaussian", "cw2_gaussian"])
@pytest.mark.parametrize("shape", [(16, 40), (16, 3)], ids=["n<d", "n>d"])
def test_gradient_is_zero_where_student_and_teacher_agree(name, shape):
    batch = identical(make_batch(*shape))
    row = DISTANCES[name]
    fn = jax.jit(jax.grad(bound(row)))
    np.testing.assert_allclose(fn(*arguments(row, batch, jnp.float64)), 0, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 40), (16, 5)], ids=["n<d", "n>d"])
def test_newton_schulz_gradient_is_as_good_as_stated(shape):
    batch = make_batch(*shape)
    expected = gradient("gaussian_wasserstein", batch.x, batch.y)
    got = gradient("gaussian_wasserstein", batch.x, batch.y, method="newton_schulz")
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 5e-3, error


def test_finite_helper_fails_on_a_root_at_zero_that_jit_hides():
    """Compiled with optimizations, means of equal samples differ in the last digit."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    distance = jax.jit(lambda x, y: jnp.linalg.norm(x.mean(0) - y.mean(0)))
    fewer = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with pytest.raises(AssertionError):
            assert_finite_gradients(distance, x, x)
    finally:
        jax.config.update("jax_disable_most_optimizations", fewer)
    assert_finite_gradients(lambda x, y: jnp.sum((x - y) ** 2), x, x)
