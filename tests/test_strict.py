"""Traces everything without implicit promotion of ranks and dtypes.

Tracing is enough, because `jax.numpy_rank_promotion("raise")` and strict promotion of
dtypes are checked while tracing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_term import ARRAYS, PARAMS, TERMS, loss_of

from kddm_jax import DISTANCES, adapters, distances, quality
from kddm_jax.data.augment import make_augment
from kddm_jax.networks.cifar import WRN16x2
from kddm_jax.networks.mlp import MLP
from kddm_jax.networks.mobilenet import MobileNetV2
from kddm_jax.networks.projectors import (
    ConvProjector,
    DenseProjector,
    ThreeLayerProjector,
)
from kddm_jax.networks.vgg import VGG8
from kddm_jax.networks.vit import ViT
from kddm_jax.resnet import ResNet9
from kddm_jax.train_step import create_state, make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("strict")

DTYPES = (jnp.float32, jnp.bfloat16)
KEY = jax.random.key(0)
IMAGES = np.zeros((4, 16, 16, 3), np.uint8)
LABELS = np.array([0, 1, -1, 2], np.int32)


def cast(tree, dtype):
    floating = lambda a: np.issubdtype(a.dtype, np.floating)
    return jax.tree.map(lambda a: jnp.asarray(a, dtype) if floating(a) else a, tree)


def trace(terms, dtype=jnp.float32):
    for term in terms:
        fn = lambda params, arrays, term=term: loss_of(term, params, arrays)
        fn = jax.value_and_grad(fn, has_aux=True)
        jax.eval_shape(fn, cast(PARAMS, dtype), cast(ARRAYS, dtype))


def test_some_distances():
    trace([TERMS[name] for name in ("cw2_gaussian", "wkd_logits", "teacher")])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_distance(dtype):
    trace(TERMS.values(), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
def test_mixed_inputs(x64):
    """The teacher is in half precision, and labels have 8 bits."""
    with jax.enable_x64(x64):
        arrays = {
            name: jnp.asarray(a, jnp.bfloat16 if name.endswith("y") else None)
            for name, a in ARRAYS.items()
        }
        arrays["labels"] = arrays["labels"].astype(jnp.int8)
        for term in TERMS.values():
            jax.eval_shape(partial(loss_of, term), PARAMS, arrays)


@pytest.mark.slow
def test_what_is_computed_from_a_teacher():
    features = jnp.ones((12, 5))
    jax.eval_shape(distances.class_cost_cka, features.reshape(3, 4, 5))
    quality.knowledge_quality(features, np.arange(12) % 3)


NETWORKS = {
    "resnet": partial(ResNet9, width=4),
    "preactivation": partial(WRN16x2, width=4),
    "vgg": partial(VGG8, width=2),
    "mobilenet": partial(MobileNetV2, width=0.25),
    "vit": partial(ViT, patch=8, width=4, layers=1, heads=2),
    "mlp": partial(MLP, hidden=(8, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_of_every_network(name, dtype):
    network = NETWORKS[name](num_classes=3, dtype=dtype)
    trace_steps(network, "w2")


def trace_steps(network, distance):
    """Traces a training step and an evaluation step with networks of one kind."""
    apply, tx = (
        adapters.linen_apply(network),
        optax.adam(optax.cosine_decay_schedule(1, 9)),
    )
    variables = jax.eval_shape(network.init, KEY, jnp.zeros(IMAGES.shape))
    augment = make_augment(mean=(0.5,) * 3, std=(0.2,) * 3, padding=1)
    step = make_train_step(
        *(apply, apply, tx),
        augment=augment,
        distance=distance,
        weight=0.1,
        weight_schedule=optax.linear_schedule(1.0, 0.0, 9),
        axis_name=None,
    )
    state = jax.eval_shape(partial(create_state, tx=tx), variables)
    jax.eval_shape(step, state, variables, IMAGES, LABELS)
    normalize = lambda image: image.astype(jnp.float32) / 255
    evaluate = make_eval_step(apply, normalize=normalize, axis_name=None)
    jax.eval_shape(evaluate, variables, IMAGES, LABELS)


def test_steps():
    trace_steps(MLP(num_classes=3, hidden=(8,)), "l2")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 6, 5)])
def test_projectors(shape):
    kinds = (
        (DenseProjector,) if len(shape) == 2 else (ConvProjector, ThreeLayerProjector)
    )
    for kind in kinds:
        for dtype in DTYPES:
            apply = lambda key, x, kind=kind: kind(features=7).init_with_output(
                key, x, **({} if kind is DenseProjector else {"train": False})
            )
            jax.eval_shape(apply, KEY, jnp.zeros(shape, dtype))


def test_table_is_whole():
    assert {term.distance for term in TERMS.values()} == set(DISTANCES)
