"""Masks of tokens: the loss is that of a batch whose padding was cut away.

The reference cuts the padded tokens away one by one, and calls the distances on what is
left, without a mask.
"""

from functools import cache

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step as steps
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kddm_jax import DISTANCES, Distance, Term, distill_loss, teachers
from kddm_jax.numerics.normalization import normalize
from kddm_jax.train_step import scan_steps

N, T, C, K = 8, 4, 3, helpers.NUM_CLASSES
LAYERS = ("short", "long")  # the student's and the teacher's
RNG = np.random.default_rng(0)


def tokens(count, shift=0.0):
    flat = helpers.relu_features(RNG, N * count, C) + shift
    return flat.reshape(N, count, C).astype(np.float32)


BATCH = helpers.make_batch(N, C).map(np.float32)
NAN = np.float32(np.nan)
LABELS = np.array([0, 1, 0, 1, 2, 0, 1, 0], np.int32)
# Samples 2 and 5 are padding throughout; sample 6 has no token on the teacher's side.
KEPT = np.arange(T) < np.array([4, 3, 0, 2, 1, 0, 2, 3])[:, None]
LONG = np.arange(T + 2) < np.array([6, 1, 0, 4, 2, 0, 0, 5])[:, None]
SHUFFLED = RNG.permuted(KEPT, axis=1)  # padding in between

FEATURES = [name for name, row in DISTANCES.items() if "features" in row.inputs]
SOME = ("cw2_gaussian", "mmd_rbf", "l2")


def terms_of(names, layers, positions):
    every = [
        Term(
            name,
            layers=layers,
            positions=positions,
            name=name,
            options=options_of(name),
        )
        for name in names
    ]
    more = {"layers": layers, "positions": positions, "normalization": "standardized"}
    return [*every, Term("l2", name="standardized", **more)]


def options_of(name):
    return helpers.options_of(DISTANCES[name], K)


def poisoned(layer, kept):
    return np.where(kept[..., None], layer, np.nan).astype(np.float32)


class Case:
    """Layers with padding, their masks, and what is left of them."""

    def __init__(self, masks, positions="pool", poison=True):
        self.masks = dict(zip(LAYERS, masks, strict=True))
        self.positions = positions
        lengths = [mask.shape[1] for mask in masks]
        plain = [tokens(lengths[0]), tokens(lengths[1], 0.3)]
        spoilt = [poisoned(a, mask) for a, mask in zip(plain, masks, strict=True)]
        self.layers = spoilt if poison else plain
        self.samples = np.any(np.concatenate(masks, axis=1), axis=1)
        self.compared = np.any(masks[0], axis=1) & np.any(masks[1], axis=1)
        logits = BATCH.logits_x, BATCH.logits_y
        self.logits = [np.where(self.samples[:, None], z, np.nan) for z in logits]

    def cut(self, layer, side):
        """The tokens that are left, and their samples."""
        if self.positions == "pool":
            mask = self.masks[LAYERS[side]]
            rows = [i for i in range(N) if self.compared[i]]
            means = [jnp.mean(layer[i][np.flatnonzero(mask[i])], axis=0) for i in rows]
            return jnp.stack(means), rows
        both = self.masks[LAYERS[0]] & self.masks[LAYERS[1]]
        places = [(i, j) for i in range(N) for j in range(both.shape[1]) if both[i, j]]
        return jnp.stack([layer[i, j] for i, j in places]), [i for i, _ in places]


POOLED = {
    "both sides": (KEPT, LONG),
    "in between": (SHUFFLED, LONG),
    "student only": (KEPT, np.ones((N, 2), bool)),
}


def masked_loss(case, names, student, mask=None, arrays=None, **options):
    """The loss and its terms by the library."""
    layer, logits = student
    other = (case.layers[1], LABELS, case.logits[1])
    teacher, labels, teacher_logits = other if arrays is None else arrays
    return distill_loss(
        *({"short": layer}, {"long": teacher}, labels, logits, teacher_logits),
        distance=[*terms_of(names, LAYERS, case.positions), Term("kd")],
        mask=case.masks if mask is None else mask,
        key=jax.random.key(0),
        teacher_data=helpers.teacher_data(K, C),
        weight=0.5,
        **options,
    )


