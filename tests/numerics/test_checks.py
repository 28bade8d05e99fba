"""Tests the checks of distances' arguments: their messages, and what they accept."""

import chex
import jax
import jax.numpy as jnp
import pytest

from kddm_jax.numerics import checks

X = jnp.ones((4, 3))
MESSAGES = {
    "not a string": (lambda: checks.check_choice("kernel", 3, ("rbf",)), "kernel.*3"),
    "ints": (lambda: checks.as_float("x", jnp.ones(3, int)), "x must be floating, got"),
    "rank": (lambda: checks.check_pair(X[0], X), r"x must have shape .*\[3\].*pool"),
    "empty": (lambda: checks.check_pair(X, X[:0]), r"y must have at.*\[0, 3\]"),
    "no labels": (lambda: checks.check_labels(X[:0, 0], 0), "labels must have at"),
    "rows of labels": (
        lambda: checks.check_labels(jnp.arange(3), 4, rows_of="student_logits"),
        r"\[n\]=\[4\], got \[3\], because student_logits have 4 rows",
    ),
    "projectors": (lambda: checks.check_pair(X, X[:, :2]), "3 and 2.*projectors"),
    "rows": (lambda: checks.check_pair(X, X[:2], same_rows=True), "4 and 2 rows"),
    "one-hot": (lambda: checks.check_labels(X, 4), r"\[n\]=\[4\].*\[4, 3\].*argmax"),
    "float labels": (lambda: checks.check_labels(X[:, 0], 4), "integers.*float32"),
    "too large": (
        lambda: checks.check_labels(jnp.array([0, 9]), 2, num_classes=9),
        "below num_classes=9, got 9",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    call, message = MESSAGES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_as_float_casts_up(dtype):
    assert checks.as_float("x", jnp.ones(2, dtype)).dtype == jnp.float32


def test_check_pair_takes_the_wider_dtype(x64):
    with jax.numpy_dtype_promotion("standard"):  # the only intended promotion
        x, y = checks.check_pair(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((4, 3)))
    assert x.dtype == y.dtype == jnp.float64


def test_check_labels_leaves_traced_values_alone():
    check = lambda labels: checks.check_labels(labels, 2, num_classes=3)
    chex.assert_trees_all_equal(jax.jit(check)(jnp.array([7, -1])), jnp.array([7, -1]))
