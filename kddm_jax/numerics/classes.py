"""Computes class masks and class means of a labelled batch.

There is no axis of classes: ``same[i, j]`` is 1 if samples i and j share a class, and a
number that belongs to a class is stored once for each of its samples.  Shapes therefore
do not depend on the labels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_choice, check_labels, check_pair
from kddm_jax.numerics.grams import map_rows
from kddm_jax.numerics.linalg import matmul


class Classes(NamedTuple):
    """Contains the same-class mask and the weights of a labelled batch.

    Attributes:
      labelled: ``[n]``, True for samples with a label.
      labels: int, ``[n]``.
      counts: ``[n]``, size of each sample's class (1 without a label).
      weights: ``[n]``, ``w_c / n_c`` for a sample of class c, 0 without a label.
      mass: scalar, sum of ``weights``: 1, or the number of classes for "sum".
    """

    labelled: jax.Array
    labels: jax.Array
    counts: jax.Array
    weights: jax.Array
    mass: jax.Array

    @property
    def same(self) -> jax.Array:
        """Returns ``[n, n]``, 1 where two samples share a class, else 0."""
        return self.same_as(self.labels)

    def same_as(self, labels: jax.Array) -> jax.Array:
        """Returns ``[r, n]``, 1 where one of r labels is the class of a sample."""
        same = (labels[:, None] == self.labels[None, :]) & self.labelled[None, :]
        return same.astype(self.weights.dtype)


REDUCTIONS = ("mean", "weighted", "sum")


def classes(labels: jax.Array, *, reduction: str, dtype: jnp.dtype) -> Classes:
    """Computes the same-class mask and the weights of the classes in a batch.

    Args:
      labels: int, shape ``[n]``; negative labels have weight zero.
      reduction: weight of each class present: ``"mean"`` gives ``1 / n_present``,
        ``"weighted"`` its frequency ``n_c / n``, ``"sum"`` 1.
      dtype: dtype of the arrays returned.

    Returns:
      `Classes`.

    Raises:
      ValueError: ``reduction`` is unknown.

    Examples:
      >>> classes(jnp.array([0, 0, 5, -1]), reduction="mean", dtype=jnp.float32).weights
      Array([0.25, 0.25, 0.5 , 0.  ], dtype=float32)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    valid = labels >= 0
    alike = lambda rows: jnp.sum((rows == labels[None, :]).astype(dtype), axis=1)
    counts = jnp.where(valid, map_rows(alike, [labels[:, None]]), 1)  # [n]
    share = valid.astype(dtype) / counts
    present = jnp.maximum(jnp.sum(share), 1)
    total = jnp.maximum(jnp.sum(valid.astype(dtype)), 1)
    weights = {
        "mean": share / present,
        "weighted": valid.astype(dtype) / total,
        "sum": share,
    }[reduction]
    return Classes(valid, labels, counts, weights, jnp.sum(weights))


def class_means(x: jax.Array, groups: Classes) -> jax.Array:
    """Computes, for each sample, the mean of its class.

    Args:
      x: shape ``[n, d]``.
      groups: result of `classes`.

    Returns:
      Shape ``[n, d]``: row i is the mean of the class of sample i (0 without a label).

    Examples:
      >>> groups = classes(jnp.array([0, 0, 1]), reduction="mean", dtype=jnp.float32)
      >>> class_means(jnp.array([[1.0], [3.0], [7.0]]), groups)[:, 0]
      Array([2., 2., 7.], dtype=float32)
    """
    total = lambda labels: matmul(groups.same_as(labels[:, 0]), x)
    return map_rows(total, [groups.labels[:, None]]) / groups.counts[:, None]


def wide(labels: jax.Array) -> jax.Array:
    """Converts small and unsigned integers, in which -1 would be a class, to int32.

    Args:
      labels: integers of any shape; other arrays are returned as they are.

    Returns:
      The labels as int32 or int64.

    Examples:
      >>> wide(jnp.array([3], jnp.uint8)).dtype
      dtype('int32')
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return labels
    return labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)


def with_mask(labels: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Removes the labels of rows that are not samples.

    Args:
      labels: int, shape ``[n]``.
      mask: shape ``[n]``, zero for no sample, or None.

    Returns:
      The labels, -1 where there is no sample.

    Examples:
      >>> with_mask(jnp.array([3, 99]), jnp.array([True, False])).tolist()
      [3, -1]
    """
    if mask is None or jnp.shape(labels) != jnp.shape(mask):  # check_labels raises
        return labels
    return jnp.where(jnp.asarray(mask).astype(bool), wide(labels), -1)


def labelled_pair(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    num_classes: int | None,
    reduction: str,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Classes]:
    """Checks the arguments of a class-conditional distance and masks its classes.

    Samples without a label may contain anything, so their features are set to the mean
    of the labelled samples.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      labels: int, shape ``[n]``; negative labels mean no label.
      num_classes: if given, labels that are not traced must be less than this.
      reduction: as in `classes`.
      mask: shape ``[n]``, zero for no sample, or None.

    Returns:
      ``(x, y, groups)``, the features as float32 or float64.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, or ``reduction`` is unknown.
    """
    x, y = check_pair(x, y, same_rows=True)
    labels = with_mask(labels, masks.check_mask(mask, x.shape[0]))
    labels = check_labels(labels, x.shape[0], num_classes=num_classes)
    groups = classes(labels, reduction=reduction, dtype=x.dtype)
    x, y = masks.filled(groups.labelled, x, y)
    return x, y, groups
