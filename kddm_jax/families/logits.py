"""Computes divergences between the predictions of two networks.

``logits_x`` are the student's logits and ``logits_y`` the teacher's of the same images,
both ``[n, k]``.  The divergences average over images.  s and t are one image's logits.

References:
  Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015 (arXiv
  1503.02531).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import (
    DIRECTIONS,
    LOGITS,
    as_released,
    check_choice,
    check_labels,
    check_number,
    check_pair,
)
from kddm_jax.numerics.classes import with_mask
from kddm_jax.numerics.divergence import divergence
from kddm_jax.numerics.linalg import safe_sqrt


def _standardized(logits):
    """Computes (l - mean) / deviation of each image; zero for equal logits.

    The deviation is the unbiased one.  Classes at -inf are ignored and stay at -inf.
    """
    there = logits != -jnp.inf
    all_classes = max(logits.shape[1] - 1, 1)
    count = jnp.sum(there.astype(logits.dtype), axis=1, keepdims=True)
    # Means over all classes, times a ratio that is 1 if no class is at -inf.
    logits = jnp.where(there, logits, 0)
    mean = jnp.mean(logits, axis=1, keepdims=True)
    mean = mean * (logits.shape[1] / jnp.maximum(count, 1))
    centred = jnp.where(there, logits - mean, 0)
    variance = jnp.sum(centred * centred, axis=1, keepdims=True) / all_classes
    variance = variance * (all_classes / jnp.maximum(count - 1, 1))
    # Equal logits have no direction. Without this, their gradient would be 1e6.
    eps, tiny = jnp.finfo(logits.dtype).eps, jnp.finfo(logits.dtype).tiny
    size = jnp.mean(logits * logits, axis=1, keepdims=True)
    equal = variance <= (10 * eps) ** 2 * size + tiny**0.5  # False for NaN
    centred, variance = jnp.where(equal, 0, centred), jnp.where(equal, 1, variance)
    return jnp.where(there, centred / (safe_sqrt(variance) + 1e-6), -jnp.inf)


def _temperature(temperature, logits):
    """Checks a temperature: one number, or one for each image."""
    n = logits.shape[0]
    if np.ndim(temperature) == 0:
        check_number("temperature", temperature, positive=True)
    elif np.shape(temperature) != (n,):
        raise ValueError(
            f"temperature must be a number, or have shape [n]=[{n}], got "
            f"{list(np.shape(temperature))}; flatten it to one number for each image"
        )
    elif not isinstance(temperature, Tracer):
        least = np.min(np.asarray(temperature))
        if not least > 0:
            raise ValueError(f"temperature must be positive, got {least} among them")
    return jnp.asarray(temperature, logits.dtype)


def kd(
    logits_x: jax.Array,
    logits_y: jax.Array,
    *,
    temperature: float | jax.Array = 4.0,
    standardize: bool = False,
    direction: str = "teacher||student",
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the KL divergence between softened predictions, as in Hinton et al.

    .. math:: \frac{T^2}{n} \sum_i KL\big(\mathrm{softmax}(t_i / T)
              \,\|\, \mathrm{softmax}(s_i / T)\big)

    A class whose logit is -inf in both networks contributes nothing.

    Cost: n k.  Gradient: ``T (softmax(s / T) - softmax(t / T)) / n`` with respect to
    the student's logits, unless they are standardised or the direction is reversed.
    Not for: a teacher with other classes than the student, or features.

    Args:
      logits_x: student logits s, shape ``[n, k]``.
      logits_y: teacher logits t, shape ``[n, k]``.
      temperature: temperature T, by which the logits are divided: a number, or an
        array of shape ``[n]`` with one temperature for each image.
      standardize: True first centres each image's logits and divides them by their
        standard deviation, so that the student need not learn the scale of the
        teacher's logits.
      direction: order of the arguments of KL: ``"teacher||student"`` (the formula
        above) or ``"student||teacher"``.
      compat: ``"released"`` uses the direction of KD2M's code, ``"student||teacher"``.
      mask: shape ``[n]``; samples where it is zero are ignored, whatever their
        logits contain.  None uses all samples.

    Returns:
      Scalar: divergence in nats times ``T^2``, averaged over images.

    Raises:
      ValueError: shapes or dtypes are wrong, an option is unknown, or ``temperature <=
        0``.

    References:
      Hinton et al., 2015 (arXiv 1503.02531), section 2.  Sun et al., Logit
      standardization in knowledge distillation, 2024 (arXiv 2403.01427), equation 8.

    Examples:
      >>> s, t = jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> kd(s, t, temperature=1.0)  # log 2 - entropy of (3/4, 1/4)
      Array(0.1308, dtype=float32)
    """
    check_choice("direction", direction, DIRECTIONS)
    (direction,) = as_released(
        compat, direction=(direction, "teacher||student", "student||teacher")
    )
    s, t = check_pair(logits_x, logits_y, names=LOGITS, same_rows=True)
    mask = masks.check_mask(mask, s.shape[0])
    s, t = masks.zeroed(mask, s, t)
    if standardize:
        s, t = _standardized(s), _standardized(t)
    temperature = _temperature(temperature, s)
    scale = temperature if temperature.ndim == 0 else temperature[:, None]
    log_s, log_t = (jax.nn.log_softmax(z / scale) for z in (s, t))
    log_p, log_q = (log_s, log_t) if direction == DIRECTIONS[0] else (log_t, log_s)
    divergences = divergence(log_p, log_q)
    if temperature.ndim == 0:
        return temperature**2 * masks.mean(divergences, mask)
    return masks.mean(temperature**2 * divergences, mask)


