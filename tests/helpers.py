"""Makes inputs for tests: batches like those of a network, and degenerate ones."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import DISTANCES, Distance

# Fields of `Batch` for each name in `Distance.inputs`, in the order of the arguments.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "features": ("x", "y"),
    "maps": ("maps_x", "maps_y"),
    "logits": ("logits_x", "logits_y"),
    "labels": ("labels",),
    "key": ("key",),
    "class_cost": ("class_cost",),
    "class_means": ("class_means",),
}

# Options without a default that a distance needs, for k classes.
REQUIRED: Mapping[str, Callable[[int], object]] = {"temperature": lambda k: 2.0}

# Numbers that a distance derives from its inputs and holds constant, and the accuracy
# of its iterations. With these values, a distance is a smooth function of its inputs.
FIXED: Mapping[str, object] = {
    "epsilon": 3.0,
    "threshold": 1e-8,
    "max_iterations": 10_000,
    "bandwidth": 1.3,
    "ridge": 0.05,
    "beta": 0.7,
    "num_projections": 2,  # with many directions, samples almost tie along one
}


# Distances that need more samples than features; they get the first few features.
TALL = {"linear_projection"}


class Batch(NamedTuple):
    """Contains the outputs of a student and a teacher for the same images."""

    x: np.ndarray
    y: np.ndarray
    logits_x: np.ndarray
    logits_y: np.ndarray
    labels: np.ndarray
    maps_x: np.ndarray
    maps_y: np.ndarray
    key: int = 0

    @property
    def class_cost(self):
        """Returns the cost between classes, which a teacher would determine."""
        return class_cost(self.logits_y.shape[-1])

    @property
    def class_means(self):
        """Returns the teacher's mean features of each class."""
        return class_means(self.logits_y.shape[-1], self.y.shape[-1])

    def map(self, fn, *names):
        """Applies ``fn`` to the named arrays, by default to all arrays of floats."""
        names = names or FLOATS
        return self._replace(**{name: fn(getattr(self, name)) for name in names})


def class_cost(k):
    """Returns costs between k classes, ``[k, k]``."""
    return np.abs(np.subtract.outer(np.arange(k), np.arange(k))).astype(np.float32) / k


def class_means(k, d):
    """Returns mean features of k classes, ``[k, d]``."""
    return (1.5 + np.cos(np.add.outer(2.0 * np.arange(k), np.arange(d)))).astype(
        np.float32
    )


# Arrays that are computed from the teacher once, so that all devices have the same.
OF_TEACHER = ("class_cost", "class_means")


def teacher_data(k, d):
    """Returns every array that a distance may need of the teacher."""
    return {"class_cost": class_cost(k), "class_means": class_means(k, d)}


FLOATS = ("x", "y", "logits_x", "logits_y", "maps_x", "maps_y")
NUM_CLASSES = 4

# The first distance of each kind. Kinds differ in how devices gather their arrays.
KINDS: dict[tuple, str] = {}
for _name, _row in DISTANCES.items():
    KINDS.setdefault((_row.inputs, _row.per_sample), _name)


def relu_features(rng, n, d):
    """Makes non-negative features; some are zero, and some are larger than others."""
    scale = rng.uniform(0.3, 2.0, d)
    return np.maximum(rng.normal(0.4, 1.0, (n, d)), 0) * scale


def make_labels(rng, n, k=NUM_CLASSES):
    """Makes unbalanced labels; each class is about half as large as the one before."""
    share = 0.5 ** np.arange(k)
    return rng.choice(k, n, p=share / share.sum()).astype(np.int32)


def make_batch(n=8, d=12, m=None, k=NUM_CLASSES, labels=None, seed=0):
    """Makes features ``[n, d]`` and ``[m, d]``, logits ``[n, k]`` and 3 x 3 maps."""
    rng = np.random.default_rng(seed)
    m = n if m is None else m
    labels = make_labels(rng, n, k) if labels is None else np.asarray(labels, np.int32)
    return Batch(
        x=relu_features(rng, n, d),
        y=relu_features(rng, m, d) + 0.3,
        logits_x=rng.normal(0, 1.5, (n, k)),
        logits_y=rng.normal(0, 3.0, (m, k)),
        labels=labels,
        maps_x=relu_features(rng, n * 9, d).reshape(n, 3, 3, d),
        maps_y=relu_features(rng, m * 9, d).reshape(m, 3, 3, d) + 0.3,
    )


