"""Checks the gradients of distances: ours in the tests, and your own.

``chex.assert_numerical_grads`` multiplies ``atol`` by the size of its first argument,
so with its defaults a gradient that is zero or has the wrong sign passes.
`assert_distance_gradients` divides by this size, works in float64, checks forward and
reverse mode, and compares with central differences of the value.
"""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.losses import get_distance


def assert_distance_gradients(
    distance: str | Callable[..., jax.Array],
    *arrays: jax.Array,
    argnums: Sequence[int] = (0,),
    rtol: float = 1e-2,
    atol: float = 1e-4,
    **options: object,
) -> None:
    """Asserts that a distance's derivatives agree with finite differences.

    Everything is computed in float64. The gradient is compared with central differences
    entry by entry, and chex checks forward and reverse mode along random directions.
    A distance holds some numbers constant that it computes from its inputs (epsilon,
    bandwidth, beta, ridge). They change in a numerical derivative, so pass them
    explicitly.  Avoid inputs at which an exact assignment is not unique.

    Args:
      distance: a key of `DISTANCES`, a `Distance`, or a callable.
      *arrays: arguments of the distance; keep them small, because each entry costs two
        evaluations.
      argnums: indices of the arrays to differentiate with respect to.
      rtol: relative tolerance of an entry.
      atol: absolute tolerance, as a fraction of the largest numerical derivative.
      **options: options of the distance.

    Raises:
      AssertionError: if a derivative is wrong.

    Examples:
      >>> x = np.random.default_rng(0).normal(size=(5, 3))
      >>> assert_distance_gradients("w2", x, x[::-1] + 1.0, solver="exact")
    """
    row = get_distance(distance)
    options = {**dict(row.options), **options}
    with jax.enable_x64(True):
        doubled = [_as_double(a) for a in arrays]

        @jax.jit  # compiled once, not at each evaluation
        def value(*moving):
            filled = list(doubled)
            for index, array in zip(argnums, moving, strict=True):
                filled[index] = array
            return row.fn(*filled, **options)

        moving = tuple(doubled[i] for i in argnums)
        gradients = jax.grad(value, argnums=tuple(range(len(moving))))(*moving)
        numerical = _central_differences(value, moving)
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

    Args:
      distance: a key of `DISTANCES`, a `Distance`, or a callable.
      *arrays: arguments of the distance.
      argnums: indices of the arrays to differentiate with respect to.
      **options: options of the distance.

    Raises:
      AssertionError: if the value or the gradient contains NaN or infinity.

    Examples:
      >>> assert_finite_gradients("w2_gaussian", jnp.ones((4, 9)), jnp.ones((4, 9)))
    """
    row = get_distance(distance)
    options = {**dict(row.options), **options}
    value, gradients = jax.value_and_grad(
        lambda *a: row.fn(*a, **options), argnums=tuple(argnums)
    )(*arrays)
    chex.assert_tree_all_finite((value, gradients))