def _log_mixture(log_p, log_q, beta):
    """Computes log(beta q + (1 - beta) p); -inf where both are zero."""
    massless = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    # The derivative of logaddexp is NaN at two infinite arguments.
    log_p, log_q = (jnp.where(massless, 0, z) for z in (log_p, log_q))
    mixture = jnp.logaddexp(jnp.log1p(-beta) + log_p, jnp.log(beta) + log_q)
    return jnp.where(massless, -jnp.inf, mixture)


def jsd(
    logits_x: jax.Array,
    logits_y: jax.Array,
    *,
    beta: float | jax.Array = 0.5,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the generalized Jensen-Shannon divergence between predictions.

    .. math:: \frac1n \sum_i \beta\, KL(q_i \,\|\, m_i)
              + (1 - \beta)\, KL(p_i \,\|\, m_i), \quad
              m = \beta q + (1 - \beta) p

    ``p = softmax(s / T)`` is the student's and ``q = softmax(t / T)`` the teacher's
    prediction.  For small beta, the value is about ``beta KL(q || p)``, and for beta
    near 1 it is about ``(1 - beta) KL(p || q)``.  Unlike these, it is finite for any
    two predictions.  A class whose logit is -inf in both networks contributes nothing.

    Cost: n k.  Gradient: that of the value; without the factor ``T^2`` of `kd`, it
    becomes small at high temperatures.  Not for: a teacher with other classes than the
    student, or features.

    Args:
      logits_x: student logits s, shape ``[n, k]``.
      logits_y: teacher logits t, shape ``[n, k]``.
      beta: weight of the teacher in the mixture, between 0 and 1; 1/2 gives the
        symmetric divergence.
      temperature: temperature T, by which the logits are divided.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: divergence in nats, averaged over images; at most the entropy of (beta, 1
      - beta).

    Raises:
      ValueError: shapes or dtypes are wrong, ``beta`` is not between 0 and 1, or
        ``temperature <= 0``.

    References:
      Agarwal et al., On-policy distillation of language models, 2024 (arXiv
      2306.13649), equation 1.

    Examples:
      >>> s, t = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0]])
      >>> jsd(s, t)  # log 2
      Array(0.6931, dtype=float32)
    """
    s, t = check_pair(logits_x, logits_y, names=LOGITS, same_rows=True)
    mask = masks.check_mask(mask, s.shape[0])
    s, t = masks.zeroed(mask, s, t)
    hint = "; it must be less than 1, and is 0.5 by default"
    check_number("beta", beta, positive=True, hint=hint)
    if not isinstance(beta, Tracer) and not beta < 1:
        raise ValueError(
            f"beta must be less than 1, got {beta}; for the limits 0 and 1, take kd "
            "with either direction"
        )
    check_number("temperature", temperature, positive=True)
    beta, temperature = (jnp.asarray(z, s.dtype) for z in (beta, temperature))
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (s, t))
    log_m = _log_mixture(log_p, log_q, beta)
    of_student, of_teacher = (divergence(z, log_m) for z in (log_p, log_q))
    return masks.mean(beta * of_teacher + (1 - beta) * of_student, mask)


def check_predictions(
    logits_x: jax.Array,
    logits_y: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Checks logits and labels; sets the logits of samples without a label to zero.

    Args:
      logits_x: student logits, shape ``[n, k]``.
      logits_y: teacher logits, shape ``[n, k]``.
      labels: class labels, int, shape ``[n]``; negative labels mean no label.
      mask: shape ``[n]``, zero for no sample, or None.

    Returns:
      Both logits; a mark at each label's class, bool ``[n, k]``; and whether a sample
      has a label, bool ``[n]``.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, or there is only one class.
    """
    s, t = check_pair(logits_x, logits_y, names=LOGITS, same_rows=True)
    n, k = s.shape
    if k < 2:
        raise ValueError(f"logits_x must have two classes at least, got {k}")
    labels = with_mask(labels, masks.check_mask(mask, n))
    labels = check_labels(labels, n, num_classes=k)
    labels = labels.astype(jnp.int32)
    own = (
        labels[:, None] == jnp.arange(k, dtype=jnp.int32)[None, :]
    )  # [n, k], False without a label
    valid = labels >= 0
    s, t = masks.zeroed(valid, s, t)  # they may be NaN
    return s, t, own, valid


