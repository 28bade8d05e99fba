"""Tests the distillation loss: terms, gradients, and any number of devices."""

from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kddm_jax import DISTANCES, Distance, Term, distill_loss
from kddm_jax.distances import get_distance, paired_l2, wasserstein
from kddm_jax.losses import cross_entropy
from kddm_jax.numerics.normalization import NORMALIZATIONS, normalize, teacher_factor
from kddm_jax.numerics.targets import predict_labels

N, D, K = 16, 6, helpers.NUM_CLASSES
BATCH = helpers.make_batch(N, D).map(np.float32)
LABELS = jnp.asarray(BATCH.labels)
KEY = jax.random.key(3)


def arrays(row, batch=BATCH):
    """Returns features (or maps, if the distance compares maps) and logits of both."""
    if "maps" in row.inputs:
        return batch.maps_x, batch.maps_y, batch.logits_x, batch.logits_y
    return batch.x, batch.y, batch.logits_x, batch.logits_y


def loss_of(name, **options):
    """Returns the loss as a function of both features, both logits and labels."""
    data = helpers.teacher_data(K, D)
    options = {"weight": 1e-3, "teacher_data": data, **options}

    def fn(x, y, s, t, labels=LABELS):
        return distill_loss(x, y, labels, s, t, distance=name, key=KEY, **options)

    return fn


def simple(x=BATCH.x, y=BATCH.y, labels=LABELS, s=BATCH.logits_x, t=None, **options):
    """Computes a loss that takes almost no time to compile."""
    options = {"distance": "l2", **options}
    if not isinstance(options["distance"], list | tuple | Term):
        options = {"weight": 1e-3, **options}
    return distill_loss(x, y, labels, s, t, **options)


def numpy_cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -np.mean([row[c] for row, c in zip(logs, labels, strict=True) if c >= 0])


# ---------------------------------------------------------- value and gradients


@pytest.mark.parametrize("name", DISTANCES)
def test_default_weight(name):
    """The default depends on the normalization; without one, a number is required."""
    row = DISTANCES[name]
    x, y, s, t = arrays(row)
    options = {"weight": None, "t": t, "distance": name, "key": KEY}
    options["teacher_data"] = helpers.teacher_data(K, D)
    loss = lambda **more: jax.eval_shape(partial(simple, x, y, **options, **more))
    assert row.weights
    for normalization in NORMALIZATIONS:
        if normalization in row.weights:
            loss(normalization=normalization)
            continue
        message = f"no default weight with normalization={normalization!r}, only with "
        with pytest.raises(ValueError, match=message):
            loss(normalization=normalization)


def test_value_of_the_default_weight():
    loss, terms = simple(weight=None, normalization="teacher")
    np.testing.assert_allclose(loss, terms["task"] + 0.1 * terms["l2"], rtol=1e-6)
    loss, terms = simple(distance=[Term("l2")])
    np.testing.assert_allclose(loss, terms["task"] + terms["l2"], rtol=1e-6)
    assert Term("l2").weight == 1


def test_the_weight_is_that_of_all_terms():
    terms = [Term("l2", weight=0.5), Term("mmd_linear", weight=2.0)]
    for distance in (terms, terms[0]):
        loss, values = simple(distance=distance, weight=0.3)
        chosen = terms if distance is terms else terms[:1]
        relative = sum(term.weight * values[term.distance] for term in chosen)
        np.testing.assert_allclose(loss, values["task"] + 0.3 * relative, rtol=1e-6)


def test_padding_has_no_part():
    """Samples labelled -1 change no cross-entropy and no class-conditional distance."""
    labels = np.array([0, 1, 1, 2, 0, 1, -1, -1])
    batch = BATCH.map(lambda z: z[:8])
    options = {"distance": "cw2_gaussian", "weight": 0.1}
    fn = jax.jit(jax.value_and_grad(lambda x, s: _padded(x, s, batch, labels, options)))
    loss, gradient = fn(batch.x, batch.logits_x)
    other = batch.map(lambda z: np.concatenate([z[:6], 9 * z[6:] + 1]))
    moved, _ = fn(other.x, other.logits_x)
    np.testing.assert_allclose(moved, loss, rtol=1e-6)
    np.testing.assert_array_equal(gradient[6:], 0)
    short = batch.map(lambda z: z[:6])
    direct = distill_loss(short.x, short.y, labels[:6], short.logits_x, **options)[0]
    np.testing.assert_allclose(loss, direct, rtol=1e-5)


def _padded(x, s, batch, labels, options):
    return distill_loss(x, batch.y, jnp.asarray(labels), s, **options)[0]


def test_cross_entropy():
    labels = np.array([3, -1, 0, 2])
    logits = BATCH.logits_x[:4]
    expected = numpy_cross_entropy(logits, labels)
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5)
    assert cross_entropy(logits, np.full(4, -1)) == 0
    half = cross_entropy(jnp.bfloat16(logits), labels)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=1e-2)


def test_diagnostics_are_terms():
    fn = jax.jit(loss_of("w2", solver="exact"))
    _, terms = fn(*arrays(DISTANCES["w2"]))
    stats = ("converged", "iterations", "marginal_error")
    assert set(terms) == {"task", "w2", *(f"w2/{stat}" for stat in stats)}
    assert terms["w2/converged"] == 1


# ------------------------------------------------------------------------- terms


def of_maps(distance, x, y, positions, **options):
    """Computes one distance of features on maps or tokens."""
    term = Term(
        distance, layers=("m", "m"), options=options, name="it", positions=positions
    )
    labels = LABELS[: len(x)]
    fn = lambda x, y: distill_loss(
        {"m": x}, {"m": y}, labels, jnp.zeros((len(x), K)), distance=[term]
    )[1]["it"]
    return jax.jit(fn)(x, y)


