"""Tests readers with small files of the official formats, and with damaged ones."""

import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from kddm_jax import data
from kddm_jax.data import archives, cache

# Number of images per training file and per test file of the small data sets.
TRAIN, TEST = 12, 3
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
ARCHIVES = {
    "cifar10": "cifar-10-binary.tar.gz",
    "cifar100": "cifar-100-binary.tar.gz",
    "svhn": "train_32x32.mat",
    "svhn_cropped": "train_32x32.mat",
}
TRAIN_FILES = {
    "cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "cifar100": ["train.bin"],
}
TEST_FILES = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
NAMES_FILES = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}
CLASSES = {"cifar10": 10, "cifar100": 100}
IDX_FOLDERS = {
    "mnist": ["mnist", "MNIST/raw", ""],
    "fashion_mnist": ["fashion_mnist", "FashionMNIST/raw"],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replaces the official numbers of images by small ones."""
    for name in archives.RECORDS:
        monkeypatch.setitem(archives.RECORDS, name, (TRAIN, TEST))


def cifar_files(name, seed=0):
    """Returns the official files as bytes, one record after the other."""
    rng = np.random.default_rng(seed)
    files = {}
    for file in [*TRAIN_FILES[name], TEST_FILES[name]]:
        content = b""
        for _ in range(TEST if file == TEST_FILES[name] else TRAIN):
            if name == "cifar100":
                content += bytes([rng.integers(20)])
            content += bytes([rng.integers(CLASSES[name])])
            content += rng.integers(256, size=3072, dtype=np.uint8).tobytes()
        files[file] = content
    names = [f"class_{i}" for i in range(CLASSES[name])]
    # The official list of CIFAR-10 ends with an empty line.
    files[NAMES_FILES[name]] = "\n".join([*names, "", ""]).encode()
    return files


def write_folder(root, name, files):
    folder = root / CIFAR_FOLDERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def write_archive(root, name, files, mode="w:gz"):
    path = root / ARCHIVES[name]
    with tarfile.open(path, mode) as tar:
        for file, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{CIFAR_FOLDERS[name]}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def loop_over_records(name, contents):
    """Returns images and fine labels, pixel by pixel as the format describes."""
    skip = 2 if name == "cifar100" else 1
    images, labels = [], []
    for content in contents:
        for start in range(0, len(content), skip + 3072):
            record = content[start : start + skip + 3072]
            labels.append(record[skip - 1])
            image = np.zeros((32, 32, 3), np.uint8)
            for channel in range(3):
                plane = record[skip + 1024 * channel :][:1024]
                image[:, :, channel] = np.array(list(plane)).reshape(32, 32)
            images.append(image)
    return np.stack(images), np.array(labels)


def idx_files(name, seed=0, first=None):
    """Returns the four official files as bytes, uncompressed."""
    rng = np.random.default_rng(seed)
    files = {}
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        labels = rng.integers(10, size=count, dtype=np.uint8)
        if prefix == "train":
            labels[:10] = archives.FIRST_LABELS[first or name]
        pixels = rng.integers(256, size=count * 784, dtype=np.uint8)
        size = count.to_bytes(4, "big")
        side = (28).to_bytes(4, "big")
        files[f"{prefix}-images-idx3-ubyte"] = (
            b"\0\0\x08\x03" + size + side + side + pixels.tobytes()
        )
        files[f"{prefix}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + size + labels.tobytes()
    return files


def write_idx(folder, files, *, compress):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        if compress:
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / file).write_bytes(content)


def assert_well_formed(dataset):
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        assert images.dtype == np.uint8
        assert images.ndim == 4
        assert images.flags.c_contiguous
        assert images.flags.writeable
        assert labels.dtype == np.int32
        assert labels.shape == images.shape[:1]
    assert all(type(name) is str for name in dataset.class_names)
    pixels = dataset.train_images.reshape(-1, dataset.train_images.shape[-1]) / 255
    # All in float64, so only the order of summation differs.
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-12)
    assert all(type(number) is float for number in dataset.mean + dataset.std)


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_damaged(name, root, *parts):
    """Asserts that loading fails with a one-line error that has each of ``parts``."""
    with pytest.raises(data.DataError) as caught:
        data.load(name, data_dir=root)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# ---------------------------------------------------------------------- digits


def digest(dataset):
    arrays = hashlib.sha256()
    for array in dataset[:4]:
        arrays.update(array.tobytes())
    return arrays.hexdigest()


def test_digits_split_never_changes():
    digits = data.load("digits")
    assert_well_formed(digits)
    assert digits.class_names == tuple("0123456789")
    # Hashes of images and labels of both parts, as read with scikit-learn 1.9.
    assert digest(digits) == (
        "448e779b691a569e5afc9ebad393ae7b936530ccb669bd853a2c55230314782e"
    )


def test_digits_against_scikit_learn():
    from sklearn.datasets import load_digits

    source = load_digits()
    digits = data.load("digits")
    seen = [0] * 10
    train, test = [], []
    for image, label in zip(source.images, source.target, strict=True):
        (test if seen[label] % 5 == 4 else train).append((image, label))
        seen[label] += 1
    for part, images, labels in (
        (train, digits.train_images, digits.train_labels),
        (test, digits.test_images, digits.test_labels),
    ):
        np.testing.assert_array_equal(labels, [label for _, label in part])
        expected = np.array([image for image, _ in part])[..., None]
        assert np.abs(images / 255 - expected / 16).max() <= 0.5 / 255
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 255


def test_digits_split_is_stratified():
    digits = data.load("digits")
    counts = np.bincount(np.concatenate([digits.train_labels, digits.test_labels]))
    assert counts.sum() == 1797
    np.testing.assert_array_equal(np.bincount(digits.test_labels), counts // 5)


# ---------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("write", [write_folder, write_archive])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_against_a_loop_over_records(tmp_path, name, write):
    files = cifar_files(name)
    write(tmp_path, name, files)
    dataset = data.load(name, data_dir=tmp_path)
    assert_well_formed(dataset)
    images, labels = loop_over_records(name, [files[f] for f in TRAIN_FILES[name]])
    np.testing.assert_array_equal(dataset.train_images, images)
    np.testing.assert_array_equal(dataset.train_labels, labels)
    images, labels = loop_over_records(name, [files[TEST_FILES[name]]])
    np.testing.assert_array_equal(dataset.test_images, images)
    np.testing.assert_array_equal(dataset.test_labels, labels)
    assert dataset.class_names == tuple(f"class_{i}" for i in range(CLASSES[name]))


def test_cifar_in_many_pieces(tmp_path, monkeypatch):
    # More images than are rearranged or counted at once.
    monkeypatch.setitem(archives.RECORDS, "cifar100", (1203, TEST))
    files = cifar_files("cifar100")
    rng = np.random.default_rng(1)
    records = rng.integers(256, size=(1203, 3074), dtype=np.uint8)
    records[:, 1] %= 100
    write_folder(tmp_path, "cifar100", files | {"train.bin": records.tobytes()})
    dataset = data.load("cifar100", data_dir=tmp_path)
    pixels = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(dataset.train_images, pixels)
    assert_well_formed(dataset)


def test_archive_is_not_unpacked(tmp_path):
    write_archive(tmp_path, "cifar10", cifar_files("cifar10"))
    before = sorted(tmp_path.rglob("*"))
    data.load("cifar10", data_dir=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_archive_that_a_browser_decompressed(tmp_path):
    files = cifar_files("cifar10")
    write_folder(tmp_path / "folder", "cifar10", files)
    write_archive(tmp_path, "cifar10", files, mode="w")
    assert_same(
        data.load("cifar10", data_dir=tmp_path),
        data.load("cifar10", data_dir=tmp_path / "folder"),
    )


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (0, "empty"),
        (7 * 3073, "cut between two records"),
        (7 * 3073 + 100, "cut within a record"),
        ((TRAIN + 1) * 3073, "a record too many"),
    ],
)
@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_cifar_file_of_wrong_size(tmp_path, write, size, why):
    files = cifar_files("cifar10")
    files["data_batch_2.bin"] = (files["data_batch_2.bin"] * 2)[:size]
    path = write(tmp_path, "cifar10", files)
    assert_damaged(
        "cifar10",
        tmp_path,
        path / "data_batch_2.bin",
        f"found {size:,} bytes",
        f"expected {TRAIN * 3073:,} bytes",
        "download it",
    )


@pytest.mark.parametrize("write", [write_folder, write_archive])
@pytest.mark.parametrize(("name", "label"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_label_out_of_range(tmp_path, write, name, label):
    files = cifar_files(name)
    content = bytearray(files[TEST_FILES[name]])
    skip = 2 if name == "cifar100" else 1
    content[2 * (3072 + skip) + skip - 1] = label
    path = write(tmp_path, name, files | {TEST_FILES[name]: bytes(content)})
    assert_damaged(
        name,
        tmp_path,
        path / TEST_FILES[name],
        f"label {label} in record 2",
        f"labels 0 to {label - 1}",
    )


@pytest.mark.parametrize("missing", ["data_batch_3.bin", "batches.meta.txt"])
def test_cifar_file_missing(tmp_path, missing):
    files = cifar_files("cifar10")
    del files[missing]
    folder = write_folder(tmp_path / "a", "cifar10", files)
    assert_damaged("cifar10", tmp_path / "a", folder / missing, "missing")
    archive = write_archive(tmp_path, "cifar10", files)
    assert_damaged("cifar10", tmp_path, archive, f"no {missing}")


@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_cifar_wrong_class_names(tmp_path, write):
    files = cifar_files("cifar10")
    path = write(tmp_path, "cifar10", files | {"batches.meta.txt": b"one\ntwo\n"})
    assert_damaged("cifar10", tmp_path, path / "batches.meta.txt", "found 2 names")
    path = write(tmp_path, "cifar10", files | {"batches.meta.txt": b"x\n" * 100_000})
    assert_damaged("cifar10", tmp_path, path / "batches.meta.txt", "200,000 bytes")


PYTHON = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", "train"),
}


def python_version(root, name, where):
    """Writes files of the Python version; returns the data folder and their path."""
    folder, archive, file = PYTHON[name]
    files = {"batches.meta" if name == "cifar10" else "meta": b"\x80", file: b"\x80"}
    if where in ("archive", "renamed archive"):
        path = write_archive(root, name, files)
        return root, path.rename(root / archive) if where == "archive" else path
    if where == "renamed folder":
        return root, write_folder(root, name, files)
    path = write_folder(root, name, files).rename(root / folder)
    return (path, path) if where == "itself" else (root, path)


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.parametrize(
    "where", ["folder", "archive", "itself", "renamed folder", "renamed archive"]
)
def test_cifar_of_the_python_version(tmp_path, name, where):
    root, path = python_version(tmp_path, name, where)
    parts = ("Python version", ARCHIVES[name], "binary version", "cs.toronto.edu")
    assert_damaged(name, root, path, *parts)


@pytest.mark.parametrize("name", PYTHON)
def test_binary_version_next_to_the_python_version(tmp_path, name):
    python_version(tmp_path, name, "folder")
    python_version(tmp_path, name, "archive")
    write_archive(tmp_path, name, cifar_files(name))
    assert_well_formed(data.load(name, data_dir=tmp_path))


@pytest.mark.parametrize("keep", [0.0, 1e-5, 0.3, 0.9, 0.99999])
def test_archive_cut_short(tmp_path, keep):
    path = write_archive(tmp_path, "cifar10", cifar_files("cifar10"))
    content = path.read_bytes()
    cut = content[: int(keep * len(content))]
    path.write_bytes(cut)
    assert_damaged("cifar10", tmp_path, path, f"{len(cut):,} bytes", "download it")


@pytest.mark.parametrize("at", [3000, 100_000, -6])
def test_archive_with_a_wrong_byte(tmp_path, at):
    # Random pixels are stored without compression, so only the checksum shows the
    # damage.
    path = write_archive(tmp_path, "cifar10", cifar_files("cifar10"))
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert_damaged("cifar10", tmp_path, path, "expected a whole .tar.gz")


def test_archive_with_a_broken_stream(tmp_path):
    # The first block after the ten bytes of the header gets a type that does not exist.
    path = write_archive(tmp_path, "cifar10", cifar_files("cifar10"))
    content = bytearray(path.read_bytes())
    content[10 + len(ARCHIVES["cifar10"]) - len(".gz") + 1] = 0xFF
    path.write_bytes(content)
    assert_damaged("cifar10", tmp_path, path, "expected a whole .tar.gz")


def test_archive_that_is_a_web_page(tmp_path):
    path = tmp_path / ARCHIVES["cifar10"]
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>" * 100)
    assert_damaged("cifar10", tmp_path, path, "expected a whole .tar.gz")


def test_archive_with_a_link_for_a_file(tmp_path):
    # A member that is not a plain file is never followed.
    secret = tmp_path / "secret"
    files = cifar_files("cifar10")
    secret.write_bytes(files.pop("test_batch.bin"))
    path = write_archive(tmp_path, "cifar10", files, mode="w")
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    assert_damaged("cifar10", tmp_path, path, "no test_batch.bin")


def add_elsewhere(tar):
    for name in ("../../evil", "/evil", str(Path.cwd() / "evil")):
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    link = tarfile.TarInfo("cifar-10-batches-bin/evil")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    tar.addfile(link)
    through = tarfile.TarInfo("cifar-10-batches-bin/evil/evil")
    tar.addfile(through)


def test_archive_that_points_elsewhere_writes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "below" / "data"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    files = cifar_files("cifar10")
    path = write_archive(folder, "cifar10", files, mode="w")
    with tarfile.open(path, "a") as tar:
        add_elsewhere(tar)
    seen = lambda: (sorted(tmp_path.rglob("*")), sorted(Path("/").iterdir()))
    before = seen()
    dataset = data.load("cifar10", data_dir=folder)
    assert len(dataset.train_images) == 5 * TRAIN
    assert seen() == before


def endless(first, size=2**27):
    """Returns a small gzip file of ``first`` and an eighth of a gigabyte of zeros."""
    compressor = zlib.compressobj(wbits=31)
    content, zeros = compressor.compress(first), bytes(2**20)
    content += b"".join(compressor.compress(zeros) for _ in range(size // 2**20))
    return content + compressor.flush()


def peak(read):
    """Returns the largest memory in bytes that Python allocates in ``read``."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def large_member(name, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, 2**27
    return member.tobuf(tarfile.USTAR_FORMAT)


BOMBS = {
    "end": lambda whole: whole,
    "member": lambda whole: whole[:-10240] + large_member("large"),
    # tarfile itself would read these completely
    "header": lambda whole: large_member("large", tarfile.XHDTYPE),
    "name": lambda whole: large_member("large", tarfile.GNUTYPE_LONGNAME),
}


@pytest.mark.parametrize(
    "bomb",
    [b if b == "end" else pytest.param(b, marks=pytest.mark.slow) for b in BOMBS],
)
def test_archive_that_inflates_without_end(tmp_path, bomb):
    path = write_archive(tmp_path, "cifar10", cifar_files("cifar10"), mode="w")
    path.write_bytes(endless(BOMBS[bomb](path.read_bytes())))
    assert path.stat().st_size < 2**20
    read = lambda: assert_damaged("cifar10", tmp_path, path, "inflates to more than")
    assert peak(read) < 2**25


# ---------------------------------------------------------------------- MNIST


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [(name, folder) for name, folders in IDX_FOLDERS.items() for folder in folders],
)
def test_mnist_against_the_bytes(tmp_path, name, folder, compress):
    files = idx_files(name)
    write_idx(tmp_path / folder, files, compress=compress)
    dataset = data.load(name, data_dir=tmp_path)
    assert_well_formed(dataset)
    assert len(dataset.class_names) == 10
    for prefix, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("t10k", dataset.test_images, dataset.test_labels),
    ):
        content = files[f"{prefix}-images-idx3-ubyte"]
        for i in range(len(images)):
            pixels = np.array(list(content[16 + 784 * i :][:784])).reshape(28, 28, 1)
            np.testing.assert_array_equal(images[i], pixels)
        expected = list(files[f"{prefix}-labels-idx1-ubyte"][8:])
        np.testing.assert_array_equal(labels, expected)


