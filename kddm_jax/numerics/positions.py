"""Turns maps and tokens, which have positions, into features ``[n, d]``.

``"pool"`` averages a layer over its positions, so that an image stays one sample.
``"each"`` makes every position a sample; the positions of student and teacher must then
correspond.  Tokens may be masked: they are then neither averaged nor samples.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kddm_jax.numerics.checks import as_float
from kddm_jax.numerics.pooling import average_pool
from kddm_jax.numerics.tokens import marked, mean_of_tokens

POSITIONS = ("pool", "each")


def _grids_alike(pair):
    """Pools maps to the smaller grid along each side; tokens must already match."""
    if all(array.ndim == 4 for array in pair):
        grid = tuple(
            min(sides) for sides in zip(*(a.shape[1:3] for a in pair), strict=True)
        )
        pair = [average_pool(as_float("maps", array), grid) for array in pair]
    if pair[0].shape[1:-1] != pair[1].shape[1:-1]:
        tokens = pair[0].ndim == pair[1].ndim == 3
        fix = "the same tokens" if tokens else "maps [n, h, w, c]"
        raise ValueError(
            "positions of student and teacher must correspond, got "
            f"{list(pair[0].shape)} and {list(pair[1].shape)}; give both "
            f"networks {fix}, or use "
            'positions="pool"'
        )
    return pair


def as_matrices(
    pair: Sequence[jax.Array],
    labels: jax.Array,
    positions: str,
    *,
    mask: jax.Array | None = None,
    tokens: Sequence[jax.Array | None] = (None, None),
) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """Turns two layers of any rank into features.

    Args:
      pair: student's and teacher's layer: features ``[n, d]``, tokens ``[n, t, c]`` or
        maps ``[n, h, w, c]``.
      labels: shape ``[n]``.
      positions: a key of `POSITIONS`.
      mask: booleans, shape ``[n]``, False for no sample, or None.
      tokens: masks ``[n, t]`` of the tokens of both layers, or None.  A sample without
        tokens on one side is no sample; with ``"each"``, a token that is masked on one
        side is no sample.

    Returns:
      Features of both sides, shape ``[m, c]`` each, the labels ``[m]``, and the mask
      ``[m]``, or None if there are no masks.

    Raises:
      ValueError: positions of the two sides do not correspond.

    Examples:
      >>> maps, labels = jnp.ones((2, 3, 3, 5)), jnp.array([0, 1])
      >>> (x, y), labels, mask = as_matrices([maps, maps], labels, "each")
      >>> x.shape, labels.shape
      ((18, 5), (18,))
    """
    if all(array.ndim <= 2 for array in pair):
        return list(pair), labels, mask
    if positions == "pool":
        pooled = [
            layer if layer.ndim == 2 else mean_of_tokens(layer, own)
            for layer, own in zip(pair, tokens, strict=True)
        ]
        present = [None if own is None else jnp.any(own, axis=1) for own in tokens]
        return pooled, labels, marked(mask, present)
    pair = _grids_alike(pair)
    flat = [array.reshape(-1, array.shape[-1]) for array in pair]
    count = len(flat[0]) // len(labels)
    mask = None if mask is None else jnp.repeat(mask, count)
    each = [None if own is None else own.reshape(-1) for own in tokens]
    return flat, jnp.repeat(labels, count), marked(mask, each)
