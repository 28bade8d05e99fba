"""Tests what projectors compute, how they train, and that they stay apart."""

from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from kddm_jax import Term
from kddm_jax.adapters import linen_apply
from kddm_jax.data.augment import make_augment
from kddm_jax.networks.projectors import (
    PROJECTORS,
    ThreeLayerProjector,
    add_projectors,
    init_projectors,
    projected_apply,
    without_projectors,
)
from kddm_jax.train_step import create_state, make_train_step

RNG = np.random.default_rng(0)
MAPS = RNG.normal(size=(5, 4, 3, 6)).astype(np.float32)


def run(projector, x, **options):
    variables = jax.jit(projector.init)(jax.random.key(0), x)
    return variables, jax.jit(lambda v: projector.apply(v, x, **options))(variables)


@pytest.mark.parametrize(("kind", "x"), [("dense", MAPS[:, 0, 0]), ("conv", MAPS)])
def test_linear_projectors_are_one_matrix(kind, x):
    variables, out = run(PROJECTORS[kind](features=7), x)
    (kernel,) = jax.tree.leaves(variables["params"])
    matrix = np.asarray(kernel).reshape(6, 7)
    np.testing.assert_allclose(out, x @ matrix, rtol=1e-5, atol=1e-6)


def test_three_layers_equal_numpy():
    variables, out = run(ThreeLayerProjector(features=2), MAPS)
    params = jax.tree.map(np.asarray, variables["params"])
    # In evaluation, initial statistics are used: mean 0 and variance 1.
    norm = lambda x: np.maximum(x / np.sqrt(1 + 1e-5), 0)
    x = norm(MAPS @ params["conv1"]["kernel"][0, 0])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(
        padded[:, i : i + 4, j : j + 3] @ params["conv2"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    expected = norm(x) @ params["conv3"]["kernel"][0, 0]
    assert expected.shape == (5, 4, 3, 2)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "conv3"])
def test_maps_are_averaged_down_to_the_grid_first(kind):
    """They are averaged along the sides that are larger: 4 x 3 on 2 x 5 gives 2 x 3."""
    make = PROJECTORS[kind]
    variables, out = run(make(features=2, grid=(2, 5)), MAPS)
    halved = (MAPS[:, ::2] + MAPS[:, 1::2]) / 2
    expected = jax.jit(make(features=2).apply)(variables, halved)
    assert out.shape == (5, 2, 3, 2)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)


class Outputs(NamedTuple):
    logits: jax.Array
    features: jax.Array
    maps: dict[str, jax.Array]


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="body")(images)
        x = nn.BatchNorm(not train, momentum=0.9, name="norm")(x)
        features = jnp.mean(nn.relu(x), axis=(1, 2))
        return Outputs(nn.Dense(3, name="head")(features), features, {"map": x})


IMAGES = RNG.integers(0, 256, (6, 4, 4, 1)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
STUDENT, TEACHER = Net(4), Net(5)
CHOSEN = {"features": PROJECTORS["dense"](5), "map": PROJECTORS["conv3"](5)}


def variables_of(model, seed):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4, 4, 1)))


@pytest.fixture(scope="module")
def student():
    variables = variables_of(STUDENT, 1)
    outputs = jax.eval_shape(STUDENT.apply, variables, jnp.zeros((2, 4, 4, 1)))
    layers = {"features": outputs.features, **outputs.maps}
    own = init_projectors(jax.random.key(2), CHOSEN, layers)
    assert set(own["params"]) == {"features", "map"}
    assert set(own["batch_stats"]) == {"map"}  # a linear map has no statistics
    return add_projectors(variables, own)


def test_only_the_named_layers_are_projected(student):
    apply = projected_apply(linen_apply(STUDENT), {"features": CHOSEN["features"]})
    x = jnp.asarray(IMAGES, jnp.float32) / 255
    outputs, stats = apply(student, x, train=False)
    plain, _ = linen_apply(STUDENT)(without_projectors(student), x, train=False)
    np.testing.assert_array_equal(outputs.logits, plain.logits)
    np.testing.assert_array_equal(outputs.maps["map"], plain.maps["map"])
    kernel = student["params"]["projectors"]["features"]["dense"]["kernel"]
    np.testing.assert_allclose(outputs.features, plain.features @ kernel, rtol=1e-5)
    chex.assert_trees_all_equal(stats, student["batch_stats"])


