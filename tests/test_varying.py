"""Distances called on each device's own arrays inside a checked shard_map.

There is no ``axis_name``: every device has a problem of its own, whose value and
gradient are those of a call outside.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    OF_TEACHER,
    arguments,
    bound,
    float_arguments,
    make_batch,
    names,
)
from jax.sharding import AxisType, PartitionSpec
from test_hostile import VARIANTS

from kddm_jax import DISTANCES, Term, distill_loss, wasserstein
from kddm_jax.numerics.transport import best_assignment
from kddm_jax.numerics.varying import call_varying

N, D = 8, 5
BATCHES = [make_batch(N, D, seed=seed) for seed in (0, 1)]
MASKS = [np.arange(N) < 6, np.arange(N) % 4 != 1]
ALIKE = ("key", *OF_TEACHER)  # equal on all devices
EVERY = [
    *((name, ()) for name in DISTANCES),
    *(
        (name, tuple(options.items()))
        for name, several in VARIANTS.items()
        for options in several
    ),
    ("wkd_logits", (("iterations", 3),)),
]
FIELDS = [(b.x, b.y, b.labels, b.logits_x) for b in BATCHES]
SHARE = PartitionSpec("batch")


def mesh():
    return jax.make_mesh(
        (2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )


def mapped(fn, specs):
    return jax.shard_map(fn, mesh=mesh(), in_specs=specs, out_specs=SHARE)


@cache
def differentiated(name, options, masked):
    """Value and gradients, of arrays and a mask, both with a leading axis of one."""
    row = DISTANCES[name]
    fn = bound(row, **dict(options))

    def value(*arguments):
        *arrays, mask = arguments
        return fn(*arrays, mask=mask) if masked else fn(*arrays)

    grad_fn = jax.value_and_grad(value, argnums=float_arguments(row))
    return lambda *arguments: jax.tree.map(lambda z: z[None], grad_fn(*arguments))


def assert_local(name, options, masked=False):
    """A program on two devices gives what two calls give."""
    row, fn = DISTANCES[name], differentiated(name, options, masked)
    both = [
        [*arguments(row, batch), mask]
        for batch, mask in zip(BATCHES, MASKS, strict=True)
    ]
    common = [kind in ALIKE for kind in (*names(row), "mask")]
    arrays = [
        one if alike else jnp.concatenate([one, other])
        for one, other, alike in zip(*both, common, strict=True)
    ]
    specs = tuple(PartitionSpec() if alike else SHARE for alike in common)
    found = jax.device_get(jax.jit(mapped(fn, specs))(*arrays))
    one = jax.jit(fn)
    expected = [jax.device_get(one(*own)) for own in both]
    assert expected[0][0] != expected[1][0]
    for i, own in enumerate(expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            atol = 1e-4 * np.abs(b).max()
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-4, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_every_distance(name, options):
    assert_local(name, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_with_a_mask(name):
    assert_local(name, (), masked=True)


def test_a_loss_of_each_device():
    """`distill_loss` without an axis; no gradient is summed over the devices."""
    batch = [np.concatenate(pair) for pair in zip(*FIELDS, strict=True)]
    arrays = [z.astype(z.dtype.kind + "4") for z in batch]
    terms = [Term("cw2"), Term("w2", options={"solver": "exact"}, normalization="unit")]

    def loss(x, y, labels, logits):
        fn = lambda x: distill_loss(x, y, labels, logits, distance=terms)[0]
        value, grad = jax.value_and_grad(fn)(x)
        return value[None], grad

    found = jax.jit(mapped(loss, (SHARE,) * 4))(*arrays)
    halves = [[z[i * N : (i + 1) * N] for z in arrays] for i in (0, 1)]
    expected = [jax.jit(loss)(*half) for half in halves]
    for a, *both in zip(found, *expected, strict=True):
        np.testing.assert_allclose(a, np.concatenate(both), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_side_that_is_equal_on_all_devices():
    """Also without jit, and for several problems of a device."""
    x, y = (np.float32(getattr(BATCHES[0], name)) for name in "xy")
    several = np.stack([x, x + 1, 2 * x, x - 1])
    distances = lambda several, y: jax.vmap(lambda x: wasserstein(x, y))(several)
    found = mapped(distances, (SHARE, PartitionSpec()))(several, y)
    expected = [wasserstein(z, y) for z in several]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_types_of_what_varies():
    """A function of arrays that vary over other axes varies over all of them."""
    types = {}

    def total(a, b):
        return jax.lax.fori_loop(0, 3, lambda _, s: s + jnp.sum(a * b), jnp.zeros(()))

    def on_device(a, b):
        same = call_varying(total, jnp.ones(2), jnp.ones(2))
        both = call_varying(total, a, b)
        for name, array in {"same": same, "both": both}.items():
            types[name] = jax.typeof(array).manual_axis_type.varying
        return both[None, None]

    axes = ("batch", "model")
    grid = jax.make_mesh(
        (2, 1), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2]
    )
    specs = {
        "in_specs": tuple(map(PartitionSpec, axes)),
        "out_specs": PartitionSpec(*axes),
    }
    fn = jax.shard_map(on_device, mesh=grid, **specs)
    a, b = jnp.arange(4.0), jnp.arange(2.0)
    np.testing.assert_allclose(jax.jit(fn)(a, b), [[3.0], [9.0]])
    assert types == {"same": frozenset(), "both": frozenset(axes)}


def test_assignments_of_each_device():
    costs = np.random.default_rng(0).uniform(size=(4, 3)).astype(np.float32)
    costs = np.concatenate([costs[:3], costs[:3][::-1]])
    found = mapped(partial(best_assignment), SHARE)(costs)
    expected = [*best_assignment(costs[:3]), *best_assignment(costs[3:])]
    np.testing.assert_array_equal(found, expected)
