"""Compares a batch with a bank, which holds the teacher's features of other images.

A bank has rows of features, each with a class and, optionally, a weight within its
class. A row may be the features of an image, a centroid, or one of the points that
together have the mean and the covariance of a class (`gaussian_bank`). Such a
comparison needs neither the teacher nor its images. Sums over a class use one-hot
matrices ``[m, k]``, because a matrix ``[m, m]`` of the bank's pairs would be slow.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_float, check_choice, check_labels, check_pair
from kddm_jax.numerics.classes import REDUCTIONS, with_mask
from kddm_jax.numerics.linalg import matmul


class Bank(NamedTuple):
    """Contains the teacher's features of other images than those of a batch.

    Attributes:
      features: float, shape ``[m, d]``.  A normalization of the loss does not apply to
        them, so they must be normalized when the bank is made.
      labels: class of each row, int, shape ``[m]``.
      weights: share of each row in its class, float, shape ``[m]``, not negative; they
        need not sum to one.  None weights all rows of a class alike.
    """

    features: jax.Array
    labels: jax.Array
    weights: jax.Array | None = None


class Across(NamedTuple):
    """Contains the classes that a batch shares with a bank.

    Classes without a sample in the batch, or without a row in the bank, have weight 0.

    Attributes:
      of_x: ``[n, k]``, 1 at the class of each sample that has a label, else 0.
      of_y: ``[m, k]``, the same for the rows of the bank.
      share_x: ``[n]``, share of each sample in its class: ``1 / n_c``.
      share_y: ``[m]``, share of each row of the bank in its class.
      weights: ``[k]``, weights of the classes.
    """

    of_x: jax.Array
    of_y: jax.Array
    share_x: jax.Array
    share_y: jax.Array
    weights: jax.Array

    @property
    def row_weights(self) -> tuple[jax.Array, jax.Array]:
        """Returns ``w_c`` times the share of each row, ``[n]`` and ``[m]``."""
        own = lambda of: matmul(of, self.weights[:, None])[:, 0]
        return self.share_x * own(self.of_x), self.share_y * own(self.of_y)

    def mean(self, x: jax.Array) -> jax.Array:
        """Computes the mean of each class in the batch, ``[k, d]``."""
        return matmul((self.of_x * self.share_x[:, None]).T, x)

    def means(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the mean of each class, ``[k, d]``, in the batch and in the bank."""
        return self.mean(x), matmul((self.of_y * self.share_y[:, None]).T, y)

    def centered(self, x: jax.Array) -> jax.Array:
        """Subtracts the mean of its class from each sample; zeros without a label."""
        labelled = jnp.sum(self.of_x, axis=1, keepdims=True)
        return labelled * (x - matmul(self.of_x, self.mean(x)))


def check_no_weights(weights_y: jax.Array | None) -> None:
    """Raises a ``ValueError`` if there are weights although there is no bank."""
    if weights_y is not None:
        raise ValueError("weights_y needs labels_y, got None; pass the bank's labels")


def _one_hot(labels, classes, dtype):
    known = jnp.arange(classes, dtype=jnp.int32)[None, :]
    return (labels.astype(jnp.int32)[:, None] == known).astype(dtype)


def _shares(of, weights):
    """Divides the weights of rows by the sum of their class."""
    total = matmul(weights[None, :], of)[0]  # [k]
    own = matmul(of, total[:, None])[:, 0]
    return jnp.where(own > 0, weights / jnp.where(own > 0, own, 1), 0)


