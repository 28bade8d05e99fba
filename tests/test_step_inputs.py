"""Tests inputs from loaders and networks: the step accepts or refuses them."""

from collections import OrderedDict
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kddm_jax import distill_loss, train_step

# --------------------------------------------------------------------- a network
VARIABLES = {"params": {"w": jnp.linspace(-1.0, 1.0, 12 * 3).reshape(12, 3)}}
IMAGES = np.arange(4 * 12).reshape(4, 2, 2, 3).astype(np.uint8)
LABELS = np.array([0, 1, 2, -1])
TX = optax.sgd(0.1)


class Pair(NamedTuple):
    logits: jax.Array
    features: jax.Array


def network(make):
    """Makes an apply function whose outputs are made from its logits."""

    def apply(variables, images, *, train):
        del train
        x = images["image"] if isinstance(images, dict) else images
        return make(x.reshape(x.shape[0], -1) @ variables["params"]["w"]), {}

    return apply


WHOLE = network(lambda h: SimpleNamespace(logits=h, features=h, maps={}))


def normalize(image):
    return jax.tree.map(lambda a: a / 255, image)


def evaluate(images=IMAGES, labels=LABELS, network=WHOLE):
    step = train_step.make_eval_step(network, normalize=normalize, axis_name=None)
    return jax.device_get(jax.jit(step)(VARIABLES, images, labels))


def train(images=IMAGES, labels=LABELS, network=WHOLE, teacher=WHOLE, distance="l2"):
    step = train_step.make_train_step(
        *(network, teacher, TX),
        augment=lambda key, image: normalize(image),
        distance=distance,
        weight=1.0,
        axis_name=None,
    )
    state = train_step.create_state(VARIABLES, TX)
    return jax.device_get(jax.jit(step)(state, VARIABLES, images, labels))


def scan(images=IMAGES, labels=LABELS):
    step = train_step.make_train_step(
        *(WHOLE, WHOLE, TX),
        augment=lambda key, image: normalize(image),
        distance="l2",
        weight=1.0,
        axis_name=None,
    )
    state = train_step.create_state(VARIABLES, TX)
    indices = np.array([[0, 1, 2, 3]])
    scanned = jax.jit(train_step.scan_steps(step))
    return jax.device_get(scanned(state, VARIABLES, images, labels, indices))


STEPS = {step.__name__: step for step in (evaluate, train, scan)}


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_refused(call, *parts):
    """Asserts that a call fails with a one-line error that has each of ``parts``."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --------------------------------------------------------------------- labels


@pytest.mark.parametrize("kind", [list, tuple, jnp.asarray])
@pytest.mark.parametrize("name", STEPS)
def test_labels_of_any_kind(name, kind):
    assert_same(STEPS[name](labels=kind(LABELS.tolist())), STEPS[name]())


@pytest.mark.parametrize("distance", ["l2", "cw2", "kd"])
def test_labels_of_the_loss(distance):
    x, s = jnp.ones((4, 2)), jnp.eye(4, 3)
    loss = lambda labels: distill_loss(x, x, labels, s, s, distance=distance, weight=1)
    assert_same(loss(LABELS.tolist()), loss(LABELS))


WRONG_LABELS = {
    "[n, 1]": (LABELS[:, None], "[4, 1]"),
    "[1, n]": (LABELS[None], "[1, 4]"),
    "one-hot": (np.eye(3)[[0, 1, 2, 0]].astype(np.int32), "[4, 3]"),
    "short": (LABELS[:3], "[3]"),
    "list of lists": ([[0], [1], [2], [0]], "[4, 1]"),
    "scalar": (1, "[]"),
    "float": (LABELS.astype(np.float32), "float32"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_labels_of_another_shape(name, case):
    labels, found = WRONG_LABELS[case]
    assert_refused(lambda: STEPS[name](labels=labels), "labels", f"got {found}")


# --------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("name", STEPS)
def test_images_as_a_mapping(name, kind):
    images = kind(image=IMAGES, other=np.ones((4, 5), np.uint8))
    assert_same(STEPS[name](images=images), STEPS[name]())


WRONG_IMAGES = {
    "list": (list(IMAGES), "got list", "np.stack"),
    "tuple": ((IMAGES, IMAGES), "got tuple", "mapping"),
    "empty mapping": ({}, "no array"),
    "scalar": (np.uint8(1), "axis of samples"),
    "lengths": ({"image": IMAGES, "other": np.ones(3)}, "[3, 4]"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_images_of_another_kind(name, case):
    images, *parts = WRONG_IMAGES[case]
    assert_refused(lambda: STEPS[name](images=images), "images", *parts)


# --------------------------------------------------------------------- outputs

LIGHT = {
    "without maps": lambda h: SimpleNamespace(logits=h, features=h),
    "maps=None": lambda h: SimpleNamespace(logits=h, features=h, maps=None),
    "proxy": lambda h: SimpleNamespace(
        logits=h, features=h, maps=MappingProxyType({"a": h})
    ),
}


@pytest.mark.parametrize("who", ["network", "teacher"])
@pytest.mark.parametrize("case", LIGHT)
def test_outputs_without_maps(case, who):
    assert_same(train(**{who: network(LIGHT[case])}), train())
    assert_same(evaluate(network=network(LIGHT[case])), evaluate())


def test_outputs_of_logits_alone():
    alone = network(lambda h: SimpleNamespace(logits=h))
    assert_same(
        train(network=alone, teacher=alone, distance="kd"), train(distance="kd")
    )
    assert_same(evaluate(network=alone), evaluate())
    assert_refused(lambda: train(network=alone), "features")


WRONG_OUTPUTS = {
    "array": (network(lambda h: h), "logits"),
    "mapping": (network(lambda h: {"logits": h, "features": h}), "logits", "got dict"),
    "list of maps": (
        network(lambda h: SimpleNamespace(logits=h, features=h, maps=[h])),
        *("maps", "got list", "name of a layer"),
    ),
    "outputs alone": (lambda v, i, *, train: WHOLE(v, i, train=train)[0], "a pair"),
    "pair of arrays": (
        lambda v, i, *, train: Pair(*[WHOLE(v, i, train=train)[0].logits] * 2),
        "a pair",
    ),
    "three": (lambda v, i, *, train: (*WHOLE(v, i, train=train), None), "a pair"),
}


@pytest.mark.parametrize("case", WRONG_OUTPUTS)
def test_outputs_of_another_kind(case):
    wrong, *parts = WRONG_OUTPUTS[case]
    assert_refused(lambda: train(network=wrong), *parts)
    assert_refused(lambda: train(teacher=wrong), *parts)
    if case != "list of maps":  # evaluation uses only logits
        assert_refused(lambda: evaluate(network=wrong), *parts)


# --------------------------------------------------------------------- shard


@pytest.mark.parametrize("wrong", [[0, 1, 2, 3], (0, 1), 3, np.float32(1)])
def test_shard_of_what_is_no_array(wrong):
    assert_refused(lambda: train_step.shard((IMAGES, wrong), 2), "np.asarray", "got ")


def test_an_empty_batch():
    with pytest.raises(ValueError, match="images must have at least one sample"):
        train(IMAGES[:0], LABELS[:0])
    x, labels = jnp.ones((0, 3)), jnp.zeros(0, int)
    for targets in (labels, x):
        with pytest.raises(ValueError, match="labels must have at least one sample"):
            distill_loss(x, x, targets, x, distance="l2", weight=1.0)
