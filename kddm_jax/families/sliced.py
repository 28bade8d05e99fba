"""Computes the sliced Wasserstein distance, by transport along random directions.

In one dimension the best plan pairs samples in sorted order, so each direction costs a
sort, and the plan is exact for any numbers of samples n and m.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_count, check_pair
from kddm_jax.numerics.linalg import matmul


def _quantiles(n, m):
    """Computes the intervals on which both quantile functions are constant.

    One function steps at multiples of 1/n, the other at multiples of 1/m.  Between two
    steps, sample i of one is matched with sample j of the other.  Steps are integers,
    in units of 1/(n m).  Returns the indices i and j and the lengths.
    """
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    start, length = steps[:-1], np.diff(steps)
    return start // m, start // n, length / (n * m)


def _sliced(x, y, directions):
    """Averages the squared distance over unit ``directions``, ``[d, p]``."""
    n, m = x.shape[0], y.shape[0]
    i, j, length = _quantiles(n, m)
    u, v = (jnp.sort(matmul(z, directions), axis=0) for z in (x, y))  # [n, p], [m, p]
    length = jnp.asarray(length, x.dtype)
    return jnp.mean(jnp.sum(length[:, None] * (u[i] - v[j]) ** 2, axis=0))


def _masked_sliced(x, y, directions, mask):
    """Does the same with a mask of both sides; rows without a sample are sorted last.

    x and y have the same number of samples, so that samples are paired in sorted order.
    """
    project = lambda z: jnp.where(mask[:, None], matmul(z, directions), jnp.inf)
    u, v = (jnp.sort(project(z), axis=0) for z in masks.zeroed(mask, x, y))
    samples = jnp.arange(x.shape[0]) < jnp.sum(mask)
    u, v = masks.zeroed(samples, u, v)
    return jnp.mean(masks.mean((u - v) ** 2, samples))


def sliced_wasserstein(
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    num_projections: int = 128,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared sliced Wasserstein distance over random directions.

    .. math:: \frac1p \sum_k W_2^2(x \theta_k, y \theta_k),
              \quad \theta_k \text{ uniform on the sphere}

    The transport along a direction is found by sorting; it is exact for all n and m.
    The value is an unbiased estimate of the mean over all directions, which is at most
    ``W_2^2(x, y) / d``.

    Cost: p n (d + log n).  Gradient: that of the sorted pairs along each direction.
    Not for: the same key at all steps, because the other directions are then never
    compared.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      key: random key of the directions; pass a new one at each step.
      num_projections: number of directions, p.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples; otherwise ``n = m``.

    Returns:
      Scalar: squared distance, averaged over samples and directions.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``num_projections < 1``.

    References:
      Bonneel et al., Sliced and Radon Wasserstein barycenters of measures, 2015,
      equation 3.

    Examples:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> sliced_wasserstein(x, x + 3, jax.random.key(0))  # one direction: W2
      Array(9., dtype=float32)
    """
    x, y = check_pair(x, y, same_rows=mask is not None)
    mask = masks.check_mask(mask, x.shape[0])
    check_count("num_projections", num_projections)
    shape = (x.shape[1], num_projections)
    # Drawn in float32, so that float64 features use the same directions.
    directions = jax.random.normal(key, shape, jnp.float32).astype(x.dtype)
    norms = jnp.sqrt(jnp.sum(directions**2, axis=0, keepdims=True))
    if mask is not None:
        return _masked_sliced(x, y, directions / norms, mask)
    return _sliced(x, y, directions / norms)