def cut_loss(case, names, student):
    """The loss by the distances' own functions, of what is left."""
    layer, logits = student
    x, rows = case.cut(layer, 0)
    y, _ = case.cut(case.layers[1], 1)
    known = {"features": [x, y], "labels": [LABELS[rows]]}
    known["logits"] = [logits[np.array(rows)], case.logits[1][np.array(rows)]]
    known["key"] = [jax.random.key(0)]
    known |= {name: [array] for name, array in helpers.teacher_data(K, C).items()}
    found = {}
    for name in names:
        row = DISTANCES[name]
        arrays = [array for kind in row.inputs for array in known[kind]]
        found[name] = row.fn(*arrays, **options_of(name))
    found["standardized"] = DISTANCES["l2"].fn(
        *normalize((x, y), (x, y), "standardized")
    )
    left = np.flatnonzero(case.samples)
    pair = logits[left], case.logits[1][left]
    found["kd"] = DISTANCES["kd"].fn(*pair)
    logs = jax.nn.log_softmax(pair[0])
    task = -jnp.mean(logs[jnp.arange(len(left)), LABELS[left]])
    return task + 0.5 * sum(found.values()), {"task": task, **found}


def differentiated(loss, case, names):
    student = case.layers[0], case.logits[0]
    fn = lambda student: loss(case, names, student)
    return jax.device_get(jax.jit(jax.value_and_grad(fn, has_aux=True))(student))


def assert_same(found, expected, case):
    (loss, parts), grads = found
    (wanted, terms), slopes = expected
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    for name, term in terms.items():
        np.testing.assert_allclose(parts[name], term, rtol=1e-3, err_msg=name)
    for grad, slope in zip(grads, slopes, strict=True):
        largest = np.abs(slope).max()
        assert largest > 0
        np.testing.assert_allclose(grad, slope, atol=2e-3 * largest, rtol=0)
    np.testing.assert_array_equal(grads[0][~case.masks["short"]], 0)
    np.testing.assert_array_equal(grads[1][~case.samples], 0)


@cache
def expected(case, names):
    return differentiated(cut_loss, case, names)


CASES = {name: Case(masks) for name, masks in POOLED.items()}
CASES["each"] = Case((SHUFFLED, KEPT), "each")
CASES["numbers"] = Case((KEPT, LONG), poison=False)
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    ["both sides", "each", *map(slow, ("in between", "student only", "numbers"))],
)
def test_a_masked_token_is_cut_away(name):
    case = CASES[name]
    found = differentiated(masked_loss, case, SOME)
    assert_same(found, expected(case, SOME), case)


ALL_FEATURES = [
    (distance, name)
    for distance in FEATURES
    for name in ("both sides", "each")
    # There is one prediction for an image, not for each of its tokens.
    if name != "each" or "logits" not in DISTANCES[distance].inputs
]


@pytest.mark.slow
@pytest.mark.parametrize(("distance", "name"), ALL_FEATURES)
def test_every_distance_of_features(distance, name):
    case = CASES[name]
    found = differentiated(masked_loss, case, (distance,))
    assert_same(found, expected(case, (distance,)), case)


# ----------------------------------------------------------------- several devices

