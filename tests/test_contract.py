"""Tests the properties of every catalogue entry.

The ``promises`` of an entry name properties that not all have: "zero" for identical
samples, "symmetric", "translation" and "rotation" (applied to both samples), and
"widths" (student and teacher may differ in width).
"""

from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DEGENERATE,
    FIELDS,
    FLOATS,
    TRACES,
    Batch,
    arguments,
    bound,
    compiled,
    fitted,
    float_arguments,
    identical,
    is_tall,
    make_batch,
    names,
    options_of,
    parameters,
    scale,
)

import kddm_jax
from kddm_jax import DISTANCES
from kddm_jax.numerics.normalization import NORMALIZATIONS


def parametrize(rows):
    """Parametrizes a test by distances."""
    return pytest.mark.parametrize("name", list(rows))


ROWS = parametrize(DISTANCES)
# Exact enough to compare two solutions of one problem.
TIGHT = {"threshold": 1e-7}
# Distances that accept n != m; all others refuse it.
UNEQUAL_COUNTS = {
    *("w2", "jw2", "w2_gaussian", "kl_gaussian", "mmd_linear", "mmd_rbf"),
    *("sliced_w2", "gromov_w2"),
}


def promising(promise):
    """Parametrizes a test by the distances that have a property."""
    rows = [name for name, row in DISTANCES.items() if promise in row.promises]
    assert rows, f"no row promises {promise!r}"
    return parametrize(rows)


def value(name, batch, dtype=jnp.float32, **wanted):
    out = compiled(name, **wanted)(*arguments(DISTANCES[name], batch, dtype))
    chex.assert_shape(out, ())
    return float(out)


def rows_along(batch, change):
    """Takes the samples of a batch in another order, or some of them."""
    return batch.map(lambda z: z[change], *FLOATS, "labels")


# -------------------------------------------------------------------- values


@ROWS
def test_not_negative(name):
    for seed in range(3):
        for shrink in (1.0, 1e-3):  # far apart and nearly identical
            batch = make_batch(seed=seed)
            near = identical(batch)
            batch = Batch(
                *(
                    b + shrink * (a - b) if field in FLOATS else b
                    for field, a, b in zip(Batch._fields, batch, near, strict=True)
                )
            )
            assert value(name, batch) >= -1e-6 * scale(batch)


@promising("zero")
def test_zero_for_identical_clouds(name):
    batch = identical(make_batch())
    assert abs(value(name, batch)) <= 1e-6 * scale(batch)


@ROWS
def test_not_zero_for_different_clouds(name):
    assert value(name, make_batch()) > 1e-3


SWAPPED = ("y", "x", "logits_y", "logits_x", "maps_y", "maps_x")


@promising("symmetric")
def test_symmetric(name, x64):
    batch = make_batch()
    swapped = batch._replace(
        **{a: getattr(batch, b) for a, b in zip(FLOATS, SWAPPED, strict=True)}
    )
    expected = value(name, batch, jnp.float64, **TIGHT)
    got = value(name, swapped, jnp.float64, **TIGHT)
    # Iterations do not treat both sides alike, and stop at a threshold.
    rtol = 1e-5 if "threshold" in parameters(DISTANCES[name]) else 1e-9
    np.testing.assert_allclose(got, expected, rtol=rtol)


@promising("translation")
def test_common_translation_changes_nothing(name, x64):
    batch = make_batch()
    shift = np.linspace(-3, 5, batch.x.shape[1])
    moved = batch.map(lambda z: z + shift, "x", "y", "maps_x", "maps_y")
    expected = value(name, batch, jnp.float64, **TIGHT)
    np.testing.assert_allclose(
        value(name, moved, jnp.float64, **TIGHT), expected, rtol=1e-8
    )


@promising("rotation")
def test_common_rotation_changes_nothing(name, x64):
    batch = fitted(DISTANCES[name], make_batch())

    def turn(z):
        shape = (z.shape[-1],) * 2
        return z @ np.linalg.qr(np.random.default_rng(1).normal(size=shape))[0]

    turned = batch.map(turn, "x", "y", "maps_x", "maps_y")
    expected = value(name, batch, jnp.float64, **TIGHT)
    np.testing.assert_allclose(
        value(name, turned, jnp.float64, **TIGHT), expected, rtol=1e-8
    )


@ROWS
def test_order_of_the_samples_is_irrelevant(name, x64):
    batch = make_batch()
    order = np.random.default_rng(2).permutation(len(batch.labels))
    expected = value(name, batch, jnp.float64, **TIGHT)
    got = value(name, rows_along(batch, order), jnp.float64, **TIGHT)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