def test_maps_are_pooled_for_distances_of_features():
    x, y = BATCH.maps_x, BATCH.maps_y
    expected = np.sum((x.mean((1, 2)) - y.mean((1, 2))) ** 2, axis=1).mean()
    np.testing.assert_allclose(of_maps("l2", x, y, "pool"), expected, rtol=1e-5)
    # If only one layer has positions, it is pooled.
    flat = of_maps("l2", x, y.mean((1, 2)), "pool")
    np.testing.assert_allclose(flat, expected, rtol=1e-5)


def test_positions_are_samples_of_their_image_s_label():
    x, y = BATCH.maps_x, BATCH.maps_y  # of 3 x 3 pixels
    expected = np.sum((x - y) ** 2, axis=-1).mean()
    np.testing.assert_allclose(of_maps("l2", x, y, "each"), expected, rtol=1e-5)
    rows = [z.reshape(-1, D) for z in (x, y)]
    labels = np.repeat(BATCH.labels, 9)
    by_class = DISTANCES["cw2_gaussian"].fn(*rows, labels)
    got = of_maps("cw2_gaussian", x, y, "each")
    np.testing.assert_allclose(got, by_class, rtol=1e-4)


def test_larger_map_is_averaged_down_to_the_smaller():
    x = np.repeat(np.repeat(BATCH.maps_x, 2, axis=1), 2, axis=2)  # of 6 x 6 pixels
    x[:, ::2] += 1.0
    x[:, 1::2] -= 1.0
    expected = of_maps("l2", BATCH.maps_x, BATCH.maps_y, "each")
    got = of_maps("l2", x, BATCH.maps_y, "each")
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_tokens_are_positions():
    x, y = (z.reshape(N, 9, D) for z in (BATCH.maps_x, BATCH.maps_y))
    expected = of_maps("l2", BATCH.maps_x, BATCH.maps_y, "each")
    np.testing.assert_allclose(of_maps("l2", x, y, "each"), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"positions .*\[16, 9, 6\] and \[16, 4, 6\]"):
        of_maps("l2", x, y[:, :4], "each")


def test_positions_are_normalized_by_their_own_deviation():
    x, y = BATCH.maps_x, BATCH.maps_y
    term = Term("l2", layers=("m", "m"), name="it", positions="each")
    options = {"distance": [term], "normalization": "teacher"}
    value = simple({"m": x}, {"m": y}, **options)[1]["it"]
    rows = y.reshape(-1, D)
    spread = np.sum((rows - rows.mean(0)) ** 2, axis=1).mean()
    expected = np.sum((x - y) ** 2, axis=-1).mean() / spread
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="positions .*'pixels'"):
        Term("l2", positions="pixels")


def test_terms_with_layers_names_and_options():
    student = {"features": BATCH.x, "block1": BATCH.x[:, :3], "unused": None}
    teacher = {"features": BATCH.y, "stage1": BATCH.y[:, :3]}
    terms = [
        Term("l2", weight=0.5),
        Term("l2", weight=0.25, layers=("block1", "stage1")),
        Term("mmd_rbf", weight=np.float32(2.0), options={"bandwidth": 1.5}),
        Term(wasserstein, weight=0.1, options={"solver": "exact"}, name="mine"),
        Term(DISTANCES["mmd_linear"], weight=0.0, name="means"),
    ]
    loss, values = jax.jit(partial(simple, student, teacher, distance=terms))()
    assert {"task", "l2", "l2@block1", "mmd_rbf", "mine", "means"} == set(values)
    l2 = lambda x, y: np.mean(np.sum((x - y) ** 2, axis=1))
    np.testing.assert_allclose(values["l2"], l2(BATCH.x, BATCH.y), rtol=1e-5)
    first = l2(BATCH.x[:, :3], BATCH.y[:, :3])
    np.testing.assert_allclose(values["l2@block1"], first, rtol=1e-5)
    expected = (
        values["task"]
        + 0.5 * values["l2"]
        + 0.25 * values["l2@block1"]
        + 2 * values["mmd_rbf"]
        + 0.1 * values["mine"]
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "distance",
    [
        "l2",
        DISTANCES["l2"],
        paired_l2,
        lambda x, y: paired_l2(x, y),
        partial(paired_l2),
        Term("l2", weight=0.3),
        (Term("l2", weight=0.3),),
    ],
    ids=["key", "row", "function", "lambda", "partial", "Term", "Terms"],
)
def test_ways_to_name_a_distance(distance):
    expected, _ = simple(weight=0.15)
    weight = 0.5 if isinstance(distance, Term | tuple) else 0.15
    actual, terms = simple(distance=distance, weight=weight)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert len(terms) == 2


def test_no_terms_is_cross_entropy():
    loss, terms = simple({}, {}, distance=())
    assert set(terms) == {"task"}
    assert loss == terms["task"]


def test_get_distance_keeps_rows():
    row = Distance(paired_l2, title="mine")
    assert get_distance(row) is row
    assert get_distance("w2") is DISTANCES["w2"]
    assert get_distance(paired_l2).title == "paired_l2"


def test_only_compared_layers_are_used():
    """Layers that no term compares may be anything, and are not gathered."""
    student = {"features": BATCH.x, "rubbish": object()}
    simple(student, BATCH.y)


