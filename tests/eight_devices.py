"""Trains with every distance on 1, 2, 4 and 8 devices, as a command of its own.

    python tests/eight_devices.py --dtype float64 --rows w2 cw2 > deviations.json

The other tests have two devices, because the machine has two cores. All distances are
in one program, and every call takes one branch of it, so that it compiles once for each
number of devices. ``test_devices.py`` judges the printed deviations.
"""

import argparse
import json
import os
import sys
from functools import partial
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from kddm_jax import DISTANCES, Distance, Term, adapters, resnet
from kddm_jax.data.augment import make_augment
from kddm_jax.train_step import (
    AXIS,
    create_state,
    make_train_step,
    parallel,
    replicate,
    shard,
)

N, SIDE, K = 64, 4, helpers.NUM_CLASSES
RNG = np.random.default_rng(0)
LABELS = helpers.make_labels(RNG, N)
IMAGES = RNG.integers(0, 256, (N, SIDE, SIDE, 1)).astype(np.uint8)
TX = optax.sgd(0.05, momentum=0.9)
COMMON = ("loss", "task", "accuracy", "finite")


class Outputs(NamedTuple):
    logits: jax.Array
    features: jax.Array
    maps: dict[str, jax.Array]


class Net(nn.Module):
    """Has a layer, BatchNorm over all devices and a layer; is smooth, without ties."""

    width: int = 8
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.reshape(images.shape[0], -1)
        # BatchNorm follows, so the gradient of a bias would be only rounding errors.
        x = nn.Dense(self.width, use_bias=False, name="first")(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
        features = nn.gelu(x)
        maps = {"map": features.reshape(-1, 2, 2, self.width // 4)}
        return Outputs(nn.Dense(K, name="head")(features), features, maps)


class Problem(NamedTuple):
    """Contains the networks, variables and images that all distances share."""

    make: object  # maps axis_name to a module
    images: np.ndarray
    dtype: object
    layer: str

    def variables(self, seed):
        shape = (1, *self.images.shape[1:])
        init = jax.jit(self.make(None).init)(jax.random.key(seed), jnp.zeros(shape))
        return jax.tree.map(lambda a: np.asarray(a, self.dtype), init)

    @property
    def augment(self):
        return make_augment(mean=(0.5,), std=(0.25,), padding=1, dtype=self.dtype)


WHOLE = ("key", *helpers.OF_TEACHER)  # the same for all groups


def within(row, groups):
    """Averages a distance over groups of neighbouring samples, on one device."""

    def fn(*arrays, **options):
        kinds = [kind for kind in row.inputs for _ in helpers.FIELDS[kind]]
        one = lambda *parts: row.fn(*parts, **options)
        axes = tuple(None if kind in WHOLE else 0 for kind in kinds)
        parts = (
            a if axis is None else a.reshape(groups, -1, *a.shape[1:])
            for a, axis in zip(arrays, axes, strict=True)
        )
        return jnp.mean(jax.vmap(one, axes)(*parts))

    return Distance(fn, inputs=row.inputs)


def term_of(name, problem, *, groups=None):
    """Makes a term of a distance, or of its average over groups on one device."""
    row = DISTANCES[name]
    layers = (problem.layer,) * 2 if "maps" in row.inputs else None
    options = helpers.options_of(row, K)
    distance = row if groups is None else within(row, groups)
    return Term(distance, layers=layers, options=options, name="distance")


def step_of_any(names, problem, **options):
    """Makes ``step(i, state, teacher, images, labels)`` with the i-th distance."""
    groups = options.pop("groups", None)

    def one(name, operands):
        step = make_train_step(
            adapters.linen_apply(problem.make(AXIS)),
            adapters.linen_apply(problem.make(None)),
            TX,
            augment=problem.augment,
            distance=[term_of(name, problem, groups=groups)],
            **options,
        )
        state, metrics = step(*operands, helpers.teacher_data(K, Net.width))
        return state, {key: metrics[key] for key in (*COMMON, "distance")}

    def step(i, *operands):
        return jax.lax.switch(i, [partial(one, name) for name in names], operands)

    return step


def shards_equal(tree, count):
    """Tells if all devices have bitwise equal arrays."""
    every = [[np.asarray(s.data) for s in a.addressable_shards] for a in leaves(tree)]
    return all(
        len(shards) == count and all(np.array_equal(shards[0], s) for s in shards)
        for shards in every
    )


leaves = jax.tree.leaves


def train(problem, names, count, *, steps, how, **options):
    """Returns each distance's state after one step, its losses, and if shards agree."""
    step = step_of_any(names, problem, **options)
    devices = jax.devices()[:count]
    axes = (None, None, None, 0, 0)
    program = parallel(step, in_axes=axes, devices=devices, how=how)
    put = lambda tree: replicate(tree, devices)
    batch = shard((problem.images, LABELS), count)
    student, teacher = problem.variables(1), put(problem.variables(2))
    results = {}
    for i, name in enumerate(names):
        state = put(create_state(student, TX, seed=7, weight=0.05))
        history = []
        for at in range(steps):
            state, metrics = program(put(jnp.int32(i)), state, teacher, *batch)
            history.append(jax.device_get(metrics))
            if at == 0:
                first = jax.device_get((state, metrics))
        equal = shards_equal((state, metrics), count)
        results[name] = {"first": first, "history": history, "equal": equal}
    return results


def deviation(tree, expected):
    """Returns the largest max|difference| / max|expected| of the tensors."""

    def of(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Values that are not sums, such as a seed, are either equal or far apart.
        return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))

    return max(leaves(jax.tree.map(of, tree, expected)))


def compare(result, expected):
    """Returns the deviations of one distance's run from another run."""
    losses = lambda of: np.array([m["loss"] for m in of["history"]], np.float64)
    curve = np.abs(losses(result) / losses(expected) - 1)
    return {
        "step": deviation(result["first"], expected["first"]),
        "curve": float(np.max(curve)),
        "equal": result["equal"],
        "finite": all(bool(m["finite"]) for m in result["history"]),
        "distance": float(expected["first"][1]["distance"]),
    }


def main():
    """Prints the deviations from one device as JSON: ``{what: {distance: ...}}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(DISTANCES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--counts", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--groups", type=int, nargs="*", default=[])
    parser.add_argument("--how", default="pmap")
    parser.add_argument("--network", choices=("mlp", "resnet"), default="mlp")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", args.dtype == "float64")

    problem = Problem(lambda axis: Net(axis_name=axis), IMAGES, args.dtype, "map")
    if args.network == "resnet":
        images = RNG.integers(0, 256, (N, 8, 8, 1)).astype(np.uint8)
        make = partial(resnet.ResNet9, num_classes=K, width=4, dtype=args.dtype)
        problem = Problem(
            lambda axis: make(axis_name=axis), images, args.dtype, "stage2_block1"
        )
    run = partial(train, problem, args.rows, steps=args.steps)
    many = partial(run, how=args.how)
    found = {}

    def judge(what, results, expected):
        found[what] = {
            name: compare(results[name], expected[name]) for name in args.rows
        }

    if args.counts:
        one = run(1, how="pmap")  # always the same program
        for count in args.counts:
            judge(str(count), many(count), one)
    for size in args.groups:
        one = run(1, how="pmap", groups=8 // size)
        judge(f"groups of {size}", many(8, group_size=size), one)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