def test_fashion_mnist_does_not_take_files_lying_about(tmp_path):
    write_idx(tmp_path, idx_files("mnist"), compress=True)
    write_idx(tmp_path / "mnist", idx_files("mnist"), compress=True)
    with pytest.raises(data.DataError, match="fashion_mnist was not found"):
        data.load("fashion_mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "other", "folder"),
    [
        ("mnist", "fashion_mnist", ""),
        ("mnist", "fashion_mnist", "mnist"),
        ("fashion_mnist", "mnist", "FashionMNIST/raw"),
    ],
)
def test_mnist_and_fashion_mnist_are_told_apart(tmp_path, name, other, folder):
    write_idx(tmp_path / folder, idx_files(name, first=other), compress=True)
    assert_damaged(
        name, tmp_path, f"{tmp_path / folder} holds {other}, not {name}", f"{name}/"
    )


IDX_DAMAGES = {
    "empty": ("train-images-idx3-ubyte", lambda c: b"", "found 0 bytes"),
    "header cut": ("train-images-idx3-ubyte", lambda c: c[:9], "found 9 bytes"),
    "cut": ("train-images-idx3-ubyte", lambda c: c[:-784], "found 8,640 bytes"),
    "longer": ("train-images-idx3-ubyte", lambda c: c + b"\0", "found more"),
    "magic": (
        "train-images-idx3-ubyte",
        lambda c: b"\0\0\x0d\x03" + c[4:],
        "magic 0x00000d03",
    ),
    "count": (
        "t10k-labels-idx1-ubyte",
        lambda c: c[:7] + b"\x02" + c[8:-1],
        "shape [2], expected magic 0x00000801 and shape [3]",
    ),
    "labels for images": (
        "t10k-images-idx3-ubyte",
        lambda c: b"\0\0\x08\x01" + c[4:],
        "magic 0x00000801",
    ),
    "label": (
        "t10k-labels-idx1-ubyte",
        lambda c: c[:-1] + b"\x0a",
        "label 10 in record 2, expected labels 0 to 9",
    ),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", IDX_DAMAGES)
def test_mnist_damaged(tmp_path, damage, compress):
    file, change, found = IDX_DAMAGES[damage]
    files = idx_files("mnist")
    files[file] = change(files[file])
    write_idx(tmp_path / "mnist", files, compress=compress)
    suffix = ".gz" if compress else ""
    path = tmp_path / "mnist" / f"{file}{suffix}"
    assert_damaged("mnist", tmp_path, f"{path}: ", found, "expected", "download it")


@pytest.mark.parametrize("change", [lambda c: c[:5000], lambda c: c[:-3]])
def test_mnist_gz_cut_short(tmp_path, change):
    write_idx(tmp_path, idx_files("mnist"), compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    size = f"{path.stat().st_size:,} bytes"
    assert_damaged("mnist", tmp_path, path, size, "expected a whole .gz")


# Damages a pixel, where only the checksum shows it, and the type of the first block.
@pytest.mark.parametrize(("at", "byte"), [(5000, 0x01), (10, 0xFF)])
def test_mnist_gz_with_a_wrong_byte(tmp_path, at, byte):
    write_idx(tmp_path, idx_files("mnist"), compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[at] ^= byte
    path.write_bytes(content)
    assert_damaged("mnist", tmp_path, path, "expected a whole .gz")


def test_mnist_gz_that_inflates_without_end(tmp_path):
    files = idx_files("mnist")
    write_idx(tmp_path / "mnist", files, compress=True)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(endless(files[path.stem]))
    read = lambda: assert_damaged("mnist", tmp_path, path, "found more")
    assert peak(read) < 2**25


def test_mnist_file_missing(tmp_path):
    files = idx_files("mnist")
    del files["t10k-labels-idx1-ubyte"]
    write_idx(tmp_path / "mnist", files, compress=True)
    stem = tmp_path / "mnist" / "t10k-labels-idx1-ubyte"
    assert_damaged("mnist", tmp_path, stem, f"{stem}.gz", "missing")


# ---------------------------------------------------------------------- SVHN

MAT_FILES = {"train_32x32.mat": TRAIN, "test_32x32.mat": TEST}


def mat_contents(seed=0):
    """Returns images ``[n, 32, 32, 3]`` and labels 1 to 10 of both files."""
    rng = np.random.default_rng(seed)
    return {
        file: (
            rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8),
            rng.permutation(np.arange(count, dtype=np.uint8) % 10 + 1),
        )
        for file, count in MAT_FILES.items()
    }


def write_mat(folder, contents, compress=True, **changes):
    """Writes a file in the official layout: X [32, 32, 3, n] and y [n, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, (images, labels) in contents.items():
        variables = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}
        variables |= changes if file == "train_32x32.mat" else {}
        kept = {name: value for name, value in variables.items() if value is not None}
        savemat(folder / file, kept, do_compression=compress)
    return folder / "train_32x32.mat"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("folder", ["svhn", "SVHN", ""])
def test_svhn_against_its_pixels(tmp_path, folder, compress):
    contents = mat_contents()
    write_mat(tmp_path / folder, contents, compress)
    dataset = data.load("svhn", data_dir=tmp_path)
    assert_well_formed(dataset)
    assert_same(data.load("svhn_cropped", data_dir=tmp_path), dataset)
    assert dataset.class_names == tuple("0123456789")
    for file, images, labels in (
        ("train_32x32.mat", dataset.train_images, dataset.train_labels),
        ("test_32x32.mat", dataset.test_images, dataset.test_labels),
    ):
        np.testing.assert_array_equal(images, contents[file][0])
        # Label 10 is the digit 0.
        expected = [0 if label == 10 else label for label in contents[file][1]]
        np.testing.assert_array_equal(labels, expected)


def test_svhn_in_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setitem(archives.RECORDS, "svhn", (1203, TEST))
    contents = mat_contents()
    rng = np.random.default_rng(1)
    images = rng.integers(256, size=(1203, 32, 32, 3), dtype=np.uint8)
    contents["train_32x32.mat"] = (images, np.arange(1203, dtype=np.uint8) % 10 + 1)
    write_mat(tmp_path, contents, compress=False)
    dataset = data.load("svhn", data_dir=tmp_path)
    np.testing.assert_array_equal(dataset.train_images, images)


MAT_DAMAGES = {
    "one image less": (
        {"X": np.zeros((32, 32, 3, TRAIN - 1), np.uint8)},
        ("X uint8 [32, 32, 3, 11]", "uint8 [32, 32, 3, 12]"),
    ),
    "floats": (
        {"X": np.zeros((32, 32, 3, TRAIN))},
        ("X double [32, 32, 3, 12]", "expected uint8"),
    ),
    "labels missing": ({"y": None}, ("y nothing", "uint8 [12, 1]")),
    "labels a row": (
        {"y": np.ones((1, TRAIN), np.uint8)},
        ("y uint8 [1, 12]", "uint8 [12, 1]"),
    ),
    "label 0": (
        {"y": np.eye(TRAIN, dtype=np.uint8)[0][:, None]},
        ("label 0 in record 1", "labels 1 to 10"),
    ),
    "label 11": (
        {"y": np.arange(TRAIN, dtype=np.uint8)[:, None] + 1},
        ("label 11 in record 10", "labels 1 to 10"),
    ),
}


@pytest.mark.parametrize("damage", MAT_DAMAGES)
def test_svhn_of_other_contents(tmp_path, damage):
    changes, parts = MAT_DAMAGES[damage]
    path = write_mat(tmp_path, mat_contents(), **changes)
    assert_damaged("svhn", tmp_path, f"{path}: found ", *parts, "download it")


def test_svhn_of_another_size_is_not_inflated(tmp_path, monkeypatch):
    path = write_mat(tmp_path, mat_contents(), X=np.zeros((32, 32, 3, 999), np.uint8))
    monkeypatch.setattr("scipy.io.loadmat", None)  # calling it would fail
    assert_damaged("svhn", tmp_path, path, "X uint8 [32, 32, 3, 999]")


# The last bytes of an uncompressed file are padding; the official ones are compressed.
@pytest.mark.parametrize(
    ("keep", "compress"),
    [*((k, c) for k in (0, 0.001, 0.01, 0.5, 0.99) for c in (False, True)), (1, True)],
)
def test_svhn_cut_short(tmp_path, keep, compress):
    path = write_mat(tmp_path, mat_contents(), compress)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) - 1] if keep else b"")
    assert_damaged("svhn", tmp_path, f"{path}: found ", "download it")


@pytest.mark.parametrize("at", [126, 129, 3000, 30_000, -7000])
def test_svhn_with_a_wrong_byte(tmp_path, at):
    path = write_mat(tmp_path, mat_contents())
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    assert_damaged("svhn", tmp_path, f"{path}: found ", "download it")


def test_svhn_that_is_a_web_page(tmp_path):
    path = write_mat(tmp_path, mat_contents())
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>" * 100)
    assert_damaged("svhn", tmp_path, path, "4,300 bytes", "a whole MATLAB 5 file")


def test_svhn_file_missing(tmp_path):
    path = write_mat(tmp_path, mat_contents()).with_name("test_32x32.mat")
    path.unlink()
    assert_damaged("svhn", tmp_path, path, "missing")


# --------------------------------------------------- archives stored uncompressed


@pytest.fixture
def kept(monkeypatch):
    """Treats small archives like the large official ones; counts decompressions."""
    monkeypatch.setattr(cache, "KEPT_FROM", 0)
    count = [0]

    def counting(read):
        def read_and_count(*arguments):
            count[0] += 1
            return read(*arguments)

        return read_and_count

    for name in ("_from_archive", "_read_mat"):
        monkeypatch.setattr(archives, name, counting(getattr(archives, name)))
    return count


def write_large(root, name, seed):
    if name == "svhn":
        return write_mat(root, mat_contents(seed), compress=False)
    return write_archive(root, name, cifar_files(name, seed))


@pytest.mark.parametrize(("name", "files"), [("cifar10", 1), ("svhn", 2)])
def test_archive_is_inflated_once(tmp_path, kept, name, files):
    write_large(tmp_path, name, seed=0)
    first = data.load(name, data_dir=tmp_path)
    again = data.load(name, data_dir=tmp_path)
    assert kept == [files]
    assert_same(again, first)
    # In memory and writable, as without a cache.
    assert_well_formed(again)
    assert not isinstance(again.train_images, np.memmap)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_changed_archive_is_inflated_again(tmp_path, kept, name):
    path = write_large(tmp_path, name, seed=0)
    size = path.stat().st_size
    first = data.load(name, data_dir=tmp_path)
    path = write_large(tmp_path, name, seed=1)  # random pixels do not compress
    assert abs(path.stat().st_size - size) < 100
    assert (data.load(name, data_dir=tmp_path).train_images != first.train_images).any()
    assert len(list((tmp_path / ".kddm_jax").iterdir())) == 1
    # A damaged archive is refused even if it was read before.
    path.write_bytes(path.read_bytes()[:-10_000])
    assert_damaged(name, tmp_path, path)


def test_archive_without_a_place_for_the_cache(tmp_path, kept):
    (tmp_path / "data").mkdir()
    write_large(tmp_path / "data", "cifar10", seed=0)
    for folder in (tmp_path / "data" / ".kddm_jax", tmp_path / "home"):
        folder.write_text("a file in the way")
    for _ in range(2):
        assert_well_formed(data.load("cifar10", data_dir=tmp_path / "data"))
    assert kept == [2]


# ---------------------------------------------------------------------- resizing


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_official_images_resized(tmp_path, name):
    if name == "cifar10":
        write_folder(tmp_path, name, cifar_files(name))
    whole = data.load(name, data_dir=tmp_path)
    small = data.load(name, data_dir=tmp_path, image_size=5)
    channels = whole.train_images.shape[-1]
    assert small.train_images.shape == (len(whole.train_images), 5, 5, channels)
    assert_well_formed(small)
    for found, images in (
        (small.train_images, whole.train_images),
        (small.test_images, whole.test_images),
    ):
        image = Image.fromarray(images[-1].squeeze())
        expected = image.resize((5, 5), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found[-1].squeeze(), np.asarray(expected))
    np.testing.assert_array_equal(small.test_labels, whole.test_labels)
    side = whole.train_images.shape[1]
    assert_same(data.load(name, data_dir=tmp_path, image_size=side), whole)


def test_image_size_of_nothing():
    with pytest.raises(data.DataError, match="image_size must be at least 1, got 0"):
        data.load("digits", image_size=0)


# ---------------------------------------------------------------------- finding


def test_folders_are_tried_in_the_documented_order(tmp_path, monkeypatch):
    # Four copies with different pixels, which show the copy that was read.
    places = [
        tmp_path / "given",
        tmp_path / "variable",
        tmp_path / "data",
        tmp_path / "home/.cache/kddm_jax",
    ]
    for seed, place in enumerate(places):
        write_idx(place, idx_files("mnist", seed), compress=False)

    def seed_of(dataset):
        pixels = dataset.train_images.tobytes()
        found = [
            seed
            for seed in range(4)
            if idx_files("mnist", seed)["train-images-idx3-ubyte"].endswith(pixels)
        ]
        return found[0]

    monkeypatch.setenv("KDDM_DATA_DIR", str(places[1]))
    assert seed_of(data.load("mnist", data_dir=places[0])) == 0
    assert seed_of(data.load("mnist", data_dir=str(places[0]))) == 0
    assert seed_of(data.load("mnist")) == 1
    monkeypatch.delenv("KDDM_DATA_DIR")
    assert seed_of(data.load("mnist")) == 2
    for file in places[2].iterdir():
        file.unlink()
    assert seed_of(data.load("mnist")) == 3
    # If the user names a folder, no other folder is searched.
    with pytest.raises(data.DataError, match="was not found"):
        data.load("mnist", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("KDDM_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError, match="was not found"):
        data.load("mnist")


@pytest.mark.parametrize("name", sorted({*data.DATASETS} - {"digits", "folder"}))
def test_an_error_names_the_missing_files_and_their_folder(tmp_path, name):
    (tmp_path / "data").mkdir()
    with pytest.raises(data.DataError) as caught:
        data.load(name)
    message = str(caught.value)
    assert f"{tmp_path / 'data'}\n" in message
    assert f"{tmp_path / 'home/.cache/kddm_jax'} (no such folder)" in message
    for place in data.DATASETS[name].places:
        assert place in message
    ways = message.split("What you can do:\n")[1].splitlines()
    assert ways[0].startswith("  --dataset digits")
    assert ARCHIVES.get(name, "ubyte.gz") in ways[1]
    assert re.search(r"https?://", ways[1])
    assert "KDDM_DATA_DIR" in ways[2]
    assert f"kddm prepare {name} " in ways[3]
    assert f"{tmp_path / 'home/tensorflow_datasets'} (no such folder)" in message


def test_unknown_name():
    with pytest.raises(data.DataError, match=r"'cifar11'; known: digits, cifar10,"):
        data.load("cifar11")


def test_import_is_light(bare):
    program = f"""{bare}
import kddm_jax.data
heavy = {{"jax", "sklearn", "scipy", "PIL", "rich", "tensorflow", "array_record"}}
ours = [module for name, module in sys.modules.items() if name.startswith("kddm_jax.")]
print(sorted(heavy & set(sys.modules)), any("pickle" in vars(m) for m in ours))
print(len(ours))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[] False\n10\n"


# ---------------------------------------------------------------------- drawing


@pytest.fixture
def labels():
    """Makes shuffled labels of five classes with 40, 30, 20, 10 and 3 samples."""
    classes = np.repeat([4, 0, 1, 2, 7], [40, 30, 20, 10, 3])
    return np.random.default_rng(0).permutation(classes).astype(np.int32)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 12, 15, 50, 103])
