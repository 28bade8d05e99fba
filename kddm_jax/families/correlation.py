"""Computes correlations between the predictions of two networks.

``logits_x`` are the student's logits and ``logits_y`` the teacher's of the same images,
both ``[n, k]``.  A correlation compares two series after their means and deviations
have been removed, so that a student need not reproduce the teacher's confidence.
"""

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import LOGITS, as_released, check_number, check_pair
from kddm_jax.numerics.linalg import constant, safe_sqrt, unit


def _deviations(p, mask):
    """Subtracts the means over the last axis, which ``mask`` marks."""
    mean = masks.mean(p.T, mask)[:, None]
    return masks.zeroed(mask, (p - mean).T)[0].T


def _dissimilarity(p, q, mask):
    """Computes 1 - Pearson's correlation along the last axis, as |u - v|^2 / 2.

    u and v are the deviations from the mean with norm 1, or zero if a series is
    constant up to round-off.
    """
    directions = []
    for series in (p, q):
        # A factor changes nothing; probabilities of rare classes may be tiny.
        peak = constant(jnp.max(jnp.abs(series), axis=1, keepdims=True))
        series = series / jnp.where(peak == 0, 1, peak)
        floor = jnp.sum(series**2, axis=1, keepdims=True)
        floor = constant((10 * jnp.finfo(series.dtype).eps) ** 2 * floor)
        directions.append(unit(_deviations(series, mask), axis=1, floor=floor))
    return jnp.sum((directions[0] - directions[1]) ** 2, axis=1) / 2


def _released_dissimilarity(p, q, mask):
    """Computes 1 - Pearson's correlation with 1e-8 added to the product of norms."""
    p, q = _deviations(p, mask), _deviations(q, mask)
    norm_p, norm_q = (safe_sqrt(jnp.sum(z * z, axis=1)) for z in (p, q))
    return 1 - jnp.sum(p * q, axis=1) / (norm_p * norm_q + 1e-8)


def dist(
    logits_x: jax.Array,
    logits_y: jax.Array,
    *,
    beta: float | jax.Array = 1.0,
    gamma: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes one minus the correlations of predictions within and across images.

    .. math:: \frac{\beta}{n} \sum_i \big(1 - \rho(P_{i:}, Q_{i:})\big)
              + \frac{\gamma}{k} \sum_c \big(1 - \rho(P_{:c}, Q_{:c})\big)

    ``P`` and ``Q`` are the student's and the teacher's probabilities at temperature T,
    and ρ is Pearson's correlation: over the classes of an image, and over the images
    for a class.

    Cost: n k.  Gradient: that of the value.  Not for: small batches, whose correlations
    over images are noise.

    Args:
      logits_x: student logits, shape ``[n, k]``.
      logits_y: teacher logits, shape ``[n, k]``.
      beta: weight of the correlations over classes.
      gamma: weight of the correlations over images.
      temperature: temperature T, by which the logits are divided; 1 on ImageNet, 4 on
        CIFAR-100.
      compat: ``"released"`` multiplies by ``T^2`` and adds 1e-8 to the denominators, so
        that constant predictions count as uncorrelated.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar, in [0, 2 (beta + gamma)]; a correlation counts as 1/2 if one side is
      constant, and as 1 if both are.

    Raises:
      ValueError: shapes or dtypes are wrong, a weight is negative, or ``temperature <=
        0``.

    References:
      Huang et al., Knowledge distillation from a stronger teacher, 2022 (arXiv
      2205.10536), equations 6 to 9.

    Examples:
      >>> s = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> dist(s, -s), dist(s, 3 * s)  # opposite, and equal up to a factor
      (Array(4., dtype=float32), Array(0., dtype=float32))
    """
    s, t = check_pair(logits_x, logits_y, names=LOGITS, same_rows=True)
    mask = masks.check_mask(mask, s.shape[0])
    s, t = masks.zeroed(mask, s, t)
    as_released(compat)
    for name, number in (("beta", beta), ("gamma", gamma)):
        hint = "; it is 1.0 by default"
        check_number(name, number, positive=False, hint=hint)
    check_number("temperature", temperature, positive=True)
    beta, gamma, temperature = (
        jnp.asarray(z, s.dtype) for z in (beta, gamma, temperature)
    )
    p, q = (jax.nn.softmax(z / temperature) for z in (s, t))
    p, q = masks.zeroed(mask, p, q)
    of = _dissimilarity if compat is None else _released_dissimilarity
    of_images = masks.mean(of(p, q, None), mask)
    of_classes = masks.zero_if_empty(jnp.mean(of(p.T, q.T, mask)), mask)
    value = beta * of_images + gamma * of_classes
    return value if compat is None else temperature**2 * value