@pytest.mark.parametrize("name", ["cka", "l2"])
def test_logits_are_a_layer(name):
    arrays = BATCH.x, BATCH.y, LABELS, BATCH.logits_x, BATCH.logits_y
    term = Term(name, layers=("logits", "logits"), name=name)

    @jax.jit
    @jax.value_and_grad
    def found(s):
        return simple(*arrays[:3], s, arrays[4], distance=term)[1][name]

    @jax.jit
    @jax.value_and_grad
    def expected(s):
        return get_distance(name).fn(s, arrays[4])

    chex.assert_trees_all_close(found(arrays[3]), expected(arrays[3]), rtol=1e-5)
    # Masked samples are left out, as of other layers.
    kept = np.arange(N) % 3 != 0
    spoilt = [np.where(kept[:, None], z, np.nan) for z in arrays[3:]]
    _, terms = simple(*arrays[:3], *spoilt, distance=term, mask=kept)
    cut = get_distance(name).fn(*(z[kept] for z in arrays[3:]))
    np.testing.assert_allclose(terms[name], cut, rtol=1e-5)
    # A layer of that name comes first.
    own = {"logits": BATCH.x}, {"logits": BATCH.y}
    _, terms = simple(*own, *arrays[2:], distance=term)
    np.testing.assert_allclose(
        terms[name], get_distance(name).fn(BATCH.x, BATCH.y), rtol=1e-5
    )
    with pytest.raises(ValueError, match="teacher_logits is None; pass teacher_logits"):
        simple(*arrays[:4], distance=term)


