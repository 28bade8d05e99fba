"""Compares augmentations with plain loops, and tests the distribution of draws."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kddm_jax.data.augment import (
    distort,
    make_augment,
    normalize,
    random_affine,
    random_crop,
    random_flip,
    random_resized_crop,
)

pytestmark = pytest.mark.usefixtures("strict")

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BLACK = [(0 - m) / s for m, s in zip(MEAN, STD, strict=True)]


@pytest.fixture
def image():
    """Makes an image without zeros, in which all pixels differ."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(1, 256, (6, 9, 3), dtype=np.uint8))


def crop_by_loop(image, padding, top, left):
    h, w, c = image.shape
    out = np.zeros_like(image)
    for row in range(h):
        for column in range(w):
            i, j = row + top - padding, column + left - padding
            if 0 <= i < h and 0 <= j < w:
                out[row, column] = image[i, j]
    return out


def all_crops(image, padding):
    image = np.asarray(image)
    side = range(2 * padding + 1)
    return {
        crop_by_loop(image, padding, top, left).tobytes(): (top, left)
        for top in side
        for left in side
    }


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def draw(fn, n, image):
    """Returns ``n`` independent results for one image."""
    # Compiled, because one operation at a time takes some seconds.
    return jax.jit(jax.vmap(fn, (0, None)))(keys(n), image)


# ---------------------------------------------------------------------- crop


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_is_one_of_the_crops_by_loop(image, padding):
    known = all_crops(image, padding)
    crops = draw(partial(random_crop, padding=padding), 64, image)
    chex.assert_shape(crops, (64, 6, 9, 3))
    assert crops.dtype == jnp.uint8
    for crop in np.asarray(crops):
        assert crop.tobytes() in known


def test_all_crop_offsets_occur_equally_often(image):
    n, padding = 4500, 1
    known = all_crops(image, padding)
    crops = draw(partial(random_crop, padding=padding), n, image)
    counts = np.zeros((3, 3))
    for out in np.asarray(crops):
        counts[known[out.tobytes()]] += 1
    expected = n / counts.size
    # Chi-squared with 8 degrees of freedom exceeds 26 for one key in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 26


def test_crop_by_the_default_padding_reaches_all_offsets(image):
    known = all_crops(image, 4)
    crops = np.asarray(draw(random_crop, 1500, image))
    # The probability that 1500 draws miss a given one of the 81 is 1e-8.
    assert {known[crop.tobytes()] for crop in crops} == {
        (top, left) for top in range(9) for left in range(9)
    }


def test_crop_larger_than_the_image():
    image = jnp.full((2, 3, 1), 7, jnp.uint8)
    known = all_crops(image, 5)
    for out in np.asarray(draw(partial(random_crop, padding=5), 50, image)):
        assert out.tobytes() in known


def test_no_padding_changes_nothing(image, key):
    chex.assert_trees_all_equal(random_crop(key, image, padding=0), image)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16, jnp.int32])
def test_crop_and_flip_keep_the_dtype(image, key, dtype):
    for fn in (random_crop, random_flip):
        assert jax.eval_shape(fn, key, image.astype(dtype)).dtype == dtype


# ---------------------------------------------------------------------- flip


def test_flip_mirrors_half_of_the_images(image):
    n = 2000
    out = np.asarray(draw(random_flip, n, image))
    same, mirror = np.asarray(image), np.asarray(image)[:, ::-1]
    is_mirror = np.array([(o == mirror).all() for o in out])
    is_same = np.array([(o == same).all() for o in out])
    np.testing.assert_array_equal(is_mirror, ~is_same)
    # Four standard deviations of a fair coin.
    assert abs(is_mirror.mean() - 0.5) < 4 * 0.5 / n**0.5


# ---------------------------------------------------------------------- normalize


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16, jnp.float16])
def test_normalize_against_float64(image, dtype):
    out = normalize(image.astype(dtype), MEAN, STD)
    assert out.dtype == jnp.float32
    expected = (np.asarray(image.astype(jnp.float32), np.float64) / 255 - MEAN) / STD
    # Whole numbers up to 255 are exact in every dtype here; the arithmetic is float32.
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_normalize_in_x64(x64, image):
    assert normalize(image.astype(jnp.float64), MEAN, STD).dtype == jnp.float32
    augment = make_augment(mean=MEAN, std=STD)
    assert jax.jit(augment)(jax.random.key(0), image).dtype == jnp.float32


