"""Checks the features of one layer, and sorts its samples by class.

These functions run on the host and cannot be traced, because shapes depend on values.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.numerics.checks import check_labels


def flat_features(features: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Flattens the features of each sample.

    Args:
      features: features, shape ``[n, ...]``.

    Returns:
      The same features, shape ``[n, d]``.

    Raises:
      ValueError: features have another shape, or there are none.
    """
    if np.ndim(features) < 2 or 0 in np.shape(features):
        raise ValueError(
            f"features must have shape [n, ...], got {list(np.shape(features))}; "
            "give each sample its features along the later axes"
        )
    return features.reshape(features.shape[0], -1)


def check_finite(*arrays: np.ndarray) -> None:
    """Raises a `ValueError` unless all numbers made of features are finite."""
    if not all(np.all(np.isfinite(array)) for array in arrays):
        raise ValueError(
            "features must be finite, got NaN, infinity or values whose square is "
            "infinite; rescale them or check the network"
        )


def by_class(labels: jax.Array | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts labelled samples by class.

    Args:
      labels: int, shape ``[n]``; samples with negative labels are left out.
      n: number of samples.

    Returns:
      ``(order, starts)``: indices of the labelled samples, sorted by class, and the
      place in this order where each class starts.

    Raises:
      ValueError: labels have a wrong shape or dtype, there are fewer than two classes,
        or a class has only one sample.
    """
    labels = np.asarray(check_labels(jnp.asarray(labels), n))
    order = np.argsort(labels, kind="stable")
    order = order[np.count_nonzero(labels < 0) :]
    names, starts, counts = np.unique(
        labels[order], return_index=True, return_counts=True
    )
    if len(names) < 2:
        raise ValueError(
            f"labels must hold two classes at least, got {len(names)}; add "
            "samples of another class"
        )
    if counts.min() < 2:
        raise ValueError(
            f"labels must give each class two samples at least, class "
            f"{names[counts.argmin()]} has one; take more samples or leave it out"
        )
    return order, starts
