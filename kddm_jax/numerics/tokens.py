"""Reads the mask of a loss, which marks samples or tokens, and makes tokens samples.

A mask of tokens is ``[n, t]`` and belongs to a layer ``[n, t, c]``, such as the output
of a Transformer's block; a zero means no token.  Masks of several layers are a mapping
from layer names, in which ``"samples"`` is the mask ``[n]`` of samples.  A masked token
may contain anything, including NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kddm_jax.numerics.checks import as_float
from kddm_jax.numerics.masks import as_booleans, check_mask

SAMPLES = "samples"

Mask = jax.Array | Mapping[str, jax.Array] | None


class Masks(NamedTuple):
    """Contains the masks of a loss.

    Attributes:
      samples: booleans, shape ``[n]``, or None for all samples.
      tokens: mapping from layer names to booleans ``[n, t]``.
    """

    samples: jax.Array | None
    tokens: dict[str, jax.Array]


def read_masks(mask: Mask, n: int) -> Masks:
    """Reads a mask of samples, or a mapping with masks of tokens.

    Args:
      mask: None, shape ``[n]``, or a mapping from layer names to ``[n, t]`` and from
        ``"samples"`` to ``[n]``.
      n: number of samples.

    Returns:
      `Masks`.  If a mapping has no ``"samples"``, the samples are those that have a
      token in some layer of the mapping.

    Raises:
      ValueError: a shape is wrong, or a number is negative.

    Examples:
      >>> read_masks({"block1": jnp.array([[1, 1], [0, 0]])}, 2).samples
      Array([ True, False], dtype=bool)
    """
    if not isinstance(mask, Mapping):
        return Masks(check_mask(mask, n), {})
    tokens = {}
    for name, array in mask.items():
        if name == SAMPLES:
            continue
        if jnp.ndim(array) != 2 or len(array) != n:
            raise ValueError(
                f"mask[{name!r}] must have shape [n, t]=[{n}, t], got "
                f"{list(jnp.shape(array))}; pass one number for each token of the "
                "layer, zero where there is none"
            )
        tokens[name] = as_booleans(f"mask[{name!r}]", array)
    samples = check_mask(mask.get(SAMPLES), n)
    if samples is None and tokens:
        samples = jnp.any(jnp.concatenate([*tokens.values()], axis=1), axis=1)
    return Masks(samples, tokens)


def check_tokens(
    tokens: Mapping[str, jax.Array], layers: Mapping[str, Mapping[str, jax.Array]]
) -> None:
    """Checks that masks of tokens fit the layers that they name.

    Args:
      tokens: from `read_masks`.
      layers: mapping from ``"student"`` and ``"teacher"`` to that network's layers.

    Raises:
      ValueError: no network has the layer, the layer has no tokens, or their numbers
        differ.
    """
    for name, mask in tokens.items():
        found = {side: of[name] for side, of in layers.items() if name in of}
        if not found:
            known = dict.fromkeys(name for of in layers.values() for name in of)
            raise ValueError(
                f"mask names the layer {name!r}, which neither network has; the layers "
                f'are {", ".join(known)}, and "samples" is the mask of samples'
            )
        for side, layer in found.items():
            if layer.ndim == 3 and layer.shape[:2] != mask.shape:
                raise ValueError(
                    f"mask[{name!r}] must have shape [n, t]={list(layer.shape[:2])}, "
                    f"as the {side}'s layer, got {list(mask.shape)}; if both networks "
                    "have a layer of that name, rename one"
                )
        if all(layer.ndim != 3 for layer in found.values()):
            raise ValueError(
                f"mask[{name!r}] leaves out tokens, but that layer has shape "
                f"{list(next(iter(found.values())).shape)}, not [n, t, c]; reshape "
                "maps to tokens, or pass a mask of samples"
            )


def tokens_of(
    tokens: Mapping[str, jax.Array], name: str, layer: jax.Array
) -> jax.Array | None:
    """Returns the mask of a layer's tokens, or None if all of them are tokens.

    Args:
      tokens: from `read_masks`.
      name: name of the layer.
      layer: the layer, of any rank; only a layer ``[n, t, c]`` has tokens.
    """
    return tokens.get(name) if layer.ndim == 3 else None


def without_tokens(layer: jax.Array, tokens: jax.Array | None) -> jax.Array:
    """Sets what is no token to zero.

    Args:
      layer: shape ``[n, t, c]``, or any shape if ``tokens`` is None.
      tokens: shape ``[n, t]``, or None for all tokens.

    Returns:
      The layer.
    """
    if tokens is None:
        return layer
    return jnp.where(tokens[:, :, None], layer, jnp.zeros((), layer.dtype))


def mean_of_tokens(layer: jax.Array, tokens: jax.Array | None) -> jax.Array:
    """Averages a layer over its tokens or positions.

    Args:
      layer: shape ``[n, ..., c]``.
      tokens: shape ``[n, t]``, or None for all positions.

    Returns:
      Shape ``[n, c]``; zeros for a sample without tokens.

    Examples:
      >>> layer = jnp.array([[[1.0], [3.0], [jnp.nan]]])
      >>> mean_of_tokens(layer, jnp.array([[True, True, False]]))
      Array([[2.]], dtype=float32)
    """
    layer = as_float("maps", layer)
    if tokens is None:
        return jnp.mean(layer, axis=tuple(range(1, layer.ndim - 1)))
    count = jnp.maximum(jnp.sum(tokens.astype(layer.dtype), axis=1), 1)
    return jnp.sum(without_tokens(layer, tokens), axis=1) / count[:, None]


Network = tuple[Any, Mapping[str, jax.Array]]  # logits or None, and layers


def samples_of_tokens(network: Network, shape: tuple[int, int]) -> Network:
    """Makes every token a sample in the outputs of a network.

    Args:
      network: logits ``[n, t, k]`` or None, and layers by name.
      shape: ``(n, t)``.

    Returns:
      Logits ``[n t, k]``, and layers ``[n t, ...]``.  Layers that do not start with
      ``[n, t]`` and have a further axis are returned unchanged.

    Examples:
      >>> network = jnp.zeros((2, 3, 5)), {"block": jnp.ones((2, 3, 4))}
      >>> logits, layers = samples_of_tokens(network, (2, 3))
      >>> logits.shape, layers["block"].shape
      ((6, 5), (6, 4))
    """
    n, t = shape

    def flat(array):
        if array.ndim < 3 or array.shape[:2] != (n, t):
            return array
        return array.reshape(n * t, *array.shape[2:])

    logits, layers = network
    flat_logits = None if logits is None else flat(logits)
    return flat_logits, {name: flat(layer) for name, layer in layers.items()}


def labels_of_tokens(
    labels: jax.Array, mask: Mask, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the labels and the mask of all tokens, for `samples_of_tokens`.

    Args:
      labels: int ``[n, t]``, or soft labels, float ``[n, t, k]``.
      mask: shape ``[n, t]``, or ``[n]`` for all tokens of a sequence, or None.
      shape: ``(n, t)``.

    Returns:
      Labels ``[n t]`` or ``[n t, k]``, and a mask ``[n t]`` or None.

    Raises:
      ValueError: a shape is wrong, or the mask names layers.
    """
    n, t = shape
    if labels.shape[:2] != shape:
        raise ValueError(
            f"labels must have shape [n, t]=[{n}, {t}], as logits [n, t, k] have, got "
            f"{list(labels.shape)}; give each token a label, -1 for none"
        )
    labels = labels.reshape(n * t, *labels.shape[2:])
    if mask is None:
        return labels, None
    if isinstance(mask, Mapping) or jnp.shape(mask) not in ((n,), (n, t)):
        found = "a mapping" if isinstance(mask, Mapping) else list(jnp.shape(mask))
        raise ValueError(
            f"with logits [n, t, k], every token is a sample, so mask must have shape "
            f"[n, t]=[{n}, {t}] or [n], got {found}; pass one mask of the tokens that "
            "all terms compare"
        )
    mask = jnp.asarray(mask)
    mask = mask if mask.ndim == 2 else mask[:, None]
    return labels, jnp.broadcast_to(mask, (n, t)).reshape(n * t)