@pytest.mark.parametrize("as_type", [tuple, list, np.array, jnp.array])
def test_normalize_takes_any_sequence(image, as_type):
    out = normalize(image, as_type(MEAN), as_type(STD))
    chex.assert_trees_all_close(out, normalize(image, MEAN, STD), atol=1e-6)


# ---------------------------------------------------------------------- recipes


def parts(image, padding):
    """Returns all results that the recipe may give, with their offsets and flips."""
    known = {}
    for crop, at in all_crops(image, padding).items():
        pixels = np.frombuffer(crop, np.uint8).reshape(image.shape)
        known[pixels.tobytes()] = (*at, False)
        known[pixels[:, ::-1].tobytes()] = (*at, True)
    return known


def to_pixels(images):
    return np.round((np.asarray(images) * STD + MEAN) * 255).astype(np.uint8)


def test_recipe_is_crop_flip_normalise(image):
    known = parts(image, 2)
    augment = make_augment(mean=MEAN, std=STD, padding=2)
    out = draw(augment, 1000, image)
    assert out.dtype == jnp.float32
    seen = {known[pixels.tobytes()] for pixels in to_pixels(out)}
    # All 50 occur, so the flip does not depend on the offsets.
    assert len(seen) == 50


def test_recipe_draws_crop_and_flip_by_two_keys(image, key):
    crop_key, flip_key = jax.random.split(key)
    crop = random_crop(crop_key, image, padding=2)
    expected = normalize(random_flip(flip_key, crop), MEAN, STD)
    augment = make_augment(mean=MEAN, std=STD, padding=2)
    chex.assert_trees_all_close(jax.jit(augment)(key, image), expected, atol=1e-6)


def test_padding_is_black_before_normalisation(image):
    augment = make_augment(mean=MEAN, std=STD, padding=2, flip=False)
    out = np.asarray(draw(augment, 200, image))
    pixels = to_pixels(out)
    padded = (pixels == 0).all(-1)
    assert padded.any()
    np.testing.assert_allclose(
        out[padded], np.broadcast_to(BLACK, out[padded].shape), atol=1e-6
    )


def test_recipe_without_flip_and_without_crop(image):
    unflipped = all_crops(image, 1)
    augment = make_augment(mean=MEAN, std=STD, padding=1, flip=False)
    for pixels in to_pixels(draw(augment, 50, image)):
        assert pixels.tobytes() in unflipped
    augment = make_augment(mean=MEAN, std=STD, padding=0, flip=False)
    chex.assert_trees_all_equal(
        augment(jax.random.key(0), image), normalize(image, MEAN, STD)
    )


def test_evaluation_only_normalises(image):
    augment = make_augment(mean=MEAN, std=STD)
    images = jnp.stack([image, image[::-1]])
    expected = jax.vmap(lambda i: normalize(i, MEAN, STD))(images)
    out = jax.vmap(partial(augment, None, train=False))(images)
    chex.assert_trees_all_equal(out, expected)
    out = jax.vmap(partial(augment, train=False))(keys(2), images)
    chex.assert_trees_all_equal(out, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "float16"])
def test_recipe_dtype(image, key, dtype):
    augment = make_augment(mean=MEAN, std=STD, dtype=dtype)
    exact = jax.jit(make_augment(mean=MEAN, std=STD))(key, image)
    out = jax.jit(augment)(key, image)
    assert out.dtype == dtype
    chex.assert_trees_all_equal(out, exact.astype(dtype))
    assert augment(None, image, train=False).dtype == dtype


@pytest.mark.parametrize("fn", [random_crop, random_flip, "recipe"])
def test_same_alone_under_vmap_and_jit(image, fn):
    fn = make_augment(mean=MEAN, std=STD) if fn == "recipe" else fn
    images = jnp.stack([image + jnp.uint8(i) for i in range(16)])
    alone = jnp.stack([fn(k, i) for k, i in zip(keys(16), images, strict=True)])
    batch = jax.jit(jax.vmap(fn))
    together = batch(keys(16), images)
    # Compilation may fuse the division and the difference, which rounds only once.
    chex.assert_trees_all_close(together, alone, atol=1e-6)
    chex.assert_trees_all_equal(batch(keys(16), images), together)
    assert not np.array_equal(batch(keys(16, seed=1), images), together)


