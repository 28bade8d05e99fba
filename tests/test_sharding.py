"""Compares losses of sharded arrays with one device: shard_map, and meshes under jit.

The loss that chex checks is compared, too. All catalogue entries and their solvers are
in one program for each way to shard. `test_devices.py` tests pmap, and shard_map with
check_vma=False.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_term import ARRAYS, MASKED, PARAMS, TERMS, loss_of
from helpers import KINDS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kddm_jax

SOME = {name: TERMS[name] for name in ("l2", "cmmd_rbf")}
WITH_MASK = ("w2", "cw2", "w2_gaussian", "mmd_rbf", "l2", "kd", "cka")
WITH_MASK = {name: TERMS[name] for name in WITH_MASK}


def gradients(terms, params, arrays, prepare=lambda params: params, **options):
    """Returns {name: ((loss, terms), gradient)}."""

    def one(term):
        fn = lambda params: loss_of(term, prepare(params), arrays, **options)
        return jax.value_and_grad(fn, has_aux=True)(params)

    return {name: one(term) for name, term in terms.items()}


def assert_alike(found, expected):
    """Asserts equality up to rounding, because sums are taken in another order."""
    assert list(found) == list(expected)
    for name, ((loss, terms), gradient) in jax.device_get(found).items():
        (one_loss, one_terms), one_gradient = expected[name]
        np.testing.assert_allclose(loss, one_loss, rtol=1e-5, err_msg=name)
        for term, value in terms.items():
            np.testing.assert_allclose(
                value, one_terms[term], rtol=1e-4, atol=1e-5, err_msg=f"{name}: {term}"
            )
        for key, one in one_gradient.items():
            largest = float(np.max(np.abs(one)))
            assert largest > 0 or key == "scale", name
            np.testing.assert_allclose(
                gradient[key], one, atol=1e-4 * largest, err_msg=name
            )


def on_one_device(terms, arrays=ARRAYS):
    return jax.device_get(jax.jit(lambda *a: gradients(terms, *a))(PARAMS, arrays))


def mesh_of(shape, names, kind):
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=devices)


def by_shard_map(terms, arrays=ARRAYS, shape=(2,), names=("batch",)):
    """Returns gradients without averaging; JAX sums them over the devices."""
    fn = lambda *a: gradients(terms, *a, axis_name="batch")
    mesh = mesh_of(shape, names, AxisType.Auto)
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("batch"))}
    mapped = jax.shard_map(fn, mesh=mesh, **specs, out_specs=PartitionSpec())
    return jax.jit(mapped)(PARAMS, arrays)


def by_jit(terms, shape, names, kind, spec, arrays=ARRAYS):
    """Shards arrays over a mesh in a plain jit, also along the last axis."""
    mesh = mesh_of(shape, names, kind)

    def place(array):
        axes = [spec[0], *[None] * (array.ndim - 2), *spec[1:]]
        return jax.device_put(
            array, NamedSharding(mesh, PartitionSpec(*axes[: array.ndim]))
        )

    arrays = {name: place(array) for name, array in arrays.items()}
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(lambda *a: gradients(terms, *a))(params, arrays)


MESHES = {
    "auto": ((2,), ("batch",), AxisType.Auto, ("batch",)),
    "explicit": ((2,), ("batch",), AxisType.Explicit, ("batch",)),
    "explicit, features": (
        (1, 2), ("batch", "model"), AxisType.Explicit, ("batch", "model")
    ),
    "auto, features": ((1, 2), ("batch", "model"), AxisType.Auto, ("batch", "model")),
}  # fmt: skip


def as_chex_checks(terms):
    """Replaces stop_gradient by ones, as `chex.assert_numerical_grads` does."""
    with mock.patch("jax.lax.stop_gradient", jnp.ones_like):
        return jax.jit(lambda *a: gradients(terms, *a))(PARAMS, ARRAYS)


WAYS = {
    "chex": as_chex_checks,
    "shard_map": by_shard_map,
    **{name: lambda terms, m=mesh: by_jit(terms, *m) for name, mesh in MESHES.items()},
}


@pytest.mark.parametrize("way", ["shard_map", "explicit, features"])
def test_some_distances_of_sharded_arrays(way):
    assert_alike(WAYS[way](SOME), on_one_device(SOME))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_sharded_over_the_mesh(kind):
    """Gradients have the sharding of their parameters."""
    mesh = mesh_of((2,), ("batch",), kind)
    shares, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("batch",), ()))

    put = jax.reshard if kind is AxisType.Explicit else jax.device_put
    gathered = lambda params: jax.tree.map(lambda a: put(a, whole), params)
    program = jax.jit(lambda *a: gradients(SOME, *a, prepare=gathered))
    found = program(jax.device_put(PARAMS, shares), jax.device_put(ARRAYS, shares))
    for _, gradient in found.values():
        for leaf in jax.tree.leaves(gradient):
            assert leaf.sharding.is_equivalent_to(shares, 1) or kind is AxisType.Auto
    assert_alike(found, on_one_device(SOME))


@pytest.fixture(scope="module")
def expected():
    return on_one_device(TERMS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_distance_and_solver_of_sharded_arrays(expected, way):
    # Under "auto", XLA chooses the shardings, and this package has no code for them: a
    # term of each kind and factorization will do.
    some = [*KINDS.values(), *(name for name in TERMS if "{'solver'" in name)]
    some += [
        "procrustes",
        "kl_gaussian",
        "bank",
        "w2_gaussian {'method': 'newton_schulz'}",
    ]
    names = sorted(some if way.startswith("auto") else TERMS)
    terms = {name: TERMS[name] for name in names}
    assert_alike(WAYS[way](terms), {name: expected[name] for name in names})


# -------------------------------------------------------------------------- masks


@pytest.fixture(scope="module")
def masked():
    return on_one_device(WITH_MASK, MASKED)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_masks_on_a_mesh(masked, mesh):
    assert_alike(by_jit(WITH_MASK, *MESHES[mesh], arrays=MASKED), masked)


@pytest.mark.slow
def test_masks_under_checked_shard_map(masked):
    assert_alike(by_shard_map(WITH_MASK, MASKED), masked)


# Of 2 x 2 devices, over which samples and features are sharded.
GRIDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def on_four_devices():
    """Yields what `four_devices.py` has checked."""
    axes = ("batch", "model")
    for arrays in (ARRAYS, MASKED):
        one = on_one_device(WITH_MASK, arrays)
        masked = "mask" in arrays
        for name, kind in GRIDS.items():
            mesh = ((2, 2), axes, kind, axes)
            assert_alike(by_jit(WITH_MASK, *mesh, arrays=arrays), one)
            yield [name, masked]
        assert_alike(by_shard_map(WITH_MASK, arrays, (2, 2), axes), one)
        yield ["shard_map", masked]


@pytest.mark.slow
def test_a_mesh_with_two_axes():
    """In a process of its own, which has four devices."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, folder / "four_devices.py"],
        env={**os.environ, "PYTHONPATH": str(Path(kddm_jax.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ways = (*GRIDS, "shard_map")
    assert json.loads(done.stdout) == [
        [way, masked] for masked in (False, True) for way in ways
    ]
