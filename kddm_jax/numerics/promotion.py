"""Allows implicit promotion for code of other libraries.

Under ``jax.numpy_rank_promotion("raise")`` or strict promotion of dtypes, parts of ott,
optax and Flax cannot be traced.  The code of this package mixes neither ranks nor
dtypes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def implicit_promotion() -> Iterator[None]:
    """Allows implicit promotion of ranks and dtypes inside a ``with`` block.

    Examples:
      >>> with jax.numpy_dtype_promotion("strict"), implicit_promotion():
      ...     (jax.numpy.ones(2) + jax.numpy.arange(2)).dtype
      dtype('float32')
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
