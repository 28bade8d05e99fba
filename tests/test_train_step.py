"""Tests the train step: it learns on any number of devices, and compiles once."""

import inspect
from typing import NamedTuple

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze

from kddm_jax import Term
from kddm_jax.adapters import linen_apply
from kddm_jax.data.augment import make_augment
from kddm_jax.networks.projectors import (
    ThreeLayerProjector,
    add_projectors,
    init_projectors,
    projected_apply,
)
from kddm_jax.numerics.evaluation import evaluation_sums
from kddm_jax.train_step import (
    AXIS,
    MAPPINGS,
    create_state,
    known_outputs,
    make_eval_step,
    make_train_step,
    parallel,
    replicate,
    scan_steps,
    shard,
)

N, SIDE, K = 16, 4, helpers.NUM_CLASSES
TX = optax.sgd(0.1, momentum=0.9)
AUGMENT = make_augment(mean=(0.5,), std=(0.25,), padding=1)
NORMALIZE = lambda image: AUGMENT(None, image, train=False)

RNG = np.random.default_rng(0)
# The labels can be learned from the pixels of one batch; classes are unbalanced.
LABELS = np.array([0] * 8 + [1] * 5 + [2] * 2 + [3], np.int32)
IMAGES = RNG.integers(0, 256, (N, SIDE, SIDE, 1)).astype(np.uint8)


class Outputs(NamedTuple):
    logits: jax.Array
    features: jax.Array
    maps: dict[str, jax.Array]