def test_predictions_need_no_layer():
    """They need no layer and no normalization."""
    row = Distance(paired_l2, inputs=("logits",), promises=frozenset({"squared"}))
    s, t = BATCH.logits_x, BATCH.logits_y
    term = Term(row, weight=0.5)
    loss, terms = simple(
        {"block": BATCH.x}, {}, t=t, distance=term, normalization="teacher"
    )
    expected = np.mean(np.sum((s - t) ** 2, axis=1))
    np.testing.assert_allclose(terms["paired_l2"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, terms["task"] + 0.5 * expected, rtol=1e-5)


# ------------------------------------------------------ normalization and weight


OF_FEATURES = [name for name, row in DISTANCES.items() if "features" in row.inputs]


@pytest.mark.parametrize("name", ["l2", "w2_gaussian", "mmd_linear"])
def test_squared_distances_are_in_units_of_the_teacher_s_deviation(name):
    assert "squared" in DISTANCES[name].promises
    x, y, s, t = arrays(DISTANCES[name])
    raw = jax.jit(loss_of(name))(x, y, s, t)[1][name]
    deviation = np.mean(np.sum((y - y.mean(0)) ** 2, axis=1))
    normalized = jax.jit(loss_of(name, normalization="teacher"))(x, y, s, t)[1][name]
    np.testing.assert_allclose(normalized, raw / deviation, rtol=1e-5)


@pytest.mark.parametrize("name", ["l2", "w2_gaussian", "mmd_rbf", "linear_projection"])
def test_a_common_factor_of_both_networks_changes_nothing(name):
    def distance(x, y, s, t):
        return loss_of(name, normalization="teacher")(x, y, s, t)[1][name]

    x, y, s, t = arrays(DISTANCES[name])
    fn = jax.jit(jax.value_and_grad(distance))
    value, gradient = fn(x, y, s, t)
    for factor in (1e-3, 1e3):
        found, slope = fn(factor * x, factor * y, s, t)
        np.testing.assert_allclose(found, value, rtol=1e-4)
        largest = np.max(np.abs(gradient))
        np.testing.assert_allclose(factor * slope, gradient, atol=1e-4 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FEATURES)
def test_normalization_transforms_the_inputs_of_every_distance_of_features(name):
    row, batch = DISTANCES[name], helpers.fitted(DISTANCES[name], BATCH)
    pair = batch.x, batch.y
    x, y = normalize(pair, pair, "teacher")
    assert np.mean(np.sum((y - y.mean(0)) ** 2, axis=1)) == pytest.approx(1, rel=1e-5)
    moved = batch._replace(x=x, y=y, key=3)
    expected = jax.jit(partial(row.fn, **helpers.options_of(row)))(
        *helpers.arguments(row, moved)
    )
    found = jax.jit(loss_of(name, normalization="teacher"))(
        *pair, batch.logits_x, batch.logits_y
    )[1][name]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_term_s_normalization_is_its_own():
    terms = [Term("l2", normalization="teacher", name="a"), Term("l2", name="b")]
    _, values = simple(distance=terms)
    deviation = np.mean(np.sum((BATCH.y - BATCH.y.mean(0)) ** 2, axis=1))
    np.testing.assert_allclose(values["a"], values["b"] / deviation, rtol=1e-5)
    with pytest.raises(ValueError, match="for distances of features, but kd compares"):
        Term("kd", normalization="teacher")


def test_unlabelled_samples_count_in_the_statistics():
    labels = jnp.where(jnp.arange(N) < N // 2, LABELS, -1)
    options = {"normalization": "teacher", "distance": "l2"}
    some, every = (simple(labels=who, **options)[1]["l2"] for who in (labels, LABELS))
    assert some == every


def test_the_teacher_s_deviation_is_a_constant():
    slope = jax.grad(teacher_factor)(jnp.asarray(BATCH.y))
    np.testing.assert_array_equal(slope, 0)
    fn = lambda x, y: simple(x, y, normalization="teacher", weight=1.0)[0]
    by_student, by_teacher = jax.grad(fn, argnums=(0, 1))(BATCH.x, BATCH.y)
    np.testing.assert_array_equal(by_teacher, 0)
    deviation = np.mean(np.sum((BATCH.y - BATCH.y.mean(0)) ** 2, axis=1))
    expected = 2 * (BATCH.x - BATCH.y) / N / deviation
    np.testing.assert_allclose(by_student, expected, rtol=1e-4, atol=1e-6)


def test_chex_checks_the_loss_that_is_trained():
    """chex replaces stop_gradient by ones during its check."""
    seen = []

    def fn(x):
        loss, _ = simple(x, jnp.asarray(y), normalization="teacher", weight=1.0)
        if not isinstance(loss, jax.core.Tracer):
            seen.append(float(loss))
        return loss

    with jax.enable_x64(True):
        x, y = (jnp.asarray(z, jnp.float64) for z in (BATCH.x, BATCH.y))
        chex.assert_numerical_grads(fn, (x,), order=1, atol=1e-6, rtol=1e-3)
        expected = float(simple(x, y, normalization="teacher", weight=1.0)[0])
    assert seen
    np.testing.assert_allclose(seen, expected, rtol=1e-2)


def test_a_constant_teacher_gives_zeros():
    ones = np.ones_like(BATCH.x)
    fn = lambda x: simple(x, ones, normalization="teacher", weight=1.0)
    for x in (ones, 2 * ones):
        (loss, terms), slope = jax.value_and_grad(fn, has_aux=True)(x)
        assert terms["l2"] == 0
        assert loss == terms["task"]
        np.testing.assert_array_equal(slope, 0)


def test_a_teacher_that_is_not_finite_gives_nan():
    for wrong in (np.nan, np.inf):
        y = BATCH.y.copy()
        y[0, 0] = wrong
        assert np.isnan(simple(BATCH.x, y, normalization="teacher")[0])
        assert np.isnan(teacher_factor(jnp.asarray(y)))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_factor_of_features_of_any_size(size):
    y = size * jnp.array([[3.0], [7.0]])
    np.testing.assert_allclose(teacher_factor(y), 0.5 / size, rtol=1e-5)


def test_unknown_normalizations_are_refused():
    for make in (Term, lambda d, **o: simple(distance=d, **o)):
        with pytest.raises(ValueError, match="must be one of None, 'teacher', 'unit'"):
            make("l2", normalization="student")


def test_a_new_weight_does_not_retrace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(weight, x):
        first, _ = simple(x, weight=weight, task_weight=weight)
        second, _ = simple(x, distance=[Term("l2", weight=0.5)], weight=weight)
        return first + second

    values = [loss(w, BATCH.x) for w in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(values[2] - values[1], values[1] - values[0], rtol=1e-4)


def test_terms_and_distances_are_hashable():
    """They can be static arguments, and the order of options does not matter."""
    options = {"solver": "exact", "pairing": 1.0}
    one = Term("w2", options=options, layers=("a", "b"))
    other = Term("w2", options=dict(reversed(options.items())), layers=("a", "b"))
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Term("w2")}) == 2
    rows = {*DISTANCES.values()}
    assert len(rows) == len(DISTANCES)
    assert len({Distance(paired_l2, options=o) for o in ({}, {"a": 1}, {"a": 1})}) == 2
    assert isinstance(Term("w2", weight=np.float32(2)).weight, float)
    lists = {"layers": ["a", "b"], "options": {"bandwidth": [1.0, 2.0]}}
    tuples = {"layers": ("a", "b"), "options": {"bandwidth": (1.0, 2.0)}}
    assert hash(Term("mmd_rbf", **lists)) == hash(Term("mmd_rbf", **tuples))
    row = Distance(paired_l2, inputs=["features"], promises={"zero"})
    assert hash(row) == hash(Distance(paired_l2, promises=frozenset({"zero"})))
    for make in (Term, Distance):
        with pytest.raises(ValueError, match="option a is a dict, which has no hash"):
            make("l2" if make is Term else paired_l2, options={"a": {}})


def test_the_distance_may_be_a_static_argument():
    """Keys, entries, functions and Terms; equal ones share a program."""
    traces = []

    def own(x, y):
        traces.append(1)
        return jnp.mean((x - y) ** 2)

    loss = jax.jit(distill_loss, static_argnames="distance")
    arguments = BATCH.x, BATCH.y, LABELS, BATCH.logits_x
    for make in (
        lambda: "l2",
        lambda: DISTANCES["l2"],
        lambda: paired_l2,
        lambda: Term("l2", weight=2.0),
        lambda: (Term("l2"), Term(own, weight=0.5, layers=["features", "features"])),
    ):
        value, _ = loss(*arguments, distance=make(), weight=0.5)
        assert value == loss(*arguments, distance=make(), weight=0.5)[0]
        expected, _ = distill_loss(*arguments, distance=make(), weight=0.5)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert len(traces) == 2  # one with the program, one without


def test_the_task_may_be_another():
    """It replaces the cross-entropy, with its weight and its metric."""
    task = lambda logits, labels: jnp.mean(logits[jnp.arange(N), labels])
    loss, terms = simple(task=task, task_weight=2.0, weight=0.5)
    expected = np.mean(BATCH.logits_x[np.arange(N), BATCH.labels])
    np.testing.assert_allclose(terms["task"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * expected + 0.5 * terms["l2"], rtol=1e-5)


def test_teacher_data_are_arguments():
    """Other costs between classes need no other program, and get no gradient."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(cost):
        data = {"class_cost": cost}
        return simple(distance="wkd_logits", t=BATCH.logits_y, teacher_data=data)[0]

    cost = jnp.asarray(helpers.class_cost(K))
    assert loss(cost) != loss(cost / 2)
    np.testing.assert_array_equal(
        jax.jit(jax.grad(loss.__wrapped__.__wrapped__))(cost), 0
    )


def test_vmap_over_weight():
    weights = jnp.array([0.0, 0.1, 3.0])
    fn = jax.value_and_grad(lambda w, x: simple(x, weight=w)[0], argnums=(0, 1))
    together = jax.jit(jax.vmap(fn, in_axes=(0, None)))(weights, BATCH.x)
    apart = [fn(w, BATCH.x) for w in weights]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    chex.assert_trees_all_close(together, expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------- devices


DEVICES = 2


def bent(x, scale):
    """Is not linear, because some distances are invariant to linear maps."""
    return x + scale * jnp.tanh(x)


def differentiate(params, batch, name, axis_name=None):
    """Returns ((loss, terms), gradients by params and by the teacher's arrays)."""
    x, y, s, t, labels = batch

    def loss(params, y, t):
        features = bent(x, params["scale"])
        logits = s + params["bias"]
        options = {"weight": 0.5, "task_weight": 2.0, "axis_name": axis_name}
        return loss_of(name, **options)(features, y, logits, t, labels)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, y, t)


def averaged(params, *batch, name):
    values, (gradient, _, _) = differentiate(params, batch, name, "devices")
    return values, jax.lax.pmean(gradient, "devices")


def by_pmap(name):
    fn = jax.pmap(
        partial(averaged, name=name),
        axis_name="devices",
        in_axes=(None, 0, 0, 0, 0, 0),
        out_axes=None,
        devices=jax.devices()[:DEVICES],
    )
    split = lambda z: z.reshape(DEVICES, -1, *z.shape[1:])
    return lambda params, *batch: fn(params, *map(split, batch))


def by_shard_map(name):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))
    spec = PartitionSpec("devices")
    return jax.jit(
        jax.shard_map(
            partial(averaged, name=name),
            mesh=mesh,
            in_specs=(PartitionSpec(), *[spec] * 5),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


def mapped_gradient(fn):
    """Differentiates by the student's scale, under shard_map with check_vma=True."""

    def loss(scale, x, s, labels):
        return distill_loss(scale * x, x, labels, s, axis_name="devices", **fn)[0]

    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))
    spec = PartitionSpec("devices")
    specs = {"in_specs": (PartitionSpec(), spec, spec, spec)}

    def gradients(*arguments):
        gradient = jax.grad(loss)(*arguments)
        return gradient, jax.lax.pmean(gradient, "devices")

    mapped = jax.shard_map(gradients, mesh=mesh, **specs, out_specs=PartitionSpec())
    return jax.jit(mapped)(jnp.float32(2), BATCH.x, BATCH.logits_x, LABELS)


