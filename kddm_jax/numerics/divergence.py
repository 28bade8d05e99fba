"""Computes Kullback-Leibler divergences between discrete distributions.

Distributions are given by the logarithms of their probabilities, which may be -inf.
"""

import jax
import jax.numpy as jnp


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Computes KL(p || q) along the last axis as a sum of p (r - 1 - log r), r = q / p.

    No term is negative, and no digits cancel if the distributions nearly agree.  If p
    is zero, the term is q.

    Args:
      log_p: logarithms of the probabilities p, shape ``[..., k]``.
      log_q: logarithms of the probabilities q, same shape.

    Returns:
      The divergence in nats, shape ``[...]``.

    Examples:
      >>> half, sure = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -jnp.inf])
      >>> divergence(sure, half)  # log 2
      Array(0.6931, dtype=float32)
    """
    massless = log_p == -jnp.inf
    p, log_ratio = jnp.exp(log_p), log_q - jnp.where(massless, 0, log_p)
    log_ratio = jnp.where(massless, 0, log_ratio)
    near = jnp.abs(log_ratio) < 1
    small = jnp.where(near, log_ratio, 0)
    terms = jnp.where(
        near,
        p * (jnp.expm1(small) - small),
        jnp.exp(log_q) - p - p * log_ratio,
    )
    return jnp.sum(jnp.where(massless, jnp.exp(log_q), terms), axis=-1)