class Net(nn.Module):
    """Has a layer, BatchNorm over all devices, and a layer; compiles in a second."""

    axis_name: str | None = None
    width: int = 12

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.reshape(images.shape[0], -1)
        # BatchNorm follows, so the gradient of a bias would be only rounding errors.
        x = nn.Dense(self.width, use_bias=False, name="first")(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
        features = nn.relu(x)
        maps = {"map": features.reshape(-1, 2, 2, self.width // 4)}
        return Outputs(nn.Dense(K, name="head")(features), features, maps)


def variables_of(seed):
    variables = jax.jit(Net().init)(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 1)))
    return jax.device_get(variables)


STUDENT, TEACHER = variables_of(1), variables_of(2)
STUDENT_APPLY = linen_apply(Net(axis_name=AXIS))
TEACHER_APPLY = linen_apply(Net())
DEVICES = jax.devices()


def make_step(student=STUDENT_APPLY, **options):
    options = {"distance": "l2", **options}
    options = {"augment": AUGMENT, **options}
    return make_train_step(student, TEACHER_APPLY, TX, **options)


def on_devices(step, count, **options):
    """Maps (state, teacher, images, labels) to (state, metrics), without donation."""
    mapped = parallel(
        step, in_axes=(None, None, 0, 0), devices=DEVICES[:count], **options
    )

    def run(state, teacher, images=IMAGES, labels=LABELS):
        return mapped(state, teacher, *shard((images, labels), count))

    return run


def on_all(tree, count):
    return replicate(tree, DEVICES[:count])


def start(count=2, **options):
    """Returns the replicated state and teacher."""
    state = create_state(STUDENT, TX, **{"weight": 0.05, "seed": 7, **options})
    return on_all(state, count), on_all(TEACHER, count)


@pytest.fixture(scope="module")
def l2_step():
    """Compiles the step that most tests share: paired l2 on two devices."""
    return on_devices(make_step(), 2)


def assert_close(actual, expected, *, tolerance=1e-5, least=1e-3):
    """Asserts max|difference| <= tolerance * max(max|expected|, least) per tensor."""

    def compare(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = max(float(np.max(np.abs(b))), least)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)

    chex.assert_trees_all_equal_structs(actual, expected)
    jax.tree.map(compare, actual, expected)


def assert_shards_equal(tree, count=2):
    for leaf in jax.tree.leaves(tree):
        shards = [np.asarray(s.data) for s in leaf.addressable_shards]
        assert len(shards) == count
        for other in shards[1:]:
            np.testing.assert_array_equal(shards[0], other)


def differs(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


# ---------------------------------------------------------------------- learning


def test_overfits_one_batch():
    """Tests cross-entropy, distance and accuracy on sixteen images."""
    plain = lambda key, image: NORMALIZE(image)
    step = on_devices(make_step(augment=plain), 2)
    state, teacher = start()
    history = []
    for _ in range(60):
        state, metrics = step(state, teacher)
        history.append(jax.device_get(metrics))
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert history[-1]["task"] < 0.2 * history[0]["task"]
    assert history[-1]["l2"] < history[0]["l2"]
    assert history[-1]["accuracy"] == 1
    assert state.step == 60


def test_learns_from_labels_alone():
    """Uses one device, no pmap and no teacher, as for training a teacher."""
    plain = lambda key, image: NORMALIZE(image)
    apply = linen_apply(Net())
    step = make_train_step(apply, None, TX, augment=plain, axis_name=None)
    step, state = jax.jit(step), create_state(STUDENT, TX)
    history = []
    for _ in range(40):
        state, metrics = step(state, {}, IMAGES, LABELS)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.3 * history[0]
    assert set(metrics) == {"loss", "task", "accuracy", "finite"}


def test_metrics_are_those_of_the_global_batch(l2_step):
    state, teacher = start()
    _, metrics = l2_step(state, teacher)
    scalars = {"loss", "task", "l2", "accuracy", "finite", "teacher_finite"}
    assert set(metrics) == scalars
    chex.assert_shape(list(metrics.values()), ())
    assert_shards_equal(metrics)
    expected = metrics["task"] + 0.05 * metrics["l2"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    key = jax.random.fold_in(jax.random.key(7), 0)

    @jax.jit
    def forward():
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(N))
        inputs = jax.vmap(AUGMENT)(keys, IMAGES)
        outputs, _ = linen_apply(Net())(STUDENT, inputs, train=True)
        return outputs, Net().apply(TEACHER, inputs).features  # in evaluation mode

    outputs, taught = forward()
    accuracy = np.mean(np.argmax(outputs.logits, 1) == LABELS)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    l2 = np.mean(np.sum((outputs.features - taught) ** 2, axis=1))
    np.testing.assert_allclose(metrics["l2"], l2, rtol=1e-5)


# ----------------------------------------------------------------------- devices


@pytest.mark.parametrize("how", MAPPINGS)
def test_lower_takes_shapes(how):
    """No arrays are needed, as if there were only a description of the devices."""
    double = lambda x, y: jax.lax.psum(x * y, AXIS)
    mapped = parallel(double, in_axes=(None, 0), devices=DEVICES[:2], how=how)
    shapes = jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((2, 3), "f4")
    assert "all_reduce" in mapped.lower(*shapes).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_shard_map_is_pmap(axis):
    """They agree in all steps, with the gradients of a single device."""
    step, axes = make_step(), (None, None, 0, 0)
    batch = shard((IMAGES, LABELS), 2)
    if axis == 1:  # axes are steps, devices, images, as in streamed runs
        step, axes = scan_steps(step), (None, None, None, None, 1)
        batch = (*on_all((IMAGES, LABELS), 2), np.arange(N).reshape(1, 2, -1))
    results = {}
    for how in MAPPINGS:
        mapped = parallel(step, in_axes=axes, donate=(0,), how=how)
        (state, teacher), before = start(), start()[0]
        for _ in range(2):
            old = state
            state, metrics = mapped(state, teacher, *batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert_shards_equal((state, metrics))
        results[how] = jax.device_get((state, metrics))
    assert list(results) == ["pmap", "shard_map"]
    assert_close(results["shard_map"], results["pmap"])
    assert differs(results["pmap"][0].params, before.params)
    one = on_devices(make_step(), 1)
    state, teacher = start(1)
    for _ in range(2):
        state, _ = one(state, teacher)
    # The momentum is the gradient.
    momentum, expected = results["shard_map"][0].opt_state, state.opt_state
    assert_close(momentum, jax.device_get(expected))


def test_unknown_mapping():
    with pytest.raises(ValueError, match="how must be one of 'pmap', 'shard_map'"):
        parallel(lambda x: x, in_axes=(0,), how="vmap")


def test_shard_map_takes_as_many_arguments_as_axes():
    """Each argument without an axis would be dropped."""
    double = lambda x, y: jax.lax.psum(x * y, AXIS)
    mapped = parallel(double, in_axes=(None, 0), how="shard_map")
    with pytest.raises(ValueError, match="got 3 arguments, but in_axes.* for 2;"):
        mapped(jnp.ones(3), jnp.ones((2, 3)), jnp.ones(3))


def test_parallel_refuses_steps_without_its_axis():
    evaluate = make_eval_step(STUDENT_APPLY, normalize=NORMALIZE, axis_name=None)
    step = make_step(axis_name=None)
    for fn in (step, scan_steps(step), make_step(axis_name="other"), evaluate):
        with pytest.raises(ValueError, match="maps the axis 'batch', but the step"):
            parallel(fn, in_axes=(None, None, 0, 0))


def test_sums_of_half_precision_are_in_single():
    """A bfloat16 near 2,300, a sum of 1,000 losses, is a multiple of 16."""
    logits = np.random.default_rng(0).normal(size=(1000, 10))
    labels = jnp.arange(1000) % 10
    half = jnp.asarray(logits, jnp.bfloat16)
    expected = evaluation_sums(half.astype(jnp.float32), labels)
    found = evaluation_sums(half, labels)
    assert found["loss"].dtype == jnp.float32
    np.testing.assert_array_equal(found["loss"], expected["loss"])


def test_steps_name_an_axis_that_is_not_mapped():
    evaluate = make_eval_step(STUDENT_APPLY, normalize=NORMALIZE)
    state = create_state(STUDENT, TX)
    with pytest.raises(ValueError, match="axis_name='batch' is not the axis"):
        jax.eval_shape(make_step(), state, TEACHER, IMAGES, LABELS)
    with pytest.raises(ValueError, match="axis_name='batch' is not the axis"):
        jax.eval_shape(evaluate, STUDENT, IMAGES, LABELS)


def test_step_on_an_explicit_mesh_is_that_of_one_device():
    """Images, labels and the mask are sharded in a plain jit."""
    options = {"axis_name": None, "distance": "w2_gaussian"}
    step = jax.jit(make_step(linen_apply(Net()), **options))
    mask = np.arange(N) < N - 3
    state = create_state(STUDENT, TX, weight=0.05, seed=7)
    expected = step(state, TEACHER, IMAGES, LABELS, {}, mask)
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2,), ("b",), axis_types=(kind,), devices=DEVICES[:2])
    place = lambda tree, *spec: jax.device_put(
        tree, jax.NamedSharding(mesh, jax.P(*spec))
    )
    state, teacher = place((state, TEACHER))
    images, labels, mask = place((IMAGES, LABELS, mask), "b")
    found = step(state, teacher, images, labels, {}, mask)
    assert_close(jax.device_get(found), jax.device_get(expected))
    evaluate = jax.jit(
        make_eval_step(linen_apply(Net()), normalize=NORMALIZE, axis_name=None)
    )
    sums = evaluate(jax.device_get(TEACHER), IMAGES, LABELS)
    assert_close(jax.device_get(evaluate(teacher, images, labels)), sums)


def test_augmentation_does_not_depend_on_the_number_of_devices():
    """It changes between images, steps and seeds."""
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)

    def student(variables, images, *, train):
        # The student's statistics are the images that it sees, from all devices.
        flat = images.reshape(images.shape[0], -1)
        outputs = Outputs(flat @ variables["params"], flat, {})
        return outputs, jax.lax.all_gather(images, AXIS, tiled=True)

    def seen_by(count):
        step = make_train_step(student, None, TX, augment=AUGMENT)
        step = on_devices(step, count)

        def seen(seed=7, steps=0):
            images = jnp.zeros((N, SIDE, SIDE, 1))
            variables = {"params": jnp.ones((SIDE * SIDE, K)), "batch_stats": images}
            state = create_state(variables, TX, seed=seed)
            state = state.replace(step=jnp.int32(steps))
            new, _ = step(on_all(state, count), on_all({}, count), same)
            return np.asarray(new.batch_stats)

        return seen

    on_one, on_two = seen_by(1), seen_by(2)
    images = on_one()
    np.testing.assert_array_equal(images, on_two())
    assert len(np.unique(images.reshape(N, -1), axis=0)) > 4
    assert np.any(images != on_one(seed=8))
    assert np.any(images != on_one(steps=1))