def test_taken_out_is_the_student_as_it_was(student):
    plain = without_projectors(student)
    assert set(plain["params"]) == {"body", "norm", "head"}
    assert set(plain["batch_stats"]) == {"norm"}
    chex.assert_trees_all_equal(plain, variables_of(STUDENT, 1))
    chex.assert_trees_all_equal(without_projectors(plain), plain)


def step_of(**options):
    terms = [
        Term("l2", weight=0.1),
        Term("l2", weight=0.1, layers=("map", "map"), name="maps"),
    ]
    return make_train_step(
        projected_apply(linen_apply(STUDENT), CHOSEN),
        linen_apply(TEACHER),
        optax.sgd(0.1),
        augment=make_augment(mean=(0.5,), std=(0.25,), padding=0, flip=False),
        distance=[Term("l2", weight=0.1)] if options.pop("one", False) else terms,
        axis_name=None,
        **options,
    )


def changed(new, old):
    """Returns the names of the modules whose parameters changed."""
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), new, old)
    return {name for name, tree in moved.items() if any(jax.tree.leaves(tree))}


def test_projectors_train_with_the_student(student):
    state = create_state(student, optax.sgd(0.1))
    step = jax.jit(step_of(one=True))
    losses = []
    for _ in range(5):
        new, metrics = step(state, variables_of(TEACHER, 3), IMAGES, LABELS)
        losses.append(float(metrics["l2"]))
        before, state = state, new
    assert losses[-1] < 0.9 * losses[0]
    assert changed(state.params, before.params) == {
        *("body", "norm", "head", "projectors")
    }
    statistics = state.batch_stats["projectors"]["map"]["bn1"]
    assert np.any(np.asarray(statistics["var"]) != 1)


def test_a_student_without_maps_has_its_features_projected():
    bare = lambda variables, images, *, train: (
        SimpleNamespace(logits=images, features=images),
        {},
    )
    projectors = {"features": PROJECTORS["dense"](5)}
    own = init_projectors(jax.random.key(0), projectors, {"features": jnp.ones((2, 3))})
    variables = add_projectors({"params": {}}, own)
    apply = projected_apply(bare, projectors)
    outputs, _ = apply(variables, jnp.ones((2, 3)), train=False)
    assert (outputs.features.shape, outputs.maps) == ((2, 5), {})


def test_projector_of_no_layer_is_refused(student):
    apply = projected_apply(linen_apply(STUDENT), {"other": CHOSEN["map"]})
    with pytest.raises(ValueError, match="'other', the network has features, map"):
        jax.eval_shape(
            lambda v, x: apply(v, x, train=False), student, jnp.zeros((1, 4, 4, 1))
        )


# -------------------------------------------------------------------------- head


def update(student, **options):
    """Returns each module's update by one step of gradient descent, and the metrics."""
    step = jax.jit(step_of(one=True, **options))
    state = create_state(student, optax.sgd(0.1))
    new, metrics = step(state, variables_of(TEACHER, 3), IMAGES, LABELS)
    return jax.tree.map(lambda a, b: a - b, new.params, state.params), metrics


@pytest.mark.slow
def test_backbone_learns_from_features_alone(student):
    """Its update is that of task_weight 0; the head's is that of the ordinary loss."""
    alone, metrics = update(student, head=("head",))
    features, _ = update(student, task_weight=0.0)
    both, expected = update(student)
    chex.assert_trees_all_close(alone["body"], features["body"], rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_close(alone["head"], both["head"], rtol=1e-5, atol=1e-8)
    assert not np.allclose(alone["body"]["kernel"], both["body"]["kernel"], rtol=1e-3)
    assert np.all(np.asarray(features["head"]["kernel"]) == 0)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-6)


@pytest.mark.slow
def test_backbone_has_no_gradient_of_the_task_at_all(student):
    step, _ = update(student, head=("head",), task_weight=1e6)
    features, _ = update(student, head=("head",), task_weight=0.0)
    chex.assert_trees_all_equal(step["body"], features["body"])
    assert np.max(np.abs(step["head"]["kernel"])) > 1e3


def test_unknown_head_is_refused(student):
    with pytest.raises(ValueError, match="head names fc; .* body, "):
        update(student, head=("fc",))
