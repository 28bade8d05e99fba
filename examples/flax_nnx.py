"""Distils Flax NNX networks on scikit-learn's digits.

    python examples/flax_nnx.py

The teacher learns from all training digits and the student from 100.  Procrustes
compares their features.  BatchNorm is in training mode only in the network that learns.
Test accuracy with seed 0: teacher 98.0 %, student alone 91.0 %, distilled 95.8 % (mean
of seeds 0 to 2: 90.5 and 94.6 %).  README.md has lambda.
"""

import numpy as np
import optax
from flax import nnx

from kddm_jax import data, distill_loss

WEIGHT, STEPS = 3.0, 400


class Network(nnx.Module):
    """Computes features and logits with a perceptron."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.features = nnx.Linear(width, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.relu(self.norm(self.hidden(x)))
        features = nnx.relu(self.features(hidden))
        return features, self.head(features)


@nnx.jit
def step(model, optimizer, x, labels, teacher, weight):
    """Updates model and optimizer in place."""

    def loss_fn(model):
        features, logits = model(x)
        if teacher is None:  # cross-entropy alone
            return distill_loss(features, features, labels, logits, distance=())[0]
        guide, _ = teacher(x)
        options = {"distance": "procrustes", "weight": weight}
        return distill_loss(features, guide, labels, logits, **options)[0]

    optimizer.update(model, nnx.grad(loss_fn)(model))


def fit(model, x, labels, seed, teacher=None, weight=0.0):
    """Trains a network and returns it in evaluation mode."""
    schedule = optax.cosine_decay_schedule(2e-3, STEPS)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    model.train()
    for _ in range(STEPS):
        batch = rng.choice(len(x), 64, replace=False)
        step(model, optimizer, x[batch], labels[batch], teacher, weight)
    model.eval()
    return model


def compare(digits: data.Dataset, weight: float = WEIGHT, seed: int = 0):
    """Returns test accuracies (%) of teacher, student alone and distilled student."""
    flat = lambda images: images.reshape(-1, 64).astype(np.float32) / 255
    x, labels = flat(digits.train_images), digits.train_labels
    few = data.balanced_subset(labels, 100, seed=0)
    student = lambda: (Network(64, rngs=nnx.Rngs(seed)), x[few], labels[few], seed)
    teacher = fit(Network(256, rngs=nnx.Rngs(100 + seed)), x, labels, seed)
    for model in teacher, fit(*student()), fit(*student(), teacher, weight):
        right = model(flat(digits.test_images))[1].argmax(-1) == digits.test_labels
        yield 100 * float(right.mean())


if __name__ == "__main__":
    found = compare(data.load("digits"))
    print("teacher {:.1f} %, student alone {:.1f} %, distilled {:.1f} %".format(*found))
