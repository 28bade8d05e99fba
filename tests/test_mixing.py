"""Label smoothing and mixup, in the step and in the command, on real digits."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train_step as steps
from commands import (
    KILL,
    assert_same_arrays,
    call,
    command,
    final_arrays,
    results_of,
    tiny,
)
from flax import linen as nn

from kddm_jax import data
from kddm_jax.adapters import linen_apply
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import as_json
from kddm_jax.experiment.training import problems, runs
from kddm_jax.numerics.mixing import make_mix, mix_batch, mixup, smooth_labels
from kddm_jax.train_step import create_state, make_train_step

N, K = 32, 10
KEY = jax.random.key(3)
DIGITS = data.load("digits")
IMAGES, LABELS = DIGITS.train_images[:N], DIGITS.train_labels[:N]


class Pixels(nn.Module):
    """Its features are the pixels that it sees."""

    @nn.compact
    def __call__(self, images, *, train=False):
        del train
        x = images.reshape(len(images), -1)
        return steps.Outputs(nn.Dense(K)(x), x, {})


APPLY = linen_apply(Pixels())
VARIABLES = jax.device_get(Pixels().init(KEY, jnp.zeros((1, 8, 8, 1))))


def scaled(key, image):
    del key
    return image.astype(jnp.float32) / 16


def one_step(mix, labels=LABELS, distance="l2", **options):
    """Metrics of a step on one device, whose seed is 7."""
    step = make_train_step(
        *(APPLY, APPLY, optax.sgd(0.1)),
        augment=scaled,
        mix=mix,
        distance=distance,
        weight=1.0,
        axis_name=None,
    )
    state = create_state(VARIABLES, optax.sgd(0.1), seed=7)
    run = jax.jit(step)
    return jax.device_get(run(state, VARIABLES, IMAGES, labels, **options)[1])


STEP_KEY = jax.random.fold_in(jax.random.key(7), 0)


def seen_by_both(x, y):
    """The pixels of student and teacher as one number each, which tells mixtures."""
    by_place = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return jnp.sum(x * by_place) + 1e3 * jnp.sum(y * by_place)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_smoothing_is_a_share(share):
    for name, smooth in (
        ("smoothing", smooth_labels),
        ("label_smoothing", lambda _, **options: make_mix(**options)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be .*{share}; pass a sh"):
            smooth(jnp.array([0]), num_classes=K, **{name: share})
    with pytest.raises(ValueError, match="mixup_alpha must be a number >= 0, got -1"):
        make_mix(num_classes=K, mixup_alpha=-1)


def test_labels_out_of_range_are_not_hidden():
    """One-hot, they would be a row of zeros, which means no label."""
    smooth = lambda labels: smooth_labels(labels, num_classes=2, smoothing=0.5)
    with pytest.raises(ValueError, match="must lie below num_classes=2, got 2"):
        smooth(jnp.array([0, 2]))
    found = jax.jit(smooth)(jnp.array([0, 2, -1]))
    np.testing.assert_array_equal(found, [[0.75, 0.25], [np.nan] * 2, [0, 0]])


@pytest.mark.parametrize(("dtype", "k"), [("uint8", 256), ("int8", 128), ("int8", 200)])
def test_as_many_classes_as_a_label_can_hold_and_more(dtype, k):
    labels = np.arange(4)
    found = smooth_labels(jnp.asarray(labels, dtype), num_classes=k, smoothing=0.1)
    expected = smooth_labels(labels, num_classes=k, smoothing=0.1)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found, expected)


def test_labels_of_tokens_are_smoothed():
    labels = jnp.array([[0, 1, -1], [2, -1, 0]])
    found = smooth_labels(labels, num_classes=3, smoothing=0.1)
    flat = smooth_labels(labels.reshape(-1), num_classes=3, smoothing=0.1)
    np.testing.assert_array_equal(found, flat.reshape(2, 3, 3))
    again = smooth_labels(found, num_classes=3, smoothing=0.0)
    np.testing.assert_array_equal(again, found)
    with pytest.raises(ValueError, match=r"shape \[n, k\] to be mixed, .*\[2, 3, 3\]"):
        mixup(jax.random.key(0), jnp.ones((2, 4)), found, alpha=1.0)


def test_the_loss_is_optax_s_of_smoothed_labels():
    logits = Pixels().apply(VARIABLES, np.float32(IMAGES / 16)).logits
    for smoothing in (0.1, 0.9):
        smooth = optax.smooth_labels(jax.nn.one_hot(LABELS, K), smoothing)
        expected = optax.losses.softmax_cross_entropy(logits, smooth).mean()
        mix = make_mix(num_classes=K, label_smoothing=smoothing)
        metrics, plain = one_step(mix), one_step(None)
        np.testing.assert_allclose(metrics["task"], expected, rtol=1e-5)
        assert metrics["accuracy"] == plain["accuracy"]
        assert metrics["l2"] == plain["l2"] == 0  # images are as they were


def test_mixup_reaches_both_networks_and_the_labels():
    mix = make_mix(num_classes=K, label_smoothing=0.1, mixup_alpha=1.0)
    metrics = one_step(mix, distance=seen_by_both)
    images = np.float32(IMAGES / 16)
    mixed, targets = mix_batch(mix, STEP_KEY, jnp.asarray(images), LABELS, None)
    assert not np.allclose(mixed, images, atol=0.1)
    flat = mixed.reshape(N, -1)
    expected = seen_by_both(flat, flat)
    np.testing.assert_allclose(metrics["seen_by_both"], expected, rtol=1e-4)
    logits = Pixels().apply(VARIABLES, mixed).logits
    losses = optax.losses.softmax_cross_entropy(logits, targets)
    np.testing.assert_allclose(metrics["task"], losses.mean(), rtol=1e-5)
    hits = np.argmax(logits, 1) == np.argmax(targets, 1)
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


def test_mixup_is_the_papers_formula():
    """One share and one permutation; over many draws, shares are from Beta(a, a)."""
    rows = jnp.eye(6)
    draw = jax.jit(jax.vmap(lambda key: mixup(key, rows, rows, alpha=0.3)))
    mixed, targets = jax.device_get(draw(jax.random.split(KEY, 2000)))
    np.testing.assert_array_equal(mixed, targets)
    own = np.diagonal(mixed, axis1=1, axis2=2)
    share = own.min(axis=1)  # 1 only if each is its own partner
    moved = own < 1
    np.testing.assert_allclose(own[moved], np.repeat(share, moved.sum(1)), atol=1e-6)
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed.sum(axis=2), 1, atol=1e-6)
    assert abs(share.mean() - 0.5) < 0.03
    variance = 1 / (4 * (2 * 0.3 + 1))  # of Beta(0.3, 0.3)
    assert abs(share.var() - variance) < 0.01


def test_samples_without_a_label_are_not_mixed():
    """They and padding, whatever it holds, stay apart from all others."""
    images = jnp.asarray(IMAGES / 16, jnp.float32).at[4].set(jnp.nan)
    labels = LABELS.copy()
    labels[[0, 4]] = -1
    targets = smooth_labels(labels, num_classes=K, smoothing=0.1)
    for key in jax.random.split(KEY, 5):
        mixed, soft = mixup(key, images, targets, alpha=1.0)
        mixed, soft = np.asarray(mixed), np.asarray(soft)
        np.testing.assert_array_equal(mixed[[0, 4]], np.asarray(images)[[0, 4]])
        assert np.isfinite(np.delete(mixed, 4, 0)).all()
        np.testing.assert_array_equal(soft[[0, 4]], 0)
        np.testing.assert_allclose(np.delete(soft, [0, 4], 0).sum(1), 1, rtol=1e-6)
    mask = labels >= 0
    mix = make_mix(num_classes=K, mixup_alpha=1.0)
    masked = one_step(mix, mask=mask, distance=masked_sum)
    unlabelled = one_step(mix, labels=labels, mask=mask, distance=masked_sum)
    assert masked == unlabelled


def masked_sum(x, y, *, mask):
    return jnp.sum(jnp.where(mask[:, None], x - y, 0) ** 2)


@pytest.mark.parametrize("soft", [False, True])
def test_each_device_mixes_its_own_share(soft):
    rows, labels = np.eye(8, dtype=np.float32), np.arange(8) % K
    if soft:
        labels = np.asarray(smooth_labels(labels, num_classes=K))
    mix = make_mix(num_classes=K, mixup_alpha=1.0)
    on_device = lambda x, y: mix_batch(mix, KEY, x, y, "batch")
    split = lambda a: a.reshape(2, 4, *a.shape[1:])
    mixed, targets = jax.pmap(on_device, axis_name="batch")(split(rows), split(labels))
    assert targets.shape == (2, 4, K)
    for device, own in enumerate(np.asarray(mixed)):
        assert own[:, 4 * device : 4 * device + 4].sum() == pytest.approx(4)
    assert not np.allclose(mixed[0, :, :4], mixed[1, :, 4:])


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_a_step_on_two_devices(how):
    mix = make_mix(num_classes=steps.K, label_smoothing=0.1, mixup_alpha=0.4)
    state, metrics = steps.on_devices(steps.make_step(mix=mix), 2, how=how)(
        *steps.start()
    )
    assert metrics["finite"]
    steps.assert_shards_equal((state.params, metrics))


def test_images_must_be_floats():
    with pytest.raises(ValueError, match="must be floating to be mixed, got uint8"):
        mixup(KEY, jnp.asarray(IMAGES), jnp.eye(N), alpha=1.0)


# -------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--label-smoothing 1", "--label-smoothing must be >= 0 and < 1, got 1.0"),
        ("--label-smoothing -0.1", "--label-smoothing must be >= 0 and < 1, got -0.1"),
        ("--label-smoothing nan", "--label-smoothing must be >= 0 and < 1, got nan"),
        ("--mixup -1", "--mixup must be >= 0, got -1.0"),
        ("--mixup inf", "--mixup must be a finite number, got inf"),
        (
            "--mixup 0.2 --views 3",
            "--mixup 0.2 mixes images at every step, but --views 3 uses teacher "
            "outputs of unmixed images; leave out one of the two",
        ),
    ],
)
def test_settings_that_are_refused(line, message):
    with pytest.raises(UserError) as error:
        parse(line.split())
    assert str(error.value) == message


def test_views_allow_label_smoothing():
    assert parse(["--views", "3", "--label-smoothing", "0.1"]).data.views == 3


def test_folders_of_earlier_versions_had_the_defaults(tmp_path):
    """They resume without the two options, and are another run with them."""

    def run_of(*line):
        settings = parse([*map(str, tiny(tmp_path)), "--devices", "1", *line])
        problem = problems.prepare(settings, tmp_path)
        return [runs.teacher_run(problem), *runs.student_runs(problem, "digest")]

    new = {"label_smoothing", "mixup"}
    plain = run_of()
    for run in plain:
        assert new < {*run.identity}
        old = {key: value for key, value in run.identity.items() if key not in new}
        run.folder(tmp_path).mkdir(parents=True)
        (run.folder(tmp_path) / "run.json").write_text(json.dumps(old))
        runs.check_folder(run, tmp_path)
    for name in ("label_smoothing", "mixup"):
        option = "--" + name.replace("_", "-")
        for run in run_of(option, "0.2"):
            with pytest.raises(UserError, match=f"was made with {name}=0.0, this "):
                runs.check_folder(run, tmp_path)
    settings = as_json(parse([]))
    assert (settings["label_smoothing"], settings["mixup"]) == (0, 0)
    assert make_mix(num_classes=K) is None  # the program of earlier versions


def test_mixed_runs_continue_on_as_many_devices_only(tmp_path):
    """Each device draws its own share and partners."""

    def identities(devices, *line):
        settings = parse([*map(str, tiny(tmp_path)), "--devices", devices, *line])
        problem = problems.prepare(settings, tmp_path)
        found = [runs.teacher_run(problem), *runs.student_runs(problem, "digest")]
        return [run.identity for run in found]

    assert identities("1") == identities("2")
    mixed = [identities(devices, "--mixup", "0.2") for devices in ("1", "2")]
    for one, two in zip(*mixed, strict=True):
        assert {key for key in one if one[key] != two[key]} == {"mixup_devices"}


@pytest.mark.slow
def test_a_killed_run_of_mixed_images_continues(tmp_path):
    """Bit for bit, with images that are streamed afterwards; all networks are mixed."""
    mixed = ("--mixup", 0.4, "--label-smoothing", 0.1, "--devices", 1)
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    assert call(*tiny(plain), "--devices", 1) == 0
    assert call(*tiny(whole), *mixed) == 0
    cut = (*tiny(tmp_path / "cut"), *mixed, "--checkpoint-seconds", 0)
    killed = command(*cut, script=("-c", KILL), cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert call(*cut, "--stream-above", 0) == 0
    for name, seed in (("teacher", 0), ("student", 1), ("w2", 1)):
        one, other = (
            final_arrays(folder, name, seed) for folder in (whole, tmp_path / "cut")
        )
        assert_same_arrays(other, one)
        pairs = zip(one[1], final_arrays(plain, name, seed)[1], strict=True)
        assert any(a.tobytes() != b.tobytes() for (_, a), (_, b) in pairs)
    settings = results_of(whole)["runs"][0]["settings"]
    assert (settings["mixup"], settings["label_smoothing"]) == (0.4, 0.1)
