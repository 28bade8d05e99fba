"""Compares the vision transformer with NumPy and with published counts."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from kddm_jax.adapters import Outputs, linen_apply
from kddm_jax.networks.vit import EncoderBlock, ViT

TINY = ViT(num_classes=2, width=4, layers=2, heads=3, patch=2)  # width 12


def shapes(model, images):
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_like(tree, seed=1):
    """Makes variables of the size of initial ones, but without zeros and ones."""
    rng = np.random.default_rng(seed)
    scale = lambda shape: 1 / math.sqrt(shape[0]) if len(shape) > 1 else 0.5
    return jax.tree.map(
        lambda a: (0.2 + rng.normal(size=a.shape) * scale(a.shape)).astype(a.dtype),
        tree,
    )


def random_images(batch=3, height=4, width=6, channels=2, seed=0):
    images = np.random.default_rng(seed).normal(size=(batch, height, width, channels))
    return images.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "count"),
    [
        # The student, counted by hand: patches, positions, eight blocks, the last
        # LayerNorm, the classifier.
        (
            ViT(),
            32,
            49 * 192 + 64 * 192 + 8 * (768 + 148_224 + 221_952) + 384 + 1930,
        ),
        # torchvision's vit_b_16(), without the class token and its position.
        (
            ViT(1000, width=256, layers=12, heads=12, mlp_ratio=4, patch=16),
            224,
            86_567_656 - 2 * 768,
        ),
    ],
)
def test_parameter_counts(model, size, count):
    params = shapes(model, jnp.zeros((1, size, size, 3)))["params"]
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(params)) == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "size", "side"), [(4, 32, 8), (4, 28, 7), (8, 64, 8), (16, 224, 14)]
)
def test_shapes_of_maps(patch, size, side):
    model = ViT(num_classes=7, patch=patch)
    images = jnp.zeros((2, size, size, 3))
    outputs = jax.eval_shape(model.apply, shapes(model, images), images)
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == (2, 7)
    assert outputs.features.shape == (2, 192)
    assert {name: a.shape for name, a in outputs.maps.items()} == {
        f"block{i}": (2, side, side, 192) for i in range(1, 9)
    }


def test_block_equals_numpy(strict):
    block = EncoderBlock(heads=3, hidden=10, dtype=jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    variables = random_like(shapes(block, x))
    params = jax.tree.map(np.float64, variables["params"])
    wanted = reference.encoder_block(np.float64(x), params)
    found = jax.jit(block.apply)(variables, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_network_equals_numpy(strict):
    images = random_images()
    variables = random_like(shapes(TINY, images))
    params = jax.tree.map(np.float64, variables["params"])
    # Patches of two by two pixels, row by row, as in a convolution with stride 2.
    kernel = params["conv_proj"]["kernel"].reshape(2, 2, 2, 12)
    x = np.zeros((3, 2, 3, 12))
    for i, j in np.ndindex(2, 3):
        patch = np.float64(images)[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        x[:, i, j] = np.tensordot(patch, kernel, 3) + params["conv_proj"]["bias"]
    x = (x + params["pos_embedding"]).reshape(3, 6, 12)
    maps = {}
    for i in range(2):
        x = reference.encoder_block(x, params[f"encoder_layer_{i}"])
        maps[f"block{i + 1}"] = x.reshape(3, 2, 3, 12)
    features = reference.layer_norm(x, params["ln"]).mean(1)
    head = params["heads_head"]
    wanted = Outputs(features @ head["kernel"] + head["bias"], features, maps)
    outputs = jax.jit(TINY.apply)(variables, images)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        outputs,
        wanted,
    )


@pytest.mark.slow
def test_training_step():
    images, labels = random_images(8, 4, 4), jnp.arange(8) % 2

    @jax.jit
    def step(variables):
        def loss(params):
            given = {"params": params}
            outputs, stats = linen_apply(TINY)(given, images, train=True)
            assert stats == {}
            of_label = jnp.take_along_axis(
                jax.nn.log_softmax(outputs.logits), labels[:, None], axis=1
            )
            return -jnp.mean(of_label)

        value, grads = jax.value_and_grad(loss)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params}, value, grads

    variables, losses = random_like(shapes(TINY, images)), []
    for _ in range(15):
        variables, value, grads = step(variables)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    # All parameters learn, except the bias of the keys, to which a softmax is
    # invariant.
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        largest = float(jnp.abs(grad).max())
        assert (largest > 1e-4) == (not name.endswith("key/bias")), (name, largest)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
    model, images = TINY.clone(dtype=jnp.dtype(dtype)), random_images()
    variables = shapes(model, images)
    outputs = jax.eval_shape(model.apply, variables, images)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float32
    assert {a.dtype for a in outputs.maps.values()} == {jnp.dtype(dtype)}


def test_bfloat16_normalises_in_float32():
    images = random_images()
    model, variables = TINY.clone(dtype=jnp.bfloat16), random_like(shapes(TINY, images))
    jaxpr = str(jax.make_jaxpr(model.apply)(variables, images))
    for operation in ("exp", "rsqrt", "sqrt", "reduce_sum", "reduce_max"):
        results = [line for line in jaxpr.splitlines() if f"= {operation}" in line]
        assert not any("bf16" in line.split("=")[0] for line in results), results
    full, half = (jax.jit(m.apply)(variables, images) for m in (TINY, model))
    scale = float(jnp.abs(full.features).max())
    np.testing.assert_allclose(half.features, full.features, atol=0.05 * scale)
    assert not np.array_equal(half.features, full.features)


def test_float64(x64):
    model, images = TINY.clone(dtype=jnp.float64), np.float64(random_images())
    variables = random_like(shapes(model, images))
    outputs = jax.jit(model.apply)(variables, images)
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float64
    params = jax.tree.map(np.float64, variables["params"])
    x = np.float64(outputs.maps["block1"]).reshape(3, 6, 12)
    wanted = reference.encoder_block(x, params["encoder_layer_1"])
    found = outputs.maps["block2"].reshape(3, 6, 12)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # softmax in float32


def test_initial_values():
    model, images = ViT(num_classes=3, layers=1), jnp.zeros((1, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    block = params["encoder_layer_0"]
    for kernel, bound in {
        "mlp_0": math.sqrt(6 / (192 + 576)),
        "mlp_3": math.sqrt(6 / (192 + 576)),
    }.items():
        largest = np.abs(block[kernel]["kernel"]).max()
        assert 0.99 * bound < largest <= bound
    query = np.abs(block["self_attention"]["query"]["kernel"]).max()
    assert 0.99 * math.sqrt(6 / 384) < query <= math.sqrt(6 / 384)
    assert np.std(params["conv_proj"]["kernel"]) == pytest.approx(48**-0.5, rel=0.02)
    assert np.std(params["pos_embedding"]) == pytest.approx(0.02, rel=0.02)
    np.testing.assert_array_equal(params["heads_head"]["kernel"], 0)
    chex.assert_trees_all_equal_shapes(params, shapes(model, images)["params"])


OPTIONS = [
    ({"heads": 5}, r"^heads must divide the 192 channels of a token, got 5;"),
    *(
        ({name: 0}, rf"^{name} must be a positive int, got 0")
        for name in ("num_classes", "width", "layers", "heads", "mlp_ratio", "patch")
    ),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ViT(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"^images must have .*, got \[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"^images must be floating .*, got uint8"),
        (np.zeros((2, 4, 5, 3), np.float32), r"^images must divide .* 2 .*got 4 x 5;"),
        (np.zeros((2, 0, 4, 3), np.float32), r"^images must divide .* 2 .*got 0 x 4;"),
    ],
)
def test_wrong_images_raise(images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.init, jax.random.key(0), images)


def test_images_of_another_size_raise():
    variables = shapes(TINY, random_images(height=4, width=6))
    message = r"^images must have the 2 x 3 patches .* got 3 x 2;"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(TINY.apply), variables, random_images(1, 6, 4))