def all_tokens(
    student: Network, teacher: Network, labels: jax.Array, mask: Mask
) -> tuple[Network, Network, jax.Array, jax.Array | None]:
    """Makes every token a sample in all arrays of a loss.

    Args:
      student: logits ``[n, t, k]``, and layers by name.
      teacher: logits of the same tokens, or None, and layers.
      labels: as in `labels_of_tokens`.
      mask: as in `labels_of_tokens`.

    Returns:
      The same arrays, with one leading axis of ``n t`` samples.

    Raises:
      ValueError: a shape is wrong, or the mask names layers.
    """
    n, t = student[0].shape[:2]
    labels, mask = labels_of_tokens(jnp.asarray(labels), mask, (n, t))
    logits = teacher[0]
    if logits is not None and (jnp.ndim(logits) != 3 or logits.shape[:2] != (n, t)):
        raise ValueError(
            f"teacher_logits must have shape [n, t, k]=[{n}, {t}, k], as those of the "
            f"student, got {list(jnp.shape(logits))}; pass those of the same tokens"
        )
    student, teacher = (samples_of_tokens(one, (n, t)) for one in (student, teacher))
    return student, teacher, labels, mask


def marked(
    mask: jax.Array | None, several: Sequence[jax.Array | None]
) -> jax.Array | None:
    """Marks the rows that every mask marks.

    Args:
      mask: shape ``[m]``, or None for all rows.
      several: other masks of the same rows.

    Returns:
      Shape ``[m]``; None if all masks are None.
    """
    for other in several:
        if other is not None:
            mask = other if mask is None else mask & other
    return mask
