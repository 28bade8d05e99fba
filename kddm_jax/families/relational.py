"""Computes distances that compare the relations between the samples of one batch.

``x`` are the student's features ``[n, d_s]`` and ``y`` the teacher's ``[n, d_t]`` of
the same samples.  Relations are cosines, distances or angles.  Only the relations of
sample i to sample j are compared, so the widths may differ, except in `contrastive`,
which relates the student's samples to the teacher's.
"""

import jax
import jax.numpy as jnp
import optax

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_released, check_number, check_pair
from kddm_jax.numerics.divergence import divergence
from kddm_jax.numerics.grams import sum_over_rows
from kddm_jax.numerics.linalg import constant, matmul, safe_sqrt, unit


def _pair_of(x, y, mask, *, same_columns=False):
    """Checks features of the same samples; sets those that are no samples to zero."""
    x, y = check_pair(x, y, same_rows=True, same_columns=same_columns)
    mask = masks.check_mask(mask, x.shape[0])
    return *masks.zeroed(mask, x, y), mask


def _between_samples(mask, n):
    """Marks the pairs of different samples, ``[n, n]``."""
    different = ~jnp.eye(n, dtype=bool)
    return different if mask is None else different & masks.pairs(mask)


def similarity_preserving(
    x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""Computes the similarity-preserving loss between two sets of features.

    .. math:: \frac{1}{n^2} \|G_x - G_y\|_F^2, \quad
              G = X X^\top \text{ with rows of unit norm}

    The features are not centred.

    Cost: n² d, in blocks of rows.  Gradient: that of the value.  Not for: features far
    from the origin (large means after a ReLU), whose inner products are nearly equal.

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
    x, y, mask = _pair_of(x, y, mask)
    # A common factor of all features cancels.  Dividing by it avoids overflow.
    x, y = unit(x, axis=(0, 1)), unit(y, axis=(0, 1))

    def of_rows(rows_x, rows_y):
        gram_x, gram_y = (
            unit(matmul(rows, z.T), axis=1) for rows, z in ((rows_x, x), (rows_y, y))
        )
        return jnp.sum(jnp.square(gram_x - gram_y))

    n = jnp.asarray(masks.size(mask, x), x.dtype)  # an int's square might overflow
    return sum_over_rows(of_rows, (x, y)) / n**2


def _log_conditionals(z, others):
    """Computes log p(j | i), ``[n, n]``; -inf where ``others`` is False."""
    z = unit(z, axis=1)
    # The kernel of opposite samples is zero, and its logarithm infinite.
    least = 4 * jnp.finfo(z.dtype).eps
    kernel = jnp.where(others, jnp.maximum((1 + matmul(z, z.T)) / 2, least), 0)
    total = jnp.sum(kernel, axis=1, keepdims=True)
    total = jnp.where(jnp.any(others, axis=1, keepdims=True), total, 1)
    return jnp.where(others, jnp.log(jnp.where(others, kernel, 1) / total), -jnp.inf)


def _released_conditionals(z, mask):
    """Computes the released code's p(j | i), ``[n, n]``, which includes j = i."""
    norms = safe_sqrt(jnp.sum(z * z, axis=1, keepdims=True))
    z = z / (norms + 1e-7)
    kernel = (matmul(z, z.T) + 1) / 2
    if mask is None:
        return kernel / jnp.sum(kernel, axis=1, keepdims=True)
    kernel = jnp.where(masks.pairs(mask), kernel, 0)
    total = jnp.sum(kernel, axis=1, keepdims=True)
    return kernel / jnp.where(mask[:, None], total, 1)


def pkt(
    x: jax.Array,
    y: jax.Array,
    *,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the probabilistic knowledge transfer loss between two sets of features.

    .. math:: \frac1n \sum_i \sum_{j \ne i} p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}, \quad
              p_{j|i} = \frac{k_{ij}}{\sum_{l \ne i} k_{il}}, \quad
              k_{ij} = \frac{1 + \cos(y_i, y_j)}{2}

    ``q`` are the same probabilities for the student.  A sample of zeros has the cosine
    0 with all others.  A kernel is at least four times the machine epsilon.

    Cost: n² d.  Gradient: that of the value.  Not for: two samples, whose only
    probability is 1, or features far from the origin (large means after a ReLU), whose
    cosines are nearly equal.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      compat: ``"released"`` includes ``j = i``, adds 1e-7 to norms and in the
        logarithm, and divides by n once more, as in RepDistiller.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: divergence in nats, averaged over samples.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``compat`` is unknown.

    References:
      Passalis and Tefas, Learning deep representations with probabilistic knowledge
      transfer, 2018 (arXiv 1803.10837), equations 3 to 6.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
      >>> y = jnp.ones((3, 1))  # every probability of the teacher is 1/2
      >>> pkt(x, y)  # two thirds of log(9/8) / 2
      Array(0.0393, dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    as_released(compat)
    if compat is not None:
        q, p = (_released_conditionals(z, mask) for z in (x, y))
        return masks.mean_of_pairs(p * jnp.log((p + 1e-7) / (q + 1e-7)), mask)
    others = _between_samples(mask, x.shape[0])
    log_q, log_p = (_log_conditionals(z, others) for z in (x, y))
    return masks.mean(divergence(log_p, log_q), mask)


def _gram(z, mask):
    """Computes the Gram matrix and the squared distances of samples, ``[n, n]`` each.

    Features are centred and divided by their largest absolute value, a constant:
    relations do not depend on either.  Squares up to their round-off are zero.
    """
    (z,) = masks.zeroed(mask, z - masks.mean(z, mask)[None, :])
    peak = constant(jnp.max(jnp.abs(z)))
    z = z / jnp.where(peak == 0, 1, peak)
    gram = matmul(z, z.T)
    norms = jnp.sum(z * z, axis=1)
    size = norms[:, None] + norms[None, :]
    squares = size - 2 * gram
    zero = squares <= constant(4 * jnp.finfo(z.dtype).eps * size)  # False for NaN
    zero = zero | jnp.eye(len(z), dtype=bool) & jnp.isfinite(squares)
    return gram, jnp.where(zero, 0, squares)


def rkd_distance(
    x: jax.Array,
    y: jax.Array,
    *,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the relational loss of pairwise distances, RKD-D.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne j} h\Big(
              \frac{\|x_i - x_j\|}{\mu_x} - \frac{\|y_i - y_j\|}{\mu_y}\Big)

    ``μ`` is the mean distance of different samples, and ``h`` the Huber loss: ``a² /
    2`` up to 1 and ``|a| - 1/2`` beyond.  If all samples are equal, their distances are
    zero.

    Cost: n² d.  Gradient: that of the value, including the mean distance; zero for
    equal samples.  Not for: two samples, whose distance is the mean distance.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      compat: ``"released"`` divides by ``n²``, as in the released code, whose mean
        includes ``i = j``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: Huber loss, averaged over pairs of different samples.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``compat`` is unknown.

    References:
      Park et al., Relational knowledge distillation, 2019 (arXiv 1904.05068),
      equations 6 to 9.

    Examples:
      >>> x = jnp.array([[0.0], [1.0], [2.0]])  # distances 3/4, 3/4 and 3/2
      >>> y = jnp.eye(3)  # distances 1, 1 and 1
      >>> rkd_distance(x, y)  # (1/16 + 1/16 + 1/4) / 2 / 3
      Array(0.0625, dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    as_released(compat)
    n = masks.size(mask, x)
    count = jnp.maximum(jnp.asarray(n * (n - 1), x.dtype), 1)
    pairs = _between_samples(mask, x.shape[0])
    shares = []
    for z in (x, y):
        _, squares = _gram(z, mask)
        distances = jnp.where(pairs, safe_sqrt(squares), 0)
        mean = jnp.sum(distances) / count
        shares.append(distances / jnp.where(mean == 0, 1, mean))
    total = jnp.sum(optax.losses.huber_loss(*shares))
    return total / (count if compat is None else n**2)


def _cosines(gram, row, norm, lengths):
    """Computes the cosines of all angles at one sample, ``[n, n]``.

    Args:
      gram: inner products of all samples, ``[n, n]``.
      row: those of the sample with all, ``[n]``.
      norm: that of the sample with itself.
      lengths: inverse distances from the sample to all, ``[n]``.
    """
    inner = gram - row[:, None] - row[None, :] + norm
    return inner * lengths[:, None] * lengths[None, :]


def _sides(z, mask):
    """Returns the Gram matrix, and what `_cosines` needs of each sample."""
    gram, squares = _gram(z, mask)
    zero = squares == 0
    lengths = jnp.where(zero, 0, 1 / jnp.sqrt(jnp.where(zero, 1, squares)))
    return gram, (gram, jnp.diagonal(gram), lengths)


def rkd_angle(
    x: jax.Array,
    y: jax.Array,
    *,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the relational loss of angles, RKD-A.

    .. math:: \frac{1}{n (n - 1) (n - 2)} \sum_{i \ne j \ne k \ne i} h\big(
              \cos\angle x_i x_j x_k - \cos\angle y_i y_j y_k\big)

    ``h`` is the Huber loss: ``a² / 2`` up to 1 and ``|a| - 1/2`` beyond.  An angle at
    two equal samples has the cosine 0.

    Cost: n² d + n³.  Angles are computed for one sample j at a time, and again for the
    gradient, so that memory is that of some ``[n, n]`` arrays.
    Gradient: that of the value; zero for equal samples.
    Not for: large batches, or fewer than three samples, which have no angles.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      compat: ``"released"`` divides by ``n³``, as in the released code, whose mean
        includes equal indices.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: Huber loss, averaged over angles between different samples.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``compat`` is unknown.

    References:
      Park et al., Relational knowledge distillation, 2019 (arXiv 1904.05068),
      equations 10 and 11.

    Examples:
      >>> x = jnp.array([[0.0], [1.0], [2.0]])  # cosines 1, -1 and 1
      >>> y = jnp.eye(3)  # cosines 1/2
      >>> rkd_angle(x, y)  # (1/8 + 1 + 1/8) / 3
      Array(0.4167, dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    as_released(compat)
    (gram_x, sides_x), (gram_y, sides_y) = (_sides(z, mask) for z in (x, y))
    within = jnp.ones(len(x), bool) if mask is None else mask
    pairs = _between_samples(mask, x.shape[0])
    if compat is not None:  # i = k counts, where the other side has equal samples
        pairs = masks.pairs(within)

    # Without the checkpoint, the gradient would store an array [n, n, n].
    @jax.checkpoint
    def at_sample(of):
        side_x, side_y, present = of
        cosines = _cosines(gram_x, *side_x), _cosines(gram_y, *side_y)
        losses = optax.losses.huber_loss(*(jnp.where(pairs, c, 0) for c in cosines))
        return jnp.where(present, jnp.sum(losses), 0)

    total = jnp.sum(jax.lax.map(at_sample, (sides_x, sides_y, within)))
    n = jnp.asarray(masks.size(mask, x), x.dtype)
    if compat is not None:
        return total / n**3
    return total / jnp.maximum(n * (n - 1) * (n - 2), 1)


def contrastive(
    x: jax.Array,
    y: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the contrastive loss between student and teacher, InfoNCE.

    .. math:: -\frac1n \sum_i \log \frac{\exp(\cos(x_i, y_i) / T)}
              {\sum_j \exp(\cos(x_i, y_j) / T)}

    The student's features of a sample should be closer to the teacher's features of the
    same sample than to those of all others of the batch.  A sample of zeros has the
    cosine 0 with all others.

    Cost: n² d.  Gradient: that of the value.  Not for: a term that should be zero for
    equal features, or small batches, which have few negatives.  CRD has a memory bank
    of 16,384 of them, and learned projections.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      temperature: temperature T, by which the cosines are divided.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: cross-entropy in nats, averaged over samples; ``log n`` for a constant
      student.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``temperature <= 0``.

    References:
      Tian et al., Contrastive representation distillation, 2020 (arXiv 1910.10699).
      Van den Oord et al., Representation learning with contrastive predictive coding,
      2018 (arXiv 1807.03748), equation 4.

    Examples:
      >>> x = jnp.eye(2)
      >>> contrastive(x, x, temperature=1.0)  # log(1 + 1 / e)
      Array(0.3133, dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask, same_columns=True)
    check_number("temperature", temperature, positive=True)
    x, y = unit(x, axis=1), unit(y, axis=1)
    logits = matmul(x, y.T) / jnp.asarray(temperature, x.dtype)
    if mask is not None:
        logits = jnp.where(mask[None, :], logits, -jnp.inf)
    own = jnp.diagonal(logits)
    if mask is not None:  # -inf - (-inf) is NaN
        own = jnp.where(mask, own, 0)
        logits = jnp.where(mask[:, None], logits, 0)
    return masks.mean(jax.nn.logsumexp(logits, axis=1) - own, mask)
