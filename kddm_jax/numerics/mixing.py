"""Smooths labels, and mixes the images of a batch.

Both make soft labels, a probability for each class.  *Label smoothing* gives a share of
each label's probability to all classes alike.  *Mixup* replaces each image by a
weighted mean with another image of the batch, and each label by the same mean.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kddm_jax.numerics.checks import check_labels, check_number
from kddm_jax.numerics.classes import wide
from kddm_jax.numerics.targets import class_labels, is_soft

# Folded into a step's key, like the positions of images, which are smaller numbers, and
# the number of dropout, which is the next one.
MIXING = np.uint32(2**32 - 2)

Mix = Callable[[jax.Array, Any, jax.Array], tuple[Any, jax.Array]]


def _check_smoothing(name, value):
    """Raises if a share of the labels is not in [0, 1)."""
    hint = "; pass a share in [0, 1), such as 0.1"
    check_number(name, value, positive=False, hint=hint)
    if value >= 1:
        raise ValueError(f"{name} must be less than 1, got {value}{hint}")


def smooth_labels(
    labels: jax.Array, *, num_classes: int, smoothing: float = 0.0
) -> jax.Array:
    r"""Computes smoothed soft labels.

    .. math:: t_i = (1 - s)\, e_{y_i} + s / k

    Args:
      labels: int, shape ``[n]``, or ``[n, t]`` for tokens; or soft labels ``[..., k]``,
        which replace the one-hot vectors e.
      num_classes: k, above all labels.
      smoothing: s, in [0, 1).

    Returns:
      Float, shape ``[n, k]`` or ``[n, t, k]``; a row of zeros for a sample without a
      label, and of NaN for a traced label of k or more.

    Raises:
      ValueError: ``smoothing`` is not in [0, 1), or labels are no integers or, if they
        are not traced, not below k.

    References:
      Szegedy et al., Rethinking the Inception architecture, CVPR 2016, section 7; the
      formula of `optax.smooth_labels` and of ``torch.nn.CrossEntropyLoss``.

    Examples:
      >>> smooth_labels(jnp.array([1, -1]), num_classes=2, smoothing=0.5)
      Array([[0.25, 0.75],
             [0.  , 0.  ]], dtype=float32)
    """
    _check_smoothing("smoothing", smoothing)
    labels = wide(labels)  # num_classes may not fit into their dtype, such as uint8
    if labels.ndim > 1 and jnp.issubdtype(labels.dtype, jnp.floating):
        labelled, targets = jnp.any(labels != 0, axis=-1), labels
    else:
        check_labels(labels.reshape(-1), labels.size, num_classes=num_classes)
        labelled = labels >= 0
        targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        # Without this, a wrong label would be a row of zeros, which is no label.
        targets = jnp.where((labels < num_classes)[..., None], targets, jnp.nan)
    smooth = optax.smooth_labels(targets, smoothing) if smoothing else targets
    return jnp.where(labelled[..., None], smooth, jnp.zeros((), smooth.dtype))


def mixup(
    key: jax.Array, images: Any, targets: jax.Array, *, alpha: float
) -> tuple[Any, jax.Array]:
    r"""Mixes each sample of a batch with another one, and their soft labels.

    .. math:: \tilde x_i = \lambda x_i + (1 - \lambda) x_{p(i)}, \quad
              \tilde t_i = \lambda t_i + (1 - \lambda) t_{p(i)}, \quad
              \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    One share λ and one permutation p are drawn for the batch, as in the authors' code.
    A sample without a label is not mixed with any other.

    Args:
      key: random key.
      images: floating array ``[n, ...]``, or a tree of them.
      targets: soft labels, shape ``[n, k]``; a row of zeros means no label.
      alpha: α, ``> 0``.

    Returns:
      The mixed images and soft labels.

    Raises:
      ValueError: images are not floating, targets are not ``[n, k]``, or ``alpha`` is
        not positive.

    References:
      Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018, equation 1.

    Examples:
      >>> images, targets = mixup(
      ...     jax.random.key(0), jnp.ones((2, 4)), jnp.eye(2), alpha=1.0
      ... )
      >>> images.shape, targets.sum(axis=1)
      ((2, 4), Array([1., 1.], dtype=float32))
    """
    check_number("alpha", alpha, positive=True)
    for array in jax.tree.leaves(images):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"images must be floating to be mixed, got {array.dtype}; augment must "
                "return floats"
            )
    if not is_soft(targets):
        raise ValueError(
            "targets must be soft labels of shape [n, k] to be mixed, got "
            f"{targets.dtype} of shape {list(targets.shape)}; leave mixup out for "
            "tokens, and smooth labels that are classes"
        )
    draw_share, draw_partner = jax.random.split(key)
    share = jax.random.beta(draw_share, alpha, alpha, dtype=jnp.float32)
    n = len(targets)
    partner = jax.random.permutation(draw_partner, n)
    labelled = class_labels(targets) >= 0
    partner = jnp.where(labelled & labelled[partner], partner, jnp.arange(n))

    def mixed(array):  # in this form a sample that is its own partner keeps its bits
        return array + (1 - share).astype(array.dtype) * (array[partner] - array)

    return jax.tree.map(mixed, images), mixed(targets)


def make_mix(
    *, num_classes: int, label_smoothing: float = 0.0, mixup_alpha: float = 0.0
) -> Mix | None:
    """Makes the argument ``mix`` of `train_step.make_train_step`.

    Args:
      num_classes: number of classes, which is that of the networks' logits.
      label_smoothing: share of each label's probability that is given to all classes
        alike, in [0, 1).
      mixup_alpha: α of `mixup`, ``>= 0``; 0 does not mix images.

    Returns:
      ``mix(key, images, labels) -> (images, soft labels)``; None if both are 0.

    Raises:
      ValueError: ``label_smoothing`` is not in [0, 1), or ``mixup_alpha`` is negative.

    Examples:
      >>> make_mix(num_classes=3) is None
      True
      >>> mix = make_mix(num_classes=2, label_smoothing=0.5)
      >>> mix(jax.random.key(0), jnp.ones((1, 4)), jnp.array([1]))[1]
      Array([[0.25, 0.75]], dtype=float32)
    """
    _check_smoothing("label_smoothing", label_smoothing)
    check_number("mixup_alpha", mixup_alpha, positive=False)
    if not label_smoothing and not mixup_alpha:
        return None

    def mix(key, images, labels):
        targets = smooth_labels(
            labels, num_classes=num_classes, smoothing=label_smoothing
        )
        if not mixup_alpha:
            return images, targets
        return mixup(key, images, targets, alpha=mixup_alpha)

    return mix


def mix_batch(
    mix: Mix, key: jax.Array, images: Any, labels: jax.Array, axis_name: Any
) -> tuple[Any, jax.Array]:
    """Applies ``mix`` to a device's share of a batch, with a key of its own.

    Args:
      mix: function ``(key, images, labels) -> (images, labels)``.
      key: key of the step.
      images: this device's share of the augmented images.
      labels: labels of these images, as in `losses.distill_loss`.
      axis_name: name of the mapped axis, or None.

    Returns:
      The mixed images and their labels.
    """
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    key = jax.random.fold_in(jax.random.fold_in(key, MIXING), device)
    return mix(key, images, labels)
