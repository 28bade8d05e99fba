"""Tests optimizers of optax in the step: those that need the loss or accumulate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train_step as steps
from optax import contrib

from kddm_jax.train_step import (
    create_state,
    make_train_step,
    parallel,
    replicate,
    shard,
)

KEY = jax.random.key(0)
# Optimizers of optax and optax.contrib that read the loss or have an unusual state.
OPTIMIZERS = {
    "reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.1), contrib.reduce_on_plateau(factor=0.5, patience=1)
    ),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.5),
    "momo": lambda: contrib.momo(0.1),
    "momo_adam": lambda: contrib.momo_adam(0.01),
    "masked": lambda: optax.masked(
        optax.polyak_sgd(0.5), lambda tree: jax.tree.map(lambda a: a.ndim > 1, tree)
    ),
    "multi_transform": lambda: optax.partition(
        {"head": optax.polyak_sgd(0.5), "rest": optax.sgd(0.1)},
        lambda tree: {name: "head" if name == "head" else "rest" for name in tree},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.polyak_sgd)(0.5),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.polyak_sgd(0.5), 3),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "MultiSteps of polyak_sgd": lambda: optax.MultiSteps(optax.polyak_sgd(0.5), 2),
    "noise": lambda: optax.chain(optax.add_noise(0.01, 0.5, KEY), optax.sgd(0.1)),
    "schedule_free": lambda: contrib.schedule_free_sgd(0.1),
    "prodigy": lambda: contrib.prodigy(),
    "sam": lambda: contrib.sam(optax.sgd(0.1), contrib.normalize()),
    "muon": lambda: contrib.muon(0.01),
    "adamw": lambda: optax.adamw(0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_steps_on_two_devices(name):
    tx = OPTIMIZERS[name]()
    step = make_train_step(
        *(steps.STUDENT_APPLY, steps.TEACHER_APPLY, tx),
        distance="l2",
        augment=lambda key, image: steps.NORMALIZE(image),
    )
    devices = steps.DEVICES[:2]
    program = parallel(step, in_axes=(None, None, 0, 0), donate=(0,), devices=devices)
    state = replicate(create_state(steps.STUDENT, tx, weight=0.05), devices)
    teacher = replicate(steps.TEACHER, devices)
    batch = shard((steps.IMAGES, steps.LABELS), 2)
    losses = []
    for _ in range(8):
        state, metrics = program(state, teacher, *batch)
        losses.append(float(metrics["loss"]))
    assert metrics["finite"]
    assert losses[-1] < losses[0]
    keyless = lambda leaf: not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    steps.assert_shards_equal(list(filter(keyless, jax.tree.leaves(state))))


def take(tx, count):
    """Returns the state and the metrics after steps on one device."""
    step = make_train_step(
        *(steps.linen_apply(steps.Net()), None, tx),
        augment=lambda key, image: steps.NORMALIZE(image),
        axis_name=None,
    )
    step, state = jax.jit(step), create_state(steps.STUDENT, tx)
    for _ in range(count):
        state, metrics = step(state, {}, steps.IMAGES, steps.LABELS)
    return state, metrics


def test_plateau_sees_the_loss():
    tx = optax.chain(optax.sgd(0.0), contrib.reduce_on_plateau(factor=0.5, patience=1))
    state, metrics = take(tx, 4)  # without learning, it never improves
    plateau = state.opt_state[1]
    np.testing.assert_allclose(plateau.best_value, metrics["loss"], rtol=1e-6)
    assert plateau.scale == 0.125


def test_multi_steps_updates_at_every_second_step():
    """It uses the mean of the gradients, here of one batch at the same parameters."""
    plain, _ = take(optax.sgd(0.1), 1)
    first, _ = take(optax.MultiSteps(optax.sgd(0.1), 2), 1)
    second, _ = take(optax.MultiSteps(optax.sgd(0.1), 2), 2)
    jax.tree.map(np.testing.assert_array_equal, first.params, steps.STUDENT["params"])
    steps.assert_close(second.params, plain.params)


@pytest.mark.parametrize("name", ["lbfgs", "backtracking"])
def test_line_searches_say_what_is_missing(name):
    """They need to evaluate the loss again."""
    search = {
        "lbfgs": lambda: optax.lbfgs(),
        "backtracking": lambda: optax.chain(
            optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)
        ),
    }
    with pytest.raises(ValueError, match=r"tx needs .*value_fn.*does not"):
        take(search[name](), 1)
