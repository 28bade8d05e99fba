"""Tests labels as probabilities, and users' tasks, in the loss and in the step."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train_step as steps

from kddm_jax import Distance, distill_loss
from kddm_jax.adapters import linen_apply
from kddm_jax.losses import cross_entropy

K = helpers.NUM_CLASSES
RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, -1, 2, 3, 0], np.int32)
SOFT = RNG.dirichlet(np.ones(K), len(LABELS)).astype(np.float32)
SOFT[2] = 0
LOGITS = jnp.asarray(RNG.normal(size=SOFT.shape), jnp.float32)
ONE_HOT = np.asarray(jax.nn.one_hot(LABELS, K))


def test_cross_entropy_of_probabilities():
    logs = np.asarray(LOGITS, float) - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    expected = -(SOFT * logs).sum() / 5
    np.testing.assert_allclose(cross_entropy(LOGITS, SOFT), expected, rtol=1e-6)
    hard = jax.value_and_grad(cross_entropy)(LOGITS, LABELS)
    soft = jax.value_and_grad(cross_entropy)(LOGITS, ONE_HOT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), soft, hard)
    half = cross_entropy(LOGITS, jnp.asarray(SOFT, jnp.bfloat16))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf])
def test_samples_and_classes_without_probability_have_no_part(hostile):
    """A row of zeros has no part with any logits, nor has a class without mass."""
    function = jax.jit(jax.value_and_grad(cross_entropy))
    value, gradient = function(LOGITS.at[2].set(hostile), SOFT)
    expected, slope = function(LOGITS.at[2].set(0), SOFT)
    assert value == expected
    np.testing.assert_array_equal(gradient, slope)
    targets = np.asarray(SOFT).copy()
    targets[:, 1] = 0
    value, gradient = function(LOGITS.at[:, 1].set(-np.inf), targets)
    expected, slope = function(jnp.delete(LOGITS, 1, 1), np.delete(targets, 1, 1))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(np.delete(gradient, 1, 1), slope, atol=1e-6)
    assert np.isnan(function(LOGITS, np.asarray(SOFT) * [[1.0], *[[np.nan]] * 5])[0])


def test_nothing_labelled_is_zero():
    value, gradient = jax.value_and_grad(cross_entropy)(LOGITS, np.zeros_like(SOFT))
    assert value == 0
    assert not np.any(gradient)


def test_distances_take_the_most_likely_class():
    """Labels are traced under jit, so their values are unknown."""
    likely = np.where(SOFT.any(1), SOFT.argmax(1), -1)
    numbers = lambda x, y, labels: jnp.sum(labels * 10.0 ** jnp.arange(len(labels)))
    distance = Distance(numbers, inputs=("features", "labels"))
    loss = jax.jit(
        lambda soft: distill_loss(
            LOGITS, LOGITS, soft, LOGITS, distance=distance, weight=1
        )
    )
    assert loss(SOFT)[1]["<lambda>"] == numbers(0, 0, likely)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (SOFT[:, :3], r"soft labels must have shape \[n, k\]=\[6, 4\].* got \[6, 3\]"),
        (SOFT[:5], r"soft labels must have shape .* got \[5, 4\]"),
        (SOFT - 0.5, "soft labels must be >= 0, got -.*row of zeros"),
    ],
)
def test_soft_labels_are_checked(labels, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(LOGITS, LOGITS, labels, LOGITS, distance="l2", weight=1)


# --------------------------------------------------- labels that the teacher predicts


TEACHER = jnp.asarray(np.random.default_rng(1).normal(size=SOFT.shape), jnp.float32)
PREDICTED = int(np.argmax(TEACHER[2]))


def labels_of(labels, teacher=TEACHER, predicted_labels=True, **options):
    """Returns the loss's task, and the labels that a distance of labels gets."""
    x = jnp.zeros((len(LABELS), 2))
    got = []

    def read(x, y, labels, mask=None):
        got.append(labels)
        return jnp.sum((x - y) ** 2)

    _, terms = distill_loss(
        *(x, x, labels, LOGITS, teacher),
        distance=Distance(read, inputs=("features", "labels")),
        weight=1.0,
        predicted_labels=predicted_labels,
        **options,
    )
    return terms["task"], np.asarray(got[0])


@pytest.mark.parametrize("labels", [LABELS, SOFT, ONE_HOT])
def test_the_teacher_predicts_missing_labels(labels):
    """Distances of labels get its class; the cross-entropy ignores the sample."""
    task, given = labels_of(labels)
    plain, without = labels_of(labels, predicted_labels=False)
    assert without[2] == -1
    assert given[2] == PREDICTED
    np.testing.assert_array_equal(np.delete(given, 2), np.delete(without, 2))
    np.testing.assert_array_equal(task, plain)
    np.testing.assert_array_equal(task, cross_entropy(LOGITS, labels))


def test_masked_samples_get_no_label():
    keep = np.array([1, 0, 1, 1, 1, 1])
    _, given = labels_of(LABELS, mask=keep)
    np.testing.assert_array_equal(given, [0, -1, PREDICTED, 2, 3, 0])
    keep[2] = 0
    _, given = labels_of(LABELS, mask=keep)
    np.testing.assert_array_equal(given, [0, -1, -1, 2, 3, 0])