def test_balanced_subset_is_balanced(labels, count):
    chosen = data.balanced_subset(labels, count, seed=3)
    assert chosen.shape == (count,)
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == count
    sizes = {c: int((labels[chosen] == c).sum()) for c in set(labels.tolist())}
    available = {c: int((labels == c).sum()) for c in sizes}
    largest = max(sizes.values())
    for c, size in sizes.items():
        assert size >= min(largest - 1, available[c])


def test_balanced_subsets_are_nested(labels):
    whole = data.balanced_subset(labels, len(labels), seed=5)
    for count in range(len(labels)):
        part = data.balanced_subset(labels, count, seed=5)
        np.testing.assert_array_equal(part, whole[:count])


def test_balanced_subset_is_a_random_draw(labels):
    draws = [tuple(data.balanced_subset(labels, 10, seed=s)) for s in range(50)]
    assert len(set(draws)) == 50
    # Each of the 50 draws takes two samples of the class of 40, so all of them miss a
    # given sample with probability 0.95^50 = 8 %, which is 3 of 40 on average.
    seen = {i for draw in draws for i in draw if labels[i] == 4}
    assert len(seen) >= 30


def test_draws_never_change():
    labels = np.arange(20) % 4
    # Computed by these functions with NumPy 2.4.
    np.testing.assert_array_equal(
        data.balanced_subset(labels, 6, seed=0), [11, 13, 2, 8, 3, 1]
    )
    np.testing.assert_array_equal(
        data.stratified_split(labels, 6, 0)[1], [1, 2, 3, 8, 11, 13]
    )


