"""Tests several teachers in one step: their losses are added, with one task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step as steps

from kddm_jax import Term, teachers
from kddm_jax.teachers import check_teachers

APPLY = steps.TEACHER_APPLY
TEACHERS = {"one": APPLY, "other": APPLY}
TERMS = {"one": "l2", "other": [Term("kd", weight=0.5), Term("cka")]}
VARIABLES = {"one": steps.TEACHER, "other": steps.variables_of(3)}
LAMBDA = 0.05


def take(teachers, distance, variables, devices=2, data=None, **options):
    """Returns the optimizer's state and the metrics of one step."""
    options = {"augment": steps.AUGMENT, "distance": distance, **options}
    step = steps.make_train_step(steps.STUDENT_APPLY, teachers, steps.TX, **options)
    own = steps.DEVICES[:devices]
    axes, more = (None, None, 0, 0), ()
    if data is not None:
        axes, more = (*axes, None), (steps.replicate(data, own),)
    program = steps.parallel(step, in_axes=axes, devices=own)
    state, _ = steps.start(devices, weight=LAMBDA)
    batch = steps.shard((steps.IMAGES, steps.LABELS), devices)
    state, metrics = program(state, steps.replicate(variables, own), *batch, *more)
    return jax.device_get((state.opt_state, metrics))  # the momentum is the gradient


def test_losses_of_teachers_are_added():
    """Gradients are added, too. The task counts once; terms have the teacher's name."""
    momentum, found = take(TEACHERS, TERMS, VARIABLES)
    one, of_one = take(APPLY, TERMS["one"], VARIABLES["one"])
    other, of_other = take(APPLY, TERMS["other"], VARIABLES["other"], task_weight=0)
    assert set(found) == {"loss", "task", "one:l2", "other:kd", "other:cka"} | {
        "accuracy",
        "finite",
        "teacher_finite",
    }
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    close(found["loss"], of_one["loss"] + of_other["loss"])
    for name in ("task", "accuracy"):
        close(found[name], of_one[name])
    close(found["one:l2"], of_one["l2"])
    close(found["other:kd"], of_other["kd"])
    jax.tree.map(lambda a, b, c: close(a, b + c), momentum, one, other)


@pytest.mark.slow
def test_one_device_is_two():
    steps.assert_close(*(take(TEACHERS, TERMS, VARIABLES, n) for n in (2, 1)))


@pytest.mark.slow
def test_one_named_teacher_is_one_teacher():
    momentum, named = take({"a": APPLY}, {"a": "l2"}, {"a": steps.TEACHER})
    expected, metrics = take(APPLY, "l2", steps.TEACHER)
    jax.tree.map(np.testing.assert_array_equal, momentum, expected)
    assert named["a:l2"] == metrics["l2"]


@pytest.mark.slow
def test_each_teacher_has_data_of_its_own():
    cost = steps.helpers.class_cost(steps.K)
    distance = {"one": "wkd_logits", "other": "wkd_logits"}
    data = {"one": {"class_cost": cost}, "other": {"class_cost": 2 * cost}}
    same = {"one": steps.TEACHER, "other": steps.TEACHER}
    _, metrics = take(TEACHERS, distance, same, data=data)
    assert metrics["other:wkd_logits"] > metrics["one:wkd_logits"] > 0


@pytest.mark.parametrize(
    ("teachers", "distance", "message"),
    [
        (TEACHERS, "l2", "several teachers are mappings .* got str as distance"),
        (APPLY, TERMS, "got function as teacher_apply"),
        (None, TERMS, "got NoneType as teacher_apply"),
        (TEACHERS, {"one": "l2"}, "same teachers, got one, other and one;"),
        ({}, {}, "names no teacher; pass None"),
        ({"a/b": APPLY}, {"a/b": "l2"}, "a teacher cannot be named 'a/b'"),
        ({"a:b": APPLY}, {"a:b": "l2"}, "a teacher cannot be named 'a:b'"),
    ],
)
def test_names_are_checked(teachers, distance, message):
    with pytest.raises(ValueError, match=message):
        check_teachers(teachers, distance)


def test_arguments_of_the_step_are_checked():
    with pytest.raises(ValueError, match="and teacher_variables must name the same"):
        take(TEACHERS, TERMS, {"one": steps.TEACHER})
    with pytest.raises(ValueError, match="teacher_data has 'class_cost', which is no"):
        take(TEACHERS, TERMS, VARIABLES, data={"class_cost": np.zeros((4, 4))})


@pytest.mark.parametrize(
    ("features", "logits", "finite"),
    [
        (None, 1.0, True),
        (None, -np.inf, True),
        (1.0, np.nan, False),
        (np.nan, 1.0, False),
    ],
)
def test_seen_are_features_and_logits(features, logits, finite):
    """A class may be left out by minus infinity; rows without a sample are zero."""
    layers = {} if features is None else {"features": jnp.full((2, 3), features)}
    taught = layers, jnp.array([[1.0, logits], [np.nan, np.nan]])
    found = teachers.seen(taught, jnp.array([1, 0]))
    assert all(np.isfinite(a).all() for a in found) == finite


def test_seen_of_a_teacher_without_logits_are_its_maps():
    (found,) = teachers.seen(({"map": jnp.ones((2, 1, 1, 3))}, None), None)
    assert found.shape == (2, 1, 1, 3)
