"""Tests that with logits of each token, every token is a sample."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kddm_jax import Term, distill_loss
from kddm_jax.adapters import Outputs
from kddm_jax.train_step import create_state, known_outputs, make_train_step

N, T, K = 4, 6, 5
TERMS = (
    Term("kd"),
    Term("cw2", layers=("block", "block")),
    Term("gram", layers=("block", "block"), weight=0.5),
    Term("l2", layers=("block", "block"), normalization="standardized"),
)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    networks = [
        ({"block": normal(N, T, 3), "pooled": normal(N, 7)}, normal(N, T, K))
        for _ in range(2)
    ]
    labels = jnp.asarray(rng.integers(-1, K, (N, T)), jnp.int32)
    mask = jnp.asarray(rng.uniform(size=(N, T)) < 0.7)
    return networks, labels, mask


def flat(tree):
    return jax.tree.map(lambda a: a.reshape(N * T, *a.shape[2:]), tree)


def loss_of(networks, labels, mask, **options):
    (x, s), (y, t) = networks
    return distill_loss(x, y, labels, s, t, distance=TERMS, mask=mask, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_flat_arrays(arrays, masked):
    networks, labels, mask = arrays
    mask = mask if masked else None
    blocks = [({"block": layers["block"]}, logits) for layers, logits in networks]
    wanted = loss_of(flat(blocks), flat(labels), flat(mask))
    found = jax.jit(loss_of)(networks, labels, mask)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, wanted)


def test_masked_tokens_may_contain_anything(arrays):
    networks, labels, mask = arrays
    hide = lambda a: jnp.where(mask[..., None], a, jnp.nan)
    hidden = [({"block": hide(x["block"])}, hide(s)) for x, s in networks]
    found, wanted = (loss_of(n, labels, mask)[0] for n in (hidden, networks))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    slope = jax.grad(lambda n: loss_of(n, labels, mask)[0])(hidden)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(slope))


def test_a_mask_of_sequences_leaves_out_all_of_their_tokens(arrays):
    networks, labels, _ = arrays
    rows = jnp.array([1, 0, 1, 1])
    whole = jnp.broadcast_to(rows[:, None], (N, T))
    found, wanted = (loss_of(networks, labels, mask)[0] for mask in (rows, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_soft_labels_and_features_alone(arrays):
    ((x, s), (y, _)), labels, mask = arrays
    soft = jax.nn.one_hot(labels, K)
    options = {"mask": mask, "distance": "l2", "weight": 1.0}
    one, other = (
        distill_loss(x["block"], y["block"], targets, s, **options)[0]
        for targets in (soft, labels)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)


def step_of(networks, labels, mask, shape=lambda a: a, terms=TERMS):
    """Runs a step whose student returns its parameters, in some shape."""
    (x, s), (y, t) = networks

    def student(variables, tokens, *, train):
        params = jax.tree.map(shape, variables["params"])
        return Outputs(params["logits"], None, {"block": params["block"]}), {}

    tx = optax.sgd(0.1)
    step = make_train_step(
        *(student, known_outputs, tx),
        augment=lambda key, tokens: tokens,
        distance=terms,
        axis_name=None,
    )
    state = create_state({"params": {"block": x["block"], "logits": s}}, tx)
    features = jnp.ones((N, 7)) if labels.shape[:2] == (N, T) else None
    teacher = Outputs(t, features, {"block": y["block"]})
    inputs = jnp.zeros(labels.shape[:1])
    return jax.jit(step)(state, teacher, inputs, labels, {}, mask)


@pytest.mark.parametrize("kind", ["plain", "masked", "soft", "no logits"])
def test_the_step_is_that_of_flat_outputs(arrays, kind):
    (student, (y, t)), labels, mask = arrays
    mask = None if kind == "plain" else mask
    t = None if kind == "no logits" else t
    if kind == "soft":
        labels = jax.nn.one_hot(labels, K)
    terms = TERMS[1:] if kind == "no logits" else TERMS
    found = step_of((student, (y, t)), labels, mask, terms=terms)
    teacher = flat({"block": y["block"]}), flat(t)
    options = {"shape": flat, "terms": terms}
    wanted = step_of((student, teacher), flat(labels), flat(mask), **options)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found[0].params, wanted[0].params)
    jax.tree.map(close, found[1], wanted[1])
    assert found[1]["finite"]
    assert found[1]["teacher_finite"]


def test_the_step_sees_a_teacher_that_is_not_finite(arrays):
    (student, (y, t)), labels, mask = arrays
    for hidden, finite in ((~mask, True), (mask, False)):
        broken = jnp.where(hidden[..., None], jnp.nan, t)
        _, metrics = step_of((student, (y, broken)), labels, mask)
        assert metrics["teacher_finite"] == finite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": jnp.zeros(N, int)}, r"labels must have shape \[n, t\]=\[4, 6\]"),
        ({"mask": jnp.ones((N, 5))}, r"mask must have shape .*got \[4, 5\]"),
        ({"mask": {"block": jnp.ones((N, T))}}, "got a mapping"),
        ({"teacher": jnp.ones((N, 3, K))}, r"teacher_logits .*got \[4, 3, 5\]"),
        ({"layer": "pooled"}, r"student_features must .* \[n, t, \.\.\.\]"),
    ],
)
def test_wrong_arrays(arrays, change, message):
    ((x, s), (y, t)), labels, mask = arrays
    given = {"labels": labels, "mask": mask, "teacher": t, "layer": "block", **change}
    term = Term("l2", layers=(given["layer"], given["layer"]))
    with pytest.raises(ValueError, match=message):
        distill_loss(
            *(x, y, given["labels"], s, given["teacher"]),
            distance=term,
            weight=1.0,
            mask=given["mask"],
        )
