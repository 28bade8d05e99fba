"""Compares all distances and options with their textbook forms, in two precisions."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_batch, make_labels, relu_features

import kddm_jax

pytestmark = pytest.mark.usefixtures("x64")

# Closed forms and assignments differ by rounding errors only.
RTOL = 1e-9
REDUCTIONS = ["mean", "weighted", "sum"]

# n < d as in a network, n > d, and n = d.
SHAPES = [(10, 16), (16, 5), (6, 6)]
# Sorted and unsorted labels, classes of one sample and of none, and padding.
LABELLINGS = {
    "unbalanced": [0, 1, 0, 0, 2, 1, 0, 0, 2, 1],
    "absent": [5, 1, 5, 5, 5, 1, 1, 1, 5, 5],
    "one-sample": [0, 1, 2, 2, 2, 3, 1, 1, 2, 4],
    "all different": list(range(10)),
    "padding": [0, -1, 1, 0, 0, -1, 1, 2, 2, -1],
    "one class": [3] * 10,
}


def labelled_clouds(d=16):
    for labels in LABELLINGS.values():
        yield np.array(labels), *clouds(10, d)


LABELS = pytest.mark.parametrize("labels", LABELLINGS.values(), ids=LABELLINGS)


def close(value, expected, rtol=RTOL, atol=0.0):
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


def clouds(n, d, m=None, seed=0):
    batch = make_batch(n, d, m, seed=seed)
    return batch.x, batch.y


@cache
def compiled(name, **options):
    return jax.jit(partial(getattr(kddm_jax, name), **options))


def call(name, *arrays, **options):
    """Calls the library; numbers are traced, strings select the compiled function."""
    words = {k: v for k, v in options.items() if isinstance(v, str) or k in STATIC}
    numbers = {k: v for k, v in options.items() if k not in words}
    return compiled(name, **words)(*map(jnp.asarray, arrays), **numbers)


# ---------------------------------------------------------------- transport

STATIC = {"threshold", "max_iterations"}
CONVERGED = {"threshold": 1e-9, "max_iterations": 20_000}


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_wasserstein(shape):
    x, y = clouds(*shape)
    close(call("wasserstein", x, y, solver="exact"), reference.wasserstein(x, y))


@pytest.mark.parametrize("solver", ["entropic", "sinkhorn"])
@pytest.mark.parametrize("shape", [(10, 16, 10), (9, 4, 6)])
def test_entropic_wasserstein(shape, solver):
    n, d, m = shape
    x, y = clouds(n, d, m)
    for share in (0.1, 0.5):
        epsilon = share * reference.squared_distances(x, y).mean()
        options = {"solver": solver, "epsilon": epsilon}
        expected = reference.wasserstein(x, y, **options)
        close(call("wasserstein", x, y, **options, **CONVERGED), expected)


def test_default_is_the_divergence_at_a_fiftieth_of_the_mean_cost():
    x, y = clouds(12, 16, 8)
    epsilon = 0.02 * reference.squared_distances(x, y).mean()
    expected = reference.wasserstein(x, y, solver="sinkhorn", epsilon=epsilon)
    close(call("wasserstein", x, y, threshold=1e-6), expected, rtol=1e-5)
    # The error of the default threshold.
    default = call("wasserstein", x, y)
    close(default, expected, rtol=1e-3)
    # The linear programme that all of these approximate.
    programme = reference.linear_programme(reference.squared_distances(x, y))
    close(default, programme, rtol=0.05)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exact_class_wasserstein(reduction):
    options = {"solver": "exact", "reduction": reduction}
    for labels, x, y in labelled_clouds():
        expected = reference.class_wasserstein(x, y, labels, **options)
        close(call("class_wasserstein", x, y, labels, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "reduction"),
    [*(("sinkhorn", r) for r in REDUCTIONS), ("entropic", "mean"), ("entropic", "sum")],
)
def test_entropic_class_wasserstein(solver, reduction):
    for labels, x, y in labelled_clouds():
        # Large enough for Sinkhorn to converge, small enough to distinguish classes.
        epsilon = 0.1 * reference.squared_distances(x, y).mean()
        options = {"solver": solver, "reduction": reduction, "epsilon": epsilon}
        expected = reference.class_wasserstein(x, y, labels, **options)
        value = call("class_wasserstein", x, y, labels, **options, **CONVERGED)
        close(value, expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_default_epsilon_of_classes_is_of_the_pairs_within_them(reduction):
    labels, (x, y) = np.array(LABELLINGS["unbalanced"]), clouds(10, 16)
    weights = reference.class_weights(labels, reduction)
    means = [
        reference.squared_distances(x[labels == c], y[labels == c]).mean()
        for c in reference.classes(labels)
    ]
    epsilon = 0.02 * (weights @ means) / weights.sum()
    options = {"reduction": reduction, "solver": "sinkhorn"}
    expected = reference.class_wasserstein(x, y, labels, **options, epsilon=epsilon)
    value = call("class_wasserstein", x, y, labels, **options, threshold=1e-6)
    close(value, expected, rtol=1e-5)


@pytest.mark.slow
def test_hundred_classes():
    rng = np.random.default_rng(5)
    n, d = 96, 20
    x, y = relu_features(rng, n, d), relu_features(rng, n, d)
    labels = rng.integers(0, 100, n)
    labels[:7] = -1
    arrays = (x, y, labels)
    for name, options, named in [
        ("class_wasserstein", {"solver": "exact"}, {}),
        ("class_gaussian_wasserstein", {}, {}),
        (
            "class_gaussian_kl",
            {"covariance": "diag", "ridge": 0.1},
            {"covariance_type": "diag", "ridge": 0.1},
        ),
        ("class_mmd", {"bandwidth": 3.0}, {"bandwidth": 3.0}),
    ]:
        expected = getattr(reference, name)(*arrays, **named)
        # The reference takes roots of eigenvalues that are zero up to rounding.
        rtol = 1e-6 if name == "class_gaussian_wasserstein" else RTOL
        close(call(name, *arrays, **options), expected, rtol=rtol)
    # The plan of a small class is nearly a permutation, so the threshold matters.
    expected = reference.class_wasserstein(*arrays)
    close(call("class_wasserstein", *arrays), expected, rtol=0.05)


BETAS = [0.0, 0.7, 30.0, "max"]


@pytest.mark.parametrize("label_cost", ["probs", "logits", "kl"])
def test_exact_joint_wasserstein(label_cost):
    batch = make_batch(10, 16)
    arrays = (batch.x, batch.y, batch.logits_x, batch.logits_y)
    for beta in BETAS:
        options = {"beta": beta, "label_cost": label_cost, "solver": "exact"}
        expected = reference.joint_wasserstein(*arrays, **options)
        close(call("joint_wasserstein", *arrays, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "label_cost", "beta"),
    [
        ("sinkhorn", "probs", "max"),
        ("sinkhorn", "logits", 0.7),
        ("sinkhorn", "kl", 0.7),
        ("entropic", "probs", 0.7),
        ("entropic", "kl", "max"),
    ],
)
def test_entropic_joint_wasserstein(solver, label_cost, beta):
    batch = make_batch(10, 16, 7)
    arrays = (batch.x, batch.y, batch.logits_x, batch.logits_y)
    options = {"beta": beta, "label_cost": label_cost, "solver": solver}
    largest = reference.largest_feature_cost(batch.x, batch.y)
    number = largest if beta == "max" else beta
    cost = reference.joint_cost(*arrays, beta=number, label_cost=label_cost)
    options["epsilon"] = 0.15 * cost.mean()
    expected = reference.joint_wasserstein(*arrays, **options)
    value = call("joint_wasserstein", *arrays, **options, **CONVERGED)
    close(value, expected, rtol=1e-8)


def test_default_of_joint_wasserstein_is_near_the_programme():
    batch = make_batch(10, 16)
    arrays = (batch.x, batch.y, batch.logits_x, batch.logits_y)
    expected = reference.joint_wasserstein(*arrays)
    close(call("joint_wasserstein", *arrays), expected, rtol=0.05)


KAPPAS = [0.0, 0.3, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "entropic"])
def test_pairing_is_a_price_on_other_samples(solver):
    batch = make_batch(10, 16)
    mean = reference.squared_distances(batch.x, batch.y).mean()
    arrays = (batch.x, batch.y, batch.logits_x, batch.logits_y)
    found = []
    for share in KAPPAS:
        options = {"solver": solver, "pairing": share * mean}
        if solver != "exact":
            options["epsilon"] = 0.2 * mean
        precision = {} if solver == "exact" else CONVERGED
        plain = reference.wasserstein(*arrays[:2], **options)
        found.append(call("wasserstein", *arrays[:2], **options, **precision))
        close(found[-1], plain, rtol=1e-8)
        options |= {"beta": 0.7 * mean}
        joint = reference.joint_wasserstein(*arrays, **options)
        close(call("joint_wasserstein", *arrays, **options, **precision), joint, 1e-8)
    assert found == sorted(found)
    assert found[0] < found[-1]


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_large_pairing_is_paired_l2(solver):
    x, y = clouds(10, 16)
    largest = 1e4 * reference.squared_distances(x, y).max()
    value = call("wasserstein", x, y, solver=solver, pairing=largest)
    close(value, reference.paired_l2(x, y))


@pytest.mark.slow
def test_pairing_does_not_change_the_default_epsilon():
    x, y = clouds(12, 16)
    mean = reference.squared_distances(x, y).mean()
    expected = reference.wasserstein(
        x, y, pairing=mean, solver="sinkhorn", epsilon=0.02 * mean
    )
    value = call("wasserstein", x, y, pairing=mean, threshold=1e-6)
    close(value, expected, rtol=1e-5)


def test_paired_l2():
    x, y = clouds(10, 16)
    close(call("paired_l2", x, y), reference.paired_l2(x, y))


# ---------------------------------------------------------------- Gaussians

# Different counts and ranks; the reference uses SciPy's `sqrtm` if both ranks are full.
GAUSSIAN_SHAPES = [(10, 16, 10), (10, 16, 7), (5, 16, 20), (16, 5, 16), (12, 5, 30)]


@pytest.mark.parametrize("shape", GAUSSIAN_SHAPES)
def test_full_gaussian_wasserstein(shape):
    n, d, m = shape
    x, y = clouds(n, d, m)
    expected = reference.gaussian_wasserstein(x, y)
    # The reference takes roots of eigenvalues that are zero up to rounding.
    rtol = RTOL if min(n, m) > d else 1e-6
    close(call("gaussian_wasserstein", x, y), expected, rtol=rtol)
    # The error of this method is documented; it is meant for accelerators.
    close(call("gaussian_wasserstein", x, y, method="newton_schulz"), expected, 1e-3)


@pytest.mark.parametrize("shape", GAUSSIAN_SHAPES)
def test_diagonal_gaussian_wasserstein(shape):
    n, d, m = shape
    x, y = clouds(n, d, m)
    expected = reference.gaussian_wasserstein(x, y, covariance_type="diag")
    close(call("gaussian_wasserstein", x, y, covariance="diag"), expected)


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("d", [2, 16])
def test_class_gaussian_wasserstein(d, covariance, reduction):
    for labels, x, y in labelled_clouds(d):
        expected = reference.class_gaussian_wasserstein(
            x, y, labels, covariance_type=covariance, reduction=reduction
        )
        value = call(
            "class_gaussian_wasserstein",
            *(x, y, labels),
            covariance=covariance,
            reduction=reduction,
        )
        close(value, expected, rtol=1e-6 if covariance == "full" else RTOL)


def test_class_gaussian_wasserstein_by_newton_schulz():
    labels, (x, y) = np.array(LABELLINGS["unbalanced"]), clouds(10, 16)
    expected = reference.class_gaussian_wasserstein(x, y, labels)
    value = call("class_gaussian_wasserstein", x, y, labels, method="newton_schulz")
    close(value, expected, rtol=1e-3)


@pytest.mark.parametrize("rank", [5, 3])
def test_bures(rank):
    rng = np.random.default_rng(6)
    cov_x, cov_y = (
        reference.covariance(rng.normal(size=(rank + 1, 5)) * [1, 2, 3, 4, 0.1])
        for _ in range(2)
    )
    close(call("bures", cov_x, cov_y), reference.bures(cov_x, cov_y), rtol=1e-6)
    if rank == 5:
        close(call("bures", cov_x, cov_y), reference.bures_sqrtm(cov_x, cov_y))


def test_gaussian_wasserstein_is_means_and_bures():
    x, y = clouds(16, 5)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = means + call("bures", reference.covariance(x), reference.covariance(y))
    close(call("gaussian_wasserstein", x, y), expected)


DIRECTIONS = ["student||teacher", "teacher||student"]


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(10, 16, 10), (16, 5, 12)])
def test_gaussian_kl(shape, direction, covariance):
    n, d, m = shape
    x, y = clouds(n, d, m)
    for ridge in (0.3, 1e-3):
        expected = reference.gaussian_kl(
            x, y, covariance_type=covariance, ridge=ridge, direction=direction
        )
        value = call(
            "gaussian_kl",
            *(x, y),
            covariance=covariance,
            ridge=ridge,
            direction=direction,
        )
        close(value, expected)


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_default_ridge_is_a_thousandth_of_the_teachers_variance(direction, covariance):
    x, y = clouds(16, 5)
    options = {"covariance": covariance, "direction": direction}
    explicit = call("gaussian_kl", x, y, ridge=1e-3 * y.var(0).mean(), **options)
    close(call("gaussian_kl", x, y, **options), explicit)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_without_variance_has_a_finite_gradient(direction):
    """The squares of the ridge must not underflow."""
    x, y = (jnp.full((6, 9), value, jnp.float32) for value in (100.0, 0.0))
    loss = lambda x: kddm_jax.gaussian_kl(x, y, direction=direction)
    value, gradient = jax.value_and_grad(loss)(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(10, 16), (16, 5)])
def test_full_kl_of_a_student_far_larger_than_the_teacher(shape, direction):
    """The teacher's ridge is smaller than the round-off of the student's covariance."""
    x, y = clouds(*shape)
    x = x[:, :1] * x[:1]  # has rank one
    x, y = jnp.float32(1e4 * x), jnp.float32(1e-4 * y)
    labels = jnp.arange(len(x)) % 2
    options = {"covariance": "full", "direction": direction}
    for fn in (
        lambda x: kddm_jax.gaussian_kl(x, y, **options),
        lambda x: kddm_jax.class_gaussian_kl(x, y, labels, **options),
    ):
        value, gradient = jax.jit(jax.value_and_grad(fn))(x)
        assert value.dtype == jnp.float32
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_gaussian_kl(reduction, direction, covariance):
    for labels, x, y in labelled_clouds(d=6):
        expected = reference.class_gaussian_kl(
            *(x, y, labels),
            covariance_type=covariance,
            ridge=0.2,
            direction=direction,
            reduction=reduction,
        )
        value = call(
            "class_gaussian_kl",
            *(x, y, labels),
            covariance=covariance,
            ridge=0.2,
            direction=direction,
            reduction=reduction,
        )
        close(value, expected)


# ------------------------------------------------------------------ kernels


@pytest.mark.parametrize("shape", [(10, 16, 10), (16, 5, 9)])
def test_mmd(shape):
    n, d, m = shape
    x, y = clouds(n, d, m)
    close(call("mmd", x, y, kernel="linear"), reference.mmd(x, y, kernel="linear"))
    close(call("mmd", x, y), reference.mmd(x, y))
    for bandwidth in (0.5, 4.0):
        expected = reference.mmd(x, y, bandwidth=bandwidth)
        close(call("mmd", x, y, bandwidth=bandwidth), expected)


@LABELS
def test_class_mmd(labels):
    labels, (x, y) = np.array(labels), clouds(10, 16)
    for reduction in REDUCTIONS:
        for options in ({"kernel": "linear"}, {"bandwidth": 4.0}, {}):
            options = {"reduction": reduction, **options}
            expected = reference.class_mmd(x, y, labels, **options)
            close(call("class_mmd", x, y, labels, **options), expected)


# ---------------------------------------------------------- single precision

IN_SINGLE = [
    ("wasserstein", "x y", {"solver": "exact"}),
    ("class_wasserstein", "x y labels", {"solver": "exact"}),
    ("joint_wasserstein", "x y logits_x logits_y", {"solver": "exact"}),
    ("gaussian_wasserstein", "x y", {}),
    ("gaussian_wasserstein", "x y", {"covariance": "diag"}),
    ("class_gaussian_wasserstein", "x y labels", {}),
    ("class_gaussian_wasserstein", "x y labels", {"covariance": "diag"}),
    ("gaussian_kl", "x y", {"ridge": 1e-2}),
    ("gaussian_kl", "x y", {"ridge": 1e-1, "covariance": "full"}),
    ("class_gaussian_kl", "x y labels", {"ridge": 1e-2}),
    ("class_gaussian_kl", "x y labels", {"ridge": 1e-1, "covariance": "full"}),
    ("mmd", "x y", {}),
    ("mmd", "x y", {"kernel": "linear"}),
    ("class_mmd", "x y labels", {}),
    ("paired_l2", "x y", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inputs", "options"),
    IN_SINGLE,
    ids=lambda value: "-".join(map(str, value.values())) if value == {} else None,
)
def test_single_precision(name, inputs, options):
    # Like a batch in training, but smaller: n < d, ReLU, many classes.
    batch = make_batch(32, 64, k=10, seed=7)
    batch = batch._replace(labels=make_labels(np.random.default_rng(8), 32, 5))
    arrays = [getattr(batch, field) for field in inputs.split()]
    named = {k: v for k, v in options.items() if k != "covariance"}
    if "covariance" in options:
        named["covariance_type"] = options["covariance"]
    expected = getattr(reference, name)(*arrays, **named)
    single = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    value = call(name, *single, **options)
    assert value.dtype == jnp.float32
    # float32 rounds to 6e-8. Sums of 64 squares, and differences of traces that are as
    # large as the distance, lose one or two digits. The default bandwidth averages
    # roots of distances that are zero up to rounding, above all in small classes.
    close(value, expected, rtol=1e-4 if name == "class_mmd" else 1e-5)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
def test_small_distances_in_single_precision(gap):
    # The student is close to the teacher, so the distance is a difference of large
    # numbers.
    x, _ = clouds(32, 64)
    rng = np.random.default_rng(9)
    y = x + gap * rng.normal(size=x.shape)
    squared_norm = (x**2).sum(1).mean()
    for name, options in [
        ("wasserstein", {"solver": "exact"}),
        ("gaussian_wasserstein", {}),
        ("mmd", {"kernel": "linear"}),
        ("paired_l2", {}),
    ]:
        expected = getattr(reference, name)(
            x, y, **{k: v for k, v in options.items() if k == "kernel"}
        )
        value = call(name, x.astype(np.float32), y.astype(np.float32), **options)
        close(value, expected, rtol=1e-4, atol=1e-6 * squared_norm)