def test_shard_map_gives_gradients_that_need_no_average():
    """Averaging does not change them."""
    as_they_come, averaged = mapped_gradient({"distance": "l2", "weight": 0.5})
    expected = np.mean(np.sum(BATCH.x**2, axis=1))  # of (s - 1)^2 |x|^2 / 2
    np.testing.assert_allclose(as_they_come, expected, rtol=1e-5)
    assert as_they_come == averaged


def test_shard_map_has_no_groups():
    """All devices are one group."""
    options = {"distance": "l2", "weight": 0.5}
    with pytest.raises(
        ValueError,
        match="group_size=1 .*check_vma=True.*, its default; leave group_size out",
    ):
        mapped_gradient({**options, "group_size": 1})
    both = [mapped_gradient({**options, **o})[0] for o in ({}, {"group_size": 2})]
    assert both[0] == both[1]


def test_an_axis_of_vmap_has_devices_whose_loss_is_one():
    options = {"distance": "l2", "weight": 1e-3}
    fn = lambda x, s, labels: distill_loss(
        x, 2 * x, labels, s, axis_name="devices", **options
    )[0]
    arguments = BATCH.x, BATCH.logits_x, LABELS
    halves = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in arguments]
    both = jax.jit(jax.vmap(fn, axis_name="devices"))(*halves)
    one = simple(BATCH.x, 2 * BATCH.x)[0]
    np.testing.assert_allclose(both, one, rtol=1e-6)


@pytest.mark.slow
def test_padding_on_one_device_alone():
    """A mean over images is that of all images, wherever the padding is."""
    labels = jnp.asarray(np.where(np.arange(N) < 6, -1, BATCH.labels), jnp.int32)
    batch = (*arrays(DISTANCES["wkd_logits"]), labels)
    params = {"scale": np.zeros(D, np.float32), "bias": np.zeros(K, np.float32)}
    one = jax.jit(partial(differentiate, name="wkd_logits"))(params, batch)
    two = by_pmap("wkd_logits")(params, *batch)
    np.testing.assert_allclose(two[0][0], one[0][0], rtol=1e-5)
    np.testing.assert_allclose(two[1]["bias"], one[1][0]["bias"], atol=1e-5)


def masked_mean(x, y, *, mask):
    """Is NaN without samples, unlike the entries of the catalogue."""
    return jnp.mean(jnp.sum((x - y) ** 2, axis=1), where=mask)


