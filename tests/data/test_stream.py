"""Tests streaming: the given images in the given order, and each device's share."""

import numpy as np
import pytest

from kddm_jax.data.stream import reads, stream


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 3, 2, 1), dtype=np.uint8)


LABELS = np.arange(40, dtype=np.int32) * 10
ORDER = np.random.default_rng(1).permutation(40)[:36].reshape(6, 6)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("of", [1, 2, 3])
def test_every_device_reads_its_share_of_every_batch(images, length, of):
    rows = reads(ORDER, length=length, shares=range(of), of=of)
    got = list(stream(images, LABELS, rows))
    assert len(got) == 6 // length
    for i, (pixels, labels) in enumerate(got):
        for device in range(of):
            for step in range(length):
                batch = ORDER[i * length + step]
                share = batch.reshape(of, -1)[device]
                at = slice(step * len(share), (step + 1) * len(share))
                np.testing.assert_array_equal(pixels[device, at], images[share])
                np.testing.assert_array_equal(labels[device, at], LABELS[share])


def test_processes_read_the_whole_batch_together():
    own = [reads(ORDER, length=2, shares=range(i, i + 1), of=3) for i in range(3)]
    whole = reads(ORDER, length=2, shares=range(3), of=3)
    np.testing.assert_array_equal(np.concatenate(own, axis=1), whole)


def test_memory_mapped_file_is_read(images, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, images)
    mapped = np.load(path, mmap_mode="r")
    rows = reads(ORDER, length=3, shares=range(2), of=2)
    from_file = list(stream(mapped, LABELS, rows))
    for a, b in zip(from_file, stream(images, LABELS, rows), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


def test_repeated_image_comes_repeatedly(images):
    rows = np.array([[[[3, 3, 1]]]])
    ((pixels, labels),) = stream(images, LABELS, rows)
    np.testing.assert_array_equal(pixels[0], images[[3, 3, 1]])
    assert labels.tolist() == [[30, 30, 10]]


@pytest.mark.parametrize(("length", "of"), [(4, 1), (1, 4)])
def test_uneven_dispatches_and_shares_are_refused(length, of):
    with pytest.raises(ValueError, match=f"length={length} .* of={of}"):
        reads(ORDER, length=length, shares=range(of), of=of)


def test_stopping_early_leaves_no_thread_waiting(images):
    rows = reads(ORDER, length=1, shares=range(1), of=1)
    batches = stream(images, LABELS, rows)
    next(batches)
    batches.close()
    assert len(list(stream(images, LABELS, rows))) == 6
