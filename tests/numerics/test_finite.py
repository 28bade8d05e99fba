"""Tests the check for numbers that are not finite, and its share of a program."""

import jax
import jax.numpy as jnp
import pytest

from kddm_jax.numerics.gradients import all_finite


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_one_number_that_is_not_finite_is_found(value):
    tree = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    assert all_finite(tree)
    assert not all_finite({**tree, "b": tree["b"].at[1, 0].set(value)})


def test_the_check_is_compiled_once_for_all_updates():
    """Without this, a step of n leaves has n * n operations, which compile slowly."""

    def update(tree):
        finite = all_finite(tree)
        return [jnp.where(finite, 2 * leaf, leaf) for leaf in tree]

    tree = [jnp.ones(3 + i) for i in range(20)]
    program = jax.jit(update).lower(tree).compile().as_text()
    conjunctions = program.count(" and(")
    # One for each leaf in its own reduction, one in their product, few for tails.
    assert 0 < conjunctions <= 4 * len(tree)
