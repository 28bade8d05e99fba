"""Tests masks of samples, and samples without a label, with any content.

A masked batch equals the batch without the masked samples, in value and gradient, for
every catalogue entry and with one program for all masks of a shape.
"""

from functools import cache

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOATS, arguments, bound, float_arguments, make_batch, names
from test_hostile import VARIANTS

from kddm_jax import DISTANCES, Distance, Term, distill_loss
from kddm_jax.distances import paired_l2
from kddm_jax.losses import cross_entropy

N, KEPT, D = 12, 9, 5
ROWS = pytest.mark.parametrize("name", list(DISTANCES))
LABELLED = [name for name, row in DISTANCES.items() if "labels" in row.inputs]
# A Sinkhorn iteration that has partly converged has these rounding errors.
RTOL = 2e-4


def rows_of(batch, rows):
    return batch.map(lambda z: z[rows], *FLOATS, "labels")


def poisoned(batch, mask, poison):
    """Replaces masked samples by ``poison``, and their labels by an unused class."""
    out = ~mask

    def spoil(z):
        z = np.array(z)
        z[out] = poison
        return z

    return batch.map(spoil)._replace(labels=np.where(mask, batch.labels, 99))


@cache
def program(name, options=(), masked=True):
    """Returns value and gradients of a distance, with a traced mask or without one."""
    row = DISTANCES[name]
    fn = bound(row, **dict(options))

    def value(*arrays):
        *arrays, mask = arrays
        return fn(*arrays, mask=mask) if masked else fn(*arrays)

    return jax.jit(jax.value_and_grad(value, argnums=float_arguments(row)))


def random_mask(seed, kept=KEPT, n=N):
    rng = np.random.default_rng(seed)
    return rng.permutation(np.arange(n) < kept)


def array_list(name, batch):
    row = DISTANCES[name]
    if helpers.is_tall(row):  # as few features as nine samples determine
        batch = batch.map(lambda z: z[..., :4], "x", "y")
        return [jnp.asarray(getattr(batch, n), jnp.float32) for n in names(row)]
    return arguments(row, batch)


def assert_masked_is_cut(name, batch, mask, poison, options=()):
    cut = program(name, options, masked=False)
    expected, slopes = cut(*array_list(name, rows_of(batch, mask)), None)
    spoilt = poisoned(batch, mask, poison)
    found, grads = program(name, options)(*array_list(name, spoilt), mask)
    unit = helpers.scale(rows_of(batch, mask))
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-6 * unit)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_array_equal(grad[~mask], 0)
        # Where the gradient is zero, its rounding errors remain.
        atol = max(1e-3 * float(np.abs(slope).max()), 2e-7)
        np.testing.assert_allclose(grad[mask], slope, atol=atol, rtol=0)


@ROWS
def test_a_masked_batch_is_the_batch_without_those_rows(name):
    for seed, poison in enumerate((np.nan, np.inf, 1e6)):
        batch = make_batch(N, D, seed=seed)
        assert_masked_is_cut(name, batch, random_mask(seed), poison)


@ROWS
def test_a_batch_without_samples_is_zero(name):
    assert_nothing(name)


def assert_nothing(name, options=()):
    mask = np.zeros(N, bool)
    batch = poisoned(make_batch(N, D), mask, np.nan)
    value, grads = program(name, options)(*array_list(name, batch), mask)
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