@pytest.mark.slow
def test_unsynchronised_statistics_would_be_noticed():
    """The comparison can fail: here each device has its own BatchNorm."""
    results = []
    for count in (1, 2):
        step = on_devices(make_step(linen_apply(Net())), count)
        state, _ = step(*start(count))
        results.append(jax.device_get(state.params))
    with pytest.raises(AssertionError):
        assert_close(results[1], results[0])


# ---------------------------------------------------------------- one compilation


@pytest.fixture
def compilations():
    """Collects the programs that are compiled during a test."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_trace_and_one_compilation(compilations):
    """Steps, batches, seeds, weights and teachers share one program."""
    step = on_devices(chex.assert_max_traces(make_step(), n=1), 2)
    first, teacher = start(seed=1, weight=0.1)
    other, _ = start(seed=2, weight=10.0)
    another_teacher = on_all(variables_of(3), 2)
    state, metrics = step(first, teacher)
    jax.block_until_ready(state)
    assert compilations  # the listener works
    compilations.clear()
    for _ in range(2):
        state, _ = step(state, teacher, IMAGES[::-1].copy())
    _, other_metrics = step(other, teacher)
    _, taught = step(first, another_teacher)
    assert compilations == []
    # Each of them changes the result.
    assert other_metrics["loss"] > metrics["loss"]
    assert other_metrics["l2"] != metrics["l2"]
    assert taught["l2"] != metrics["l2"]
    assert taught["task"] == metrics["task"]


@pytest.mark.slow
def test_schedule_scales_the_weight_at_each_step():
    """The factor is 0.5 at the first step, 1.5 at the second, with both lambdas."""
    factor = lambda step: 0.5 + step
    for own in (None, 0.2):
        state, teacher = start(weight=0.2)
        terms = "l2" if own else [Term("l2")]
        options = {"weight": own, "distance": terms, "weight_schedule": factor}
        scheduled = on_devices(make_step(**options), 2)
        for share in (0.5, 1.5):
            plain = on_devices(make_step(weight=0.2 * share), 2)
            wanted, _ = plain(state, teacher)
            state, _ = scheduled(state, teacher)
            chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-6)


def projected_student():
    """Returns a student with a three-layer projector and BatchNorm over all devices."""
    projectors = {"map": ThreeLayerProjector(features=3, axis_name=AXIS)}
    outputs = jax.eval_shape(
        lambda v, x: STUDENT_APPLY(v, x, train=False)[0],
        STUDENT,
        jnp.zeros((1, SIDE, SIDE, 1)),
    )
    own = init_projectors(jax.random.key(5), projectors, outputs.maps)
    return projected_apply(STUDENT_APPLY, projectors), add_projectors(STUDENT, own)


@pytest.mark.slow
def test_projectors_and_positions_on_one_device_are_on_two():
    student, variables = projected_student()
    terms = [
        Term("l2", layers=("map", "map"), name="paired", positions="each"),
        Term("cw2_gaussian", layers=("map", "map"), positions="each"),
    ]
    results = []
    for count in (1, 2):
        state = on_all(create_state(variables, TX, seed=7, weight=0.1), count)
        run = on_devices(make_step(student, distance=terms), count)
        for _ in range(2):
            state, metrics = run(state, on_all(TEACHER, count))
        assert_shards_equal((state, metrics), count)
        results.append(jax.device_get((state, metrics)))
    assert_close(*results[::-1])
    old = variables["batch_stats"]["projectors"]
    assert differs(results[0][0].batch_stats["projectors"], old)


@pytest.mark.slow
def test_known_outputs_on_one_device_are_on_two():
    plain = lambda key, image: AUGMENT(None, image, train=False)
    known, _ = jax.jit(lambda x: TEACHER_APPLY(TEACHER, x, train=False))(
        jax.vmap(NORMALIZE)(IMAGES)
    )
    step = make_train_step(
        STUDENT_APPLY, known_outputs, TX, augment=plain, distance="l2"
    )
    order = np.random.default_rng(1).permutation(N)[None]
    results = []
    for count in (1, 2):
        scanned = parallel(
            scan_steps(step, known=True),
            in_axes=(None, None, None, None, 1),
            devices=DEVICES[:count],
        )
        state = on_all(create_state(STUDENT, TX, weight=0.05), count)
        data = on_all((known, IMAGES, LABELS), count)
        state, metrics = scanned(state, *data, order.reshape(1, count, -1))
        assert_shards_equal((state, metrics), count)
        results.append(jax.device_get((state, metrics)))
    assert_close(*results[::-1])
    assert differs(results[0][0].params, STUDENT["params"])


def test_scan_is_single_steps(l2_step):
    steps = 3
    rng = np.random.default_rng(1)
    indices = np.stack([rng.permutation(2 * N)[:N] for _ in range(steps)])
    images = np.concatenate([IMAGES, IMAGES[::-1]])
    labels = np.concatenate([LABELS, LABELS[::-1]])
    scanned = parallel(scan_steps(make_step()), in_axes=(None, None, None, None, 1))
    # [steps, N] -> [steps, devices, N / devices]
    split = indices.reshape(steps, 2, -1)
    state, teacher = start()
    data = replicate((images, labels))
    many, metrics = scanned(state, teacher, *data, split)
    chex.assert_tree_shape_prefix(metrics, (steps,))
    for i in range(steps):
        state, one = l2_step(state, teacher, images[indices[i]], labels[indices[i]])
        assert_close(jax.tree.map(lambda m, i=i: m[i], metrics), one)
    assert_close(many, state)
    assert many.step == steps
    # A single step is not a loop, but its results have the same shapes.
    _, last = scanned(state, teacher, *data, split[:1])
    chex.assert_tree_shape_prefix(last, (1,))


def test_donation_and_replicate():
    """The step reuses the memory of the state, but not that of the caller's arrays."""
    step = on_devices(make_step(), 2, donate=(0,))
    initial = jax.device_put(create_state(STUDENT, TX, weight=0.05), DEVICES[0])
    state, teacher = replicate(initial), replicate(TEACHER)
    assert_shards_equal(state)
    old = state
    state, _ = step(state, teacher)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((initial, teacher)))
    chex.assert_trees_all_equal(initial.params, STUDENT["params"])
    step(state, teacher)
    # Another student starts from the same initial state.
    again, _ = step(replicate(initial), teacher)
    assert again.step == 1