def test_draws_do_not_depend_on_the_batch(image):
    # Keys are folded with the global position, so the second half alone gives the same.
    augment = make_augment(mean=MEAN, std=STD)
    images = jnp.stack([image] * 8)
    folded = jax.vmap(partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(8))
    whole = jax.jit(jax.vmap(augment))(folded, images)
    half = jax.jit(jax.vmap(augment))(folded[4:], images[4:])
    chex.assert_trees_all_close(whole[4:], half, atol=1e-6)


def test_recipe_traces_once(image):
    augment = make_augment(mean=MEAN, std=STD)
    batch = jax.jit(jax.vmap(chex.assert_max_traces(augment, n=1)))
    for seed in range(3):
        batch(keys(4, seed), jnp.stack([image] * 4))


# ---------------------------------------------------------------------- errors

FLOAT = jnp.zeros((4, 4, 3))
BYTES = jnp.zeros((4, 4, 3), jnp.uint8)
ERRORS = {
    "crop of a batch": (
        lambda k: random_crop(k, jnp.zeros((2, 4, 4, 3))),
        r"\[h, w, c\], got \[2, 4, 4, 3\]; batch by jax.vmap",
    ),
    "flip without channels": (lambda k: random_flip(k, FLOAT[..., 0]), r"got \[4, 4\]"),
    "normalise a batch": (
        lambda k: normalize(FLOAT[None], MEAN, STD),
        r"got \[1, 4, 4, 3\]",
    ),
    "negative padding": (lambda k: random_crop(k, FLOAT, padding=-1), "got -1"),
    "part of a batch": (
        lambda k: random_resized_crop(k, FLOAT[None], smallest_area=0.5),
        r"got \[1, 4, 4, 3\]",
    ),
    "area above one": (
        lambda k: random_resized_crop(k, FLOAT, smallest_area=1.1),
        "got 1.1",
    ),
    "padding of half": (lambda k: random_crop(k, FLOAT, padding=0.5), "got 0.5"),
    "normalise int": (lambda k: normalize(BYTES.astype(int), MEAN, STD), "got int32"),
    "mean of one": (lambda k: normalize(BYTES, (0.5,), STD), r"mean .*=\[3\].*\[1\]"),
    "std of a number": (lambda k: normalize(BYTES, MEAN, 0.5), r"std .*=\[3\].*\[\]"),
    "recipe of float": (
        lambda k: make_augment(mean=MEAN, std=STD)(k, FLOAT),
        "must be uint8, got float32",
    ),
    "recipe of a batch": (
        lambda k: make_augment(mean=MEAN, std=STD)(k, BYTES[None]),
        "jax.vmap",
    ),
    "recipe of grey": (
        lambda k: make_augment(mean=MEAN, std=STD)(k, BYTES[..., :1]),
        r"mean must have shape \[c\]=\[1\]",
    ),
    "evaluation of float": (
        lambda k: make_augment(mean=MEAN, std=STD)(None, FLOAT, train=False),
        "must be uint8",
    ),
}
RECIPE_ERRORS = {
    "lengths": ({"mean": (0.5,), "std": STD}, r"shapes \[1\] and \[3\]"),
    "numbers": ({"mean": 0.5, "std": 0.5}, r"shapes \[\] and \[\]"),
    "zero std": ({"mean": (0.5,), "std": (0.0,)}, r"positive in some .* std=\(0.0,\)"),
    "all zero": ({"mean": MEAN, "std": (0.0,) * 3}, "positive in some channel"),
    "negative": ({"mean": MEAN, "std": (1.0, -1.0, 1.0)}, "std >= 0"),
    "nan": ({"mean": (float("nan"),), "std": (1.0,)}, "must be finite"),
    "area": ({"mean": MEAN, "std": STD, "smallest_area": 0}, "> 0 and <= 1, got 0"),
    "padding": ({"mean": MEAN, "std": STD, "padding": -1}, "padding .* got -1"),
    "dtype": ({"mean": MEAN, "std": STD, "dtype": jnp.uint8}, "floating, got uint8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, key):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        call(key)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        jax.jit(call)(key)


@pytest.mark.parametrize("case", RECIPE_ERRORS)
def test_recipe_errors(case):
    options, message = RECIPE_ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        make_augment(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_channel_becomes_zero(key, value, dtype):
    """Tests training, where a crop pads with black, evaluation, and new values."""
    std = (0.25, 0.5, 0.0)
    mean = (0.5, 0.5, value / 255)
    whole = make_augment(mean=mean, std=(0.25, 0.5, 1.0), dtype=dtype)
    augment = make_augment(mean=mean, std=std, dtype=dtype)
    images = BYTES.at[..., 2].set(value)
    for train in (True, False):
        found, expected = (
            np.asarray(jax.jit(partial(function, train=train))(key, images))
            for function in (augment, whole)
        )
        np.testing.assert_array_equal(found[..., :2], expected[..., :2])
        assert not found[..., 2].any()
    assert not normalize(BYTES, mean, std)[..., 2].any()


# --------------------------------------------------------------------- affine


def affine(image, **options):
    keys = jax.random.split(jax.random.key(3), 200)
    options = {"degrees": 0.0, "shift": 0.0, "zoom": 0.0, **options}
    move = lambda key: random_affine(key, image, **options)
    return np.asarray(jax.jit(jax.vmap(move))(keys))


def centre_and_second_moment(images):
    weight = np.asarray(images, float)[..., 0]
    h, w = weight.shape[1:]
    y, x = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    total = weight.sum((1, 2))
    mean = lambda z: (weight * z).sum((1, 2)) / total
    return mean(y), mean(x), mean(y * y), mean(x * x), mean(x * y)


def blob(h=33, w=33, sy=2.0, sx=2.0):
    y, x = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    return (1000 * np.exp(-((y / sy) ** 2 + (x / sx) ** 2) / 2))[..., None]


def single(image):
    return jnp.asarray(image, jnp.float32)


def test_affine_without_range_changes_nothing():
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3)), "uint8")
    moved = affine(image)
    assert moved.dtype == np.uint8
    np.testing.assert_array_equal(moved, np.broadcast_to(image, moved.shape))