OPTIONS = [
    (name, tuple(sorted(options.items())))
    for name, several in VARIANTS.items()
    for options in several
] + [
    ("w2", (("pairing", 1.0),)),
    ("w2", (("pairing", 1.0), ("solver", "exact"))),
    ("jw2", (("pairing", 1.0),)),
    ("kl_gaussian", (("compat", "released"),)),
    ("mmd_rbf", (("bandwidth", (0.5, 2.0)),)),
    ("cmmd_rbf", (("bandwidth", (0.5, 2.0)),)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_other_options_with_a_mask(name, options):
    for seed in range(2):
        mask = random_mask(seed)
        assert_masked_is_cut(name, make_batch(N, D, seed=seed), mask, np.nan, options)
    assert_nothing(name, options)


CASES = {
    "wide": lambda seed: make_batch(N, 16, seed=seed),
    "far from the origin": lambda seed: make_batch(N, D, seed=seed).map(
        lambda z: 1e2 + z, "x", "y", "maps_x", "maps_y"
    ),
    "collapsed student": lambda seed: make_batch(N, D, seed=seed).map(
        helpers.constant_rows, "x", "logits_x", "maps_x"
    ),
    "small": lambda seed: make_batch(N, D, seed=seed).map(lambda z: 1e-4 * z),
}


@pytest.mark.slow
@ROWS
@pytest.mark.parametrize("case", CASES)
def test_hard_batches_with_a_mask(name, case):
    if helpers.is_tall(DISTANCES[name]) and case == "wide":
        pytest.skip("needs few features")
    assert_masked_is_cut(name, CASES[case](3), random_mask(3), np.nan)


@pytest.mark.slow
@ROWS
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_few_samples(name, kept):
    """They give the batch without the others, even if the distance would refuse it."""
    mask, batch = random_mask(kept, kept), make_batch(N, D, seed=kept)
    if not helpers.is_tall(DISTANCES[name]):
        assert_masked_is_cut(name, batch, mask, np.nan)
        return
    spoilt = array_list(name, poisoned(batch, mask, np.nan))
    value, grads = program(name)(*spoilt, mask)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_debiased_alignment_of_few_samples_is_zero(kept):
    mask = random_mask(kept, kept)
    batch = poisoned(make_batch(N, D), mask, np.nan)
    fn = program("cka", (("debiased", True),))
    value, grads = fn(*array_list("cka", batch), mask)
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


# ------------------------------------------------------------------ without a label


@pytest.mark.parametrize("name", LABELLED)
def test_a_sample_without_a_label_may_hold_anything(name):
    """Distances that take labels leave it out like a masked sample."""
    mask = random_mask(0)
    batch = make_batch(N, D)
    for poison in (np.nan, np.inf, -np.inf):
        spoilt = poisoned(batch, mask, poison)
        spoilt = spoilt._replace(labels=np.where(mask, batch.labels, -1))
        arrays = array_list(name, spoilt)
        everyone = np.ones(N, bool)
        value, grads = program(name)(*arrays, everyone)
        expected, slopes = program(name)(*arrays, mask)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for grad, slope in zip(grads, slopes, strict=True):
            np.testing.assert_array_equal(grad[~mask], 0)
            np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-7)


def test_cross_entropy_leaves_out_what_has_no_label():
    s, labels = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([0, 1])
    fn = jax.jit(jax.value_and_grad(cross_entropy))
    expected, slope = fn(s, labels)
    for poison in (np.nan, np.inf, -np.inf):
        more = jnp.concatenate([s, jnp.full((1, 2), poison)])
        value, grad = fn(more, jnp.array([0, 1, -1]))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(grad[:2], slope, rtol=1e-6)
        np.testing.assert_array_equal(grad[2], 0)


# ------------------------------------------------------------------------- the loss


TERMS = [
    Term("l2", layers=("map", "map"), positions="each", name="each"),
    Term("l2", layers=("map", "map"), normalization="teacher", name="pool"),
    Term("cw2_gaussian", layers=("map", "map"), positions="each", name="classes"),
    Term("mmd_linear"),
    Term("kd"),
]


def whole_loss(batch, mask=None, **options):
    """Returns the loss and its gradients by the student's arrays."""

    def fn(student):
        x, maps, logits = student
        return distill_loss(
            {"features": x, "map": maps},
            {"features": batch.y, "map": batch.maps_y},
            batch.labels,
            logits,
            batch.logits_y,
            distance=TERMS,
            mask=mask,
            weight=0.5,
            **options,
        )

    student = batch.x, batch.maps_x, batch.logits_x
    return jax.value_and_grad(fn, has_aux=True)(student)


def as_arrays(batch):
    return batch.map(lambda z: np.asarray(z, np.float32))


# The two devices have different numbers of samples.
MASK = np.arange(N) % 4 != 1
MASK[:4] = False


def assert_same_losses(found, expected, mask):
    (loss, terms), grads = found
    (wanted, parts), slopes = expected
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    for name, part in parts.items():
        np.testing.assert_allclose(terms[name], part, rtol=1e-3, err_msg=name)
    for grad, slope in zip(grads, slopes, strict=True):
        grad = np.asarray(grad).reshape(N, *slope.shape[1:])
        np.testing.assert_array_equal(grad[~mask], 0)
        atol = 1e-3 * np.abs(slope).max()
        np.testing.assert_allclose(grad[mask], slope, atol=atol)


def test_the_loss_of_a_masked_batch_on_one_device_and_on_two():
    batch = as_arrays(make_batch(N, D, seed=5))
    expected = jax.jit(whole_loss)(rows_of(batch, MASK))
    spoilt = as_arrays(poisoned(batch, MASK, np.nan))
    assert_same_losses(jax.jit(whole_loss)(spoilt, MASK), expected, MASK)

    def on_device(batch, mask):
        value, grads = whole_loss(batch, mask, axis_name="batch")
        return value, grads

    split = lambda z: np.asarray(z).reshape(2, N // 2, *np.shape(z)[1:])
    shares = jax.tree.map(split, spoilt._replace(key=np.zeros(N)))
    value, grads = jax.pmap(on_device, axis_name="batch")(shares, split(MASK))
    for both in jax.tree.leaves(value):
        np.testing.assert_array_equal(both[0], both[1])
    first = jax.tree.map(lambda z: z[0], value)
    # Every device differentiates the global loss, so the mean is the gradient.
    grads = jax.tree.map(lambda z: z / 2, grads)
    assert_same_losses((first, grads), expected, MASK)


def test_a_task_of_one_s_own_sees_no_labels_where_there_is_no_sample():
    batch = as_arrays(poisoned(make_batch(N, D), MASK, np.nan))
    seen = {}

    def task(logits, labels):
        seen.update(logits=logits, labels=labels)
        return jnp.mean(logits)

    arrays = batch.x, batch.y, batch.labels, batch.logits_x
    loss, _ = distill_loss(*arrays, distance=(), task=task, mask=MASK)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(seen["labels"][~MASK], -1)
    np.testing.assert_array_equal(seen["labels"][MASK], batch.labels[MASK])


def masked_loss(distance="l2", mask=MASK, **options):
    batch = as_arrays(make_batch(N, D))
    return distill_loss(
        *(batch.x, batch.y, batch.labels, batch.logits_x),
        distance=distance,
        weight=1.0,
        mask=mask,
        **options,
    )


def mine(x, y, *, mask=None):
    return paired_l2(x, y, mask=mask)


def test_a_distance_of_one_s_own_takes_the_mask():
    assert masked_loss(mine)[0] == masked_loss("l2")[0]
    assert masked_loss(mine, mask=None)[0] == masked_loss("l2", mask=None)[0]
    with pytest.raises(ValueError, match="'<lambda>' does not take a mask; give it a"):
        masked_loss(lambda x, y: jnp.sum(x - y))


def test_a_mask_reaches_a_distance_that_takes_other_arrays_first():
    bank = jnp.ones((N // 2, D))

    def banked(bank, x, y, *, mask):  # required; None without a mask
        return paired_l2(x, y, mask=mask) + 0 * jnp.sum(bank)

    row = Distance(banked, inputs=("bank", "features"))
    for mask in (MASK, None):
        found, _ = masked_loss(row, mask=mask, teacher_data={"bank": bank})
        assert found == masked_loss("l2", mask=mask)[0]


def test_a_group_of_devices_without_samples_has_no_part():
    """The loss does not depend on the position of the padding."""
    batch, half = as_arrays(make_batch(N, D)), np.arange(N) < N // 2
    arrays = batch.x, batch.y, batch.labels, batch.logits_x

    def loss(x, arrays, mask, **options):
        options |= {"distance": "mmd_rbf", "weight": 1.0, "task_weight": 0.0}
        return distill_loss(x, *arrays, mask=mask, **options)[0]

    def on_device(arrays, mask):
        x, *others = arrays
        options = {"axis_name": "batch", "group_size": 1}
        value, grad = jax.value_and_grad(loss)(x, others, mask, **options)
        return value, grad

    split = lambda z: np.asarray(z).reshape(2, N // 2, *np.shape(z)[1:])
    shares = jax.tree.map(split, arrays)
    value, grads = jax.pmap(on_device, axis_name="batch")(shares, split(half))
    cut = [z[half] for z in arrays]
    expected, slope = jax.value_and_grad(loss)(cut[0], cut[1:], None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Every device differentiates the global loss, so the mean is the gradient.
    np.testing.assert_allclose(grads[0] / 2, slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(grads[1], 0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((N, 1)), r"mask must have shape \[n\]=\[12\], got \[12, 1\]; pass"),
        (np.ones(N - 1), r"mask must have shape \[n\]=\[12\], got \[11\]; pass one"),
        ({"features": np.ones((N, 3))}, r"leaves out tokens, but that layer has shape"),
    ],
)
def test_messages_of_a_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        masked_loss(mask=mask)


def test_a_distance_takes_no_mapping():
    batch = make_batch(N, D)
    with pytest.raises(ValueError, match="got a mapping; .* argument of distill_loss"):
        paired_l2(batch.x, batch.y, mask={"features": np.ones((N, 3))})


@pytest.mark.parametrize("name", helpers.KINDS.values())
def test_a_mask_needs_the_same_samples_on_both_sides(name):
    row = DISTANCES[name]
    arrays = arguments(row, make_batch(N, D, m=N - 1))
    if not {"features", "logits", "maps"} & set(row.inputs):
        return
    with pytest.raises(ValueError, match="12 and 11"):
        jax.eval_shape(lambda *a: bound(row)(*a, mask=jnp.asarray(MASK)), *arrays)