def test_replicating_twice_keeps_the_first():
    first = replicate({"a": np.arange(3.0)})
    second = replicate(first)
    jax.tree.map(lambda a: a.delete(), second)
    np.testing.assert_array_equal(first["a"], np.arange(3.0))


# -------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_non_finite_step_returns_the_old_state(broken, l2_step):
    state, teacher = start()
    state, _ = l2_step(state, teacher)
    before = jax.device_get(state)
    if broken == "loss":
        step, bad = l2_step, state.replace(weight=on_all(jnp.float32(jnp.inf), 2))
    else:  # the value sqrt(0) is finite, its slope is not
        kink = lambda x, y: jnp.sqrt(jnp.sum((x - jax.lax.stop_gradient(x)) ** 2))
        step, bad = on_devices(make_step(distance=kink), 2), state
    after, metrics = step(bad, teacher)
    assert not metrics["finite"]
    assert bool(np.isfinite(metrics["loss"])) == (broken == "gradient")
    after_on_host = jax.device_get(after).replace(weight=before.weight)
    chex.assert_trees_all_equal(after_on_host, before)
    # The next step with a finite weight works.
    recovered, metrics = l2_step(after.replace(weight=state.weight), teacher)
    assert metrics["finite"]
    assert recovered.step == before.step + 1