def test_affine_shifts_by_at_most_a_share_in_both_directions():
    y, x, *_ = centre_and_second_moment(affine(single(blob(33, 49)), shift=0.1))
    for moved, side in ((y, 33), (x, 49)):
        assert np.abs(moved).max() <= 0.1 * side + 0.05
        assert moved.min() < -0.08 * side
        assert moved.max() > 0.08 * side


def test_affine_zooms_about_the_centre():
    y, x, yy, *_ = centre_and_second_moment(affine(single(blob()), zoom=0.3))
    np.testing.assert_allclose([y, x], 0, atol=1e-3)
    # Bilinear interpolation blurs by at most a quarter of a pixel, squared.
    scale = np.sqrt(yy / 4)
    assert 0.69 < scale.min() < 0.75
    assert 1.25 < scale.max() < 1.34


def test_affine_turns_both_ways_by_at_most_the_angle():
    turned = affine(single(blob(sy=5.0, sx=1.0)), degrees=20.0)
    _, _, yy, xx, xy = centre_and_second_moment(turned)
    angle = np.rad2deg(0.5 * np.arctan2(2 * xy, yy - xx))
    assert np.abs(angle).max() <= 20.5
    assert angle.min() < -17
    assert angle.max() > 17


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"degrees": -1.0}, "degrees"),
        ({"shift": -0.1}, "shift"),
        ({"zoom": 1.0}, "zoom"),
    ],
)
def test_affine_out_of_range_is_refused(options, name):
    with pytest.raises(ValueError, match=name):
        affine(jnp.zeros((3, 3, 1)), **options)
    with pytest.raises(ValueError, match=name):
        make_augment(mean=(0.5,), std=(0.5,), **options)


def test_flip_and_angle_are_independent():
    """Rotates and flips a bright pixel right of the centre into all four quadrants."""
    image = np.zeros((21, 21, 1), np.float32)
    image[9:12, 15:18] = 1000
    keys = jax.random.split(jax.random.key(3), 200)
    move = lambda key: distort(key, single(image), padding=0, degrees=40.0)
    y, x, *_ = centre_and_second_moment(jax.jit(jax.vmap(move))(keys))
    flipped, upwards = x < 0, y * np.sign(x) < 0
    counts = [np.sum(flipped & upwards), np.sum(flipped & ~upwards)]
    counts += [np.sum(~flipped & upwards), np.sum(~flipped & ~upwards)]
    assert min(counts) > 25, counts