def is_tall(row: Distance) -> bool:
    return row.fn.__name__ in TALL


def fitted(row: Distance, batch: Batch) -> Batch:
    """Returns the batch, with as few features as the distance needs."""
    most = max(len(batch.x) - 2, 1)
    return batch.map(lambda z: z[:, :most], "x", "y") if is_tall(row) else batch


def names(row: Distance) -> list[str]:
    """Returns the names of a distance's array arguments, with pairs expanded."""
    return [name for kind in row.inputs for name in FIELDS[kind]]


def arguments(row: Distance, batch: Batch, dtype=jnp.float32) -> list[jax.Array]:
    """Returns the arrays that ``row.inputs`` names, in order; floats as ``dtype``."""
    arrays, batch = [], fitted(row, batch)
    for name in names(row):
        value = getattr(batch, name)
        if name == "key":
            arrays.append(jax.random.key(value))
        else:
            arrays.append(jnp.asarray(value, dtype if name in FLOATS else None))
    return arrays


def float_arguments(row: Distance) -> tuple[int, ...]:
    """Returns the positions of the arguments that have a gradient."""
    return tuple(i for i, name in enumerate(names(row)) if name in FLOATS)


def parameters(row: Distance) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(row.fn).parameters


def fixed_of(row: Distance, **options) -> dict[str, object]:
    """Returns the numbers of `FIXED` that a distance takes with these options."""
    kernel = {**dict(row.options), **options}.get("kernel")
    linear = kernel == "linear"  # has no bandwidth
    known = {*parameters(row)} - ({"bandwidth"} if linear else set())
    return {name: value for name, value in FIXED.items() if name in known}


def options_of(row: Distance, k=NUM_CLASSES, **wanted) -> dict[str, object]:
    """Returns a distance's options, those it needs, and those of ``wanted`` it has."""
    known = parameters(row)
    needed = {name: make(k) for name, make in REQUIRED.items() if name in known}
    needed = {n: v for n, v in needed.items() if known[n].default is inspect._empty}
    wanted = {name: value for name, value in wanted.items() if name in known}
    return {**needed, **dict(row.options), **wanted}


def bound(row: Distance, **wanted) -> Callable[..., jax.Array]:
    """Returns the distance as a function of arrays only."""
    return partial(row.fn, **options_of(row, **wanted))


TRACES: Counter = Counter()


@cache
def compiled(name: str, **wanted) -> Callable[..., jax.Array]:
    """Returns the same, compiled once for all tests; `TRACES` counts its traces."""
    fn = bound(DISTANCES[name], **wanted)

    @jax.jit
    def call(*arrays):
        TRACES[name, *wanted.items(), *((a.shape, a.dtype) for a in arrays)] += 1
        return fn(*arrays)

    return call


def scale(batch: Batch) -> float:
    """Returns the size to which rounding errors of a squared distance are relative."""
    squared = lambda z: (np.asarray(z, float) ** 2).sum(-1).mean()
    return (
        float(squared(batch.x) + squared(batch.y)) + 1e-19
    )  # the smallest epsilon in float32


# ----------------------------------------------------------------- degenerate


def with_zeros(columns):
    def fn(z):
        z = np.array(z)
        z[..., columns] = 0
        return z

    return fn


def constant_rows(z):
    return np.broadcast_to(z[:1], z.shape).copy()


def identical(batch):
    return batch._replace(y=batch.x, logits_y=batch.logits_x, maps_y=batch.maps_x)


