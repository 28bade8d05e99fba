"""Computes distances that compare the relations between the samples of one batch.

``x`` are the student's features ``[n, d_s]`` and ``y`` the teacher's ``[n, d_t]`` of
the same samples.  Only the relations of sample i to sample j are compared, so the
widths may differ.
"""

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_pair
from kddm_jax.numerics.linalg import matmul, unit


def similarity_preserving(
    x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""Computes the similarity-preserving loss between two sets of features.

    .. math:: \frac{1}{n^2} \|G_x - G_y\|_F^2, \quad
              G = X X^\top \text{ with rows of unit norm}

    The features are not centred.

    Cost: n² d.  Gradient: that of the value.  Not for: features far from the origin
    (large means after a ReLU), whose inner products are nearly equal.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: squared distance, averaged over pairs of samples; at most ``4 / n``.

    Raises:
      ValueError: shapes or dtypes are wrong.

    References:
      Tung and Mori, Similarity-preserving knowledge distillation, 2019 (arXiv
      1907.09682), equations 2 to 4.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])  # rows (1, 0) and (0, 1)
      >>> y = jnp.array([[1.0], [1.0]])  # rows (1, 1) / sqrt 2, twice
      >>> similarity_preserving(x, y)  # 1 - 1 / sqrt 2
      Array(0.2929, dtype=float32)
    """
    x, y = check_pair(x, y, same_rows=True, same_columns=False)
    mask = masks.check_mask(mask, x.shape[0])
    x, y = masks.zeroed(mask, x, y)
    # A common factor of all features cancels.  Dividing by it avoids overflow.
    x, y = unit(x, axis=(0, 1)), unit(y, axis=(0, 1))
    gram_x, gram_y = (unit(matmul(z, z.T), axis=1) for z in (x, y))
    return masks.mean_of_pairs(jnp.square(gram_x - gram_y), mask)
