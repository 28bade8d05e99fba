"""Tests every catalogue entry on input that no network should give.

Few shapes and precisions are used, because each is compiled. Hypothesis draws the
content of arrays as names of patterns and a seed, so that a failure can be read.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Batch, arguments, bound, names, relu_features
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from kddm_jax import DISTANCES

# Arguments whose gradient a student gets.
STUDENT = ("x", "logits_x", "maps_x")
NUM_CLASSES = 4


# Options that use other code than the entry's own options.
VARIANTS: Mapping[str, tuple[dict[str, object], ...]] = {
    "w2": ({"solver": "exact"}, {"solver": "entropic"}, {"epsilon": 1e-3}),
    "cw2": (
        {"solver": "exact", "reduction": "sum"},
        {"solver": "entropic"},
        {"reduction": "weighted"},
    ),
    "jw2": (
        {"solver": "exact", "label_cost": "logits"},
        {"label_cost": "kl"},
        {"label_cost": "kl", "solver": "exact"},
        {"beta": 1.0},
        {"compat": "released"},
    ),
    "w2_gaussian": ({"covariance": "diag"}, {"method": "newton_schulz"}),
    "cw2_gaussian": (
        {"covariance": "diag"},
        {"method": "newton_schulz"},
        {"num_classes": NUM_CLASSES},
    ),
    "kl_gaussian": ({"covariance": "full"}, {"direction": "teacher||student"}),
    "ckl_gaussian": (
        {"covariance": "full"},
        {"covariance": "full", "direction": "teacher||student"},
        {"reduction": "sum"},
        {"num_classes": NUM_CLASSES},
        {"num_classes": NUM_CLASSES, "covariance": "full"},
    ),
    "mmd_rbf": ({"bandwidth": 1.0},),
    "cmmd_rbf": ({"kernel": "linear"}, {"compat": "released"}),
    "gromov_w2": ({"metric": "sqeuclidean"}, {"metric": "cosine"}, {"epsilon": 1.0}),
    "procrustes": ({"unit_norm": False}, {"method": "newton_schulz"}),
    "gram": ({"unit_norm": False},),
    "cka": ({"debiased": True},),
    "nst": ({"kernel": "linear"}, {"kernel": "rbf"}),
    "kd": ({"direction": "student||teacher"}, {"temperature": 1.0}),
    "kd_standardized": ({"direction": "student||teacher"},),
    "pkt": ({"compat": "released"},),
    "rkd_distance": ({"compat": "released"},),
    "rkd_angle": ({"compat": "released"},),
    "contrastive": ({"temperature": 1.0},),
    "attention": ({"power": 1}, {"power": 4}, {"compat": "released"}),
    "dct": ({"frequencies": 2}, {"compat": "released"}),
    "dkd": ({"temperature": 1.0},),
    "dist": ({"temperature": 4.0}, {"compat": "released"}),
    "jsd": ({"beta": 0.1},),
    "wkd_logits": ({"iterations": 10},),
    "wkd_features": ({"grid": 2},),
}


class Form(NamedTuple):
    """Holds the student's and the teacher's n, the width, and the arrays' precision."""

    n: int
    m: int
    d: int
    dtype: str = "float32"


# Both sides of n = d; the quick tests compile only the first form.
FEW = (Form(6, 6, 9), Form(9, 9, 5, "float16"))
MANY = (
    *FEW,
    Form(1, 1, 7),
    Form(2, 2, 3, "bfloat16"),
    Form(24, 16, 5, "bfloat16"),
    Form(16, 24, 40),
    Form(64, 64, 40),
    Form(8, 8, 11, "float64"),
)

# ------------------------------------------------------------------ patterns


