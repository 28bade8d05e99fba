"""Tests distances of attention maps."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import relu_features

import kddm_jax

pytestmark = pytest.mark.usefixtures("x64")

RTOL = 1e-9
NAMES = pytest.mark.parametrize("name", ["attention_transfer", "attention_dct"])


@cache
def compiled(name, **options):
    return jax.jit(jax.value_and_grad(partial(getattr(kddm_jax, name), **options)))


def maps(height, width, channels, b=3, seed=0):
    rng = np.random.default_rng(seed)
    flat = relu_features(rng, b * height * width, channels)
    return flat.reshape(b, height, width, channels)


PAIRS = [
    (maps(4, 4, 6), maps(4, 4, 9, seed=1)),
    (maps(8, 6, 5), maps(4, 3, 5, seed=1)),  # a multiple along both sides
    (maps(3, 7, 2), maps(5, 4, 3, seed=1)),  # overlapping cells, on both sides
]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("power", [1, 2, 4])
def test_attention(pair, power):
    value, _ = compiled("attention_transfer", power=power)(*pair)
    expected = reference.attention_transfer(*pair, power=power)
    np.testing.assert_allclose(value, expected, rtol=RTOL)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("frequencies", [None, 2, 9])
def test_dct(pair, frequencies):
    value, _ = compiled("attention_dct", frequencies=frequencies)(*pair)
    expected = reference.attention_dct(*pair, frequencies=frequencies)
    np.testing.assert_allclose(value, expected, rtol=RTOL, atol=1e-15)


def test_all_frequencies_are_attention_without_the_mean():
    x, y = PAIRS[0]
    whole, _ = compiled("attention_transfer")(x, y)
    value, _ = compiled("attention_dct")(x, y)
    means = [
        [a.mean() for a in pair] for pair in reference.attention_maps(x, y, power=2)
    ]
    lost = 16 * np.mean([(a - b) ** 2 for a, b in means])
    np.testing.assert_allclose(value + lost, whole, rtol=RTOL)


@NAMES
@pytest.mark.parametrize("compat", [None, "released"])
def test_strength_does_not_count(name, compat):
    """Neither does it of an image whose squares are not representable."""
    x, y = (z.astype(np.float32) for z in PAIRS[0])
    fn = compiled(name, compat=compat)
    expected, slope = fn(x, y)
    for factor in (1e-18, 1e12):
        value, grad = fn(np.float32(factor) * x, y)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(factor * grad, slope, atol=1e-5 * abs(slope).max())


@NAMES
@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("side", [0, 1])
def test_images_without_attention_are_finite(name, compat, side):
    pair = [np.array(z) for z in PAIRS[0]]
    pair[side][0] = 0
    pair[side][1] = 1
    value, grad = compiled(name, compat=compat)(*pair)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[0] if side == 0 else 0, 0)


def test_one_pixel_has_no_frequencies():
    x, y = maps(1, 1, 4), maps(1, 1, 4, seed=1)
    for name in ("attention_transfer", "attention_dct"):
        value, grad = compiled(name)(x, y)
        assert abs(value) < 1e-15
        np.testing.assert_allclose(grad, 0, atol=1e-15)


def test_messages():
    x, y = map(jnp.asarray, PAIRS[0])
    with pytest.raises(ValueError, match="power must be a whole number, got 0.5"):
        kddm_jax.attention_transfer(x, y, power=0.5)
    with pytest.raises(ValueError, match="frequencies must be at least 2, got 1, wh"):
        kddm_jax.attention_dct(x, y, frequencies=1)
    with pytest.raises(ValueError, match="means frequencies=None, got frequencies=2"):
        kddm_jax.attention_dct(x, y, frequencies=2, compat="released")
