"""Draws samples by class: balanced subsets, and a stratified split for validation.

Draws use PCG64's raw output, which never changes, so that a seed gives the same samples
with every version of NumPy and on every platform.
"""

import numpy as np


def ranks(labels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Computes the position of each sample within its class by the order of draws."""
    order = np.lexsort((draws, labels))
    _, start, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(start, counts)
    return ranks


def _check_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        fix = "labels.astype(int)" if labels.ndim == 1 else "argmax(one_hot, axis=-1)"
        # argmax over a single column would make every label 0.
        fix = "labels[:, 0]" if labels.shape[1:] == (1,) else fix
        raise ValueError(
            "labels must be integers of shape [n], got "
            f"{labels.dtype} {list(labels.shape)}; pass {fix}"
        )
    return labels


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws samples with the same number from each class, as far as possible.

    Class sizes in the subset differ by at most one until a class is used up.  For
    one seed the subsets are nested: the subset of ``count`` samples is the beginning
    of every larger one.

    Args:
      labels: labels, integers, shape ``[n]``.
      count: number of samples to draw, at most ``n``.
      seed: seed of the draw, the same subset on every platform.

    Returns:
      Indices into ``labels``, ``int64``, shape ``[count]``, without repetition.

    Raises:
      ValueError: ``labels`` has another shape or dtype, or ``count`` is out of range.

    Examples:
      >>> labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
      >>> np.bincount(labels[balanced_subset(labels, 4, seed=0)])
      array([2, 2])
    """
    labels = _check_labels(labels)
    if not 0 <= count <= len(labels):
        raise ValueError(f"count must be in [0, n]=[0, {len(labels)}], got {count}")
    # PCG64's raw output is guaranteed never to change; Generator's methods are not.
    draws = np.random.PCG64(seed).random_raw(len(labels))
    # The first of every class, then the second of every class, and so on.
    return np.lexsort((draws, ranks(labels, draws)))[:count]


def stratified_split(
    labels: np.ndarray, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits off samples for validation, from each class in proportion to its size.

    Args:
      labels: labels, integers, shape ``[n]``.
      held_out: number of validation samples, less than ``n``.
      seed: seed of the draw, the same split on every platform.

    Returns:
      Indices of the training samples, shape ``[n - held_out]``, and of the validation
      samples, shape ``[held_out]``; ``int64``, ascending, disjoint.

    Raises:
      ValueError: ``labels`` has another shape or dtype, or ``held_out`` is out of
        range.

    Examples:
      >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
      >>> train, held_out = stratified_split(labels, 3, seed=0)
      >>> np.bincount(labels[train]), np.bincount(labels[held_out])
      (array([4, 2]), array([2, 1]))
    """
    labels = _check_labels(labels)
    if not 0 <= held_out < len(labels):
        raise ValueError(
            f"held_out must be in [0, n)=[0, {len(labels)}), got {held_out}"
        )
    draws = np.random.PCG64(seed).random_raw(len(labels))
    _, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # Sample r of a class of n_c has its turn at (r + 1/2) / n_c, so that at any time
    # the same share of each class is drawn, up to rounding (Sainte-Lague).
    turn = (ranks(labels, draws) + 0.5) / counts[class_of]
    order = np.lexsort((draws, turn))
    return np.sort(order[held_out:]), np.sort(order[:held_out])
