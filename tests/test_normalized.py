"""Tests distances of normalized features in the loss, on one device and on two."""

from functools import cache, partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kddm_jax import DISTANCES, Distance, Term, distill_loss
from kddm_jax.families.gaussian import gaussian_wasserstein
from kddm_jax.families.gaussian_kl import gaussian_kl
from kddm_jax.numerics.normalization import NORMALIZATIONS, normalize

N, D, K = 8, 3, helpers.NUM_CLASSES
X, Y = np.random.default_rng(1).normal(0.5, [[[1.0]], [[2.0]]], (2, N, D))
BATCH = helpers.make_batch(N, D)._replace(x=X, y=Y).map(np.float32)
KEY = jax.random.key(3)
NAMES = [name for name in NORMALIZATIONS if name is not None]
OF_FEATURES = [name for name, row in DISTANCES.items() if "features" in row.inputs]
# Pairs that are zero for all features.
ZERO = {
    *[("mmd_linear", name) for name in ("centered", "standardized")],
    ("kl_gaussian", "standardized"),
}
# Class means are not centred, so centred features do not compare with them.
NOT_CENTERED = {("kdpp", name) for name in ("centered", "standardized")}
REFUSED = ZERO | NOT_CENTERED
PAIRS = [(d, n) for d in OF_FEATURES for n in NAMES if (d, n) not in REFUSED]


def one_each(distances):
    """Returns each distance with one normalization; they take turns."""
    found = []
    for i, name in enumerate(distances):
        able = [n for n in NAMES if (name, n) not in REFUSED]
        found.append((name, able[i % len(able)]))
    return found


ONE_EACH = one_each(OF_FEATURES)
# One distance of features of each kind, except "jw2", whose solver compiles slowly, and
# several for each normalization.
SOME = [
    ("mmd_rbf", "unit"),
    ("cmmd_rbf", "centered"),
    ("sliced_w2", "standardized"),
    ("l2", "centered"),
]
KINDS = [name for name in helpers.KINDS.values() if name in OF_FEATURES]


def term_value(name, normalization, x, y, **options):
    """Returns the value of a term for features of both sides."""
    _, terms = distill_loss(
        *(x, y, BATCH.labels, BATCH.logits_x, BATCH.logits_y),
        **{"distance": name, "weight": 1.0, "normalization": normalization},
        **{"key": KEY, "teacher_data": helpers.teacher_data(K, D), **options},
    )
    return terms[name]


@cache
def compiled(name, normalization):
    """Returns value and gradient by the student, with one program for all tests."""
    return jax.jit(jax.value_and_grad(partial(term_value, name, normalization)))


def fitted(name):
    batch = helpers.fitted(DISTANCES[name], BATCH)
    return batch.x, batch.y


def slow_but(chosen, every):
    """Makes parameters of a test, and marks all but the chosen ones as slow."""
    return [
        pytest.param(*p, marks=() if p in chosen else pytest.mark.slow) for p in every
    ]


# ----------------------------------------------------------------------- contract