def test_padding_of_a_whole_device_has_no_part_in_a_mean_of_ones_own():
    distance = Distance(masked_mean, per_sample=True)
    mask = np.arange(N) < N // DEVICES  # the second device has padding only

    def value(x, y, s, labels, mask, axis_name=None):
        options = {"mask": mask, "axis_name": axis_name}
        return simple(x, y, labels, s, distance=distance, weight=1.0, **options)[0]

    batch = (BATCH.x, BATCH.y, BATCH.logits_x, LABELS, mask)
    halves = [np.reshape(z, (DEVICES, -1, *np.shape(z)[1:])) for z in batch]
    mapped = jax.pmap(
        jax.value_and_grad(partial(value, axis_name="devices")), "devices"
    )
    found, slope = mapped(*halves)
    expected = jax.jit(value)(*batch)
    assert np.isfinite(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_groups_with_a_mask_need_no_promotion():
    mask = np.arange(N) < N // DEVICES  # the second group has padding only
    value = lambda x, y, s, labels, mask: simple(
        *(x, y, labels, s),
        **{"axis_name": "devices", "group_size": 1, "mask": mask, "weight": 1.0},
    )[1]["l2"]
    batch = (BATCH.x, BATCH.y, BATCH.logits_x, LABELS, mask)
    halves = [np.reshape(z, (DEVICES, -1, *np.shape(z)[1:])) for z in batch]
    with jax.numpy_dtype_promotion("strict"):
        found = jax.pmap(value, "devices")(*halves)
    expected = np.mean(np.sum((BATCH.x - BATCH.y)[mask] ** 2, axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def means_apart(x, y):
    value = jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
    return value, {"converged": x[0, 0] > 0, "first": x[0, 0]}


# Distances with labels, per sample, with a key, and with diagnostics.
GROUPED = {
    "cmmd_rbf": DISTANCES["cmmd_rbf"],
    "l2": DISTANCES["l2"],
    "sliced_w2": DISTANCES["sliced_w2"],
    "means": Distance(
        lambda x, y: means_apart(x, y)[0],
        diagnose=means_apart,
        promises=frozenset({"squared"}),
    ),
}


def grouped_loss(params, x, y, s, t, labels, axis_name=None, **options):
    """Returns a loss of several terms, with normalization by the teacher in a group."""
    terms = [Term(row, weight=0.5, name=name) for name, row in GROUPED.items()]
    features, logits = bent(x, params["scale"]), s + params["bias"]
    return distill_loss(
        *(features, y, labels, logits, t),
        **{"distance": terms, "key": KEY, "normalization": "teacher"},
        **{"axis_name": axis_name, **options},
    )


@pytest.mark.slow
def test_groups_of_devices_have_the_mean_of_their_losses():
    """With two groups of one device, the loss is the mean over halves of the batch."""
    params = {"scale": np.full(D, 0.1, np.float32), "bias": np.ones(K, np.float32)}
    batch = (*arrays(DISTANCES["l2"]), LABELS)
    halves = [z.reshape(DEVICES, -1, *z.shape[1:]) for z in batch]

    @jax.jit
    def on_one(params):
        def mean(params):
            parts = [
                grouped_loss(params, *(z[i] for z in halves)) for i in range(DEVICES)
            ]
            return jax.tree.map(lambda *values: sum(values) / DEVICES, *parts)

        return jax.value_and_grad(mean, has_aux=True)(params)

    def averaged(params, *batch):
        fn = partial(grouped_loss, axis_name="devices", group_size=1)
        values, gradient = jax.value_and_grad(fn, has_aux=True)(params, *batch)
        return values, jax.lax.pmean(gradient, "devices")

    on_two = jax.pmap(
        averaged, "devices", in_axes=(None, *[0] * 5), out_axes=None,
        devices=jax.devices()[:DEVICES],
    )  # fmt: skip
    ((loss, terms), gradient), ((loss_on_two, terms_on_two), gradient_on_two) = (
        on_one(params),
        on_two(params, *halves),
    )
    values = ("task", *GROUPED)
    for value in (loss_on_two, *(terms_on_two[name] for name in values)):
        shards = [float(shard.data) for shard in value.addressable_shards]
        assert shards[0] == shards[1]
    np.testing.assert_allclose(loss_on_two, loss, rtol=1e-6)
    for name in values:
        # 1e-5 of numbers of order one; cancellation makes some of them smaller
        value = terms_on_two[name], terms[name]
        np.testing.assert_allclose(*value, rtol=1e-5, atol=1e-5)
    for key, one in gradient.items():
        largest = float(np.max(np.abs(one)))
        np.testing.assert_allclose(gradient_on_two[key], one, atol=1e-5 * largest)
    # Diagnostics report the worst group.
    firsts = [
        float(bent(x[0, 0], 0.1) * teacher_factor(y))
        for x, y in zip(*halves[:2], strict=True)
    ]
    np.testing.assert_allclose(terms_on_two["means/first"], max(firsts), rtol=1e-6)
    assert bool(terms_on_two["means/converged"]) == (min(firsts) > 0)
    # The loss of the whole batch is another.
    whole, _ = jax.jit(grouped_loss)(params, *batch)
    assert abs(whole / loss - 1) > 0.01


@pytest.mark.parametrize("size", [0, 3])
def test_groups_divide_the_devices(size):
    fn = lambda x: simple(x, x, s=x, labels=LABELS[:8], axis_name="i", group_size=size)
    with pytest.raises(ValueError, match=f"group_size={size} does not divide the 2 de"):
        jax.pmap(fn, "i", devices=jax.devices()[:2])(BATCH.logits_x.reshape(2, 8, K))


def test_one_program_of_arrays_that_lie_on_two_devices():
    """Under plain jit without an axis, the compiler moves the arrays that it needs."""
    compare_sharded(("l2", "mmd_rbf"))


@pytest.mark.slow
def test_every_row_of_arrays_that_lie_on_two_devices():
    compare_sharded(DISTANCES)


def compare_sharded(names):
    """Compares values and gradients with arrays on one device and on two."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))
    sharded = NamedSharding(mesh, PartitionSpec("devices"))
    params = {"scale": np.full(D, 0.1, np.float32), "bias": np.ones(K, np.float32)}
    batches = {name: (*arrays(DISTANCES[name]), LABELS) for name in names}

    @jax.jit
    def every(params, batches):
        return {
            name: differentiate(params, batch, name) for name, batch in batches.items()
        }

    one = jax.device_get(every(params, batches))
    on_two = jax.device_put(batches, sharded)
    assert all(len(a.sharding.device_set) == 2 for a in jax.tree.leaves(on_two))
    two = jax.device_get(
        every(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), on_two)
    )
    for name in names:
        ((loss, terms), gradients), ((loss_on_two, terms_on_two), on_two) = (
            one[name],
            two[name],
        )
        np.testing.assert_allclose(loss_on_two, loss, rtol=1e-6)
        # as below: 1e-5 of numbers of order one, some of which cancellation makes
        # smaller
        chex.assert_trees_all_close(terms_on_two, terms, rtol=1e-5, atol=1e-5)
        assert np.any(gradients[0]["bias"])
        for a, b in zip(*map(jax.tree.leaves, (on_two, gradients)), strict=True):
            largest = max(float(np.max(np.abs(b))), 1e-6)
            np.testing.assert_allclose(a, b, atol=1e-5 * largest, err_msg=name)


# With two devices, a distance of each kind; test_devices.py tests all with eight.
DEVICE_ROWS = [
    *((None, name) for name in DISTANCES),
    *((by_pmap, name) for name in helpers.KINDS.values()),
    *((by_shard_map, name) for name in ("mmd_rbf", "l2", "cw2_gaussian", "w2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mapped", "name"), DEVICE_ROWS)
def test_every_row_on_one_device_and_on_two(mapped, name):
    """CE + weight * distance of the global batch; the teacher gets no gradient."""
    row = DISTANCES[name]
    x, y, s, t = arrays(row)
    params = {
        "scale": np.linspace(-0.2, 0.3, D, dtype=np.float32),
        "bias": np.linspace(0.5, -0.5, K, dtype=np.float32),
    }
    moved = BATCH.map(lambda z: bent(z, params["scale"]), "x", "maps_x")
    moved = moved.map(lambda z: z + params["bias"], "logits_x")

    @jax.jit
    def on_one(params, *batch):
        distance = row.fn(
            *helpers.arguments(row, moved._replace(key=3)), **helpers.options_of(row)
        )
        return differentiate(params, batch, name), distance

    batch = (x, y, s, t, LABELS)
    ((loss, terms), (gradient, *teacher)), distance = on_one(params, *batch)
    task = numpy_cross_entropy(moved.logits_x, BATCH.labels)
    np.testing.assert_allclose(terms["task"], task, rtol=1e-5)
    np.testing.assert_allclose(terms[name], distance, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * task + 0.5 * distance, rtol=1e-5)
    chex.assert_tree_all_finite((terms, gradient))
    for zeros in teacher:
        np.testing.assert_array_equal(zeros, np.zeros_like(zeros))
    assert np.any(gradient["bias"])
    compared = {"features", "maps"} & set(row.inputs)
    assert bool(np.any(gradient["scale"])) == bool(compared)

    if mapped is None:
        return
    (loss_on_two, terms_on_two), gradient_on_two = mapped(name)(params, *batch)
    shards = [float(shard.data) for shard in loss_on_two.addressable_shards]
    assert len(shards) == DEVICES
    assert shards[0] == shards[1]
    np.testing.assert_allclose(loss_on_two, loss, rtol=1e-6)
    chex.assert_trees_all_close(terms_on_two, terms, rtol=1e-5, atol=1e-5)
    for key, one in gradient.items():
        # 1e-5 of the largest entry, because sums over a batch are taken in another
        # order
        largest = float(np.max(np.abs(one)))
        np.testing.assert_allclose(gradient_on_two[key], one, atol=1e-5 * largest)


def test_a_plain_jax_network_learns():
    """Uses no framework: parameters are a dictionary, with plain gradient descent."""
    rng = np.random.default_rng(0)
    images = jnp.float32(rng.normal(size=(N, 5)))
    init = lambda *shape: jnp.float32(rng.normal(size=shape) / np.sqrt(shape[0]))
    params = {"hidden": init(5, D), "head": init(D, K)}

    def apply(params, images):
        features = jax.nn.relu(images @ params["hidden"])
        return features, features @ params["head"]

    @jax.jit
    def step(params):
        def loss(params):
            features, logits = apply(params, images)
            return distill_loss(
                features, BATCH.y, LABELS, logits, distance="w2_gaussian", weight=0.1
            )[0]

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    losses = []
    for _ in range(30):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------- messages


LAYERED = {"features": BATCH.x, "block": BATCH.x}
MESSAGES = {
    "negative weight": ({"weight": -0.1}, r"weight must be a number >= 0, got -0\.1"),
    "NaN weight": ({"weight": float("nan")}, "weight must .* got nan"),
    "task weight": ({"task_weight": -1}, "task_weight must be a number >= 0, got -1"),
    "no weight": (
        {"weight": None},
        "weight is None, but paired L2 has no default weight with normalization=None, "
        "only with normalization='teacher', normalization='unit', "
        "normalization='standardized'; pass a number, weight=...",
    ),
    "no default": (
        {"distance": paired_l2, "weight": None},
        "paired_l2 has no default weight with normalization=None; pass a number",
    ),
    "unknown": ({"distance": "emd"}, r"unknown distance 'emd'; known: .*w2.*cw2.*l2"),
    "misspelt": ({"distance": "cw3"}, "unknown distance 'cw3', did you mean 'cw2'"),
    "misspelt option": (
        {"distance": "cw2", "epsilom": 1.0},
        r"'cw2' has no option 'epsilom'; its options are .*epsilon",
    ),
    "no options": ({"distance": "l2", "epsilon": 1.0}, "'l2' has no option 'epsilon'"),
    "axis": ({"axis_name": "b"}, "axis_name='b' is not the axis .*axis_name=None"),
    "type": ({"distance": 3}, "must be a key of DISTANCES.*got int"),
    "widths": ({"x": BATCH.x[:, :4]}, "4 and 6; .*kddm_jax.networks.projectors"),
    "teacher's logits": ({"distance": "jw2"}, "'jw2' needs teacher_logits, got None"),
    "sliced": ({"distance": "sliced_w2"}, "'sliced_w2' needs key=jax.random.key"),
    "required options": (
        {"distance": "wkd_logits", "t": BATCH.logits_y},
        r"'wkd_logits' needs teacher_data=\{'class_cost': ...\}, got None",
    ),
    "class_cost as an option": (
        {"distance": "wkd_logits", "t": BATCH.logits_y, "class_cost": 1.0},
        r"class_cost of .* is an array, .* pass it as teacher_data=\{'class_cost'",
    ),
    "array as an option": (
        {"distance": "wkd_logits", "t": BATCH.logits_y, "class_cost": np.eye(K)},
        r"option class_cost is an array of shape \[4, 4\], .*teacher_data=\{'class_c",
    ),
    "option without a default": (
        {"distance": Distance(lambda x, y, *, p: x.sum())},
        r"needs the option p; .*options=\{",
    ),
    "labels of a plain function": (
        {"distance": lambda x, y, labels: x.sum()},
        r"needs labels; wrap it in Distance\(fn, inputs=\('features', 'labels'\)\)",
    ),
    "float labels": (
        {"labels": np.float32(BATCH.labels)},
        "labels must be integers, got float32",
    ),
    "key": (
        {"distance": Distance(lambda x, y, key: x.sum(), inputs=("features", "key"))},
        "needs key=jax.random.key",
    ),
    "options with Terms": (
        {"distance": Term("w2"), "solver": "exact"},
        "got the option solver, but Terms have options of their own",
    ),
    "not a Term": ({"distance": ["l2"]}, r"must hold Terms, got str; write Term\('l2'"),
    "duplicates": (
        {"distance": [Term("l2"), Term("l2")]},
        "different names, got l2, l2",
    ),
    "student's layer": (
        {"x": LAYERED, "distance": [Term("l2", layers=("stem", "features"))]},
        "student_features has no layer 'stem', only features, block",
    ),
    "teacher's layer": (
        {"y": {"maps": BATCH.y}},
        r"teacher_features has no layer 'features', only maps; .*layers=\(",
    ),
    "no features": (
        {"y": None},
        "teacher_features has no layer 'features', it is empty or None; pass teacher_f",
    ),
    "bandwidth of a linear kernel": (
        {"distance": "mmd_linear", "bandwidth": 5.0},
        "bandwidth is the width of the rbf kernel, but kernel='linear' has none; leav",
    ),
    "inputs": (
        {"distance": Distance(paired_l2, inputs=("images",))},
        "distance 'paired_l2' needs teacher_data={'images': ...}, got None",
    ),
    "not a scalar": (
        {"distance": lambda x, y: (x - y).sum(0)},
        r"must return a scalar, got shape \[6\]",
    ),
    "labels": (
        {"labels": jax.nn.one_hot(LABELS, K, dtype=int)},
        r"labels must have shape \[n\]=\[16\], got \[16, 4\]; pass argmax",
    ),
    "labels in a column": (
        {"labels": LABELS[:, None]},
        r"labels must have shape \[n\]=\[16\], got \[16, 1\]; pass labels\[:, 0\]",
    ),
    "other classes": (
        {"distance": "kd", "t": BATCH.logits_y[:, :3]},
        "logits_x and logits_y must be of the same classes, got 4 and 3; give both",
    ),
    "a weight for each sample": (
        {"weight": np.ones(N)},
        r"weight must be a number, got shape \[16\]",
    ),
    "a task weight for each sample": (
        {"task_weight": jnp.ones(N)},
        r"task_weight must be a number, got shape \[16\]",
    ),
    "a task that is no mean": (
        {"task": lambda logits, labels: logits[:, 0]},
        r"task must return a scalar, got shape \[16\]; average it over samples",
    ),
    "a weight that is no number": ({"weight": "1"}, "weight must be .*got '1'"),
    "label values": ({"num_classes": 2}, "labels must lie below num_classes=2"),
    "logits": (
        {"s": LABELS},
        r"student_logits must have shape \[n, k\] or \[n, t, k\], got \[16\]",
    ),
    "groups without an axis": (
        {"group_size": 2},
        "group_size=2 groups the devices of an axis, but axis_name is None; pass",
    ),
    "option": ({"distance": "w2", "solver": "emd"}, "solver must be one of .*'emd'"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    options, message = MESSAGES[name]
    with pytest.raises(ValueError, match=message):
        simple(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight of l2 .* got -1.0"),
        ({"options": {"a": np.eye(2)}}, r"option a is an array .*teacher_data=\{'a'"),
        ({"options": {"a": jnp.ones(())}}, r"option a .*teacher_data=\{'a': ...\}"),
        ({"layers": "block"}, r"layers must be \(student_layer, .* got 'block'"),
        ({"layers": ("block",)}, r"got \('block',\); pass two names"),
        ({"layers": 3}, "got 3; pass two names"),
        ({"layers": ("a", None)}, "pass two names"),
    ],
)
def test_messages_of_a_term(options, message):
    with pytest.raises(ValueError, match=message):
        Term("l2", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kd", {"layers": ("a", "b")}),
        ("kd", {"positions": "each"}),
        ("nst", {"positions": "each"}),
    ],
)
def test_what_a_distance_would_ignore_is_refused(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=f"{option}=.* is for .* but {name}.* leave"):
        Term(name, **options)


# ------------------------------------------------------------- labels of few bits

PADDED = np.arange(N) >= 4
NARROW = (jnp.uint8, jnp.int8, jnp.uint32)


@pytest.mark.parametrize("dtype", NARROW)
def test_padding_of_unsigned_labels_is_no_class(dtype):
    """Otherwise -1 would wrap to the largest class."""
    x = np.where(PADDED[:, None], BATCH.x, np.nan)
    labels = np.maximum(BATCH.labels, 0)

    def values(labels):
        terms = [Term("cmmd_rbf"), Term("l2")]
        return simple(x=x, labels=labels, mask=PADDED, distance=terms)

    found = jax.jit(values)(jnp.asarray(labels, dtype))
    expected = jax.jit(values)(jnp.asarray(labels, jnp.int32))
    assert np.isfinite(expected[0])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1]["cmmd_rbf"], expected[1]["cmmd_rbf"])


def test_predicted_classes_do_not_wrap():
    """An int8 label holds classes below 128 only."""
    logits = jnp.zeros((2, 200)).at[:, 150].set(1.0)
    found = predict_labels(jnp.array([-1, 3], jnp.int8), logits, logits, None)
    assert found.tolist() == [150, 3]


def test_predictions_are_not_compared_position_by_position():
    maps = np.ones((N, 2, 2, D), np.float32)
    term = Term("jw2", layers=("map", "map"), positions="each")
    with pytest.raises(ValueError, match="several features for each prediction; use"):
        simple({"map": maps}, {"map": maps}, t=BATCH.logits_y, distance=term)


def test_the_weight_of_a_term_is_not_traced():
    with pytest.raises(ValueError, match="weight of l2 is traced.* trace lambda"):
        jax.jit(lambda w: Term("l2", weight=w).weight)(1.0)
