"""Makes deeper ResNets from weights, replaces heads, and adapts to grey images.

Each function takes variables ``{"params": ..., "batch_stats": ...}`` and returns those
of another network.  `kddm_jax.networks.torchvision.architecture` recognizes the network
of the given variables.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import adapters
from kddm_jax.networks.torchvision import (
    Variables,
    WeightsError,
    architecture,
    network_of,
)


def _identity_block(key: jax.Array, features: int) -> tuple[dict, dict]:
    """Makes parameters and statistics of a block that starts as the identity.

    Its second BatchNorm scales by zero, and maps are non-negative after a ReLU, so
    ``relu(x + 0) = x``.
    """
    shape = (3, 3, features, features)
    conv = lambda key: {
        "kernel": np.asarray(adapters.conv_init(key, shape, jnp.float32))
    }
    full = lambda value: np.full(features, value, np.float32)
    norm = lambda scale: {"scale": full(scale), "bias": full(0)}
    first, second = jax.random.split(key)
    params = {
        "conv1": conv(first),
        "bn1": norm(1),
        "conv2": conv(second),
        "bn2": norm(0),
    }
    stats = {name: {"mean": full(0), "var": full(1)} for name in ("bn1", "bn2")}
    return params, stats


def grow(
    key: jax.Array, variables: Variables, blocks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Makes a deeper network that computes the same function.

    The given blocks are copied.  Blocks are added at the end of each stage; they start
    as the identity, with random convolutions, and can be trained.

    Args:
      key: random key of the added convolutions.
      variables: variables of a network.
      blocks: wanted number of blocks in each of the four stages, such as
        ``ResNet34.blocks``.

    Returns:
      Variables of the deeper network.

    Raises:
      WeightsError: a stage already has more blocks.

    References:
      Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
      arXiv:1706.02677, section 5.1: the zero scale.

    Examples:
      >>> from kddm_jax.networks.torchvision import Architecture
      >>> variables = jax.tree.map(jnp.ones_like, Architecture(width=4).shapes())
      >>> grown = grow(jax.random.key(0), variables, (3, 4, 6, 3))
      >>> architecture(grown).name
      'ResNet34'
    """
    found, blocks = architecture(variables), tuple(blocks)
    fewer = [new < old for old, new in zip(found.blocks, blocks, strict=False)]
    if len(blocks) != 4 or any(fewer):
        raise WeightsError(
            f"blocks {blocks} cannot be grown from {found.blocks}; pass at least as "
            "many for each of the four stages"
        )
    params, stats = map(dict, network_of(variables).values())
    for stage, (old, new) in enumerate(zip(found.blocks, blocks, strict=True)):
        for index in range(old, new):
            # The key depends only on the position, so that a deeper network has the
            # same blocks.
            drawn = jax.random.fold_in(jax.random.fold_in(key, stage), index)
            name = f"layer{stage + 1}_{index}"
            params[name], stats[name] = _identity_block(drawn, found.width * 2**stage)
    return {"params": params, "batch_stats": stats}


def replace_head(
    key: jax.Array, variables: Variables, num_classes: int
) -> dict[str, dict[str, Any]]:
    """Replaces the classifier by an untrained one.

    Args:
      key: random key of the weights, which are uniform in ``+- 1 / sqrt(d)``; the bias
        is zero.
      variables: variables of a network.
      num_classes: number of logits.

    Returns:
      Variables that differ in ``params/fc`` only.

    Raises:
      WeightsError: ``num_classes < 1``, or the network of the variables is not known.

    Examples:
      >>> from kddm_jax.networks.torchvision import Architecture
      >>> variables = jax.tree.map(jnp.ones_like, Architecture(width=4).shapes())
      >>> variables = replace_head(jax.random.key(0), variables, 10)
      >>> variables["params"]["fc"]["kernel"].shape
      (32, 10)
    """
    if num_classes < 1:
        raise WeightsError(f"num_classes must be a positive int, got {num_classes}")
    shape = (8 * architecture(variables).width, num_classes)
    head = {
        "kernel": np.asarray(adapters.dense_init(key, shape, jnp.float32)),
        "bias": np.zeros(num_classes, np.float32),
    }
    network = network_of(variables)
    return {**network, "params": {**network["params"], "fc": head}}


def sum_channels(variables: Variables) -> dict[str, dict[str, Any]]:
    """Makes a network for grey images from one for colour images.

    The first convolution is summed over its input channels.  On a grey image it gives
    the same result as the given convolution on that image copied to every channel.

    Args:
      variables: variables of a network.

    Returns:
      Variables that differ in ``params/conv1`` only.

    Raises:
      WeightsError: the network of the variables is not known.

    Examples:
      >>> from kddm_jax.networks.torchvision import Architecture
      >>> variables = jax.tree.map(jnp.ones_like, Architecture(width=4).shapes())
      >>> kernel = sum_channels(variables)["params"]["conv1"]["kernel"]
      >>> kernel.shape, float(kernel[0, 0, 0, 0])
      ((7, 7, 1, 4), 3.0)
    """
    architecture(variables)
    network = network_of(variables)
    kernel = np.asarray(network["params"]["conv1"]["kernel"])
    first = {"kernel": kernel.sum(2, keepdims=True)}
    return {**network, "params": {**network["params"], "conv1": first}}