LABELLED = [name for name, row in DISTANCES.items() if "labels" in row.inputs]


@parametrize(LABELLED)
def test_names_of_the_classes_are_irrelevant(name, x64):
    if {"logits", "class_means"} & set(DISTANCES[name].inputs):
        pytest.skip("there a class is a place in an array")
    batch = make_batch()
    renamed = batch._replace(labels=np.array([7, 2, 0, 30], np.int32)[batch.labels])
    expected = value(name, batch, jnp.float64, **TIGHT)
    got = value(name, renamed, jnp.float64, **TIGHT)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


@parametrize(LABELLED)
def test_padding_weighs_nothing(name, x64):
    padded = make_batch(labels=[0, 1, 1, 0, 1, -1, -1, -1])
    # The content of padding does not matter either, except for a digit or two.
    garbage = padded.map(lambda z: np.concatenate([z[:5], 1e3 + z[5:]]))
    expected = value(name, padded, jnp.float64, **TIGHT)
    np.testing.assert_allclose(
        value(name, garbage, jnp.float64, **TIGHT), expected, rtol=1e-6
    )


@parametrize(LABELLED)
def test_padding_is_the_same_as_leaving_out(name, x64):
    padded = make_batch(labels=[0, 1, 1, 0, 1, -1, -1, -1])
    expected = value(name, rows_along(padded, np.s_[:5]), jnp.float64, **TIGHT)
    np.testing.assert_allclose(
        value(name, padded, jnp.float64, **TIGHT), expected, rtol=1e-7
    )


@ROWS
def test_not_a_number_shows(name):
    # The train step must see NaN, so no guard against zeros may hide it.
    row, batch = DISTANCES[name], make_batch()
    for position in float_arguments(row):
        arrays = arguments(row, batch)
        arrays[position] = arrays[position].at[2, ..., 1].set(jnp.nan)
        assert np.isnan(compiled(name)(*arrays)), names(row)[position]


# ------------------------------------------------------------- precision


@ROWS
def test_single_precision_follows_double(name):
    batch = make_batch()
    single = value(name, batch)
    with jax.enable_x64(True):
        double = value(name, batch, jnp.float64)
    # Iterations reach the threshold of 1e-3 one step earlier or later.
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-6 * scale(batch))


@pytest.mark.slow
@ROWS
def test_type_of_the_result(name, x64):
    batch, row = make_batch(), DISTANCES[name]
    fn = bound(row)
    for given, wanted in [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ]:
        out = jax.eval_shape(fn, *arguments(row, batch, given))
        chex.assert_shape(out, ())
        assert out.dtype == wanted, given


@ROWS
def test_one_feature_in_another_precision_is_accepted(name):
    row = DISTANCES[name]
    mixed = arguments(row, make_batch(), jnp.float32)
    mixed[0] = mixed[0].astype(jnp.bfloat16)
    assert jax.eval_shape(bound(row), *mixed).dtype == jnp.float32


# ---------------------------------------------------------- transformations


@ROWS
def test_traced_once_for_one_shape(name):
    before = TRACES.copy()
    for seed in range(3):
        value(name, make_batch(seed=seed))
    assert (TRACES - before).total() <= 1


@pytest.mark.slow
@ROWS
def test_eager_equals_compiled(name):
    batch, row = make_batch(), DISTANCES[name]
    eager = bound(row)(*arguments(row, batch))
    chex.assert_shape(eager, ())
    np.testing.assert_allclose(
        eager, value(name, batch), rtol=1e-5, atol=1e-6 * scale(batch)
    )


@pytest.mark.slow
@ROWS
def test_vmap_and_pmap_equal_single_calls(name):
    row = DISTANCES[name]
    batches = [make_batch(seed=seed) for seed in range(2)]
    expected = [value(name, batch) for batch in batches]
    arrays = zip(*(arguments(row, batch) for batch in batches), strict=True)
    stacked = [jnp.stack(pair) for pair in arrays]
    for transform in (lambda fn: jax.jit(jax.vmap(fn)), jax.pmap):
        # Under vmap, all problems iterate until the last one has converged.
        np.testing.assert_allclose(transform(bound(row))(*stacked), expected, rtol=1e-4)


NUMBERS = ("epsilon", "bandwidth", "ridge", "beta")
WITH_NUMBERS = [
    (name, option)
    for name, row in DISTANCES.items()
    for option in NUMBERS
    if option in parameters(row) and dict(row.options).get("kernel") != "linear"
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), WITH_NUMBERS)
def test_number_may_be_traced(name, option):
    row, batch = DISTANCES[name], make_batch()
    options = options_of(row)

    @jax.jit
    def fn(number, *arrays):
        return row.fn(*arrays, **{**options, option: number})

    number = 0.7 if option == "beta" else 2.0  # "jsd" needs one below 1
    expected = value(name, batch, **{option: number})
    np.testing.assert_allclose(fn(number, *arguments(row, batch)), expected, rtol=1e-5)


