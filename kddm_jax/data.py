"""Image data sets as ``uint8`` arrays in memory, read from their official files.

``digits`` is embedded in scikit-learn and needs no file.  The others are read from
the files that their authors publish, wherever they lie: nothing is downloaded,
nothing is unpickled and no archive is unpacked to disk.  The folder looked in is

1. ``data_dir`` if given,
2. else ``$KDDM_DATA_DIR`` if set,
3. else ``./data`` and then ``~/.cache/kddm_jax``.

Every file is checked against its official size, so that one cut short is an error
and never a smaller data set.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

# Images per training file and per test file, as published.
RECORDS = {
    "cifar10": (10_000, 10_000),
    "cifar100": (50_000, 10_000),
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
}


class DataError(ValueError):
    """A data set is unknown, not at hand, or damaged."""


class Dataset(NamedTuple):
    """Images and labels of a data set, in memory.

    Attributes:
      train_images: training images, ``uint8``, shape ``[n, h, w, c]``.
      train_labels: training labels, ``int32``, shape ``[n]``.
      test_images: test images, ``uint8``, shape ``[m, h, w, c]``.
      test_labels: test labels, ``int32``, shape ``[m]``.
      class_names: the name of each label.
      mean: mean of the training images per channel, in ``[0, 1]`` units.
      std: their standard deviation per channel, in ``[0, 1]`` units.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _folders(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """The folders to look in, in order."""
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    if os.environ.get("KDDM_DATA_DIR"):
        return [Path(os.environ["KDDM_DATA_DIR"]).expanduser()]
    return [Path("data"), Path("~/.cache/kddm_jax").expanduser()]


def _missing(name: str, folders: Sequence[Path]) -> DataError:
    """What was looked for, where, and every way to get it."""
    source = DATASETS[name]
    looked = [
        f"  {folder.absolute()}{'' if folder.is_dir() else ' (no such folder)'}"
        for folder in folders
    ]
    return DataError(
        "\n".join(
            [
                f"{name} is not at hand. Looked in, in this order:",
                *looked,
                f"for {', '.join(source.places)}.",
                "Ways to go on:",
                '  --dataset digits, or load("digits"): real images, needs no file',
                f"  {source.get}",
                "  another folder: data_dir=..., or the variable KDDM_DATA_DIR",
            ]
        )
    )


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
      name: a key of ``DATASETS``.
      data_dir: folder with the official files.  By default ``$KDDM_DATA_DIR``, or
        if that is not set ``./data`` and then ``~/.cache/kddm_jax``.

    Returns:
      The data set, with mean and standard deviation of its training images.

    Raises:
      DataError: if the name is unknown; if the files are not found, with every
        place looked in and the ways to get them; if a file is damaged or cut short.

    Examples:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.test_images.shape
      ((1442, 8, 8, 1), (355, 8, 8, 1))
      >>> digits.mean, digits.std
      ((0.305,), (0.376,))
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    source = DATASETS[name]
    if not source.places:
        return source.read()
    folders = _folders(data_dir)
    for folder in folders:
        for place in source.places:
            if (folder / place).exists():
                return source.read(folder / place)
    raise _missing(name, folders)


def _ranks(labels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Position of each sample within its class, in the order of ``draws``."""
    order = np.lexsort((draws, labels))
    _, start, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(start, counts)
    return ranks


def _check_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            "labels must be integers of shape [n], got "
            f"{labels.dtype} {list(labels.shape)}; pass argmax(one_hot, axis=-1)"
        )
    return labels


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws samples with the same number from each class, as far as possible.

    Class sizes in the subset differ by at most one until a class is used up.  For
    one seed the subsets are nested: the subset of ``count`` samples is the beginning
    of every larger one.

    Args:
      labels: labels, integers, shape ``[n]``.
      count: number of samples to draw, at most ``n``.
      seed: seed of the draw, the same subset on every platform.

    Returns:
      Indices into ``labels``, ``int64``, shape ``[count]``, without repetition.

    Raises:
      ValueError: if ``labels`` has another shape or dtype, or ``count`` is out of
        range.

    Examples:
      >>> labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
      >>> np.bincount(labels[balanced_subset(labels, 4, seed=0)])
      array([2, 2])
    """
    labels = _check_labels(labels)
    if not 0 <= count <= len(labels):
        raise ValueError(f"count must be in [0, n]=[0, {len(labels)}], got {count}")
    # PCG64's raw output is guaranteed never to change; Generator's methods are not.
    draws = np.random.PCG64(seed).random_raw(len(labels))
    # The first of every class, then the second of every class, and so on.
    return np.lexsort((draws, _ranks(labels, draws)))[:count]


def stratified_split(
    labels: np.ndarray, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds samples out for validation, each class in proportion to its size.

    Args:
      labels: labels, integers, shape ``[n]``.
      held_out: number of samples to hold out, less than ``n``.
      seed: seed of the draw, the same split on every platform.

    Returns:
      Indices of the samples to train on, shape ``[n - held_out]``, and of those held
      out, shape ``[held_out]``; ``int64``, ascending, disjoint.

    Raises:
      ValueError: if ``labels`` has another shape or dtype, or ``held_out`` is out of
        range.

    Examples:
      >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
      >>> train, held_out = stratified_split(labels, 3, seed=0)
      >>> np.bincount(labels[train]), np.bincount(labels[held_out])
      (array([4, 2]), array([2, 1]))
    """
    labels = _check_labels(labels)
    if not 0 <= held_out < len(labels):
        raise ValueError(
            f"held_out must be in [0, n)=[0, {len(labels)}), got {held_out}"
        )
    draws = np.random.PCG64(seed).random_raw(len(labels))
    _, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # Sample r of a class of n_c has its turn at (r + 1/2) / n_c: at any moment each
    # class has given the same share of its samples, rounded (Sainte-Lague).
    turn = (_ranks(labels, draws) + 0.5) / counts[class_of]
    order = np.lexsort((draws, turn))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, exact, from histograms of bytes."""
    channels = images.shape[-1]
    histogram = np.zeros((channels, 256), np.int64)
    # Pieces of 200 images stay in the cache: 0.2 s instead of 1.0 s for CIFAR.
    for start in range(0, len(images), 200):
        for c in range(channels):
            piece = images[start : start + 200, ..., c].ravel()
            histogram[c] += np.bincount(piece, minlength=256)
    share = histogram / histogram.sum(axis=1, keepdims=True)  # [c, 256]
    values = np.arange(256) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _dataset(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: Sequence[str],
) -> Dataset:
    mean, std = _statistics(train[0])
    return Dataset(*train, *test, tuple(class_names), mean, std)


def _read_digits() -> Dataset:
    """Every fifth image of each class, in scikit-learn's order, is a test image."""
    # Imported here: scikit-learn takes a second to import and only digits needs it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.asarray(digits.images)[..., None]  # 0, ..., 16
    images = np.round(levels * (255 / 16)).astype(np.uint8)
    labels = np.asarray(digits.target).astype(np.int32)
    # A rule instead of a draw: no library's shuffling can ever change the split.
    is_test = _ranks(labels, np.arange(len(labels))) % 5 == 4
    return _dataset(
        (images[~is_test], labels[~is_test]),
        (images[is_test], labels[is_test]),
        [str(name) for name in digits.target_names],
    )


def _damaged(path: Path, found: str, expected: str) -> DataError:
    return DataError(
        f"{path}: found {found}, expected {expected}; the file is damaged, cut short "
        "or not the official one: delete it and get it again"
    )


def _in_range(labels: np.ndarray, num_classes: int, path: Path) -> np.ndarray:
    """The labels as ``int32``, checked."""
    if labels.size and labels.max() >= num_classes:
        at = int(labels.argmax())
        raise _damaged(
            path, f"label {labels[at]} in record {at}", f"labels 0 to {num_classes - 1}"
        )
    return labels.astype(np.int32)


def _open(path: Path):
    """Opens a file, through gzip if it is compressed, whatever its name says."""
    # Some browsers decompress a download and leave the name ending in .gz.
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


# What reading a damaged gzip or tar file raises.
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)


class _Cifar(NamedTuple):
    """Layout of a binary CIFAR: label bytes, then 3 x 32 x 32 pixels, per record."""

    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last one is the fine label
    num_classes: int


_CIFAR = {
    "cifar10": _Cifar(
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": _Cifar(
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        label_bytes=2,
        num_classes=100,
    ),
}
_PIXELS = 3 * 32 * 32
# The class names of both sets take less than a kilobyte.
_NAMES_LIMIT = 65_536


def _check_size(path: Path, size: int, expected: int | None) -> None:
    """The exact size of a file of records; a bound for the names (``None``)."""
    if expected is None:
        if size > _NAMES_LIMIT:
            raise _damaged(path, f"{size:,} bytes", f"at most {_NAMES_LIMIT:,}")
    elif size != expected:
        raise _damaged(path, f"{size:,} bytes", f"{expected:,} bytes")


def _from_folder(folder: Path, sizes: Mapping[str, int | None]):
    """The files of an unpacked archive as arrays of bytes."""
    files = {}
    for name, expected in sizes.items():
        path = folder / name
        if not path.is_file():
            raise DataError(
                f"{path} is missing; unpack the archive again, or delete the folder "
                "and put the archive itself in its place"
            )
        _check_size(path, path.stat().st_size, expected)
        files[name] = np.fromfile(path, np.uint8)
    return files


def _from_archive(archive: Path, sizes: Mapping[str, int | None]):
    """The wanted members of an archive as arrays of bytes, read in memory."""
    files = {}
    try:
        # Member by member in the order they lie: nothing is decompressed twice.
        with _open(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in sizes:
                    _check_size(archive / name, member.size, sizes[name])
                    files[name] = np.frombuffer(tar.extractfile(member).read(), "u1")
            # gzip compares its checksum at the very end.
            while file.read(1 << 20):
                pass
    except _BROKEN as error:
        size = f"{archive.stat().st_size:,} bytes"
        raise _damaged(archive, f"{size} ({error})", "a whole .tar.gz") from error
    if missing := [name for name in sizes if name not in files]:
        raise _damaged(archive, f"no {', '.join(missing)}", "the official archive")
    return files


def _read_cifar(name: str, path: Path) -> Dataset:
    """CIFAR from its folder or its archive."""
    layout, counts = _CIFAR[name], RECORDS[name]
    length = layout.label_bytes + _PIXELS
    sizes: dict[str, int | None] = dict.fromkeys(layout.train, counts[0] * length)
    sizes |= {layout.test: counts[1] * length, layout.names: None}
    files = (_from_folder if path.is_dir() else _from_archive)(path, sizes)

    def read(parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        records = {part: files[part].reshape(-1, length) for part in parts}
        labels = [
            _in_range(r[:, layout.label_bytes - 1], layout.num_classes, path / part)
            for part, r in records.items()
        ]
        return _channels_last(list(records.values())), np.concatenate(labels)

    class_names = bytes(files[layout.names]).decode("utf-8", "replace").split()
    if len(class_names) != layout.num_classes:
        raise _damaged(
            path / layout.names, f"{len(class_names)} names", f"{layout.num_classes}"
        )
    return _dataset(read(layout.train), read([layout.test]), class_names)


def _channels_last(records: Sequence[np.ndarray]) -> np.ndarray:
    """``[n, ... 3 * 32 * 32]`` records to images ``[n, 32, 32, 3]``."""
    images = np.empty((sum(map(len, records)), 32 * 32, 3), np.uint8)
    start = 0
    # By channel and a few images at a time: 0.1 s for CIFAR, where transposing the
    # whole array takes 0.5 s.
    for file in records:
        for i in range(0, len(file), 500):
            pixels = file[i : i + 500, -_PIXELS:].reshape(-1, 3, 32 * 32)
            for c in range(3):
                images[start : start + len(pixels), :, c] = pixels[:, c]
            start += len(pixels)
    return images.reshape(-1, 32, 32, 3)


_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# MNIST and Fashion-MNIST publish files of the same names and sizes, so that one is
# easily read as the other.  The first training labels tell them apart.
FIRST_LABELS = {
    "mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4),
    "fashion_mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5),
}


def _idx_header(header: bytes) -> str:
    magic, *shape = np.frombuffer(header, ">u4").tolist()
    return f"magic 0x{magic:08x} and shape {shape}"


def _read_idx(stem: Path, shape: tuple[int, ...]) -> tuple[Path, np.ndarray]:
    """An IDX file of bytes, ``stem`` or ``stem.gz``, and the path it was read from."""
    paths = [stem, stem.with_name(f"{stem.name}.gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"{stem} and {stem}.gz are missing; the files belong together")
    # Big-endian: 0x08 (unsigned bytes) and the number of axes, the length of each.
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()
    size = len(header) + int(np.prod(shape))
    try:
        with _open(path) as file:
            # One byte more than expected also makes gzip compare its checksum.
            content = file.read(size + 1)
    except _BROKEN as error:
        found = f"{path.stat().st_size:,} bytes ({error})"
        raise _damaged(path, found, "a whole .gz") from error
    if len(content) >= len(header) and not content.startswith(header):
        raise _damaged(path, _idx_header(content[: len(header)]), _idx_header(header))
    if len(content) != size:
        found = "more" if len(content) > size else f"{len(content):,} bytes"
        raise _damaged(path, found, f"{size:,} bytes uncompressed")
    pixels = np.frombuffer(content, np.uint8, offset=len(header))
    return path, pixels.reshape(shape).copy()  # writeable, as the others


def _read_mnist(name: str, class_names: tuple[str, ...], path: Path) -> Dataset:
    """The four IDX files beside ``path``."""

    def read(prefix: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        images = path.parent / f"{prefix}-images-idx3-ubyte"
        labels = path.parent / f"{prefix}-labels-idx1-ubyte"
        _, pixels = _read_idx(images, (count, 28, 28))
        file, values = _read_idx(labels, (count,))
        return pixels[..., None], _in_range(values, len(class_names), file)

    train_count, test_count = RECORDS[name]
    train = read("train", train_count)
    first = tuple(train[1][: len(FIRST_LABELS[name])].tolist())
    if first != FIRST_LABELS[name][: len(first)]:
        is_of = [other for other, labels in FIRST_LABELS.items() if first == labels]
        raise DataError(
            f"{path.parent} holds {is_of[0] if is_of else 'other files'}, not {name}, "
            f"under the same file names (first training labels {first}, expected "
            f"{FIRST_LABELS[name]}); put the files of {name} into a folder {name}/"
        )
    return _dataset(train, read("t10k", test_count), class_names)


def _idx_places(*folders: str) -> tuple[str, ...]:
    """The file by which each folder is recognised, unpacked or not."""
    stem = "train-images-idx3-ubyte"
    return tuple(f"{f}{stem}{end}" for f in folders for end in ("", ".gz"))


class Source(NamedTuple):
    """A row of ``DATASETS``.

    Attributes:
      title: name for tables.
      places: paths below a data folder, in the order tried; empty if the data set
        needs no file.
      read: reads the data set from the first of ``places`` that exists.
      get: one line telling how to get the files.
    """

    title: str
    places: tuple[str, ...]
    read: Callable[..., Dataset]
    get: str


DATASETS: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source(
            title="Digits",
            places=(),
            read=_read_digits,
            get="pip install scikit-learn",
        ),
        "cifar10": Source(
            title="CIFAR-10",
            places=("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
            read=partial(_read_cifar, "cifar10"),
            get="put cifar-10-binary.tar.gz (the binary version, no need to unpack) "
            "from https://www.cs.toronto.edu/~kriz/cifar.html into a folder above",
        ),
        "cifar100": Source(
            title="CIFAR-100",
            places=("cifar-100-binary", "cifar-100-binary.tar.gz"),
            read=partial(_read_cifar, "cifar100"),
            get="put cifar-100-binary.tar.gz (the binary version, no need to unpack) "
            "from https://www.cs.toronto.edu/~kriz/cifar.html into a folder above",
        ),
        "mnist": Source(
            title="MNIST",
            places=_idx_places("mnist/", "MNIST/raw/", ""),
            read=partial(_read_mnist, "mnist", _DIGITS),
            get="put the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz "
            "from https://ossci-datasets.s3.amazonaws.com/mnist/ into mnist/ of a "
            "folder above",
        ),
        "fashion_mnist": Source(
            title="Fashion-MNIST",
            places=_idx_places("fashion_mnist/", "FashionMNIST/raw/"),
            read=partial(_read_mnist, "fashion_mnist", _FASHION),
            get="put the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz "
            "from https://github.com/zalandoresearch/fashion-mnist into "
            "fashion_mnist/ of a folder above",
        ),
    }
)
