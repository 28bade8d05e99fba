"""A mask of samples, and samples without a label, whatever their rows hold.

A masked batch equals the batch without those rows, in value and gradient: for every
entry of the catalogue, and by one program for all masks of a shape.
"""

from functools import cache

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOATS, arguments, bound, float_arguments, make_batch, names

from kddm_jax import DISTANCES

N, KEPT, D = 12, 9, 5
ROWS = pytest.mark.parametrize("name", list(DISTANCES))
LABELLED = [name for name, row in DISTANCES.items() if "labels" in row.inputs]
# A partly converged Sinkhorn iteration repeats its rounding errors, no more.
RTOL = 2e-4


def rows_of(batch, rows):
    return batch.map(lambda z: z[rows], *FLOATS, "labels")


def poisoned(batch, mask, poison):
    """Rows that are no samples hold ``poison``, and labels of no class."""
    out = ~mask

    def spoil(z):
        z = np.array(z)
        z[out] = poison
        return z

    return batch.map(spoil)._replace(labels=np.where(mask, batch.labels, 99))


def thin(batch):
    """Few features, so that a batch of nine samples is tall."""
    return batch


@cache
def program(name, options=(), masked=True):
    """Value and gradients of a row, with a traced mask or without one."""
    row = DISTANCES[name]
    fn = bound(row, **dict(options))

    def value(*arrays):
        *arrays, mask = arrays
        return fn(*arrays, mask=mask) if masked else fn(*arrays)

    return jax.jit(jax.value_and_grad(value, argnums=float_arguments(row)))


def random_mask(seed, kept=KEPT, n=N):
    rng = np.random.default_rng(seed)
    return rng.permutation(np.arange(n) < kept)


def array_list(name, batch):
    row = DISTANCES[name]
    if helpers.is_tall(row):  # as few features as nine samples can determine
        batch = batch.map(lambda z: z[..., :4], "x", "y")
        return [jnp.asarray(getattr(batch, n), jnp.float32) for n in names(row)]
    return arguments(row, batch)


def assert_masked_is_cut(name, batch, mask, poison, options=()):
    cut = program(name, options, masked=False)
    expected, slopes = cut(*array_list(name, rows_of(batch, mask)), None)
    spoilt = poisoned(batch, mask, poison)
    found, grads = program(name, options)(*array_list(name, spoilt), mask)
    unit = helpers.scale(rows_of(batch, mask))
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-6 * unit)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_array_equal(grad[~mask], 0)
        largest = float(np.abs(slope).max()) + 1e-6 * unit
        np.testing.assert_allclose(grad[mask], slope, atol=1e-3 * largest, rtol=0)


@ROWS
def test_a_masked_batch_is_the_batch_without_those_rows(name):
    for seed, poison in enumerate((np.nan, np.inf, 1e6)):
        batch = make_batch(N, D, seed=seed)
        assert_masked_is_cut(name, batch, random_mask(seed), poison)