@pytest.mark.parametrize("layer", ["first", "head"])
def test_metrics_tell_that_the_teacher_is_not_finite(layer, l2_step):
    """Names the teacher if its features or logits are not finite on any device."""
    state, teacher = start()
    _, metrics = l2_step(state, teacher)
    assert metrics["teacher_finite"]
    broken = jax.tree.map(np.array, TEACHER)
    broken["params"][layer]["kernel"][0, 0] = np.nan
    _, metrics = l2_step(state, on_all(broken, 2))
    assert_shards_equal(metrics)
    assert not metrics["teacher_finite"]
    assert bool(metrics["finite"]) == (layer == "head")  # l2 does not compare logits
    wrong = state.replace(weight=on_all(jnp.float32(jnp.inf), 2))
    _, metrics = l2_step(wrong, teacher)
    assert (bool(metrics["finite"]), bool(metrics["teacher_finite"])) == (False, True)


# ----------------------------------------------------------------------- teacher


def test_teacher_is_an_argument_in_evaluation_mode(l2_step):
    """It uses its own statistics, which do not change, instead of the batch's."""
    state, teacher = start()
    before = jax.device_get(teacher)
    _, metrics = l2_step(state, teacher)
    chex.assert_trees_all_equal(jax.device_get(teacher), before)
    shifted = jax.tree.map(lambda a: a + 1, before["batch_stats"])
    moved = on_all({**before, "batch_stats": shifted}, 2)
    _, moved_metrics = l2_step(state, moved)
    assert moved_metrics["l2"] != metrics["l2"]
    assert moved_metrics["task"] == metrics["task"]