def _decoupled(logits, own):
    """Returns log (p(label), 1 - p(label)), [n, 2], and log p(class | not the label).

    The class of the label has -inf in the second array.
    """
    target = jnp.max(jnp.where(own, logits, -jnp.inf), axis=1)
    others = jnp.where(own, -jnp.inf, logits)
    # Without another class, the second array and the gradient would be NaN.
    some = jnp.any(others != -jnp.inf, axis=1, keepdims=True)
    others = jnp.where(some, others, 0)
    rest = jnp.where(some[:, 0], jax.nn.logsumexp(others, axis=1), -jnp.inf)
    binary = jnp.stack([target, rest], axis=1)
    among = jax.nn.log_softmax(others, axis=1)
    return jax.nn.log_softmax(binary, axis=1), jnp.where(some, among, -jnp.inf)


def dkd(
    logits_x: jax.Array,
    logits_y: jax.Array,
    labels: jax.Array,
    *,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array = 8.0,
    temperature: float | jax.Array = 4.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the decoupled knowledge distillation loss, DKD.

    .. math:: \frac{T^2}{n} \sum_i \alpha\, KL(b^t_i \,\|\, b^s_i)
              + \beta\, KL(\hat q_i \,\|\, \hat p_i)

    ``b`` is the pair of the label's probability and that of all other classes, and
    ``\hat p``, ``\hat q`` are the probabilities of the student and the teacher among
    the other classes.  `kd` is the case ``alpha = 1``, with beta replaced by the
    teacher's probability of the other classes, which is small for a confident teacher.

    Cost: n k.  Gradient: that of the value.  Not for: samples without labels, which are
    left out (use `kd`), or two classes, whose second term is zero.

    Args:
      logits_x: student logits s, shape ``[n, k]``.
      logits_y: teacher logits t, shape ``[n, k]``.
      labels: class labels, int, shape ``[n]``; negative labels have no weight.
      alpha: weight of the label's probability.
      beta: weight of the other classes; 0.5 to 10 in the paper.
      temperature: temperature T, by which the logits are divided.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: divergence in nats times ``T^2``, averaged over images with a label.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, a weight is negative,
        ``temperature <= 0``, or there is only one class.

    References:
      Zhao et al., Decoupled knowledge distillation, 2022 (arXiv 2203.08679), equation
      7.

    Examples:
      >>> s, t = jnp.zeros((1, 3)), jnp.log(jnp.array([[2.0, 1.0, 1.0]]))
      >>> dkd(s, t, jnp.array([0]), temperature=1.0)  # KL((1/2, 1/2) || (1/3, 2/3))
      Array(0.0589, dtype=float32)
    """
    s, t, own, valid = check_predictions(logits_x, logits_y, labels, mask)
    for name, number, default in (("alpha", alpha, 1.0), ("beta", beta, 8.0)):
        hint = f"; it is {default} by default"
        check_number(name, number, positive=False, hint=hint)
    check_number("temperature", temperature, positive=True)
    alpha, beta, temperature = (
        jnp.asarray(z, s.dtype) for z in (alpha, beta, temperature)
    )
    (binary_s, others_s), (binary_t, others_t) = (
        _decoupled(z / temperature, own) for z in (s, t)
    )
    target, other = divergence(binary_t, binary_s), divergence(others_t, others_s)
    return temperature**2 * masks.mean(alpha * target + beta * other, valid)
