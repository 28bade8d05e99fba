"""Reads labels, which are classes ``[n]`` or soft labels ``[n, k]``.

Soft labels are a probability for each class, as made by label smoothing and mixup.  A
sample without a label has a negative class, or a row of zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_samples
from kddm_jax.numerics.classes import wide, with_mask
from kddm_jax.numerics.devices import unsharded


def is_soft(labels: jax.Array) -> bool:
    """Returns True for floating soft labels ``[n, k]``, False for classes ``[n]``."""
    return jnp.ndim(labels) == 2 and jnp.issubdtype(
        jnp.result_type(labels), jnp.floating
    )


def class_labels(labels: jax.Array) -> jax.Array:
    """Returns the class of each sample, or -1 for a sample without a label.

    The class of soft labels is the most probable one.

    Args:
      labels: int ``[n]``, which are returned unchanged, or float ``[n, k]``.

    Returns:
      Int ``[n]``.

    Examples:
      >>> class_labels(jnp.array([[0.2, 0.8], [0.0, 0.0]])).tolist()
      [1, -1]
    """
    if not is_soft(labels):
        return labels
    labelled = jnp.any(labels != 0, axis=1)  # a row with NaN counts as labelled
    return jnp.where(labelled, jnp.argmax(labels, axis=1), -1)


def without_labels(labels: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Removes the labels of rows that are not samples.

    Args:
      labels: int ``[n]``, or float ``[n, k]``.
      mask: shape ``[n]``, zero for no sample, or None.

    Returns:
      The labels: -1, or a row of zeros, where there is no sample.

    Examples:
      >>> without_labels(jnp.array([3, 99]), jnp.array([True, False])).tolist()
      [3, -1]
      >>> without_labels(jnp.ones((2, 2)), jnp.array([True, False])).tolist()
      [[1.0, 1.0], [0.0, 0.0]]
    """
    if is_soft(labels) and mask is not None and len(labels) == len(mask):
        return masks.zeroed(jnp.asarray(mask).astype(bool), labels)[0]
    return with_mask(labels, mask)


def predict_labels(
    labels: jax.Array,
    teacher_logits: jax.Array | None,
    student_logits: jax.Array,
    mask: jax.Array | None,
) -> jax.Array:
    """Replaces negative labels by the class that the teacher predicts.

    Args:
      labels: int, shape ``[n]``.
      teacher_logits: shape ``[n, k]``.
      student_logits: shape ``[n, k]``.
      mask: shape ``[n]``, zero for no sample, or None.  Rows that are not samples keep
        their negative label.

    Returns:
      Int, shape ``[n]``.

    Raises:
      ValueError: ``teacher_logits`` is None, or has another shape than the student's.

    Examples:
      >>> logits = jnp.array([[0.0, 1.0], [0.0, 1.0]])
      >>> predict_labels(jnp.array([0, -1]), logits, logits, None).tolist()
      [0, 1]
    """
    if teacher_logits is None:
        raise ValueError(
            "predicted_labels=True gives samples without a label the teacher's class, "
            "but teacher_logits is None; pass teacher_logits, shape [n, k], or leave "
            "predicted_labels out"
        )
    shape = jnp.shape(teacher_logits)
    if shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have shape [n, k]={list(student_logits.shape)}, as "
            f"the student's, for predicted_labels=True, got {list(shape)}; pass logits "
            "of the same classes, or leave predicted_labels out"
        )
    # On an explicit mesh, labels and logits may be sharded differently.
    labels, logits = unsharded(wide(labels)), unsharded(jnp.asarray(teacher_logits))
    missing = labels < 0
    if mask is not None:
        missing &= unsharded(mask)
    return jnp.where(missing, jnp.argmax(logits, axis=1).astype(labels.dtype), labels)


def check_targets(targets: jax.Array, n: int, k: int) -> jax.Array:
    """Checks the shape of soft labels, and their signs if they are not traced.

    Args:
      targets: float, shape ``[n, k]``, a probability for each class; a row of zeros
        means no label.
      n: number of samples.
      k: number of logits.

    Returns:
      The targets.

    Raises:
      ValueError: the shape is wrong, or a number is negative.
    """
    check_samples("labels", targets)
    if targets.shape != (n, k):
        raise ValueError(
            f"soft labels must have shape [n, k]=[{n}, {k}], as the logits, got "
            f"{list(targets.shape)}; pass a probability for each class"
        )
    if not isinstance(targets, Tracer) and (np.asarray(targets) < 0).any():
        raise ValueError(
            f"soft labels must be >= 0, got {np.asarray(targets).min()}; a sample "
            "without a label has a row of zeros"
        )
    return targets


def _soft_cross_entropy(logits, targets):
    """Computes the cross-entropy of each sample.

    A class of probability 0 may have a logit of minus infinity.
    """
    logs = jnp.where(targets == 0, 0, jax.nn.log_softmax(logits))
    return -jnp.sum(targets.astype(logs.dtype) * logs, axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Computes the mean cross-entropy of the labelled samples.

    .. math:: -\frac1n \sum_i \log \mathrm{softmax}(s_i)_{y_i}

    Args:
      logits: shape ``[n, k]``.
      labels: int, shape ``[n]``; samples with a negative label are ignored, whatever
        their logits are.  Soft labels are float, ``[n, k]``: the logarithm is averaged
        with these probabilities, and a row of zeros means no label.

    Returns:
      Scalar, in nats.

    Examples:
      >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([1, 3]))  # log 4
      Array(1.386, dtype=float32)
    """
    double = logits.dtype == jnp.float64
    logits = logits.astype(jnp.float64 if double else jnp.float32)
    valid = class_labels(labels) >= 0
    (logits,) = masks.zeroed(valid, logits)
    if is_soft(labels):
        losses = _soft_cross_entropy(logits, labels)
    else:
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(valid, labels, 0)
        )
    count = jnp.maximum(jnp.sum(valid), 1).astype(losses.dtype)
    return jnp.sum(jnp.where(valid, losses, 0)) / count