def test_student_statistics_are_updated(l2_step):
    state, teacher = start()
    new, _ = l2_step(state, teacher)
    assert differs(new.batch_stats, state.batch_stats)
    assert new.step == 1
    assert new.seed == state.seed
    assert new.weight == state.weight


def test_terms_are_weighed_by_the_state_s_lambda():
    terms = [Term("l2", weight=0.5), Term("l2", weight=2.0, name="twice")]
    _, metrics = on_devices(make_step(distance=terms), 2)(*start(weight=0.3))
    distances = 0.5 * metrics["l2"] + 2 * metrics["twice"]
    expected = metrics["task"] + 0.3 * distances
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("scanned", [False, True])
def test_teacher_data_are_an_argument_of_the_program(scanned, compilations):
    """Other costs between classes change the loss, but not the program."""
    step = make_step(distance="wkd_logits")
    axes, batch = (None, None, 0, 0, None), shard((IMAGES, LABELS), 2)
    if scanned:
        step, axes = scan_steps(step), (None, None, None, None, 1, None)
        indices = np.arange(2 * N).reshape(2, 2, -1) % N
        batch = (*on_all((IMAGES, LABELS), 2), indices)
    program = parallel(step, in_axes=axes, devices=DEVICES[:2])
    cost = helpers.class_cost(K)
    data = [on_all({"class_cost": price}, 2) for price in (cost, cost / 2)]
    state, teacher = start()
    losses = []
    for one in data:
        _, metrics = program(state, teacher, *batch, one)
        losses.append(np.ravel(metrics["wkd_logits"])[0])
        if len(losses) == 1:
            jax.block_until_ready(metrics)
            compilations.clear()
    assert compilations == []
    assert losses[0] != losses[1]
    assert np.all(np.isfinite(losses))


def test_dropout_has_keys_of_its_own():
    """Keys of dropout differ between steps and devices, and from those of images."""
    seen, fold = [], jax.vmap(jax.random.fold_in, (None, 0))

    def student(variables, images, *, train, rngs):
        outputs, _ = linen_apply(Net())(variables, images, train=True)
        data = jax.random.key_data(rngs["dropout"])
        key = jax.lax.all_gather(data, AXIS).astype(jnp.int32)
        return outputs, {"key": key}

    step = on_devices(make_train_step(student, None, TX, augment=AUGMENT), 2)
    state = create_state(
        {**STUDENT, "batch_stats": {"key": jnp.zeros((2, 2), int)}}, TX
    )
    for at, seed in ((0, 0), (1, 0), (0, 1)):
        now = state.replace(step=jnp.int32(at), seed=jnp.uint32(seed))
        new, _ = step(on_all(now, 2), on_all({}, 2))
        seen += [tuple(key) for key in np.asarray(new.batch_stats["key"]).tolist()]
        key = jax.random.fold_in(jax.random.key(seed), at)
        images = jnp.append(fold(key, jnp.arange(N)), key)
        inner = jax.vmap(lambda key: fold(key, jnp.arange(4)))(images)  # and split's
        data = jax.random.key_data(jnp.append(images, inner.ravel())).astype(jnp.int32)
        assert not {tuple(one) for one in data.tolist()} & set(seen)
    assert len(set(seen)) == 6