POOL, EACH = CASES["both sides"], CASES["each"]
shares = lambda z: np.asarray(z).reshape(2, N // 2, *np.shape(z)[1:])


def sharded(case, axis_name="batch", prepare=lambda z: z):
    """A function of arrays, and its arrays."""
    arrays = (case.layers[1], LABELS, case.logits[1])
    masks = {name: mask.astype(np.float32) for name, mask in case.masks.items()}

    def fn(student, masks, *arrays):
        loss = lambda student: masked_loss(
            *(case, SOME, student, masks, arrays), axis_name=axis_name
        )
        return jax.value_and_grad(loss, has_aux=True)(student)

    everything = ((case.layers[0], case.logits[0]), masks, *arrays)
    return fn, jax.tree.map(prepare, everything)


@pytest.mark.parametrize("case", [POOL, slow(EACH)], ids=["pool", "each"])
def test_under_pmap(case):
    fn, arrays = sharded(case, prepare=shares)
    value, grads = jax.device_get(jax.pmap(fn, axis_name="batch")(*arrays))
    for both in jax.tree.leaves(value):
        np.testing.assert_array_equal(both[0], both[1])
    # Every device differentiates the global loss: their mean is the gradient.
    grads = [z.reshape(N, *z.shape[2:]) / 2 for z in grads]
    first = jax.tree.map(lambda z: z[0], value)
    assert_same((first, grads), expected(case, SOME), case)


@pytest.mark.parametrize("case", [slow(POOL), EACH], ids=["pool", "each"])
def test_under_checked_shard_map(case):
    fn, arrays = sharded(case)
    rows, whole = PartitionSpec("batch"), PartitionSpec()
    mesh = jax.make_mesh(
        (2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=rows, out_specs=(whole, rows))
    value, grads = jax.device_get(jax.jit(mapped)(*arrays))
    assert_same((value, grads), expected(case, SOME), case)


@pytest.mark.parametrize("case", [POOL, slow(EACH)], ids=["pool", "each"])
def test_on_an_explicit_mesh(case):
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    assert AxisType.Explicit in mesh.axis_types
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    fn, arrays = sharded(case, axis_name=None)
    found = jax.device_get(jax.jit(fn)(*jax.device_put(arrays, rows)))
    assert_same(found, expected(case, SOME), case)


def test_groups_of_devices_without_tokens_have_no_part():
    """Means over images, too: the other group's value counts alone."""
    case = Case(
        (np.repeat([[1], [0]], 4, axis=0) * np.ones(T) > 0, np.ones((N, 2)) > 0)
    )
    student = case.layers[0], case.logits[0]

    def on_device(student, masks, teacher, labels, logits):
        return distill_loss(
            *({"short": student[0]}, {"long": teacher}, labels, student[1], logits),
            distance=[Term("l2", layers=LAYERS), Term("mmd_rbf", layers=LAYERS)],
            mask=masks,
            axis_name="batch",
            group_size=1,
        )[1]

    _, arrays = sharded(case, prepare=shares)
    terms = jax.pmap(on_device, axis_name="batch")(*arrays)
    half = [student[0][:4].mean(1), case.layers[1][:4].mean(1)]
    for name in ("l2", "mmd_rbf"):
        value = DISTANCES[name].fn(*half, **options_of(name))
        np.testing.assert_allclose(terms[f"{name}@short"], value, rtol=1e-4)


def labelled_l2(x, y, labels, *, mask):
    """The mean over samples with a label."""
    kept = mask & (labels >= 0)
    squares = jnp.sum(jnp.where(kept[:, None], x - y, 0) ** 2, axis=1)
    return jnp.sum(squares) / jnp.maximum(jnp.sum(kept), 1)


LABELLED = Distance(labelled_l2, inputs=("features", "labels"), per_sample=True)


@pytest.mark.parametrize("case", [POOL, EACH], ids=["pool", "each"])
def test_a_mean_over_labelled_samples_counts_those_of_the_term(case):
    """Devices have as many labels, but not as many samples that are compared."""

    def loss(student, masks, teacher, labels, logits, axis_name="batch"):
        return distill_loss(
            *({"short": student[0]}, {"long": teacher}, labels, student[1], logits),
            distance=Term(LABELLED, layers=LAYERS, positions=case.positions),
            mask=masks,
            axis_name=axis_name,
        )[1]

    _, arrays = sharded(case)
    expected = jax.jit(lambda *arrays: loss(*arrays, axis_name=None))(*arrays)
    found = jax.pmap(loss, axis_name="batch")(*jax.tree.map(shares, arrays))
    assert list(found) == list(expected)
    assert len(found) == 2
    for name, value in expected.items():
        assert value > 0
        np.testing.assert_allclose(found[name], [value] * 2, rtol=1e-5)


# ------------------------------------------------------------------------- samples


def count(x, y, labels, *, mask):
    """The number of samples with a label, and 100 times that of all samples."""
    del x, y
    return jnp.sum(mask & (labels >= 0)) + 100 * jnp.sum(mask)


COUNT = Distance(count, inputs=("features", "labels"))


def counts(mask, positions="pool", layers=LAYERS, features=None):
    case = CASES["both sides"]
    x, y = case.layers if features is None else features
    terms = [Term(COUNT, layers=layers, positions=positions, name="count")]
    rest = Distance(lambda s, t, *, mask: jnp.sum(mask), inputs=("logits",))
    task = lambda logits, labels: jnp.sum(labels >= 0).astype(jnp.float32)
    _, found = distill_loss(
        *({layers[0]: x}, {layers[1]: y}, LABELS, BATCH.logits_x, BATCH.logits_y),
        distance=[*terms, Term(rest, name="predictions")],
        task=task,
        mask=mask,
    )
    return [int(found[name]) for name in ("count", "predictions", "task")]


ALIKE = np.ones((N, T, C), np.float32)


def test_which_samples_are_left():
    masks = {"short": KEPT, "long": LONG}
    # 2 and 5 have no token anywhere, 6 none in the teacher's layer.
    assert counts(masks) == [505, 6, 6]
    assert counts({**masks, "samples": np.ones(N)}) == [505, 8, 8]
    assert counts({**masks, "samples": np.arange(N) > 0}) == [404, 7, 7]
    assert counts({"samples": np.arange(N) > 0}) == [707, 7, 7]
    alike = ALIKE, ALIKE
    each = {"positions": "each", "features": alike}
    assert counts({"short": KEPT, "long": SHUFFLED}, **each)[0] == 101 * int(
        (KEPT & SHUFFLED).sum()
    )
    assert counts({"short": KEPT}, **each)[0] == 101 * int(KEPT.sum())


def test_a_name_is_for_both_networks():
    """A layer [n, d] of that name has no tokens, and is compared as it is."""
    same = ("tokens", "tokens")
    alike = ALIKE, ALIKE
    assert counts({"tokens": KEPT}, layers=same, features=alike) == [606, 6, 6]
    pooled = ALIKE, ALIKE[:, 0]
    assert counts({"tokens": KEPT}, layers=same, features=pooled) == [606, 6, 6]
    plain = distill_loss(
        *(alike[0], alike[1], LABELS, BATCH.logits_x),
        distance=COUNT,
        weight=1.0,
        mask={"features": KEPT},
    )[1]
    assert plain["count"] == 606


def test_no_tokens_at_all_is_zero():
    nothing = {"short": np.zeros((N, T)), "long": np.zeros((N, T + 2))}
    student = NAN * ALIKE, np.full((N, K), NAN)
    case = CASES["both sides"]
    arrays = np.full((N, T + 2, C), NAN), LABELS, np.full((N, K), NAN)
    fn = lambda student: masked_loss(case, SOME, student, nothing, arrays)
    (loss, _), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(student)
    assert loss == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


MISTAKES = [
    (
        {"sort": KEPT},
        r"names the layer 'sort', which neither .* short, long, and \"sam",
    ),
    (
        {"short": LONG},
        r"mask\['short'\] must have shape \[n, t\]=\[8, 4\], as the stud",
    ),
    (
        {"long": KEPT},
        r"must have shape .*=\[8, 6\], as the teacher's layer, got \[8, 4",
    ),
    (
        {"short": KEPT[0]},
        r"mask\['short'\] must have shape .*=\[8, t\], got \[4\]; pass",
    ),
    ({"short": KEPT[:5]}, r"mask\['short'\] must have shape .*=\[8, t\], got \[5, 4\]"),
    ({"samples": KEPT}, r"mask must have shape \[n\]=\[8\], got \[8, 4\]; pass one"),
]


@pytest.mark.parametrize(("mask", "message"), MISTAKES)
def test_mistakes_are_one_line(mask, message):
    with pytest.raises(ValueError, match=message):
        counts(mask)


@pytest.mark.parametrize("shape", [(N, T), (N, 2, 2, C)])
def test_a_layer_without_tokens_has_no_mask_of_tokens(shape):
    layers = np.ones(shape, np.float32), np.ones(shape, np.float32)
    with pytest.raises(
        ValueError, match=r"'short'\] leaves out tokens, but that layer"
    ):
        counts({"short": KEPT}, features=layers)


def test_a_distance_of_maps_leaves_out_no_token():
    mine = Distance(lambda a, b, *, mask: jnp.sum(a), inputs=("maps",))
    with pytest.raises(ValueError, match="'mine' compares maps and cannot leave out"):
        distill_loss(
            *({"short": CASES["each"].layers[0]}, {"long": CASES["each"].layers[1]}),
            *(LABELS, BATCH.logits_x),
            distance=[Term(mine, layers=LAYERS, name="mine")],
            mask={"short": KEPT},
        )


# ----------------------------------------------------------------- step and teachers


def tokens_apply(variables, images, *, train):
    """A network of tokens; black images are padding, of which it makes NaN."""
    del train
    x = images.reshape(len(images), T, C).astype(jnp.float32) / 255
    kept = jnp.any(x > 0, axis=2)
    layer = jnp.tanh(x * variables["params"]["scale"])
    features = jnp.sum(layer * kept[:, :, None], axis=1)
    logits = features @ variables["params"]["head"]
    logits = jnp.where(jnp.any(kept, axis=1)[:, None], logits, jnp.nan)
    layer = jnp.where(kept[:, :, None], layer, jnp.nan)
    return steps.Outputs(logits, features, {"tokens": layer}), {}


def variables_of(seed):
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(C, K)).astype(np.float32)
    return {"params": {"scale": rng.uniform(1, 2, C).astype(np.float32), "head": head}}


def step_loss(params, images, labels, chosen, **options):
    """The step's loss of chosen samples."""
    (student, _), (teacher, _) = (
        tokens_apply(variables, images, train=True)
        for variables in ({"params": params}, variables_of(1))
    )
    return distill_loss(
        *(student.maps, teacher.maps, labels, student.logits),
        distance=chosen,
        weight=0.5,
        **options,
    )


@pytest.mark.parametrize("scan", [False, True])
def test_a_step_with_masked_tokens(scan):
    """Its gradient, its metrics, and what it says of the teacher."""
    images = RNG.integers(1, 256, (N, T, 1, C)).astype(np.uint8)
    images[~KEPT] = 0
    terms, tx = [Term("l2", layers=("tokens", "tokens"))], steps.optax.sgd(1.0)
    step = steps.make_train_step(
        *(tokens_apply, tokens_apply, tx),
        distance=terms,
        augment=lambda key, image: image,
        axis_name=None,
    )
    state = steps.create_state(variables_of(0), tx, weight=0.5)
    mask, before = {"tokens": KEPT.astype(np.float32)}, variables_of(0)["params"]
    if scan:
        order = np.arange(N).reshape(1, N)
        arguments = state, variables_of(1), images, LABELS, order, {}, mask
        new, metrics = jax.device_get(jax.jit(scan_steps(step))(*arguments))
        metrics = jax.tree.map(lambda z: z[0], metrics)
    else:
        arguments = state, variables_of(1), images, LABELS, {}, mask
        new, metrics = jax.device_get(jax.jit(step)(*arguments))
    assert metrics["finite"]
    assert metrics["teacher_finite"]
    left = KEPT.any(axis=1)
    loss = lambda params: step_loss(
        *(params, images[left], LABELS[left], terms), mask={"tokens": KEPT[left]}
    )
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(before)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected_params = jax.tree.map(lambda p, g: p - g, before, grads)
    steps.assert_close(new.params, jax.device_get(expected_params))
    outputs, _ = tokens_apply(variables_of(0), images[left], train=True)
    hits = np.argmax(outputs.logits, 1) == LABELS[left]
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)


def test_seen_are_the_tokens_that_are_left():
    layer = poisoned(np.ones((N, T, C)), KEPT)
    (found,) = teachers.seen(({"tokens": layer}, None), {"tokens": KEPT})
    assert np.isfinite(found).all()
    assert found.sum() == C * KEPT.sum()


def test_each_teacher_has_the_tokens_of_its_layers():
    """A name that only one of them has; samples are those of the whole mask."""
    case = CASES["both sides"]
    short, long = case.layers
    taught = {"one": ({"long": long}, None), "other": ({"wide": short}, None)}
    distance = {
        "one": [Term(COUNT, layers=LAYERS, name="count")],
        "other": [Term(COUNT, layers=("short", "wide"), name="count")],
    }
    mask = {"short": KEPT, "long": LONG, "wide": KEPT}
    logits = np.zeros((N, K), np.float32)
    arguments = ((logits, {"short": short}), taught, LABELS)
    _, terms = teachers.loss_of(*arguments, distance=distance, mask=mask)
    assert terms["one:count"] == 505
    assert terms["other:count"] == 606
    with pytest.raises(ValueError, match="names the layer 'sort'"):
        teachers.loss_of(*arguments, distance=distance, mask={"sort": KEPT})
