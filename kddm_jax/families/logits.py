"""Computes divergences between the predictions of two networks.

``logits_x`` are the student's logits and ``logits_y`` the teacher's of the same images,
both ``[n, k]``.  The divergences average over images.

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
    check_number,
    check_pair,
)
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
    return jnp.where(there, centred / (safe_sqrt(variance) + 1e-6), -jnp.inf)


def _divergence(log_p, log_q):
    """Computes KL(p || q) of each image as a sum of p (r - 1 - log r), r = q / p.

    No term is negative, and no digits cancel if the predictions nearly agree.  If p is
    zero, the term is q.
    """
    massless = log_p == -jnp.inf
    p, log_ratio = jnp.exp(log_p), log_q - jnp.where(massless, 0, log_p)
    log_ratio = jnp.where(massless, 0, log_ratio)
    near = jnp.abs(log_ratio) < 1
    small = jnp.where(near, log_ratio, 0)
    terms = jnp.where(
        near,
        p * (jnp.expm1(small) - small),
        jnp.exp(log_q) - p - p * log_ratio,
    )
    return jnp.sum(jnp.where(massless, jnp.exp(log_q), terms), axis=1)


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
    divergences = _divergence(log_p, log_q)
    if temperature.ndim == 0:
        return temperature**2 * masks.mean(divergences, mask)
    return masks.mean(temperature**2 * divergences, mask)
