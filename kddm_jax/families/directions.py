"""Computes how far the student's features point away from the teacher's class means.

``x`` are the student's features ``[n, d]``, ``y`` the teacher's of the same samples,
and ``class_means`` ``[k, d]`` the teacher's mean features of each class, computed once
over the training set.
"""

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_float, check_labels, check_pair
from kddm_jax.numerics.classes import with_mask
from kddm_jax.numerics.linalg import constant, safe_sqrt, unit


def _check_means(class_means, d, dtype):
    """Checks the class means and returns their directions, a constant."""
    class_means = as_float("class_means", class_means)
    if class_means.ndim != 2 or class_means.shape[1] != d:
        raise ValueError(
            f"class_means must have shape [classes, d]=[k, {d}], got "
            f"{list(class_means.shape)}; average the teacher's features of each class"
        )
    return unit(constant(class_means.astype(dtype)), axis=1)


def kdpp(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    class_means: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the loss of norm and direction, ND, of KD++.

    .. math:: \frac1n \sum_i 1 - \frac{\langle x_i, e_{c(i)} \rangle}
              {\max(\|x_i\|, \|y_i\|)}, \quad e_c = \frac{m_c}{\|m_c\|}

    ``m_c`` is the teacher's mean of the class c.  The student's features should point
    in its direction.  Those that are shorter than the teacher's should also become
    longer, and those that are longer need not become shorter.  A class whose mean is
    zero or missing has the loss 1.

    Cost: (n + k) d.  Gradient: that of the value; the means are constants.
    Not for: features that are normalized differently from the class means.  Means of
    raw features fit the normalizations None, "teacher" and "unit".

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``; only their norms are
        used.
      labels: class labels, int, shape ``[n]``; negative labels have no weight.
      class_means: the teacher's mean features of each class, shape ``[k, d]``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar in [0, 2], averaged over samples with a label.

    Raises:
      ValueError: shapes, dtypes or labels are wrong.

    References:
      Wang et al., Improving knowledge distillation via regularizing feature norm and
      direction, 2023 (arXiv 2305.17007); the released code adds the constant 1.

    Examples:
      >>> means, labels = jnp.array([[2.0, 0.0], [0.0, 5.0]]), jnp.array([0, 1])
      >>> x = jnp.array([[3.0, 0.0], [1.0, 0.0]])  # longer than y, and orthogonal
      >>> kdpp(x, jnp.ones((2, 2)), labels, means)
      Array(0.5, dtype=float32)
    """
    x, y = check_pair(x, y, same_rows=True)
    n, d = x.shape
    directions = _check_means(class_means, d, x.dtype)
    labels = with_mask(labels, masks.check_mask(mask, n))
    labels = check_labels(labels, n, num_classes=len(directions))
    valid = labels >= 0
    x, y = masks.zeroed(valid, x, y)
    own = jnp.where(valid, labels, 0)
    own = jnp.take(directions, own, axis=0, mode="fill", fill_value=0)  # [n, d]
    along = jnp.sum(x * own, axis=1)
    lengths = (safe_sqrt(jnp.sum(z * z, axis=1)) for z in (x, y))
    longest = jnp.maximum(*lengths)
    zero = longest == 0
    share = jnp.where(zero, 0, along / jnp.where(zero, 1, longest))
    # A teacher that is not finite must show, not count as long.
    share = jnp.where(jnp.isfinite(longest), share, jnp.nan)
    return masks.mean(1 - share, valid)