def test_recipe_with_an_affine_map_is_affine_then_normalise():
    image = jnp.asarray(blob(9, 9, 2.0, 1.0).clip(0, 255), "uint8")
    key, options = jax.random.key(5), {"degrees": 30.0, "shift": 0.2, "zoom": 0.1}
    recipe = make_augment(mean=(0.5,), std=(0.25,), padding=0, flip=False, **options)
    moved = random_affine(jax.random.fold_in(key, 1), image, **options)
    assert not np.array_equal(moved, image)
    np.testing.assert_allclose(
        recipe(key, image), normalize(moved, (0.5,), (0.25,)), rtol=1e-6
    )


def boxes(n, size, smallest_area):
    """Draws parts, and reads top, left, height and width of each from two ramps."""
    ramps = jnp.stack(
        jnp.meshgrid(*(jnp.arange(s, dtype=jnp.float32) for s in size), indexing="ij"),
        axis=-1,
    )
    fn = partial(random_resized_crop, smallest_area=smallest_area)
    rows, columns = np.moveaxis(np.float64(draw(fn, n, ramps)), -1, 0)
    found = []
    for ramp, pixels in ((rows[:, :, 0], size[0]), (columns[:, 0], size[1])):
        middle = pixels // 2  # the ends of a ramp are not interpolated
        step = ramp[:, middle] - ramp[:, middle - 1]
        found += [ramp[:, middle] + 0.5 - (middle + 0.5) * step, step * pixels]
    top, height, left, width = found
    return top, left, height, width


def test_parts_are_those_of_torchvision():
    """Tests area, aspect ratio and place of parts of a square."""
    top, left, height, width = boxes(2000, (16, 16), 0.25)
    assert min(top.min(), left.min()) > -1e-3
    assert max((top + height).max(), (left + width).max()) < 16 + 1e-3
    share, ratio = height * width / 16**2, width / height
    assert 0.25 - 1e-3 < share.min() < 0.27
    assert share.max() > 0.95
    assert 3 / 4 - 1e-3 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 4 / 3 + 1e-3
    # All parts with at most 9/16 of the area fit, so they are uniform. The deviation of
    # the mean of 1000 parts is 0.003 of the area, and 0.005 of the ratio's logarithm.
    small = share < 0.5
    assert np.mean(share[small]) == pytest.approx(0.375, abs=0.012)
    assert np.mean(np.log(ratio[small])) == pytest.approx(0, abs=0.02)
    place = (top / (16 - height))[small]
    assert np.mean(place) == pytest.approx(0.5, abs=0.04)
    assert np.std(place) == pytest.approx(12**-0.5, abs=0.03)
    assert abs(np.corrcoef(top[small], left[small])[0, 1]) < 0.15


def test_a_part_that_never_fits_is_the_whole_image():
    """No part of this area and ratio fits into an image of one row of pixels."""
    image = jnp.arange(9.0).reshape(1, 9, 1)
    fn = partial(random_resized_crop, smallest_area=0.9)
    np.testing.assert_allclose(draw(fn, 20, image), jnp.stack([image] * 20), rtol=1e-6)


def test_parts_are_enlarged_as_by_pillow():
    pillow = pytest.importorskip("PIL.Image")
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    fn = partial(random_resized_crop, smallest_area=0.08)
    found = np.asarray(draw(fn, 8, jnp.asarray(image)))
    assert found.dtype == np.uint8
    for pixels, top, left, height, width in zip(
        found, *boxes(8, (12, 12), 0.08), strict=True
    ):
        box = np.clip((left, top, left + width, top + height), 0, 12)
        wanted = pillow.fromarray(image).resize((12, 12), pillow.BILINEAR, tuple(box))
        # Pillow rounds to 8 bits after each axis.
        np.testing.assert_allclose(pixels, np.float32(wanted), atol=1.5)


def test_recipe_with_a_part_is_a_part_then_crop():
    image = np.random.default_rng(0).integers(1, 256, (12, 12, 3), dtype=np.uint8)
    key, image = jax.random.key(5), jnp.asarray(image)
    part_key, crop_key = jax.random.split(jax.random.split(key)[0])
    part_of = jax.jit(partial(random_resized_crop, smallest_area=0.2))
    part = part_of(part_key, image)
    assert not np.array_equal(part, image)
    recipe = partial(distort, smallest_area=0.2, padding=3, flip=False)
    cropped = random_crop(crop_key, part, padding=3)
    np.testing.assert_array_equal(jax.jit(recipe)(key, image), cropped)


def test_training_needs_a_key():
    augment = make_augment(mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="key must be a random key .* got None; pass"):
        augment(None, jnp.zeros((8, 8, 1), jnp.uint8))