# --------------------------------------------------------------- degenerate


@cache
def value_and_gradients(name):
    """Returns a distance and its gradients by all float arguments, compiled."""
    row = DISTANCES[name]
    return jax.jit(jax.value_and_grad(bound(row), argnums=float_arguments(row)))


def complaints(name, batch, out, grads):
    """Yields everything that is wrong with a value and its gradients."""
    row, rounding = DISTANCES[name], 1e-6 * scale(batch)
    if not np.isfinite(out):
        yield f"value {out}"
    elif out < -rounding:
        yield f"negative, {out} at scale {scale(batch)}"
    identical_clouds = np.array_equal(batch.x, batch.y) and "zero" in row.promises
    if identical_clouds and not abs(out) <= rounding:
        yield f"not zero: {out} at scale {scale(batch)}"
    # The unit is the gradient of the mean squared norm, 2 |x| / n. Without any
    # variation, ridge and bandwidth are as small as rounding errors, but gradients must
    # not explode.
    unit = 2 * np.abs(batch.x).max() / len(batch.x) + 1e-30
    most = 1e-3 if np.ptp(batch.x, axis=0).any() else 1.0
    for position, grad in zip(float_arguments(row), grads, strict=True):
        grad, argument = np.asarray(grad, np.float32), names(row)[position]
        if not np.isfinite(grad).all():
            yield f"gradient of {argument}"
        elif identical_clouds and not np.abs(grad).max() <= most * unit:
            yield f"gradient of {argument} is {np.abs(grad).max() / unit} units"


@pytest.mark.slow
@ROWS
def test_degenerate_inputs_have_finite_values_and_gradients(name):
    wrong = []
    for case, make in DEGENERATE.items():
        batch = make()
        if is_tall(DISTANCES[name]) and len(batch.x) < 3:
            assert "samples" in refusal(name, *arguments(DISTANCES[name], batch))
            continue
        arrays = arguments(DISTANCES[name], batch)
        out, grads = value_and_gradients(name)(*arrays)
        wrong += [f"{case}: {text}" for text in complaints(name, batch, out, grads)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@ROWS
def test_half_precision_is_computed_in_single(name):
    wrong = []
    fn = value_and_gradients(name)
    for case in ("n < d", "identical", "dead features", "padding", "constant"):
        batch = DEGENERATE[case]()
        half = arguments(DISTANCES[name], batch, jnp.bfloat16)
        out, grads = fn(*half)
        assert out.dtype == jnp.float32
        wrong += [f"{case}: {text}" for text in complaints(name, batch, out, grads)]
        widen = lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a
        expected, _ = fn(*map(widen, half))
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6 * scale(batch))
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------- errors