@pytest.mark.parametrize("held_out", [0, 1, 10, 51, 102])
def test_stratified_split(labels, held_out):
    train, held = data.stratified_split(labels, held_out, seed=1)
    assert held.shape == (held_out,)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train, held])), np.arange(len(labels))
    )
    np.testing.assert_array_equal(train, np.sort(train))
    np.testing.assert_array_equal(held, np.sort(held))
    for c in set(labels.tolist()):
        share = (labels == c).sum() * held_out / len(labels)
        assert abs((labels[held] == c).sum() - share) < 1
    again = data.stratified_split(labels, held_out, seed=1)
    assert_same((train, held), again)
    if held_out == 10:
        assert held.tolist() != data.stratified_split(labels, 10, seed=2)[1].tolist()


def test_stratified_split_of_balanced_classes_is_exact():
    labels = np.arange(1000) % 10
    _, held = data.stratified_split(labels, 200, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[held]), [20] * 10)


@pytest.mark.parametrize("draw", [data.balanced_subset, data.stratified_split])
@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        (np.zeros(4, np.int32), 5, r"\[0, 4"),
        (np.zeros(4, np.int32), -1, "got -1"),
        (np.zeros((4, 2), np.int32), 1, r"labels must be .* \[4, 2\]"),
        (np.zeros(4, np.float32), 1, "labels must be integers"),
    ],
)
def test_draws_refuse(draw, labels, count, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(labels, count, 0)
    assert "\n" not in str(caught.value)


def test_stratified_split_leaves_something_to_train_on():
    with pytest.raises(ValueError, match=r"held_out must be in \[0, n\)=\[0, 4\)"):
        data.stratified_split(np.zeros(4, np.int32), 4, 0)


# ---------------------------------------------------------------------- real data

REAL = Path(os.environ.get("KDDM_DATA_DIR", ""))


@pytest.mark.slow
@pytest.mark.skipif(
    not any((REAL / place).exists() for place in data.DATASETS["cifar10"].places)
    or "KDDM_DATA_DIR" not in os.environ,
    reason="set KDDM_DATA_DIR to a folder with the binary CIFAR-10 to run this",
)
def test_real_cifar10(monkeypatch):
    monkeypatch.setitem(archives.RECORDS, "cifar10", (10_000, 10_000))
    dataset = data.load("cifar10", data_dir=REAL)
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    # The widely used mean and standard deviation of CIFAR-10.
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=1e-4)
    np.testing.assert_allclose(dataset.std, (0.2470, 0.2435, 0.2616), atol=1e-4)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), [1000] * 10)
    assert dataset.class_names[0] == "airplane"