@pytest.mark.parametrize(("name", "normalization"), slow_but(SOME, PAIRS))
def test_gradient_is_that_of_the_value(name, normalization, x64):
    row = DISTANCES[name]
    fixed = helpers.fixed_of(row)
    x, y = (np.asarray(z, np.float64) for z in fitted(name))
    direction = np.cos(np.arange(x.size)).reshape(x.shape)
    fn = partial(term_value, name, normalization, y=y, **fixed)
    along = jax.jit(lambda x: jax.jvp(lambda x: fn(x=x), (x,), (direction,)))
    (_, slope), h = along(x), 1e-5
    (above, _), (below, _) = along(x + h * direction), along(x - h * direction)
    assert abs(slope) > 1e-6
    np.testing.assert_allclose(slope, (above - below) / (2 * h), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalization"), PAIRS)
def test_value_is_that_of_normalized_features(name, normalization):
    """It is finite and not zero, with a finite gradient."""
    x, y = fitted(name)
    fn = compiled(name, normalization)
    value, slope = fn(x, y)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    assert value > 1e-5
    row = DISTANCES[name]
    moved = normalize([jnp.asarray(x), jnp.asarray(y)], [x, y], normalization)
    batch = BATCH._replace(x=moved[0], y=moved[1], key=3)
    expected = helpers.compiled(name)(*helpers.arguments(row, batch))
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalization"), ONE_EACH)
def test_half_precision_is_normalized_in_single(name, normalization):
    fn = compiled(name, normalization)
    half = [jnp.asarray(z, jnp.bfloat16) for z in fitted(name)]
    found = jax.jit(partial(term_value, name, normalization))(*half)
    wide, _ = fn(*(z.astype(jnp.float32) for z in half))
    # "mmd_rbf" is a difference of means of about 1.
    atol = 1e-6 if name == "mmd_rbf" else 0
    np.testing.assert_allclose(found, wide, rtol=1e-5, atol=atol)


def hostile():
    """Returns pairs of features of one shape that no layer should have."""
    x, y = BATCH.x, BATCH.y
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    gaps = np.where(np.arange(N)[:, None] % 3 == 0, 0, x)
    return {
        "constant teacher": (x, ones),
        "constant student": (ones, y),
        "both constant": (ones, 2 * ones),
        "zeros": (zeros, zeros),
        "rows of zeros": (gaps, gaps + zeros),
        "the same": (y, y),
        "large": (np.float32(1e15) * x, np.float32(1e15) * y),
        "small": (np.float32(1e-15) * x, np.float32(1e-15) * y),
        "far apart": (np.float32(1e8) * x, np.float32(1e-8) * y),
    }


CHEAP = [("l2", name) for name in NAMES]


@pytest.mark.parametrize(("name", "normalization"), slow_but(CHEAP, PAIRS))
def test_hostile_features(name, normalization):
    fn = compiled(name, normalization)
    width = fitted(name)[0].shape[1]
    for what, pair in hostile().items():
        if normalization == "teacher" and what == "far apart":
            continue  # in the teacher's unit, squares overflow
        value, slope = fn(*(z[:, :width] for z in pair))
        assert np.isfinite(value), what
        assert np.all(np.isfinite(slope)), what
        if what == "both constant" and normalization in ("centered", "standardized"):
            np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize(("name", "normalization"), slow_but(CHEAP, PAIRS))
def test_one_sample(name, normalization):
    if helpers.is_tall(DISTANCES[name]):
        pytest.skip("takes more samples than features")
    one = BATCH.map(lambda z: z[:1], "x", "y", "logits_x", "logits_y")

    def value(x):
        return distill_loss(
            *(x, one.y, BATCH.labels[:1], one.logits_x, one.logits_y),
            **{"distance": name, "normalization": normalization},
            **{"weight": 1.0, "key": KEY, "teacher_data": helpers.teacher_data(K, D)},
        )[1][name]

    found, slope = jax.jit(jax.value_and_grad(value))(one.x)
    assert np.isfinite(found)
    assert np.all(np.isfinite(slope))


EVERY = [(d, n) for d in OF_FEATURES for n in NORMALIZATIONS if (d, n) not in REFUSED]


@pytest.mark.parametrize(("name", "normalization"), slow_but(CHEAP, EVERY))
def test_a_teacher_that_is_not_finite_gives_nan(name, normalization):
    fn = compiled(name, normalization)
    x, y = fitted(name)
    for wrong in (np.nan, np.inf):
        y = y.copy()
        y[1, 0] = wrong
        value, _ = fn(x, y)
        if normalization is None:  # an infinite distance is allowed
            assert not np.isfinite(value), wrong
        else:
            assert np.isnan(value), wrong


# ----------------------------------------------------------------------- refusals


def shapes(distance, normalization, **options):
    fn = lambda x: distill_loss(
        *(x, BATCH.y, BATCH.labels, BATCH.logits_x, BATCH.logits_y),
        **{"distance": distance, "normalization": normalization},
        **{"weight": 1.0, "key": KEY, **options},
    )
    jax.eval_shape(fn, BATCH.x)


@pytest.mark.parametrize(
    ("distance", "normalization", "options"),
    [
        *[(*pair, {}) for pair in sorted(ZERO)],
        ("mmd_rbf", "centered", {"kernel": "linear"}),
        ("w2_gaussian", "standardized", {"covariance": "diag"}),
        ("w2_gaussian", "standardized", {"compat": "released"}),
        ("kl_gaussian", "standardized", {"compat": "released"}),
        (gaussian_kl, "standardized", {}),
        (Distance(gaussian_wasserstein, options={"covariance": "diag"}),)
        + ("standardized", {}),
        ([Term("l2"), Term("mmd_linear", name="means")], "centered", {}),
        ([Term("mmd_linear", normalization="centered")], None, {}),
    ],
)
def test_a_pair_that_is_always_zero_is_refused(distance, normalization, options):
    message = r"normalization='\w*' makes \w* zero: with \w*='\w*' it compares nothing "
    message += r"but .* then equal on both sides; take 'teacher', 'unit'.* or another"
    with pytest.raises(ValueError, match=message) as caught:
        shapes(distance, normalization, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("distance", "normalization"), sorted(NOT_CENTERED))
def test_centred_features_and_class_means_are_refused(distance, normalization):
    with pytest.raises(ValueError, match="class_means are means of raw features"):
        shapes(distance, normalization)


def test_other_options_of_the_same_functions_are_not():
    shapes("kl_gaussian", "standardized", covariance="full")
    shapes("w2_gaussian", "standardized")
    shapes("mmd_rbf", "centered")
    for normalization in (None, "teacher", "unit"):
        shapes("mmd_linear", normalization)


@pytest.mark.parametrize("normalization", NAMES)
def test_a_term_without_features_refuses(normalization):
    for name, row in DISTANCES.items():
        if "features" not in row.inputs:
            with pytest.raises(ValueError, match=f"{normalization!r} is for distances"):
                Term(name, normalization=normalization)


def test_a_normalization_of_the_loss_leaves_predictions_alone():
    arrays = BATCH.x, BATCH.y, BATCH.labels, BATCH.logits_x, BATCH.logits_y
    loss = lambda *arrays: [
        distill_loss(*arrays, distance="kd", normalization=normalization)[0]
        for normalization in NORMALIZATIONS
    ]
    assert len(set(map(float, jax.jit(loss)(*arrays)))) == 1


@pytest.mark.parametrize("normalization", ["unit", "centered", "standardized"])
def test_distances_of_features_ask_for_a_weight(normalization):
    message = (
        f"has no default weight with normalization={normalization!r}, only with .*"
    )
    with pytest.raises(ValueError, match=message + "; pass a number, weight="):
        distill_loss(
            *(BATCH.x, BATCH.y, BATCH.labels, BATCH.logits_x),
            distance="w2",
            normalization=normalization,
        )


def test_each_position_is_a_row_of_its_own():
    """Maps that are compared position by position are normalized after flattening."""
    maps = BATCH.maps_x, BATCH.maps_y
    flat = [z.reshape(-1, D) for z in maps]
    for name in NAMES:
        term = Term("l2", positions="each", normalization=name)
        _, terms = distill_loss(*maps, BATCH.labels, BATCH.logits_x, distance=term)
        x, y = normalize(flat, flat, name)
        expected = np.mean(np.sum((x - y) ** 2, axis=1))
        np.testing.assert_allclose(terms["l2"], expected, rtol=1e-5)


# ------------------------------------------------------------------------ devices


DEVICES = 2


def terms_of(names):
    return [Term(name, normalization=n, name=f"{name} {n}") for name, n in names]


def loss_of(scale, batch, *, names, **options):
    """Computes a loss of a parameter that bends the student's features."""
    x, y, labels, s, t = batch
    features = x + scale * jnp.tanh(x)
    return distill_loss(
        *(features, y, labels, s, t),
        **{"distance": terms_of(names), "key": KEY, **options},
        teacher_data=helpers.teacher_data(K, D),
    )


def on_one(names, groups):
    """Computes the loss of the whole batch, or the mean over its halves."""

    def fn(scale, batch):
        parts = [z.reshape(groups, -1, *z.shape[1:]) for z in batch]
        values = jax.vmap(partial(loss_of, names=names), (None, 0))(scale, parts)
        return jax.tree.map(partial(jnp.mean, axis=0), values)

    return jax.jit(jax.value_and_grad(fn, has_aux=True))


def on_two(names, group_size):
    def fn(scale, batch):
        loss = partial(loss_of, names=names, axis_name="devices", group_size=group_size)
        values, slope = jax.value_and_grad(loss, has_aux=True)(scale, batch)
        return values, jax.lax.pmean(slope, "devices")

    return jax.pmap(fn, "devices", in_axes=(None, 0), devices=jax.devices()[:DEVICES])


# Means over samples, and a distance between whole batches.
QUICK = [*CHEAP, ("cmmd_rbf", "standardized")]
OF_KINDS = [*dict.fromkeys([*one_each(KINDS), *QUICK])]


@pytest.mark.parametrize("group_size", [None, 1], ids=["all", "groups"])
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(OF_KINDS, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_two_devices_are_one(names, group_size):
    order = np.argsort(BATCH.x[:, 0])  # devices get different means and deviations
    batch = BATCH.x, BATCH.y, BATCH.labels, BATCH.logits_x, BATCH.logits_y
    batch = [z[order] for z in batch]
    halves = [z.reshape(DEVICES, -1, *z.shape[1:]) for z in batch]
    scale = np.full(D, 0.1, np.float32)
    groups = 1 if group_size is None else DEVICES // group_size
    (loss, terms), slope = on_one(names, groups)(scale, batch)
    (loss_on_two, terms_on_two), slope_on_two = on_two(names, group_size)(scale, halves)
    for device in range(DEVICES):
        np.testing.assert_allclose(loss_on_two[device], loss, rtol=1e-5)
        for name in (term.name for term in terms_of(names)):
            pair = terms_on_two[name][device], terms[name]
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(slope_on_two[device], slope, rtol=1e-3, atol=1e-5)