def refusal(name, *arrays, **options):
    """Returns the message of the ValueError that is raised while tracing."""
    row = DISTANCES[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jax.eval_shape(lambda *a: row.fn(*a, **options_of(row), **options), *arrays)
    return str(error.value)


@ROWS
def test_wrong_rank_is_refused_by_name(name):
    row = DISTANCES[name]
    for position, argument in enumerate(names(row)):
        if argument == "key":
            continue
        for change in (lambda a: a[0], lambda a: a[None]):
            arrays = arguments(row, make_batch())
            arrays[position] = change(arrays[position])
            message = refusal(name, *arrays)
            assert argument in message, (argument, message)


@ROWS
def test_integer_features_are_refused_by_name(name):
    row = DISTANCES[name]
    for position in float_arguments(row):
        arrays = arguments(row, make_batch())
        arrays[position] = arrays[position].astype(jnp.int32)
        assert names(row)[position] in refusal(name, *arrays)


@ROWS
def test_other_number_of_samples(name):
    row = DISTANCES[name]
    batch = make_batch(n=8, m=6)
    if name in UNEQUAL_COUNTS:
        assert np.isfinite(value(name, batch))
    else:
        message = refusal(name, *arguments(row, batch))
        assert "8" in message, message
        assert "6" in message, message


@ROWS
def test_labels_of_another_length_are_refused(name):
    row = DISTANCES[name]
    for position, argument in enumerate(names(row)):
        if argument in ("x", "y", "key", "maps_x", "maps_y", "class_means"):
            continue
        if "features" not in row.inputs and argument != "labels":
            continue
        arrays = arguments(row, make_batch())
        arrays[position] = arrays[position][:-1]
        assert argument in refusal(name, *arrays)


@ROWS
def test_other_width(name):
    row = DISTANCES[name]
    if not {"features", "maps"} & set(row.inputs):
        pytest.skip("the row takes no features")
    batch = make_batch()
    narrow = batch._replace(x=batch.x[:, :7], maps_x=batch.maps_x[..., :7])
    narrow = arguments(row, narrow)
    if "widths" in row.promises:
        assert np.isfinite(compiled(name)(*narrow))
    else:
        message = refusal(name, *narrow)
        assert "7" in message, message
        assert "12" in message, message
        assert "projectors" in message, message


@parametrize(LABELLED)
def test_wrong_labels_are_refused(name):
    row = DISTANCES[name]
    at = names(row).index("labels")
    labels = make_batch().labels

    def with_labels(new):
        arrays = arguments(row, make_batch())
        arrays[at] = jnp.asarray(new)
        return arrays

    assert "labels" in refusal(name, *with_labels(labels.astype(np.float32)))
    one_hot = refusal(name, *with_labels(np.eye(4, dtype=np.int32)[labels]))
    assert "labels" in one_hot
    assert "argmax" in one_hot
    if "num_classes" in parameters(row):
        # The values of labels are known only outside compiled code.
        fn = bound(row, num_classes=4)

        def trace(new):  # the labels are constant
            arrays = arguments(row, make_batch())
            before, after = arrays[:at], arrays[at + 1 :]
            new = jnp.asarray(new)
            jax.eval_shape(lambda a, b: fn(*a, new, *b), before, after)

        trace(np.where(labels > 1, -1, labels))
        with pytest.raises(ValueError, match="labels"):
            trace(np.where(labels > 1, 4, labels))


UNKNOWN_NAMES = ("solver", "reduction", "covariance", "method", "kernel", "direction")
WITH_NAMES = [
    (name, option)
    for name, row in DISTANCES.items()
    for option in (*UNKNOWN_NAMES, "label_cost", "metric", "beta", "compat")
    if option in parameters(row)
]


@pytest.mark.parametrize(("name", "option"), WITH_NAMES)
def test_unknown_word_is_refused_with_the_known_ones(name, option):
    row = DISTANCES[name]
    options = {**options_of(row), option: "nonsense"}
    with pytest.raises(ValueError, match=option) as error:
        jax.eval_shape(lambda *a: row.fn(*a, **options), *arguments(row, make_batch()))
    assert "nonsense" in str(error.value)
    assert str(parameters(row)[option].default) in str(error.value)


WITH_SOLVER = [name for name, row in DISTANCES.items() if "solver" in parameters(row)]


@parametrize(WITH_SOLVER)
def test_exact_refuses_other_numbers_of_samples(name):
    batch = make_batch(n=8, m=6)
    arrays = arguments(DISTANCES[name], batch)
    message = refusal(name, *arrays, solver="exact")
    assert "8" in message, message
    assert "6" in message, message


@parametrize([name for name, row in DISTANCES.items() if "pairing" in parameters(row)])
def test_pairing_refuses_what_it_cannot_price(name):
    row = DISTANCES[name]
    message = refusal(name, *arguments(row, make_batch(n=8, m=6)), pairing=1.0)
    assert "8" in message, message
    assert "6" in message, message
    arrays = arguments(row, make_batch())
    for wrong in (-1.0, float("nan"), float("inf")):
        message = refusal(name, *arrays, pairing=wrong)
        assert "pairing" in message, message
        assert str(wrong) in message, message
    assert "pairing" in refusal(name, *arrays, pairing=np.ones(3))
    with pytest.raises(ValueError, match="pairing must be a number"):
        jax.jit(lambda k: row.fn(*arrays, pairing=k))(jnp.ones(3))
    assert "pairing" in refusal(name, *arrays, pairing=1.0, compat="released")


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 3)])
def test_bures_refuses_what_is_no_covariance(shape):
    with pytest.raises(ValueError, match="cov_x"):
        kddm_jax.bures(jnp.ones(shape), jnp.eye(3))
    with pytest.raises(ValueError, match="cov_y"):
        kddm_jax.bures(jnp.eye(3), jnp.ones(shape))
    with pytest.raises(ValueError, match="cov_"):
        kddm_jax.bures(jnp.eye(3), jnp.eye(4))


# ---------------------------------------------------------------- catalogue


def test_catalogue_is_read_only():
    with pytest.raises(TypeError):
        DISTANCES["mine"] = DISTANCES["w2"]