def test_rngs_are_passed_through_projectors():
    """Only students that take them get them; the apply function keeps its signature."""

    def noisy(variables, images, *, train, rngs):
        outputs, stats = linen_apply(Net())(variables, images, train=train)
        keep = jax.random.bernoulli(rngs["dropout"], 0.5, outputs.features.shape)
        return outputs._replace(features=outputs.features * keep), stats

    projected = projected_apply(noisy, {})
    images = jax.random.normal(jax.random.key(2), (2, SIDE, SIDE, 1))
    takes = lambda fn: "rngs" in inspect.signature(fn).parameters
    assert takes(projected)
    plain = lambda variables, images, *, train: STUDENT_APPLY(
        variables, images, train=train
    )
    assert not takes(projected_apply(plain, {}))
    one, other = (
        projected(STUDENT, images, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert differs(one[0].features, other[0].features)


def test_padding_counts_in_no_metric():
    """Uses two devices, one of which has almost no labels."""
    plain = lambda key, image: NORMALIZE(image)
    labels = np.where(np.arange(N) < 7, -1, LABELS).astype(np.int32)
    step = on_devices(make_step(augment=plain), 2)
    _, metrics = step(*start(), labels=labels)
    outputs, _ = linen_apply(Net())(STUDENT, jax.vmap(NORMALIZE)(IMAGES), train=True)
    right = (np.argmax(outputs.logits, axis=1) == labels)[7:]
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-6)
    nothing = np.full(N, -1, np.int32)
    assert step(*start(), labels=nothing)[1]["accuracy"] == 0


def test_optimisers_that_want_it_are_given_the_loss():
    """Other optimizers do not get the loss."""

    def init(params):
        del params
        return jnp.zeros(())

    def update(updates, state, params=None, *, value, **extra):
        del state, params, extra
        return jax.tree.map(jnp.zeros_like, updates), value

    tx = optax.chain(TX, optax.GradientTransformationExtraArgs(init, update))
    step = make_train_step(
        linen_apply(Net()), None, tx, augment=AUGMENT, axis_name=None
    )
    state, metrics = jax.jit(step)(create_state(STUDENT, tx), {}, IMAGES, LABELS)
    assert state.opt_state[1] == metrics["loss"]


def test_counters_of_a_state_are_not_averaged():
    """Only floating arrays are averaged, because an average would convert others."""

    def student(variables, images, *, train):
        outputs, stats = STUDENT_APPLY(variables, images, train=train)
        return outputs, {**stats, "count": variables["batch_stats"]["count"] + 1}

    start_of = {**STUDENT["batch_stats"], "count": jnp.int32(3)}
    state = create_state({**STUDENT, "batch_stats": start_of}, TX, weight=0.05)
    step = on_devices(make_step(student), 2)
    new, _ = step(on_all(state, 2), on_all(TEACHER, 2))
    assert new.batch_stats["count"] == 4
    assert new.batch_stats["count"].dtype == jnp.int32


def test_weight_of_the_step_overrides_the_states():
    step = on_devices(make_step(weight=0.5), 2)
    _, metrics = step(*start(weight=100.0))
    expected = metrics["task"] + 0.5 * metrics["l2"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


# -------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_counts(count):
    labels = LABELS.copy()
    labels[[0, 3, 9, 15]] = -1
    evaluate = parallel(
        make_eval_step(TEACHER_APPLY, normalize=NORMALIZE),
        in_axes=(None, 0, 0),
        devices=DEVICES[:count],
    )
    sums = evaluate(on_all(TEACHER, count), *shard((IMAGES, labels), count))
    assert_shards_equal(sums, count)
    logits = Net().apply(TEACHER, jax.vmap(NORMALIZE)(IMAGES)).logits
    logits = np.asarray(logits, np.float64)[labels >= 0]
    valid = labels[labels >= 0]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert sums["count"] == 12
    assert sums["correct"] == np.sum(logits.argmax(1) == valid)
    loss = -logs[np.arange(12), valid].sum()
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_counts_the_largest_logits(count):
    """Sorts all logits; padding is not counted."""
    labels = np.arange(N, dtype=np.int32) % 4
    labels[[0, 3, 9, 15]] = -1
    evaluate = parallel(
        make_eval_step(TEACHER_APPLY, normalize=NORMALIZE, top=2),
        in_axes=(None, 0, 0),
        devices=DEVICES[:count],
    )
    sums = evaluate(on_all(TEACHER, count), *shard((IMAGES, labels), count))
    assert_shards_equal(sums, count)
    logits = np.asarray(Net().apply(TEACHER, jax.vmap(NORMALIZE)(IMAGES)).logits)
    largest = np.argsort(-logits, axis=1)[:, :2]
    expected = sum(label in row for label, row in zip(labels, largest, strict=True))
    assert sums["correct"] < sums["correct_top"] == expected < sums["count"] == 12


def test_evaluation_without_an_axis():
    evaluate = make_eval_step(TEACHER_APPLY, normalize=NORMALIZE, axis_name=None)
    sums = jax.jit(evaluate)(TEACHER, IMAGES, np.full(N, -1))
    chex.assert_trees_all_equal(
        jax.device_get(sums), {"count": 0, "correct": 0, "loss": np.float32(0)}
    )


# ----------------------------------------------------------------- small functions


def test_shard():
    batch = {"images": np.arange(12).reshape(6, 2), "labels": np.arange(6)}
    split = shard(batch, 3)
    np.testing.assert_array_equal(split["labels"], [[0, 1], [2, 3], [4, 5]])
    assert split["images"].shape == (3, 2, 2)
    np.testing.assert_array_equal(split["images"].reshape(6, 2), batch["images"])


def test_shard_refuses_an_uneven_batch():
    with pytest.raises(
        ValueError, match="batch of 6 does not divide among 4 devices.*drop.*mask"
    ):
        shard(np.zeros((6, 2)), 4)


@pytest.mark.parametrize("distance", ["w2", [Term("l2")], lambda x, y: x.sum()])
def test_a_distance_needs_a_teacher(distance):
    with pytest.raises(ValueError, match=r"teacher_apply is None.*or distance=\(\)"):
        make_train_step(STUDENT_APPLY, None, TX, augment=AUGMENT, distance=distance)


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_create_state_refuses_a_weight(weight):
    with pytest.raises(ValueError, match="weight must be a number >= 0, got"):
        create_state(STUDENT, TX, weight=weight)


@pytest.mark.parametrize("head", [None, ("head",)])
def test_frozen_variables(head):
    """The state keeps its structure, which the next step needs."""
    student, teacher = freeze(STUDENT), freeze(TEACHER)
    step = make_step(linen_apply(Net()), axis_name=None, head=head)
    state = create_state(student, TX)
    new, _ = jax.eval_shape(step, state, teacher, IMAGES, LABELS)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_create_state():
    state = create_state({"params": STUDENT["params"]}, TX, seed=5, weight=0.25)
    assert state.batch_stats == {}
    assert set(state.variables) == {"params", "batch_stats"}
    assert (state.step, state.seed, state.weight) == (0, 5, 0.25)
    chex.assert_type(
        [state.step, state.seed, state.weight], [jnp.int32, jnp.uint32, jnp.float32]
    )


# -------------------------------------------------------------------------- padding


def test_padded_images_of_a_mask_have_no_part():
    """Loss, terms, accuracy and update equal those of the batch without these."""
    plain = lambda key, image: NORMALIZE(image)

    def apply(variables, images, *, train):
        logits = images.reshape(len(images), -1) @ variables["params"]
        return Outputs(logits, logits**2, {}), {}

    def taught(variables, images, *, train):  # a blank image gives NaN
        contrast = images / jnp.std(images, axis=(1, 2, 3), keepdims=True)
        return apply(variables, contrast, train=train)

    terms = [Term("w2_gaussian"), Term("kd")]
    step = jax.jit(
        make_train_step(
            *(apply, taught, TX), augment=plain, distance=terms, axis_name=None
        )
    )
    rng = np.random.default_rng(4)
    student, teacher = (rng.normal(size=(SIDE * SIDE, K)) for _ in range(2))
    state = create_state({"params": jnp.float32(student)}, TX, weight=0.1)
    state = state.replace(batch_stats={})
    teacher = {"params": jnp.float32(teacher)}
    mask = np.arange(N) % 3 != 0
    images = np.where(mask[:, None, None, None], IMAGES, 0).astype(np.uint8)
    new, metrics = step(
        state, teacher, images, np.where(mask, LABELS, 77), {}, mask.astype(np.float32)
    )
    assert metrics["teacher_finite"]
    moved = np.roll(np.arange(N), 1)[None]  # the mask moves on
    scanned, _ = jax.jit(scan_steps(step))(
        state, teacher, images, np.where(mask, LABELS, 77), moved, {}, mask
    )
    assert_close(scanned.params, new.params, tolerance=1e-4)
    cut, expected = step(state, teacher, IMAGES[mask], LABELS[mask])
    assert_close(metrics, expected, tolerance=1e-4)
    assert_close(new.params, cut.params, tolerance=1e-4)