def orthonormal(batch):
    """Makes covariances with a single eigenvalue of high multiplicity."""
    n, d = batch.x.shape
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(d, d)))[0]
    signs = np.repeat([1.0, -1.0], n // 2)[:, None]
    x = signs * np.eye(d)[np.tile(np.arange(n // 2), 2)]
    return batch._replace(x=x, y=2 * x @ basis)


DEGENERATE: Mapping[str, Callable[[], Batch]] = {
    "n < d": lambda: make_batch(8, 12),
    "n > d": lambda: make_batch(8, 5),
    "identical": lambda: identical(make_batch(8, 12)),
    "identical, n > d": lambda: identical(make_batch(8, 5)),
    "constant": lambda: make_batch(8, 12).map(np.ones_like),
    "zero": lambda: make_batch(8, 12).map(np.zeros_like),
    "collapsed student": lambda: make_batch(8, 12).map(
        constant_rows, "x", "logits_x", "maps_x"
    ),
    "collapsed student, n > d": lambda: make_batch(8, 5).map(
        constant_rows, "x", "logits_x", "maps_x"
    ),
    "dead features": lambda: make_batch(8, 12).map(
        with_zeros(np.s_[:5]), "x", "y", "maps_x", "maps_y"
    ),
    "dead features, n > d": lambda: make_batch(8, 5).map(
        with_zeros(np.s_[:2]), "x", "y", "maps_x", "maps_y"
    ),
    "other features dead": lambda: (
        make_batch(8, 12)
        .map(with_zeros(np.s_[:5]), "x", "maps_x")
        .map(with_zeros(np.s_[4:9]), "y", "maps_y")
    ),
    "repeated samples": lambda: make_batch(8, 12).map(
        lambda z: np.concatenate([z[:4], z[:4]])
    ),
    "repeated eigenvalues": lambda: orthonormal(make_batch(8, 12)),
    "repeated eigenvalues, n > d": lambda: orthonormal(make_batch(8, 5)),
    "one sample": lambda: make_batch(1, 12, labels=[2]),
    "one-sample classes": lambda: make_batch(8, 12, labels=range(8)),
    "one-sample and larger classes": lambda: make_batch(
        8, 12, labels=[0, 0, 0, 1, 2, 2, 3, 3]
    ),
    "absent classes": lambda: make_batch(8, 12, labels=[0, 3, 3, 0, 0, 0, 3, 3]),
    "one class": lambda: make_batch(8, 12, labels=[3] * 8),
    "padding": lambda: make_batch(8, 12, labels=[0, 1, -1, 1, 0, 1, -1, -1]),
    "only padding": lambda: make_batch(8, 12, labels=[-1] * 8),
    "identical, one-sample classes": lambda: identical(
        make_batch(8, 12, labels=range(8))
    ),
    "identical, one sample": lambda: identical(make_batch(1, 12, labels=[2])),
    "identical, constant": lambda: identical(make_batch(8, 12).map(constant_rows)),
    "far from the origin": lambda: make_batch(8, 12).map(
        lambda z: 1e3 + z, "x", "y", "maps_x", "maps_y"
    ),
    "scale 1e-4": lambda: make_batch(8, 12).map(lambda z: 1e-4 * z),
    "scale 1e4": lambda: make_batch(8, 12).map(lambda z: 1e4 * z),
    "scale 1e-4, n > d": lambda: make_batch(8, 5).map(lambda z: 1e-4 * z),
    "scale 1e4, n > d": lambda: make_batch(8, 5).map(lambda z: 1e4 * z),
    "student much smaller": lambda: make_batch(8, 12).map(lambda z: 1e-4 * z, "x"),
    "student much larger": lambda: make_batch(8, 12).map(lambda z: 1e4 * z, "x"),
}


def largest_array(fn, *arrays):
    """Returns the size of the largest array of a program, including its loops."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (getattr(v.aval, "size", 0) for v in equation.outvars)
            inner = jax.tree.leaves(
                tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            )
            for parameter in (getattr(p, "jaxpr", p) for p in inner):
                if hasattr(parameter, "eqns"):
                    yield from sizes(parameter)

    return max(sizes(jax.make_jaxpr(jax.value_and_grad(fn))(*arrays).jaxpr))