def across(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    labels_y: jax.Array,
    weights_y: jax.Array | None,
    num_classes: int | None,
    reduction: str,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Across]:
    """Checks a batch and a bank, and finds the classes that they share.

    Args:
      x: student features, shape ``[n, d]``.
      y: features of the bank, shape ``[m, d]``.
      labels: int, shape ``[n]``; negative labels mean no label.
      labels_y: int, shape ``[m]``; rows with a negative label are ignored.
      weights_y: shape ``[m]``, shares of the rows in their classes, or None.
      num_classes: number of classes k.
      reduction: as in `numerics.classes.classes`.
      mask: shape ``[n]``, zero for no sample, or None.

    Returns:
      ``(x, y, classes)``, the features as float32 or float64.  Samples and rows
      without a label are set to the mean of the others.

    Raises:
      ValueError: a shape, dtype or label is wrong, or ``num_classes`` is missing.

    Examples:
      >>> x, y, of = across(
      ...     jnp.ones((2, 1)), jnp.ones((3, 1)), jnp.array([0, 1]),
      ...     labels_y=jnp.array([0, 0, 2]), weights_y=None, num_classes=3,
      ...     reduction="mean", mask=None)
      >>> of.weights.tolist(), of.share_y.tolist()
      ([1.0, 0.0, 0.0], [0.5, 0.5, 1.0])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if num_classes is None:
        raise ValueError(
            "labels_y needs num_classes, got None; pass the number of classes, such as "
            "the number of logits"
        )
    x, y = check_pair(x, y)
    labels = with_mask(labels, masks.check_mask(mask, x.shape[0]))
    labels = check_labels(labels, x.shape[0], num_classes=num_classes)
    labels_y = check_labels(
        labels_y, y.shape[0], num_classes=num_classes, name="labels_y"
    )
    of_x, of_y = (_one_hot(z, num_classes, x.dtype) for z in (labels, labels_y))
    weights_y = jnp.ones(len(y), y.dtype) if weights_y is None else weights_y
    weights_y = as_float("weights_y", weights_y).astype(y.dtype)
    if weights_y.shape != labels_y.shape:
        raise ValueError(
            f"weights_y must have shape [m]=[{len(y)}], got {list(weights_y.shape)}; "
            "pass one number for each row of the bank"
        )
    if not isinstance(weights_y, Tracer) and not np.all(np.asarray(weights_y) >= 0):
        raise ValueError(
            f"weights_y must be >= 0, got {np.min(np.asarray(weights_y))}; pass the "
            "share of each row in its class"
        )
    share_x = _shares(of_x, jnp.ones(len(x), x.dtype))
    share_y = _shares(of_y, weights_y)
    in_x, in_y = (
        matmul(share[None, :], of)[0] > 0
        for share, of in ((share_x, of_x), (share_y, of_y))
    )
    both = (in_x & in_y).astype(x.dtype)
    counts = both * jnp.sum(of_x, axis=0)
    weights = {
        "mean": both / jnp.maximum(jnp.sum(both), 1),
        "weighted": counts / jnp.maximum(jnp.sum(counts), 1),
        "sum": both,
    }[reduction]
    (x,) = masks.filled(jnp.any(of_x > 0, axis=1), x)
    (y,) = masks.filled(jnp.any(of_y > 0, axis=1), y)
    return x, y, Across(of_x, of_y, share_x, share_y, weights)


def own_classes(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    reduction: str,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Across]:
    """Finds the classes of a pair of features, with an axis of classes.

    Arrays ``[n, k]`` take the place of the ``[n, n]`` of `classes.labelled_pair`.
    Traced labels that are not below ``num_classes`` count as no label.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      labels: int, shape ``[n]``; negative labels mean no label.
      num_classes: number of classes k.
      reduction: as in `numerics.classes.classes`.
      mask: shape ``[n]``, zero for no sample, or None.

    Returns:
      ``(x, y, classes)`` as in `across`.

    Raises:
      ValueError: a shape, dtype or label is wrong.
    """
    x, y = check_pair(x, y, same_rows=True)
    labels = with_mask(labels, masks.check_mask(mask, x.shape[0]))
    return across(
        *(x, y, labels),
        labels_y=labels,
        weights_y=None,
        num_classes=num_classes,
        reduction=reduction,
        mask=None,
    )


def gaussian_bank(means: np.ndarray, covariances: np.ndarray) -> Bank:
    r"""Makes a bank whose classes have exactly the given means and covariances.

    .. math:: y_{cj} = \mu_c + \sqrt{d + 1}\; S_c^{1/2} v_j, \quad
              \sum_j v_j = 0, \quad \sum_j v_j v_j^\top = I

    The ``v_j`` are the corners of a regular simplex, so a class has ``d + 1`` rows.
    With such a bank, `class_gaussian_wasserstein` compares a batch with stored moments.

    Cost: k d³, once, on the host.  Not for: distances that depend on more than means
    and covariances.

    Args:
      means: mean of each class, shape ``[k, d]``.
      covariances: covariance of each class, ``[k, d, d]``, or its diagonal, ``[k, d]``.

    Returns:
      A `Bank` of ``k (d + 1)`` rows, as float32 NumPy arrays, without weights.

    Raises:
      ValueError: the shapes do not fit, or a covariance has a negative eigenvalue.

    References:
      Julier and Uhlmann, Reduced sigma point filters for the propagation of means and
      covariances through nonlinear transformations, 2002.

    Examples:
      >>> bank = gaussian_bank(np.zeros((1, 2)), np.array([[4.0, 1.0]]))
      >>> np.cov(bank.features.T, bias=True).round(5).tolist()
      [[4.0, 0.0], [0.0, 1.0]]
    """
    means = np.asarray(means, np.float64)
    covariances = np.asarray(covariances, np.float64)
    k, d = means.shape
    if covariances.shape == (k, d):
        covariances = covariances[:, :, None] * np.eye(d)
    if covariances.shape != (k, d, d):
        raise ValueError(
            f"covariances must have shape [{k}, {d}, {d}] or [{k}, {d}], got "
            f"{list(covariances.shape)}; pass one covariance for each mean"
        )
    values, vectors = np.linalg.eigh(covariances)
    # Round-off in float32 makes zero eigenvalues negative by 1e-6 of the largest.
    negative = values < -1e-4 * np.abs(values).max(axis=1, keepdims=True)
    if negative.any():
        raise ValueError(
            "covariances must be positive semidefinite, got the eigenvalue "
            f"{values[negative].min():g}; pass the covariance matrix of each class"
        )
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    roots = roots @ np.swapaxes(vectors, 1, 2)  # [k, d, d]
    # Columns of an orthogonal matrix whose first one is constant.
    basis = np.linalg.qr(np.column_stack([np.ones(d + 1), np.eye(d + 1, d)]))[0]
    rows = means[:, None, :] + (d + 1) ** 0.5 * basis[:, 1:] @ roots
    features: Any = rows.reshape(-1, d).astype(np.float32)
    labels: Any = np.repeat(np.arange(k, dtype=np.int32), d + 1)
    return Bank(features, labels)
