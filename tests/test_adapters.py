"""Tests Linen and NNX networks in the train step: statistics, random keys, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from kddm_jax.adapters import Outputs, linen_apply, nnx_apply
from kddm_jax.data.augment import make_augment
from kddm_jax.train_step import (
    AXIS,
    create_state,
    make_eval_step,
    make_train_step,
    parallel,
    replicate,
    shard,
)

N, SIDE, K, WIDTH = 8, 4, 3, 6
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, SIDE, SIDE, 1)).astype(np.uint8)
FLOATS = jnp.asarray(IMAGES / 255.0, jnp.float32)
LABELS = np.arange(N, dtype=np.int32) % K
NORMALIZE = make_augment(mean=(0.5,), std=(0.25,))
PLAIN = lambda key, image: NORMALIZE(None, image, train=False)
TX = optax.sgd(0.1, momentum=0.9)
KEYS = {"dropout": jax.random.key(0)}


class LinenNet(nn.Module):
    axis_name: str | None = None
    rate: float = 0.0

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dense(WIDTH, name="first")(images.reshape(images.shape[0], -1))
        norm = nn.BatchNorm(
            not train, momentum=0.9, axis_name=self.axis_name, name="norm"
        )
        features = nn.relu(norm(x))
        dropped = nn.Dropout(self.rate, deterministic=not train)(features)
        return Outputs(nn.Dense(K, name="head")(dropped), features, {})


class NNXNet(nnx.Module):
    """The same network in NNX; keys of its parameters are the integers of a list."""

    def __init__(self, rngs, axis_name=None, rate=0.0):
        self.first = nnx.List([nnx.Linear(SIDE * SIDE, WIDTH, rngs=rngs)])
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(WIDTH, K, rngs=rngs)

    def __call__(self, images):
        x = self.first[0](images.reshape(images.shape[0], -1))
        features = nnx.relu(self.norm(x))
        return Outputs(self.head(self.dropout(features)), features, {})


def nnx_net(seed=0, **options):
    return nnx_apply(NNXNet(nnx.Rngs(seed), **options))


def as_linen(variables):
    """Returns the NNX network's variables with the Linen network's names."""
    params = {**variables["params"], "first": variables["params"]["first"][0]}
    return {"params": params, "batch_stats": variables["batch_stats"]}


def run(apply, variables, *, teacher, devices, how="pmap", steps=2, **options):
    """Distils by l2; returns the state and the metrics."""
    taught, given = teacher
    options = {"distance": "l2", "augment": PLAIN, **options}
    if devices is None:
        step = make_train_step(apply, taught, TX, axis_name=None, **options)
        step, state, batch = (
            jax.jit(step),
            create_state(variables, TX),
            (IMAGES, LABELS),
        )
    else:
        own = jax.devices()[:devices]
        step = make_train_step(apply, taught, TX, **options)
        step = parallel(step, in_axes=(None, None, 0, 0), devices=own, how=how)
        state = replicate(create_state(variables, TX), own)
        given, batch = replicate(given, own), shard((IMAGES, LABELS), devices)
    for _ in range(steps):
        state, metrics = step(state, given, *batch)
    return jax.device_get((state, metrics))


LINEN_TEACHER = (
    linen_apply(LinenNet()),
    LinenNet().init(jax.random.key(5), jnp.zeros((1, SIDE, SIDE, 1))),
)


def test_nnx_is_linen():
    """The same network in both libraries takes equal steps, on one and two devices."""
    _, variables = nnx_net()
    nnx_of = lambda axis: nnx_net(axis_name=axis)[0]
    state, metrics = run(
        linen_apply(LinenNet()),
        as_linen(variables),
        teacher=LINEN_TEACHER,
        devices=None,
    )
    assert metrics["finite"]
    assert np.any(state.batch_stats["norm"]["mean"] != 0)
    for devices, how in ((None, None), (2, "pmap"), (2, "shard_map")):
        axis = None if devices is None else AXIS
        found, its = run(
            nnx_of(axis), variables, teacher=LINEN_TEACHER, devices=devices, how=how
        )
        assert jax.tree.structure(found.params) == jax.tree.structure(
            variables["params"]
        )
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, as_linen(found.variables), state.variables)
        jax.tree.map(close, its, metrics)


def test_nnx_teacher_is_in_evaluation_mode():
    """It has no dropout and no keys, uses its own statistics, and keeps them."""
    teacher = nnx_net(seed=3, rate=0.5)
    student = linen_apply(LinenNet())
    state, metrics = run(
        student, LINEN_TEACHER[1], teacher=teacher, devices=None, steps=1
    )
    apply, variables = teacher
    images = jax.vmap(lambda image: PLAIN(None, image))(IMAGES)
    outputs, kept = apply(variables, images, train=False)
    assert kept is variables["batch_stats"]
    own, _ = student(LINEN_TEACHER[1], images, train=True)
    l2 = jnp.mean(jnp.sum((own.features - outputs.features) ** 2, axis=1))
    np.testing.assert_allclose(metrics["l2"], l2, rtol=1e-5)
    sums = jax.jit(
        make_eval_step(apply, normalize=lambda x: PLAIN(None, x), axis_name=None)
    )(variables, IMAGES, LABELS)
    assert sums["count"] == N
    assert state.step == 1


def test_trained_arrays_return_to_the_module():
    module = NNXNet(nnx.Rngs(0))
    apply, variables = nnx_apply(module)
    state, _ = run(apply, variables, teacher=LINEN_TEACHER, devices=None)
    nnx.update(module, state.params)
    nnx.update(module, state.batch_stats)
    module.eval()
    expected, _ = apply(state.variables, FLOATS, train=False)
    np.testing.assert_allclose(module(FLOATS).logits, expected.logits, rtol=1e-6)


def test_a_donating_step_leaves_the_module_alone():
    module = NNXNet(nnx.Rngs(0))
    _, variables = nnx_apply(module)
    own = jax.tree.leaves(nnx.state(module, nnx.Param))
    for array in jax.tree.leaves(variables):
        array.delete()  # as a step does that donates its state
    assert not any(array.is_deleted() for array in own)


class Stochastic(nn.Module):
    """Draws from three collections, two of which have no key of their own."""

    @nn.compact
    def __call__(self, images, *, train=False):
        draws = {}
        for name in ("dropout", "drop_path", "stochastic_depth"):
            draw = lambda name=name: jax.random.normal(self.make_rng(name), (4,))
            draws[name] = draw() if train else jnp.zeros(4)
        logits = nn.Dense(K)(images.reshape(images.shape[0], -1))
        return Outputs(logits, logits, draws)


NETS = {
    "linen": lambda: (linen_apply(LinenNet(rate=0.5)), LINEN_TEACHER[1]),
    "nnx": lambda: nnx_net(rate=0.5),
}


@pytest.mark.parametrize("kind", NETS)
def test_dropout_changes_with_step_and_device(kind):
    """Both devices have the same images, so only the keys differ."""
    apply, variables = NETS[kind]()

    def watched(variables, images, *, train, rngs):
        own = {**variables, "batch_stats": variables["batch_stats"]["own"]}
        outputs, stats = apply(own, images, train=train, rngs=rngs)
        return outputs, {"own": stats, "seen": jax.lax.all_gather(outputs.logits, AXIS)}

    seen = jnp.zeros((2, N // 2, K))
    start = {
        **variables,
        "batch_stats": {"own": variables["batch_stats"], "seen": seen},
    }
    step = make_train_step(watched, None, optax.sgd(0.0), augment=PLAIN)
    step = parallel(step, in_axes=(None, None, 0, 0), devices=jax.devices()[:2])
    state = replicate(create_state(start, optax.sgd(0.0)), jax.devices()[:2])
    nothing = replicate({}, jax.devices()[:2])
    batch = shard((np.concatenate([IMAGES[:4]] * 2), LABELS), 2)
    drawn = []
    for _ in range(2):
        state, metrics = step(state, nothing, *batch)
        assert metrics["finite"]
        drawn += list(np.asarray(state.batch_stats["seen"]))
    for i, one in enumerate(drawn):
        assert not any(np.array_equal(one, other) for other in drawn[:i])


@pytest.mark.parametrize("kind", NETS)
def test_dropout_follows_its_key(kind):
    apply, variables = NETS[kind]()
    call = jax.jit(lambda key: apply(variables, FLOATS, train=True, rngs=key)[0].logits)
    one, again = call(KEYS), call(KEYS)
    np.testing.assert_array_equal(one, again)
    assert np.any(one != call({"dropout": jax.random.key(1)}))


def test_linen_modules_draw_from_any_name():
    """Stochastic depth has no standard name; draws with all names are independent."""
    images = jnp.zeros((2, SIDE, SIDE, 1))
    variables = Stochastic().init(jax.random.key(0), images)
    outputs, _ = linen_apply(Stochastic())(variables, images, train=True, rngs=KEYS)
    draws = list(outputs.maps.values())
    assert len({float(draw[0]) for draw in draws}) == 3
    same = Stochastic().apply(
        variables, images, train=True, rngs={**KEYS, "params": KEYS["dropout"]}
    )
    np.testing.assert_array_equal(same.maps["dropout"], draws[0])


class Tied(nnx.Module):
    """Has two layers that share a stream, and a stream for each of two branches."""

    def __init__(self, rngs):
        self.rngs = rngs
        self.one = nnx.Dropout(0.5, rngs=rngs)
        self.branches = nnx.Rngs(7).split(2)

    def __call__(self, images):
        draw = lambda stream: jax.random.normal(stream.default(), (4,))
        shared = jax.random.normal(self.rngs.other(), (4,))
        split = nnx.vmap(draw)(self.branches)
        return self.one(images), shared, split


def test_nnx_streams_have_keys_of_their_own():
    apply, variables = nnx_apply(Tied(nnx.Rngs(0)))
    assert variables == {"params": {}, "batch_stats": {}}
    images = jnp.ones((4, 4))
    dropped, shared, split = apply(variables, images, train=True, rngs=KEYS)[0]
    assert len(np.unique(np.append(np.asarray(split), shared))) == 12
    assert 0 < np.sum(dropped == 0) < 16
    with pytest.raises(ValueError, match='Tied draws random .* pass rngs={"dropout"'):
        apply(variables, images, train=True)


def test_nnx_module_may_take_train():
    class Asks(nnx.Module):
        def __call__(self, images, *, train):
            return images + train

    apply, variables = nnx_apply(Asks())
    assert [apply(variables, 0, train=train)[0] for train in (True, False)] == [1, 0]


def test_nnx_module_of_shapes():
    """As with a large network whose arrays come from a checkpoint."""
    shapes = nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0), rate=0.5))
    apply, _ = nnx_apply(shapes)
    plain, variables = nnx_net(rate=0.5)
    for train in (True, False):
        found, _ = apply(variables, FLOATS, train=train, rngs=KEYS)
        expected, _ = plain(variables, FLOATS, train=train, rngs=KEYS)
        np.testing.assert_array_equal(found.logits, expected.logits)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_intermediates_are_no_state():
    class Sows(nnx.Module):
        def __call__(self, images):
            self.sow(nnx.Intermediate, "images", images)
            return images

    _, state = nnx_apply(Sows())[0]({"params": {}}, jnp.ones(2), train=True)
    assert state == {}