def repeated_rows(rng, n, d):
    return rng.normal(size=(n, d))[rng.integers(0, max(n // 3, 1), n)]


def dead_columns(rng, n, d):
    return rng.normal(size=(n, d)) * (rng.random(d) < 0.5)


def one_column(rng, n, d):
    return rng.normal(size=(n, d)) * (np.arange(d) == rng.integers(d))


def one_outlier(rng, n, d):
    z = rng.normal(size=(n, d))
    z[rng.integers(n)] *= 1e4
    return z


def far_from_the_origin(rng, n, d):
    return 1e3 + rng.normal(size=(n, d))


# Functions of rng, n and d; the magnitude is set later.
PATTERNS: Mapping[str, Callable] = {
    "relu": relu_features,
    "normal": lambda rng, n, d: rng.normal(size=(n, d)),
    "zero": lambda rng, n, d: np.zeros((n, d)),
    "constant": lambda rng, n, d: np.ones((n, d)),
    "constant rows": lambda rng, n, d: np.tile(rng.normal(size=d), (n, 1)),
    "repeated rows": repeated_rows,
    "binary": lambda rng, n, d: rng.integers(0, 2, (n, d)).astype(float),
    "signs": lambda rng, n, d: rng.choice([-1.0, 1.0], (n, d)),
    "rank one": lambda rng, n, d: np.outer(rng.normal(size=n), rng.normal(size=d)),
    "dead columns": dead_columns,
    "one column": one_column,
    "one outlier": one_outlier,
    "far from the origin": far_from_the_origin,
    "columns of all sizes": lambda rng, n, d: (
        rng.normal(size=(n, d)) * 10.0 ** rng.integers(-4, 5, d)
    ),
    "rows of all sizes": lambda rng, n, d: (
        rng.normal(size=(n, d)) * 10.0 ** rng.integers(-4, 5, (n, 1))
    ),
}

# The teacher's array, from its own pattern ``y`` or from the student's array ``x``.
RELATIONS: Mapping[str, Callable] = {
    "independent": lambda rng, x, y: y,
    "equal": lambda rng, x, y: x,
    "nearly equal": lambda rng, x, y: x * (1 + 1e-6 * rng.normal(size=x.shape)),
    "in another order": lambda rng, x, y: rng.permutation(x),
    "moved": lambda rng, x, y: x + np.abs(x).max(),
    "turned round": lambda rng, x, y: -x,
    "much smaller": lambda rng, x, y: 1e-4 * x,
}

LABELS: Mapping[str, Callable] = {
    "random": lambda rng, n: rng.integers(0, NUM_CLASSES, n),
    "one class": lambda rng, n: np.full(n, NUM_CLASSES - 1),
    "classes missing": lambda rng, n: rng.choice([0, NUM_CLASSES - 1], n),
    "one sample a class": lambda rng, n: np.arange(n),
    "some padding": lambda rng, n: rng.integers(-1, 2, n),
    "all padding": lambda rng, n: np.full(n, -1),
    "one sample left": lambda rng, n: np.where(np.arange(n) == n // 2, 1, -1),
}

MAGNITUDES = (1e-4, 1e-2, 1.0, 1e2, 1e4)


class Content(NamedTuple):
    """Names the contents of a batch's arrays."""

    student: str
    teacher: str
    relation: str
    magnitudes: tuple[float, float]
    labels: str
    seed: int


contents = st.builds(
    Content,
    student=st.sampled_from(list(PATTERNS)),
    teacher=st.sampled_from(list(PATTERNS)),
    relation=st.sampled_from(list(RELATIONS)),
    magnitudes=st.tuples(*[st.sampled_from(MAGNITUDES)] * 2),
    labels=st.sampled_from(list(LABELS)),
    seed=st.integers(0, 2**32 - 1),
)


def pair(rng, content, n, m, d):
    """Makes the arrays of student and teacher, with these largest entries."""

    def sized(z, magnitude):
        largest = np.abs(z).max()
        return z * (magnitude / largest) if largest else z

    x = sized(PATTERNS[content.student](rng, n, d), content.magnitudes[0])
    y = sized(PATTERNS[content.teacher](rng, m, d), content.magnitudes[1])
    return x, RELATIONS[content.relation](rng, x[np.arange(m) % n], y)


def make(form, content):
    rng = np.random.default_rng(content.seed)
    n, m, d, _ = form
    x, y = pair(rng, content, n, m, d)
    # Large features with small logits, and the reverse.
    turned = content._replace(magnitudes=content.magnitudes[::-1])
    logits_x, logits_y = pair(rng, turned, n, m, NUM_CLASSES)
    maps_x, maps_y = pair(rng, content, n * 9, m * 9, d)
    return Batch(
        *(x, y, logits_x, logits_y),
        LABELS[content.labels](rng, n).astype(np.int32),
        *(maps_x.reshape(n, 3, 3, d), maps_y.reshape(m, 3, 3, d)),
        key=content.seed,
    )


# --------------------------------------------------------------------- finite


@cache
def value_and_gradients(name, options=()):
    """Returns a distance and its gradients by the student's arrays, compiled."""
    row = DISTANCES[name]
    student = tuple(i for i, arg in enumerate(names(row)) if arg in STUDENT)
    return jax.jit(jax.value_and_grad(bound(row, **dict(options)), argnums=student))


def floats(form):
    return jnp.float64 if form.dtype == "float64" else jnp.float32


@cache
def refused(name, form, options=()):
    """Tells if an entry refuses this form; asserts that the error is one line."""
    row = DISTANCES[name]
    blank = make(form, Content("zero", "zero", "equal", (1.0, 1.0), "random", 0))
    arrays = arguments(row, blank, floats(form))
    try:
        jax.eval_shape(bound(row, **dict(options)), *arrays)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message, message
        assert any(str(number) in message for number in form[:3]), message
        return True
    return False


def hold(name, form, content, options=()):
    """Asserts that value and gradients are finite."""
    rounded = make(form, content).map(lambda z: np.asarray(z, jnp.dtype(form.dtype)))
    with jax.enable_x64(form.dtype == "float64"):
        if refused(name, form, options):
            return
        arrays = arguments(DISTANCES[name], rounded, floats(form))
        out, grads = value_and_gradients(name, options)(*arrays)
    assert out.dtype == floats(form)
    assert np.isfinite(out), f"value {out}"
    for grad in grads:
        bad = ~np.isfinite(grad)
        assert not bad.any(), f"{bad.sum()} of {bad.size} of a gradient, value {out}"


def examples(count):
    """Uses this number of examples, which are the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,  # the first of a form compiles
        suppress_health_check=[HealthCheck.too_slow],  # for the same reason
    )


ROWS = pytest.mark.parametrize("name", list(DISTANCES))


@ROWS
@examples(20)
@given(content=contents)
def test_finite(name, content):
    hold(name, FEW[0], content)


@pytest.mark.slow
@ROWS
@examples(500)
@given(form=st.sampled_from(MANY), content=contents)
def test_finite_at_length(name, form, content):
    hold(name, form, content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, tuple(o.items())) for name, several in VARIANTS.items() for o in several],
)
@examples(200)
@given(form=st.sampled_from(FEW), content=contents)
def test_finite_with_other_options(name, options, form, content):
    hold(name, form, content, options)


# ------------------------------------------------------------------- precision


def halves_computed_with(jaxpr):
    """Yields the names of operations on half precision, except those that widen it."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        for sub in inner:
            yield from halves_computed_with(sub)
        ends = [*equation.invars, *equation.outvars]
        half = any(getattr(end.aval, "dtype", None) in HALVES for end in ends)
        if half and not inner and equation.primitive.name != "convert_element_type":
            yield equation.primitive.name


HALVES = (jnp.float16, jnp.bfloat16)


@ROWS
def test_half_precision_is_widened_first(name):
    """The square of 1e4 is infinite in float16, so no operation may use float16."""
    row = DISTANCES[name]
    content = Content("normal", "normal", "independent", (1e4, 1e4), "random", 0)
    arrays = arguments(row, make(FEW[1], content), jnp.float16)
    jaxpr = jax.make_jaxpr(bound(row))(*arrays).jaxpr
    assert not set(halves_computed_with(jaxpr))
    # The search does find operations.
    naive = jax.make_jaxpr(lambda x: jnp.sum(x * x))(arrays[0]).jaxpr
    assert "mul" in set(halves_computed_with(naive))


# -------------------------------------------------------------------- refusals


ODD = [Form(1, 1, 1), Form(5, 3, 4), Form(3, 3, 70), Form(2, 90, 6)]


@ROWS
@pytest.mark.parametrize(
    "forms", [ODD[:2], pytest.param(ODD[2:], marks=pytest.mark.slow)], ids=["", "more"]
)
def test_what_is_refused_is_refused_in_one_line(name, forms):
    """For all shapes, the result is a scalar or a ValueError that names the shape."""
    assert not refused(name, FEW[1])
    for form in forms:
        refused(name, form)
