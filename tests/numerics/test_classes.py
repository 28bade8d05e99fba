"""Compares class masks, weights and means with loops over the classes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kddm_jax.numerics.classes import class_means, classes

pytestmark = pytest.mark.usefixtures("strict")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


LABELS = {
    "unbalanced": [0, 2, 2, 0, 2, 7],
    "padded": [1, -1, 1, 3, -1, -2],
    "one class": [4, 4, 4, 4, 4, 4],
    "all different": [5, 4, 3, 2, 1, 0],
    "all padding": [-1, -1, -1, -1, -1, -1],
}


@pytest.mark.parametrize("reduction", ["mean", "weighted", "sum"])
@pytest.mark.parametrize("name", LABELS)
def test_classes_against_a_loop(name, reduction):
    labels = LABELS[name]
    groups = classes(jnp.array(labels), reduction=reduction, dtype=jnp.float32)
    labelled, _, *numbers = groups
    chex.assert_type(numbers, jnp.float32)
    np.testing.assert_array_equal(labelled, np.array(labels) >= 0)
    present = sorted({c for c in labels if c >= 0})
    valid = sum(c >= 0 for c in labels)
    for i, label in enumerate(labels):
        size = labels.count(label) if label >= 0 else 1
        share = {
            "mean": 1 / max(len(present), 1),
            "weighted": size / max(valid, 1),
            "sum": 1,
        }[reduction]
        same = [float(label >= 0 and label == other) for other in labels]
        np.testing.assert_array_equal(groups.same[i], same)
        assert groups.counts[i] == size
        expected = share / size if label >= 0 else 0.0
        np.testing.assert_allclose(groups.weights[i], expected, rtol=1e-6)
    mass = {"mean": 1, "weighted": 1, "sum": len(present)}[reduction]
    np.testing.assert_allclose(groups.mass, mass if present else 0, rtol=1e-6)


@pytest.mark.parametrize("name", LABELS)
def test_class_means_against_a_loop(name):
    labels = np.array(LABELS[name])
    x = normal(6, 3)
    groups = classes(jnp.array(labels), reduction="mean", dtype=jnp.float32)
    means = class_means(jnp.float32(x), groups)
    for i, label in enumerate(labels):
        expected = x[labels == label].mean(0) if label >= 0 else np.zeros(3)
        np.testing.assert_allclose(means[i], expected, atol=1e-6)


def test_classes_jit_and_vmap_without_a_second_trace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def means(labels, x):
        groups = classes(labels, reduction="mean", dtype=x.dtype)
        return class_means(x, groups)

    x = jnp.float32(normal(6, 3))
    batch = jnp.array(list(LABELS.values()))
    one_by_one = jnp.stack([means(labels, x) for labels in batch])
    together = jax.vmap(means, in_axes=(0, None))(batch, x)
    chex.assert_trees_all_close(together, one_by_one, atol=1e-6)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'mean', 'weighted', 'sum'; got 'max'"):
        classes(jnp.zeros(4, int), reduction="max", dtype=jnp.float32)