def test_predicted_labels_are_not_made_for_distances_without_labels():
    x, labels = jnp.ones((3, 2)), jnp.array([0, -1, 1])
    given = (x, x + 1, labels, jnp.zeros((3, 4)))  # no logits of the teacher
    _, terms = distill_loss(*given, distance="l2", weight=1.0, predicted_labels=True)
    np.testing.assert_allclose(terms["l2"], 2, rtol=1e-6)


def test_predicted_labels_need_the_teacher_s_logits():
    with pytest.raises(ValueError, match="teacher_logits is None; pass teacher_logits"):
        labels_of(LABELS, teacher=None)
    with pytest.raises(ValueError, match=r"n, k\]=\[6, .*as the student's.*\[6, 2\]"):
        labels_of(LABELS, teacher=TEACHER[:, :2])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_predicted_labels_in_the_step(devices, per_sample):
    """The distance gets them on every device; task and accuracy do not change."""
    labels = np.where(np.arange(steps.N) % 3, -1, steps.LABELS).astype(np.int32)
    images = jax.vmap(steps.NORMALIZE)(steps.IMAGES)
    guide, _ = steps.TEACHER_APPLY(steps.TEACHER, images, train=False)
    filled = np.where(labels < 0, np.argmax(guide.logits, 1), labels)
    assert len(np.unique(filled[labels < 0])) > 1
    distance = Distance(
        lambda x, y, labels: jnp.mean((labels + 1.0) ** 2),
        inputs=("features", "labels"),
        per_sample=per_sample,
    )
    options = {"distance": distance, "augment": lambda key, x: steps.NORMALIZE(x)}
    (_, found), (_, plain) = (
        take_steps(steps.make_step(**options, **more), devices, labels, count=1)
        for more in ({"predicted_labels": True}, {})
    )
    value = lambda metrics: next(v for k, v in metrics.items() if k not in NAMES)
    np.testing.assert_allclose(value(found), np.mean((filled + 1.0) ** 2), rtol=1e-6)
    assert value(plain) != value(found)
    for name in ("task", "accuracy"):
        np.testing.assert_array_equal(found[name], plain[name])


NAMES = ("loss", "task", "accuracy", "finite", "teacher_finite")


def take_steps(step, devices, labels, count=2):
    """Returns parameters and metrics after some steps."""
    run, (state, teacher) = steps.on_devices(step, devices), steps.start(devices)
    for _ in range(count):
        state, metrics = run(state, teacher, labels=labels)
    return jax.device_get((state.params, metrics))


SMOOTH = lambda labels, amount=0.1: (
    optax.smooth_labels(jax.nn.one_hot(labels, K), amount) * (labels >= 0)[:, None]
)


@pytest.mark.slow
def test_soft_labels_in_the_step():
    """One-hot labels equal classes; smoothed labels do not depend on the devices."""
    classes = np.where(np.arange(steps.N) % 5 == 0, -1, steps.LABELS)
    step = steps.make_step(distance="l2")
    hard = take_steps(step, 2, classes.astype(np.int32))
    soft = take_steps(step, 2, np.asarray(jax.nn.one_hot(classes, K)))
    steps.assert_close(soft, hard)
    smooth = np.asarray(SMOOTH(classes))
    one, two = (take_steps(step, devices, smooth) for devices in (1, 2))
    steps.assert_close(two, one)
    assert two[1]["task"] > soft[1]["task"]


@pytest.mark.slow
def test_task_of_ones_own_in_the_step():
    """With label smoothing as a task, the loss equals that of smoothed labels."""
    task = lambda logits, labels: cross_entropy(logits, SMOOTH(labels))
    found = take_steps(steps.make_step(task=task), 2, steps.LABELS)
    expected = take_steps(steps.make_step(), 2, np.asarray(SMOOTH(steps.LABELS)))
    steps.assert_close(found, expected)
    poly = lambda logits, labels: optax.losses.poly_loss_cross_entropy(
        logits, jax.nn.one_hot(labels, K)
    ).mean()
    one, two = (
        take_steps(steps.make_step(task=poly), devices, steps.LABELS)
        for devices in (1, 2)
    )
    steps.assert_close(two, one)


def test_mixup_is_two_lines():
    """Images and labels of the whole batch are mixed before they are sharded."""
    partner = np.random.default_rng(0).permutation(steps.N)
    mix = lambda a: 0.7 * a + 0.3 * a[partner]
    labels = mix(np.asarray(jax.nn.one_hot(steps.LABELS, K)))
    images = mix(steps.IMAGES.astype(np.float32)).astype(np.uint8)
    apply = linen_apply(steps.Net(axis_name=steps.AXIS))
    results = []
    for devices in (1, 2):
        run = steps.on_devices(steps.make_step(apply), devices)
        state, metrics = run(*steps.start(devices), images, labels)
        results.append(jax.device_get((state.params, metrics)))
    steps.assert_close(*results)
