"""Tests which modules of the student learn from labels, with any type of tree."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from kddm_jax.numerics.gradients import gradients

LEAVES = {"body": {"scale": jnp.float32(3)}, "head": {"bias": jnp.float32(5)}}


@flax.struct.dataclass
class Params:
    """A tree whose modules are attributes, as in Equinox."""

    body: dict
    head: dict


TREES = {"dict": dict, "FrozenDict": freeze, "dataclass": lambda tree: Params(**tree)}


def forward(params):
    get = params.get if hasattr(params, "get") else lambda name: getattr(params, name)
    features = 2 * get("body")["scale"]
    return (features * get("head")["bias"], features), {}


def by_head(kind, head):
    objective = lambda outputs: (outputs[0] ** 2 + outputs[1] ** 3, {})
    return gradients(forward, objective, TREES[kind](LEAVES), head)[-1]


@pytest.mark.parametrize("kind", TREES)
def test_gradients_have_the_structure_of_the_parameters(kind):
    """The head learns from the logits (60), the body from the features (2 scale)."""
    found = by_head(kind, ("head",))
    assert jax.tree.structure(found) == jax.tree.structure(TREES[kind](LEAVES))
    np.testing.assert_allclose(jax.tree.leaves(found), [3 * 6**2 * 2, 2 * 30 * 6])
    expected = by_head(kind, None)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    both = by_head(kind, ("head", "body"))
    np.testing.assert_allclose(jax.tree.leaves(both), jax.tree.leaves(expected))


@pytest.mark.parametrize("kind", TREES)
def test_unknown_modules_are_refused(kind):
    with pytest.raises(ValueError, match="head names fc; the student.* body, head"):
        by_head(kind, ("head", "fc"))
