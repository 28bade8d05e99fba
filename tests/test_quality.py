"""Compares knowledge quality with its definition, and tests the choice of layers."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import relu_features

from kddm_jax import cka, quality
from kddm_jax.quality import (
    RELEASED,
    KnowledgeQuality,
    knowledge_quality,
    layer_similarity,
    select_layers,
)

LABELS = np.array([0, 2, 2, 0, 5, 2, 0, 5, 2, 0, 5, 0])  # of 5, 4 and 3 samples


def features(d=7, n=12, seed=0):
    x = relu_features(np.random.default_rng(seed), n, d)
    return (x + 0.1).astype(np.float32)


def assert_close(actual, wanted, rtol=2e-5):
    """Gram matrices are in float32, and what follows from them in float64."""
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("d", [2, 7, 40])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, {}),
        ({"include_diagonal": True}, {"diagonal": True}),
        (RELEASED, {"diagonal": True, "log_const": 5.0}),
    ],
)
def test_equals_its_definition(d, options, named):
    x = features(d)
    actual = knowledge_quality(x, LABELS, n_train=1000, **options)
    wanted = reference.knowledge_quality(np.float64(x), LABELS, n_train=1000, **named)
    assert_close(actual[:4], wanted)
    np.testing.assert_allclose(actual.K, (1000 / np.pi) ** (1 / min(len(x), d)))


def test_golden(x64):
    # Computed by NumPy in float64 from the released code's formulas, with test_golden's
    # samples.
    i, j = np.meshgrid(np.arange(6.0), np.arange(3.0), indexing="ij")
    y = np.cos(0.5 + 1.1 * i - 0.4 * j) + 0.2 * j
    labels = np.array([0, 1, 0, 1, 1, 0])
    found = knowledge_quality(y, labels, n_train=50_000, **RELEASED)
    wanted = KnowledgeQuality(
        S=0.15782056737799843,
        I=0.09583153601531547,
        E=30.232311537571853,
        Q=1.8599394973999446,
        K=25.15397995802179,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    plain = knowledge_quality(y, labels, n_train=50_000)
    np.testing.assert_allclose(plain.S, 0.03495554701021564, rtol=1e-12)
    # The released code divides the entropy by log 5; three samples have two singular
    # values.
    np.testing.assert_allclose(plain.I, found.I * np.log(5) / np.log(2), rtol=1e-12)
    assert plain[2:] == (found.E, plain.S + np.sqrt(plain.I * plain.E), found.K)


def test_orthogonal_classes_are_separated_entirely():
    directions = np.repeat(np.eye(3, 5, dtype=np.float32), 4, axis=0)
    lengths = np.random.default_rng(0).uniform(0.5, 2, (12, 1)).astype(np.float32)
    found = knowledge_quality(lengths * directions, np.repeat([4, 1, 9], 4))
    np.testing.assert_allclose(found.S, 1.0, atol=1e-6)
    np.testing.assert_allclose(found.I, 0.0, atol=1e-6)  # a class has one direction
    # The same samples with labels that are unrelated to the directions.
    mixed = knowledge_quality(lengths * directions, np.tile([4, 1, 9], 4))
    assert mixed.S < 0


def test_isotropic_classes_hold_all_information():
    # Each class has the corners of a simplex around the origin, equal in all
    # directions.
    corners = np.eye(5, dtype=np.float32) - 0.2
    found = knowledge_quality(
        np.concatenate([corners, 2 * corners]), np.repeat([0, 1], 5)
    )
    # The entropy is its maximum, log(n_c - 1), and corners have the cosine -1/4.
    np.testing.assert_allclose(found.I, 1 - 0.25, rtol=1e-5)


def test_order_of_samples_and_names_of_classes_do_not_matter():
    x = features()
    wanted = knowledge_quality(x, LABELS)
    order = np.random.default_rng(1).permutation(len(x))
    assert_close(knowledge_quality(x[order], LABELS[order]), wanted)
    renamed = np.array([7, -1, 3, -1, -1, 0])[LABELS]
    assert_close(knowledge_quality(x, renamed), wanted)


@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e4])
def test_scale_does_not_matter(scale):
    x = features()
    assert_close(
        knowledge_quality(np.float32(scale) * x, LABELS), knowledge_quality(x, LABELS)
    )


def test_training_set_size_scales_efficiency_alone():
    x = features(3)
    small, large = (knowledge_quality(x, LABELS, n_train=n) for n in (1000, 8000))
    np.testing.assert_allclose(large.E, 2 * small.E)  # 8 ** (1 / 3)
    assert (large.S, large.I) == (small.S, small.I)
    assert knowledge_quality(x, LABELS) == knowledge_quality(x, LABELS, n_train=12)


def test_padding_is_left_out():
    x = features()
    kept = LABELS != 2
    padded = np.where(kept, LABELS, -1)
    assert_close(knowledge_quality(x, padded), knowledge_quality(x[kept], LABELS[kept]))


def test_blocks_of_features_add_up(monkeypatch, tmp_path):
    x = features(40)
    wanted = knowledge_quality(x, LABELS)
    monkeypatch.setattr(quality, "_BLOCK", 16 * len(x))  # 16, 16 and 8 features
    assert_close(knowledge_quality(x, LABELS), wanted)
    np.save(tmp_path / "x.npy", x.reshape(-1, 2, 4, 5))  # maps on disk
    maps = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_close(knowledge_quality(maps, jnp.asarray(LABELS)), wanted)


def test_bfloat16_is_summed_in_float32():
    x = jnp.asarray(features(), jnp.bfloat16)
    found = knowledge_quality(x, LABELS)
    assert_close(found, knowledge_quality(x.astype(jnp.float32), LABELS), rtol=1e-6)


def test_far_from_the_origin():
    x = np.float64(features()) + 100
    actual = knowledge_quality(np.float32(x), LABELS, n_train=12)
    wanted = reference.knowledge_quality(
        np.float32(x).astype(float), LABELS, n_train=12
    )
    # Alignments are near 1, where float32 has errors of 1e-7; S and I are 1e-5 at
    # least.
    np.testing.assert_allclose(actual[:2], wanted[:2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(actual.E, wanted[2], rtol=1e-4)


def constant_classes():
    x = np.repeat(np.float32([[1, 2], [2, 1]]), 3, axis=0)
    return x, np.repeat([0, 1], 3)


def test_constant_classes_hold_no_information():
    found = knowledge_quality(*constant_classes())
    np.testing.assert_allclose(found.I, 0, atol=1e-6)
    np.testing.assert_allclose(found.S, 1 - 0.8, atol=1e-6)
    np.testing.assert_allclose(found.Q, found.S, atol=1e-2)  # root of a rounding error


def test_constant_features_hold_nothing():
    found = knowledge_quality(np.ones((6, 3), np.float32), np.repeat([0, 1], 3))
    np.testing.assert_allclose(found[:4], 0, atol=1e-6)


def test_two_samples_a_class_have_one_direction():
    x = features(7, n=4)
    found = knowledge_quality(x, np.array([0, 0, 1, 1]))
    assert found.I == 0
    assert np.all(np.isfinite(found))


def test_a_dead_sample_aligns_with_nothing():
    x = np.float32([[1, 0], [0, 0], [0, 1], [0, 2]])
    found = knowledge_quality(x, np.array([0, 0, 1, 1]))
    # Alignments are 1 within classes and 0 between them. Lengths are 1/2 and 3/2, and
    # the distance between classes is 1.
    np.testing.assert_allclose(found.S, 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.E / found.K, 2 * 1 / 1, rtol=1e-6)


def with_value(value):
    x = features()
    x[3, 2] = value
    return x


ERRORS = [
    (features(), np.zeros(12, int), {}, r"^labels must hold two classes .*got 1;"),
    (features(), -np.ones(12, int), {}, r"^labels must hold two classes .*got 0;"),
    (features(), np.r_[LABELS[:-1], 9], {}, r"^labels must give .* class 9 has one;"),
    (features(), LABELS[:-1], {}, r"^labels must have shape \[n\]=\[12\], got \[11\]"),
    (features(), LABELS / 2, {}, r"^labels must be integers, got float"),
    (features()[:, 0], LABELS, {}, r"^features must have .* got \[12\];"),
    (features(0), LABELS, {}, r"^features must have .* got \[12, 0\];"),
    (np.ones((12, 3), np.uint8), LABELS, {}, r"^features must be floating, got uint8"),
    (with_value(np.nan), LABELS, {}, r"^features must be finite"),
    (with_value(np.inf), LABELS, {}, r"^features must be finite"),
    (with_value(3e30), LABELS, {}, r"^features must be finite"),
    (0 * features(), LABELS, {}, r"^features must not be zero for every sample"),
    (features(), LABELS, {"n_train": 0}, r"^n_train must be positive, got 0"),
    (features(), LABELS, {"log_const": 1.0}, r"^log_const must be above 1, got 1.0"),
]


@pytest.mark.parametrize(("x", "labels", "options", "message"), ERRORS)
def test_wrong_arguments_raise(x, labels, options, message):
    with pytest.raises(ValueError, match=message) as error:
        knowledge_quality(x, labels, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ the layers


def test_select_layers_takes_the_best_in_order_of_depth():
    values = {"stem": 0.2, "b1": 0.9, "b2": 0.1, "b3": 1.1, "b4": 0.3}
    assert select_layers(values) == ("stem", "b1", "b3", "b4")
    assert select_layers(values, 2) == ("b1", "b3")
    assert select_layers(list(values.values()), 3) == (1, 3, 4)
    assert select_layers(np.array([0.0, -1.0]), 1) == (0,)


def test_select_layers_compares_qualities_by_q():
    rows = [KnowledgeQuality(9.0, 9.0, 9.0, q, 9.0) for q in (0.1, 0.3, 0.2)]
    assert select_layers(dict(zip("abc", rows, strict=True)), 2) == ("b", "c")


def test_select_layers_prefers_the_first_of_equals():
    assert select_layers([0.5, 0.7, 0.5, 0.7], 3) == (0, 1, 3)


@pytest.mark.parametrize(
    ("values", "count", "message"),
    [
        ([0.1, 0.2], 3, r"^count must be between 1 and .* layers 2, got 3"),
        ([0.1, 0.2], 0, r"^count must be between 1 and .* layers 2, got 0"),
        ({"a": 0.1, "b": np.nan}, 1, r"^quality of layer 'b' is NaN"),
    ],
)
def test_select_layers_refuses(values, count, message):
    with pytest.raises(ValueError, match=message):
        select_layers(values, count)


def test_select_layers_takes_the_last_on_demand():
    values = {"stem": 0.2, "b1": 0.9, "b2": 0.1, "b3": 1.1, "b4": -0.3}
    assert select_layers(values, 2, last=True) == ("b3", "b4")
    assert select_layers(values, 1, last=True) == ("b4",)
    assert select_layers([1.0, 0.5], 2, last=True) == (0, 1)


def alike(*groups):
    """Similarity 0.99 within groups of layers, 0.5 between them."""
    groups = np.array(groups)
    return np.where(groups[:, None] == groups[None, :], 0.99, 0.5)


def test_select_layers_leaves_out_copies():
    values = [0.1, 0.9, 0.8, 0.7, 0.2]
    similarity = alike(0, 1, 1, 1, 2)
    assert select_layers(values, 3) == (1, 2, 3)
    assert select_layers(values, 3, similarity=similarity) == (0, 1, 4)
    assert select_layers(values, 2, similarity=similarity) == (1, 4)
    # The limit itself is allowed.
    options = {"similarity": similarity, "most_similar": 0.99}
    assert select_layers(values, 3, **options) == (1, 2, 3)


def test_select_layers_prefers_the_last_to_its_better_copy():
    similarity = alike(0, 1, 2, 2)
    values = [0.1, 0.2, 0.9, 0.3]
    assert select_layers(values, 2, similarity=similarity) == (1, 2)
    assert select_layers(values, 2, last=True, similarity=similarity) == (1, 3)


def test_select_layers_returns_fewer_rather_than_copies():
    assert select_layers([0.1, 0.2, 0.3], 3, similarity=alike(0, 0, 1)) == (1, 2)


@pytest.mark.parametrize("wrong", [np.eye(2), np.zeros(3), np.full((3, 3), np.nan)])
def test_select_layers_refuses_another_similarity(wrong):
    with pytest.raises(ValueError, match=r"^similarity must have shape \[3, 3\] "):
        select_layers([0.1, 0.2, 0.3], similarity=wrong, count=2)


# -------------------------------------------------------------- their similarity


def test_similarity_is_debiased_linear_cka():
    """The distance of the catalogue, which is computed in another way."""
    layers = [features(d, n=30, seed=d) for d in (3, 7, 40)]
    layers[2][:, :3] += layers[0]
    found = layer_similarity(layers)
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        wanted = 1 - cka(layers[i], layers[j], debiased=True)
        np.testing.assert_allclose(found[i, j], wanted, atol=1e-5)


def test_copies_are_similar_and_strangers_are_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 50)).astype(np.float32)
    turn, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    copy = np.float32(3 * x @ turn + 2)
    near = np.float32(x + 0.05 * rng.normal(size=x.shape))
    # Without the correction, wide independent features would have 0.9.
    other = rng.normal(size=(100, 10, 200)).astype(np.float32)
    found = layer_similarity(iter([x, copy, near, other]))
    np.testing.assert_allclose(found[0, 1], 1, atol=1e-4)
    assert 0.98 < found[0, 2] < 1
    assert abs(found[0, 3]) < 0.1


def test_similarity_is_summed_over_blocks(monkeypatch):
    layers = [features(40), features(7, seed=1)]
    wanted = layer_similarity(layers)
    monkeypatch.setattr(quality, "_BLOCK", 16 * 12)
    np.testing.assert_allclose(layer_similarity(layers), wanted, atol=1e-5)


def test_constant_features_are_similar_to_nothing():
    found = layer_similarity([features(), np.full((12, 3), 0.1, np.float32)])
    np.testing.assert_array_equal(found[1], [0, 0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([features(), features(n=11)], r"^features must be .* 2 layers of \[11, 12\]"),
        ([], r"^features must be those of the same samples .* got 0 layers"),
        ([features(n=3)], r"^features must have 4 samples at least, got 3"),
        ([with_value(np.nan)], r"^features must be finite"),
        ([features()[:, 0]], r"^features must have shape \[n, ...\], got \[12\]"),
    ],
)
def test_similarity_refuses(layers, message):
    with pytest.raises(ValueError, match=message):
        layer_similarity(layers)
