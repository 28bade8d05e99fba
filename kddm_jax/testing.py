"""Checks gradients of distances and losses, in this package's tests and in yours.

``chex.assert_numerical_grads`` multiplies ``atol`` by the size of its first argument,
so that at its defaults a gradient that is zero or has the wrong sign passes.
`assert_loss_gradients` and `assert_distance_gradients` divide by that size.  They work
in float64, check forward and reverse mode, and compare with central differences of the
value.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.distances import get_distance


def assert_distance_gradients(
    distance: str | Callable[..., jax.Array],
    *arrays: jax.Array,
    argnums: Sequence[int] = (0,),
    rtol: float = 1e-2,
    atol: float = 1e-4,
    **options: object,
) -> None:
    """Asserts that a distance's derivatives agree with finite differences.

    Everything is computed in float64.  The gradient is compared with central
    differences entry by entry, and chex checks forward and reverse mode along random
    directions.  A distance computes some numbers from its inputs and treats them as
    constants (epsilon, bandwidth, beta, ridge).  They change in a numerical derivative,
    so pass them explicitly.  Avoid inputs at which an exact assignment is not unique.

    Args:
      distance: a key of `DISTANCES`, a `Distance`, or a callable.
      *arrays: arguments of the distance; keep them small, because each entry costs two
        evaluations.
      argnums: indices of the arrays to differentiate with respect to.
      rtol: relative tolerance of an entry.
      atol: absolute tolerance, as a fraction of the largest numerical derivative.
      **options: options of the distance.

    Raises:
      AssertionError: a derivative is wrong.

    Examples:
      >>> x = np.random.default_rng(0).normal(size=(5, 3))
      >>> assert_distance_gradients("w2", x, x[::-1] + 1.0, solver="exact")
    """
    row = get_distance(distance)
    fn = partial(row.fn, **{**dict(row.options), **options})
    assert_loss_gradients(fn, *arrays, argnums=argnums, rtol=rtol, atol=atol)


def assert_loss_gradients(
    loss: Callable[..., Any],
    *trees: Any,
    argnums: Sequence[int] = (0,),
    rtol: float = 1e-2,
    atol: float = 1e-4,
) -> None:
    """Asserts that a loss's derivatives agree with finite differences.

    Everything is computed in float64, as in `assert_distance_gradients`.  Pass numbers
    that a distance computes from the student and treats as constants (epsilon,
    bandwidth, beta, ridge) as options of the distance, because they change in a
    numerical derivative.  Avoid inputs at ties of an exact assignment or at kinks of a
    ReLU.

    Args:
      loss: function that returns a scalar, or ``(scalar, anything)`` as `distill_loss`
        does.
      *trees: arguments of the loss, PyTrees of arrays.
      argnums: indices of the trees to differentiate with respect to, such as
        parameters, features or logits; keep them small, because each floating entry
        costs two evaluations.
      rtol: relative tolerance of an entry.
      atol: absolute tolerance, as a fraction of the largest numerical derivative.

    Raises:
      AssertionError: a derivative is wrong, or anything is not finite.
      ValueError: ``argnums`` has an index of no tree.

    Examples:
      >>> from kddm_jax import distill_loss
      >>> x = np.random.default_rng(0).normal(size=(5, 3))
      >>> labels, loss = np.array([0, 1, 2, 0, 1]), partial(distill_loss, distance="l2")
      >>> fn = lambda params: loss(x @ params["w"], x, labels, x, weight=0.1)
      >>> assert_loss_gradients(fn, {"w": np.eye(3) + 0.1})
    """
    if wrong := [index for index in argnums if not -len(trees) <= index < len(trees)]:
        raise ValueError(
            f"argnums has {wrong[0]}, but there are {len(trees)} arguments; number "
            "them from 0"
        )
    differentiated = [index % len(trees) for index in argnums]
    with jax.enable_x64(True):
        doubled = [jax.tree.map(_as_double, tree) for tree in trees]
        leaves, structure = jax.tree.flatten(doubled)
        owners = [i for i, tree in enumerate(doubled) for _ in jax.tree.leaves(tree)]
        at = [
            position
            for position, (owner, leaf) in enumerate(zip(owners, leaves, strict=True))
            if owner in differentiated and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]

        @jax.jit  # compiled once rather than at each evaluation
        def value(*moving):
            filled = list(leaves)
            for position, array in zip(at, moving, strict=True):
                filled[position] = array
            result = loss(*jax.tree.unflatten(structure, filled))
            return result[0] if isinstance(result, tuple) else result

        moving = tuple(leaves[position] for position in at)
        gradients = jax.grad(value, argnums=tuple(range(len(moving))))(*moving)
        numerical = _central_differences(value, moving)
        # NaN is equal to NaN in what follows.
        chex.assert_tree_all_finite((value(*moving), gradients, numerical))
        largest = max(float(jnp.max(jnp.abs(g))) for g in numerical)
        scale = max(largest, float(jnp.finfo(jnp.float64).tiny))
        for gradient, expected in zip(gradients, numerical, strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=atol * scale)
        chex.assert_numerical_grads(
            value, moving, order=1, atol=atol * scale / moving[0].size, rtol=rtol
        )


def _central_differences(value, arrays, step=1e-5):
    """Computes numerical gradients, one entry at a time."""
    gradients = []
    for index, array in enumerate(arrays):
        h = step * max(1.0, float(jnp.max(jnp.abs(array))))

        def difference(direction, index=index, array=array, h=h):
            at = lambda x: value(*arrays[:index], x, *arrays[index + 1 :])
            direction = h * direction.reshape(array.shape)
            return (at(array + direction) - at(array - direction)) / (2 * h)

        entries = jax.lax.map(difference, jnp.eye(array.size, dtype=array.dtype))
        gradients.append(entries.reshape(array.shape))
    return gradients


def _as_double(array):
    array = jnp.asarray(array)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(np.asarray(array), jnp.float64) if floating else array


def assert_finite_gradients(
    distance: str | Callable[..., jax.Array],
    *arrays: jax.Array,
    argnums: Sequence[int] = (0,),
    **options: object,
) -> None:
    """Asserts that a distance's value and gradient are finite numbers.

    A distance that is not an entry of the catalogue is also computed without jit, one
    operation at a time, which takes seconds if it has long loops: a compiled function
    may round the means of equal samples to different numbers, and so hide the
    infinite derivative of a root at zero.

    Args:
      distance: a key of `DISTANCES`, a `Distance`, or a callable.
      *arrays: arguments of the distance.
      argnums: indices of the arrays to differentiate with respect to.
      **options: options of the distance.

    Raises:
      AssertionError: the value or the gradient contains NaN or infinity.

    Examples:
      >>> assert_finite_gradients("w2_gaussian", jnp.ones((4, 9)), jnp.ones((4, 9)))
    """
    row = get_distance(distance)
    options = {**dict(row.options), **options}
    fn = jax.value_and_grad(lambda *a: row.fn(*a, **options), argnums=tuple(argnums))
    chex.assert_tree_all_finite(fn(*arrays))
    if not isinstance(distance, str):
        with jax.disable_jit():
            chex.assert_tree_all_finite(fn(*arrays))
