"""Counts what a network predicts correctly.

Sums over images are returned instead of means, because batches and devices may have
different numbers of images.  A negative label means that an image is padding.
"""

import jax
import jax.numpy as jnp
import optax


def evaluation_sums(
    logits: jax.Array, labels: jax.Array, top: int | None = None
) -> dict[str, jax.Array]:
    """Counts images and correct predictions, and sums the cross-entropy.

    Args:
      logits: logits, ``[n, k]``.
      labels: int ``[n]``; images with a negative label are not counted.
      top: number of predicted classes of which one must be right, for ``correct_top``;
        at most k.  None leaves it out.

    Returns:
      ``count``, ``correct``, ``loss`` (nats) and ``correct_top``, all scalars.

    Raises:
      ValueError: ``top`` is not from 1 to k.

    Examples:
      >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
      >>> sums = evaluation_sums(logits, jnp.array([2, 2, -1]), top=2)
      >>> int(sums["count"]), int(sums["correct"]), int(sums["correct_top"])
      (2, 0, 1)
    """
    if top is not None and not 1 <= top <= logits.shape[-1]:
        raise ValueError(
            f"top must be from 1 to the number of classes, {logits.shape[-1]}, got "
            f"{top}; lower it, or leave it out"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    valid = labels >= 0
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(valid, labels, 0)
    )
    hits = jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels
    sums = {
        "count": jnp.sum(valid),
        "correct": jnp.sum(hits & valid),
        "loss": jnp.sum(jnp.where(valid, losses, 0)),
    }
    if top is not None:
        _, predicted = jax.lax.top_k(logits, top)  # [n, top]
        among = jnp.any(predicted == labels[:, None], axis=-1)
        sums["correct_top"] = jnp.sum(among & valid)
    return sums
