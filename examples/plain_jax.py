"""Distils networks in plain JAX, with parameters in a dict, on scikit-learn's digits.

    python examples/plain_jax.py

The teacher learns from all training digits, the narrower student from 100 of them.  CKA
compares a hidden layer of both and KD their predictions.  Test accuracy with seed 0:
teacher 98.0 %, student alone 89.9 %, distilled 94.1 % (mean of seeds 0 to 2: 88.6 and
94.1 %).  README.md has lambda.
"""

import jax
import jax.numpy as jnp
import optax

from kddm_jax import Term, data, distill_loss

WEIGHT, STEPS = 10.0, 600
tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def init(key, *widths):
    """Makes a matrix and a bias for each layer."""
    params = {}
    for i, (a, b) in enumerate(zip((64, *widths), (*widths, 10), strict=True)):
        matrix = jax.random.normal(jax.random.fold_in(key, i), (a, b))
        params[f"layer{i}"] = {"w": matrix * (2 / a) ** 0.5, "b": jnp.zeros(b)}
    return params


def apply(params, x):
    """Returns the hidden layers by name, and the logits."""
    *names, head = params
    layers = {}
    for name in names:
        layers[name] = x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
    return layers, x @ params[head]["w"] + params[head]["b"]


def loss_fn(params, x, labels, teacher, weight):
    """Computes the distillation loss, or cross-entropy if there is no teacher."""
    layers, logits = apply(params, x)
    terms = Term("cka", layers=("layer0", "layer0")), Term("kd")
    if teacher is None:
        return distill_loss(layers, layers, labels, logits, distance=())[0]
    guide = apply(teacher, x)
    options = {"distance": terms, "weight": weight}
    return distill_loss(layers, guide[0], labels, logits, guide[1], **options)[0]


@jax.jit
def fit(params, x, labels, key, teacher=None, weight=0.0):
    """Trains a network with all steps in one program."""

    def step(state, key):
        params, opt_state = state
        batch = jax.random.choice(key, len(x), (64,), replace=False)
        grads = jax.grad(loss_fn)(params, x[batch], labels[batch], teacher, weight)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    state = params, tx.init(params)
    return jax.lax.scan(step, state, jax.random.split(key, STEPS))[0][0]


def compare(digits: data.Dataset, weight: float = WEIGHT, seed: int = 0):
    """Returns test accuracies (%) of teacher, student alone and distilled student."""
    x, test = (i.reshape(-1, 64) / 255.0 for i in (digits[0], digits.test_images))
    labels, key = digits.train_labels, jax.random.key(seed)
    few = data.balanced_subset(labels, 100, seed=0)
    student = init(key, 32, 32), x[few], labels[few], key
    teacher = fit(init(jax.random.key(100 + seed), 256, 64), x, labels, key)
    for params in teacher, fit(*student), fit(*student, teacher, weight):
        right = apply(params, test)[1].argmax(-1) == digits.test_labels
        yield 100 * float(right.mean())


if __name__ == "__main__":
    found = compare(data.load("digits"))
    print("teacher {:.1f} %, student alone {:.1f} %, distilled {:.1f} %".format(*found))
