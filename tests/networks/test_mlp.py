"""Compares multi-layer perceptrons with their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kddm_jax.adapters import linen_apply
from kddm_jax.networks.mlp import MLP, StudentMLP, TeacherMLP

IMAGES = np.random.default_rng(0).normal(size=(3, 4, 5, 1)).astype(np.float32)


def make(model):
    return jax.jit(model.init)(jax.random.key(0), IMAGES)


def test_equals_numpy():
    model = MLP(num_classes=3, hidden=(7, 6))
    variables = make(model)
    outputs = jax.jit(model.apply)(variables, IMAGES)
    layers = jax.tree.map(np.asarray, variables["params"])
    x = IMAGES.reshape(3, 20)
    for name in ("hidden1", "hidden2"):
        x = np.maximum(x @ layers[name]["kernel"] + layers[name]["bias"], 0)
        np.testing.assert_allclose(outputs.maps[name], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs.features, outputs.maps["hidden2"])
    logits = x @ layers["fc"]["kernel"] + layers["fc"]["bias"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "count", "hidden"),
    [(TeacherMLP(), 600_458, 5), (StudentMLP(), 567_434, 3)],
)
def test_the_released_networks(model, count, hidden):
    images = jnp.zeros((2, 28, 28, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
    outputs = jax.eval_shape(model.apply, variables, images)
    assert outputs.features.shape == (2, 128)
    assert outputs.logits.shape == (2, 10)
    assert len(outputs.maps) == hidden


def test_bfloat16_keeps_features_and_logits_in_single():
    model = MLP(hidden=(4,), dtype=jnp.bfloat16)
    outputs = jax.eval_shape(model.apply, make(model), IMAGES)
    assert outputs.maps["hidden1"].dtype == jnp.bfloat16
    assert outputs.features.dtype == outputs.logits.dtype == jnp.float32


def test_trains_without_statistics():
    model = MLP(hidden=(4,))
    outputs, statistics = linen_apply(model)(make(model), IMAGES, train=True)
    assert outputs.logits.shape == (3, 10)
    assert statistics == {}


def test_wrong_images_and_no_hidden_layer_are_refused():
    flat = IMAGES.reshape(3, 20)
    with pytest.raises(ValueError, match=r"images .*\[3, 20\]"):
        jax.eval_shape(MLP().init, jax.random.key(0), flat)
    with pytest.raises(ValueError, match="hidden"):
        jax.eval_shape(MLP(hidden=()).init, jax.random.key(0), IMAGES)