@ROWS
def test_row_is_complete(name):
    row = DISTANCES[name]
    assert row.title
    assert row.complexity
    assert row.fn.__doc__
    assert row.weights
    assert set(row.weights) <= set(NORMALIZATIONS)
    assert all(weight > 0 for weight in row.weights.values())
    assert set(row.inputs) <= set(FIELDS)
    assert set(dict(row.options)) <= set(parameters(row))
    for change in (  # shared defaults cannot be changed
        lambda: setattr(row, "title", "mine"),
        lambda: row.weights.update(mine=1),
        lambda: row.options.append(("mine", 1)),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()
    assert hash(row) == hash(replace(row))


@parametrize([name for name, row in DISTANCES.items() if "features" in row.inputs])
def test_default_weights_are_those_of_a_unit(name, x64):
    """Raw features have a default if the scale of features does not matter."""
    row, batch = DISTANCES[name], make_batch(16, 5)
    larger = batch.map(lambda z: 3 * z, "x", "y")
    fixed = {"bandwidth": None}  # the batch's own
    before, after = (value(name, b, jnp.float64, **fixed) for b in (batch, larger))
    same = np.isclose(before, after, rtol=1e-6)
    raw, teacher = row.weights.get(None), row.weights.get("teacher")
    assert (raw == teacher) == same
    if "squared" in row.promises:
        np.testing.assert_allclose(after, 9 * before, rtol=1e-4)
        assert raw is None
        assert teacher is not None


@parametrize([name for name, row in DISTANCES.items() if "features" in row.inputs])
def test_distances_of_directions_have_a_default_for_unit_rows(name, x64):
    """Rows of unit length give the same value if the rows' lengths do not matter."""
    row, batch = DISTANCES[name], make_batch(16, 5)
    rng = np.random.default_rng(0)  # the two sides have different lengths
    other = batch.map(lambda z: rng.uniform(0.5, 2, (16, 1)) * z, "x", "y")
    before, after = (value(name, b, jnp.float64) for b in (batch, other))
    if np.isclose(before, after, rtol=1e-6):
        assert row.weights["unit"] == row.weights[None]


@ROWS
def test_diagnosis_has_the_same_value(name):
    row, batch = DISTANCES[name], make_batch()
    if row.diagnose is None:
        assert "threshold" not in parameters(row), "iterates, but tells nothing"
        return
    diagnose = jax.jit(lambda *a: row.diagnose(*a, **options_of(row)))
    out, facts = diagnose(*arguments(row, batch))
    np.testing.assert_allclose(out, value(name, batch), rtol=1e-5)
    assert {"converged", "iterations", "marginal_error"} <= set(facts)
    chex.assert_shape(list(facts.values()), ())
    assert facts["converged"] == 1


# Options that are a single number, and options that are a count.
ONE_NUMBER = ("epsilon", "ridge", "alpha", "beta", "pairing", "gamma", "ratio")
COUNTS = ("max_iterations", "num_projections", "grid", "iterations", "power")
VECTORS = ("bandwidth", "temperature")
WITH_ONE_NUMBER = [
    (name, option)
    for name, row in DISTANCES.items()
    for option in (*ONE_NUMBER, *COUNTS, "threshold", "frequencies", *VECTORS)
    if option in parameters(row) and dict(row.options).get("kernel") != "linear"
]


@pytest.mark.parametrize(("name", "option"), WITH_ONE_NUMBER)
def test_an_array_is_not_taken_for_a_number(name, option):
    row = DISTANCES[name]
    arrays = arguments(row, make_batch())
    for wrong in (np.ones((3, 2)), jnp.ones((3, 2)), [[1.0], [4.0]], -1, float("nan")):
        with pytest.raises(ValueError, match=f"^{option} must ") as error:
            jax.eval_shape(
                lambda *a: row.fn(*a, **{**options_of(row), option: wrong}),  # noqa: B023
                *arrays,
            )
        shape = list(np.shape(wrong))
        assert str(shape if shape else wrong) in str(error.value) or shape == [2, 1]


@parametrize(["mmd_rbf", "cmmd_rbf"])
def test_kernels_of_several_bandwidths_are_averaged(name, x64):
    batch = make_batch()
    one, two, both = (
        value(name, batch, jnp.float64, bandwidth=b) for b in (0.5, 2.0, (0.5, 2.0))
    )
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-9)
    refused = lambda b: refusal(name, *arguments(DISTANCES[name], batch), bandwidth=b)
    assert "bandwidth must be positive, got 0.0" in refused((0.5, 0.0))
    assert "bandwidth must be a number or several, got none" in refused(())
