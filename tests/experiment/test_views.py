"""Tests fixed views: teacher and student see the same images; the teacher runs once."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step as steps
from commands import KEEP, SMALL, TINY, call, results_of

from kddm_jax import adapters
from kddm_jax.data import augment
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import change
from kddm_jax.experiment.training import problems, views
from kddm_jax.train_step import known_outputs, scan_steps

# ------------------------------------------------------------------ train step


@pytest.mark.parametrize("rows", [1, 2])
def test_known_outputs_are_the_teacher_s(rows):
    """A step that reads the teacher's outputs equals a step that runs the teacher."""
    plain = lambda key, image: steps.AUGMENT(None, image, train=False)
    teacher, _ = jax.jit(lambda v, x: steps.TEACHER_APPLY(v, x, train=False))(
        steps.TEACHER, jax.vmap(lambda image: plain(None, image))(steps.IMAGES)
    )
    options = {"augment": plain, "axis_name": None, "distance": "l2", "weight": 0.1}
    make = lambda apply: steps.make_train_step(
        steps.linen_apply(steps.Net()), apply, steps.TX, **options
    )
    state = steps.create_state(steps.STUDENT, steps.TX)
    order = np.random.default_rng(0).permutation(steps.N).reshape(2, -1)[:rows]
    data = (steps.IMAGES, steps.LABELS, order)
    known = jax.jit(scan_steps(make(known_outputs), known=True))
    run = jax.jit(scan_steps(make(steps.TEACHER_APPLY)))
    new, metrics = known(state, teacher, *data)
    expected, expected_metrics = run(state, steps.TEACHER, *data)
    chex.assert_trees_all_close(new.params, expected.params, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)


# ----------------------------------------------------------------------- views

IMAGES = np.random.default_rng(0).integers(1, 256, (9, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(9, dtype=np.int32)
SEEN = np.array([1, 4, 5, 8])


def make(*line, views_of=3):
    line = ("--dataset", "digits", "--views", str(views_of), *line)
    return views.Views(parse(list(line)), IMAGES, LABELS, SEEN)


def test_views_lie_side_by_side_and_differ():
    images, labels = make().pair
    assert images.shape == (12, 8, 8, 1)
    assert labels.tolist() == np.repeat(SEEN, 3).tolist()
    by_image = images.reshape(4, 3, -1)
    assert any(len(np.unique(own, axis=0)) > 1 for own in by_image)
    np.testing.assert_array_equal(images, make().pair[0])  # drawn only once


def test_views_are_the_recipe_s_augmentation():
    images, _ = make("--padding", "2").pair
    for place, view in enumerate(images):
        key = jax.random.fold_in(jax.random.key(0), place)
        source = IMAGES[SEEN[place // 3]]
        options = {"padding": 2, "flip": False, "degrees": 10.0}
        expected = augment.distort(key, source, **options)
        np.testing.assert_array_equal(view, expected)


def test_without_augmentation_a_view_is_its_image():
    images, _ = make("--padding", "0", "--degrees", "0").pair
    np.testing.assert_array_equal(images, np.repeat(IMAGES[SEEN], 3, axis=0))


def test_order_keeps_the_images_and_draws_their_views():
    fixed, order = make(), np.array([[8, 1], [5, 4], [1, 8]])
    placed = fixed.order(order, seed=0, epoch=0)
    np.testing.assert_array_equal(SEEN[placed // 3], order)
    many = [fixed.order(order, seed=0, epoch=epoch) % 3 for epoch in range(30)]
    assert np.all(np.bincount(np.ravel(many)) > 40)
    np.testing.assert_array_equal(placed, fixed.order(order, seed=0, epoch=0))
    assert (fixed.order(order, 0, 1) != placed).any() or (many[1] != many[2]).any()


class Teacher:
    """Returns the sums of the pixels as features, and counts its calls."""

    def __init__(self, digest):
        self.digest, self.variables, self.calls = digest, {"factor": 2.0}, 0
        self.model = self

    def apply(self, variables, images, train=False):
        self.calls += 1
        total = jnp.sum(images, axis=(1, 2)) * variables["factor"]
        return adapters.Outputs(total * jnp.ones(3), total, {"map": images})


def problem_in(folder, memory=1e9):
    normalize = lambda key, image: image.astype(jnp.float32)
    return SimpleNamespace(out=folder, memory=memory, normalize=normalize)


def test_outputs_are_computed_once_for_a_teacher_and_kept(tmp_path):
    fixed, teacher = make(), Teacher("a")
    outputs = fixed.outputs(problem_in(tmp_path), teacher, ("map",))
    total = 2.0 * fixed.pair[0].astype(np.float32).sum((1, 2))
    np.testing.assert_allclose(outputs.features, total)
    np.testing.assert_allclose(outputs.logits, total * np.ones(3))
    np.testing.assert_allclose(outputs.maps["map"], fixed.pair[0])
    asked = teacher.calls
    again = make().outputs(problem_in(tmp_path), teacher, ("map",))
    assert teacher.calls == asked
    chex.assert_trees_all_equal(again, outputs)


def test_half_precision_comes_back_from_its_file(tmp_path):
    problem = problem_in(tmp_path)
    problem.normalize = lambda key, image: image.astype(jnp.bfloat16)
    first = make().outputs(problem, Teacher("a"), ("map",))
    again = make().outputs(problem, Teacher("a"), ("map",))
    chex.assert_trees_all_equal(first, again)
    assert jax.tree.map(jnp.asarray, again).maps["map"].dtype == jnp.float32


def test_another_teacher_or_other_views_are_other_outputs(tmp_path):
    problem = problem_in(tmp_path)
    make().outputs(problem, Teacher("a"), ())
    for fixed, digest in ((make(), "b"), (make("--padding", "2"), "a")):
        teacher = Teacher(digest)
        fixed.outputs(problem, teacher, ())
        assert teacher.calls
    assert len(list((tmp_path / "teacher-outputs").glob("*.npz"))) == 3


def test_outputs_beyond_the_memory_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--views 3: .* GB; lower --views"):
        make().outputs(problem_in(tmp_path, memory=1e3), Teacher("a"), ("map",))
    assert not list(tmp_path.rglob("*.npz"))


def test_views_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(problems.Problem, "memory", 1e5)
    settings = change(parse([*TINY, "--views", "9"]), compilation_cache=None)
    with pytest.raises(UserError, match="--views 9: .* lower it"):
        problems.prepare(settings, tmp_path)


@pytest.mark.slow
def test_views_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    line = (*SMALL, *KEEP, "--devices", 1)
    line = (*line, "--views", 2, "--out", out, "--distances", "w2_gaussian", "l2")
    assert call(*line) == 0
    assert len(list((out / "teacher-outputs").glob("*.npz"))) == 1
    for run in results_of(out)["runs"][1:]:
        values = [record[run["name"]] for record in run["history"]]
        assert values[-1] < values[0]
    capsys.readouterr()
    other = ("--views", 3)
    assert call(*line, *other) == 2
    assert "was made with views=2, this command says 3" in capsys.readouterr().err
