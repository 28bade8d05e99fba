"""Reads data sets from the files that their authors publish: CIFAR, MNIST, SVHN.

Nothing is downloaded, unpickled or unpacked to disk.  The size of every file is checked
against the official one, so that a truncated file is an error rather than a smaller
data set.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kddm_jax.data.cache import keep
from kddm_jax.data.dataset import DataError, Dataset, damaged, make_dataset
from kddm_jax.extras import extra

# Images per training file and per test file, as published.
RECORDS = {
    "cifar10": (10_000, 10_000),
    "cifar100": (50_000, 10_000),
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
}


def _in_range(labels: np.ndarray, num_classes: int, path: Path) -> np.ndarray:
    """Checks the range of labels and returns them as ``int32``."""
    if labels.size and labels.max() >= num_classes:
        at = int(labels.argmax())
        raise damaged(
            path, f"label {labels[at]} in record {at}", f"labels 0 to {num_classes - 1}"
        )
    return labels.astype(np.int32)


def _open(path: Path):
    """Opens a file, through gzip if its content (not its name) is compressed."""
    # Some browsers decompress a download, but keep the ending .gz.
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


# Errors raised while a damaged gzip or tar file is read.
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)


class _Cifar(NamedTuple):
    """Describes a binary CIFAR, with records of label bytes and 3 x 32 x 32 pixels."""

    title: str
    archive: str
    python: tuple[str, ...]  # places of the version with pickles
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last one is the fine label
    num_classes: int


_CIFAR = {
    "cifar10": _Cifar(
        title="CIFAR-10",
        archive="cifar-10-binary.tar.gz",
        python=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": _Cifar(
        title="CIFAR-100",
        archive="cifar-100-binary.tar.gz",
        python=("cifar-100-python", "cifar-100-python.tar.gz", "meta"),
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
# An archive also contains names, headers, padding and a readme.
_BESIDE_LIMIT = 2**20


def how_to_get_cifar(name: str, where: object = "a folder above") -> str:
    """Describes how to get the binary version of CIFAR."""
    return (
        f"put {_CIFAR[name].archive} (the binary version, no need to unpack) from "
        f"https://www.cs.toronto.edu/~kriz/cifar.html into {where}"
    )


def find_python_version(name: str, folders: Sequence[Path]) -> DataError | None:
    """Makes the error for the Python version of CIFAR if it is in one of the folders.

    Args:
      name: name of any data set.
      folders: data folders, or the unpacked version itself.

    Returns:
      The error, or None if the version is in none of the folders.
    """
    if name not in _CIFAR:
        return None
    places = _CIFAR[name].python
    for folder in folders:
        for place in places:
            if (folder / place).exists():
                # The last place is a file of the unpacked version.
                itself = place == places[-1]
                return _python_version(name, folder if itself else folder / place)
    return None


def _python_version(name: str, path: Path) -> DataError:
    # Unpickling runs code, so it is not done.
    return DataError(
        f"{path} is the Python version of {_CIFAR[name].title}, whose pickles are not "
        f"read; {how_to_get_cifar(name, path.parent)}"
    )


def _check_size(path: Path, size: int, expected: int | None) -> None:
    """Checks the size of records exactly, or that of class names (None) by a bound."""
    if expected is None:
        if size > _NAMES_LIMIT:
            raise damaged(path, f"{size:,} bytes", f"at most {_NAMES_LIMIT:,}")
    elif size != expected:
        raise damaged(path, f"{size:,} bytes", f"{expected:,} bytes")


def _from_folder(dataset: str, folder: Path, sizes: Mapping[str, int | None]):
    """Reads the files of an unpacked archive as arrays of bytes."""
    files = {}
    for name, expected in sizes.items():
        path = folder / name
        if not path.is_file():
            if path.with_suffix("").is_file():
                raise _python_version(dataset, folder)
            raise DataError(
                f"{path} is missing; unpack the archive again, or delete the folder "
                "and put the archive itself in its place"
            )
        _check_size(path, path.stat().st_size, expected)
        files[name] = np.fromfile(path, np.uint8)
    return files


class _Bounded(io.RawIOBase):
    """Reads a file up to a limit, because a small gzip may inflate without end."""

    def __init__(self, file, limit: int):
        self._file, self._limit, self._left = file, limit, limit

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise tarfile.ReadError(f"inflates to more than {self._limit:,} bytes")
        return content


def _from_archive(dataset: str, archive: Path, sizes: Mapping[str, int | None]):
    """Reads members of an archive as arrays of bytes, in memory."""
    files, pickled = {}, {name.removesuffix(".bin") for name in sizes}
    limit = _BESIDE_LIMIT + sum(size or 0 for size in sizes.values())
    try:
        # Members are read in the archive's order, so nothing is decompressed twice.
        with (
            _open(archive) as whole,
            tarfile.open(fileobj=(file := _Bounded(whole, limit)), mode="r|") as tar,
        ):
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in pickled - {*sizes}:
                    raise _python_version(dataset, archive)
                if member.isreg() and name in sizes:
                    _check_size(archive / name, member.size, sizes[name])
                    content = tar.extractfile(member)
                    assert content is not None, "a regular file has content"
                    files[name] = np.frombuffer(content.read(), "u1")
            # gzip compares the checksum at the end of the file.
            while file.read(1 << 20):
                pass
    except _BROKEN as error:
        size = f"{archive.stat().st_size:,} bytes"
        raise damaged(archive, f"{size} ({error})", "a whole .tar.gz") from error
    if missing := [name for name in sizes if name not in files]:
        raise damaged(archive, f"no {', '.join(missing)}", "the official archive")
    return files


def read_cifar(name: str, path: Path) -> Dataset:
    """Reads CIFAR-10 or CIFAR-100 from its folder or its archive."""
    layout, counts = _CIFAR[name], RECORDS[name]
    length = layout.label_bytes + _PIXELS
    sizes: dict[str, int | None] = dict.fromkeys(layout.train, counts[0] * length)
    sizes |= {layout.test: counts[1] * length, layout.names: None}
    if path.is_dir():
        return _to_dataset(layout, path, _from_folder(name, path, sizes))
    read = lambda: _to_dataset(layout, path, _from_archive(name, path, sizes))
    return keep(name, [path], read)


def _to_dataset(layout: _Cifar, path: Path, files: Mapping[str, np.ndarray]) -> Dataset:
    """Makes a data set from CIFAR's records, and checks labels and class names."""
    length = layout.label_bytes + _PIXELS

    def read(parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        records = {part: files[part].reshape(-1, length) for part in parts}
        labels = [
            _in_range(r[:, layout.label_bytes - 1], layout.num_classes, path / part)
            for part, r in records.items()
        ]
        return _channels_last(list(records.values())), np.concatenate(labels)

    class_names = bytes(files[layout.names]).decode("utf-8", "replace").split()
    if len(class_names) != layout.num_classes:
        raise damaged(
            path / layout.names, f"{len(class_names)} names", f"{layout.num_classes}"
        )
    return make_dataset(read(layout.train), read([layout.test]), class_names)


def _channels_last(records: Sequence[np.ndarray]) -> np.ndarray:
    """Turns records ``[n, ... 3 * 32 * 32]`` into images ``[n, 32, 32, 3]``."""
    images = np.empty((sum(map(len, records)), 32 * 32, 3), np.uint8)
    start = 0
    # One channel of a few images at a time takes 0.1 s for CIFAR; transposing the whole
    # array takes 0.5 s.
    for file in records:
        for i in range(0, len(file), 500):
            pixels = file[i : i + 500, -_PIXELS:].reshape(-1, 3, 32 * 32)
            for c in range(3):
                images[start : start + len(pixels), :, c] = pixels[:, c]
            start += len(pixels)
    return images.reshape(-1, 32, 32, 3)


_DIGITS = tuple("0123456789")
_MNIST_CLASSES = {
    "mnist": _DIGITS,
    "fashion_mnist": (
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
    ),
}
# MNIST and Fashion-MNIST have files of the same names and sizes, so that one is easily
# read as the other.  The first training labels differ.
FIRST_LABELS = {
    "mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4),
    "fashion_mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5),
}


def _idx_header(header: bytes) -> str:
    magic, *shape = np.frombuffer(header, ">u4").tolist()
    return f"magic 0x{magic:08x} and shape {shape}"


def _read_idx(stem: Path, shape: tuple[int, ...]) -> tuple[Path, np.ndarray]:
    """Reads the IDX file ``stem`` or ``stem.gz``, and returns its path and array."""
    paths = [stem, stem.with_name(f"{stem.name}.gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"{stem} and {stem}.gz are missing; the files belong together")
    # Big-endian: 0x08 (unsigned bytes), the number of axes, and the length of each.
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()
    size = len(header) + int(np.prod(shape))
    try:
        with _open(path) as file:
            # One byte more than expected also makes gzip compare its checksum.
            content = file.read(size + 1)
    except _BROKEN as error:
        found = f"{path.stat().st_size:,} bytes ({error})"
        raise damaged(path, found, "a whole .gz") from error
    if len(content) >= len(header) and not content.startswith(header):
        raise damaged(path, _idx_header(content[: len(header)]), _idx_header(header))
    if len(content) != size:
        found = "more" if len(content) > size else f"{len(content):,} bytes"
        raise damaged(path, found, f"{size:,} bytes uncompressed")
    pixels = np.frombuffer(content, np.uint8, offset=len(header))
    return path, pixels.reshape(shape).copy()  # writeable, as from other readers


def read_mnist(name: str, path: Path) -> Dataset:
    """Reads MNIST or Fashion-MNIST from the four IDX files next to ``path``."""
    class_names = _MNIST_CLASSES[name]

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
    return make_dataset(train, read("t10k", test_count), class_names)


def idx_places(*folders: str) -> tuple[str, ...]:
    """Lists the file that identifies each folder, unpacked or not."""
    stem = "train-images-idx3-ubyte"
    return tuple(f"{f}{stem}{end}" for f in folders for end in ("", ".gz"))


_SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")


def _check_mat(path: Path, found: Mapping[str, tuple], count: int) -> None:
    """Checks the type and shape of both variables."""
    for variable, shape in (("X", (32, 32, 3, count)), ("y", (count, 1))):
        kind, size = found.get(variable, ("nothing", None))
        text = "nothing" if size is None else f"{kind} {list(size)}"
        if text != f"uint8 {list(shape)}":
            raise damaged(path, f"{variable} {text}", f"uint8 {list(shape)}")


def _read_mat(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads images and labels from one of SVHN's MATLAB files."""
    with extra("kddm_jax.data"):  # imported here: only SVHN needs it
        from scipy.io import loadmat, whosmat

    if not path.is_file():
        raise DataError(f"{path} is missing; the files belong together")
    try:
        # The headers are checked first, so that no other size is inflated.
        listed = {name: (kind, shape) for name, shape, kind in whosmat(path)}
        _check_mat(path, listed, count)
        content = loadmat(path, variable_names=["X", "y"])
    except DataError:
        raise
    # SciPy raises errors of zlib and its own, ValueError, TypeError, struct.error, ...
    except Exception as error:
        found = f"{path.stat().st_size:,} bytes ({str(error).strip()})"
        raise damaged(path, found, "a whole MATLAB 5 file") from error
    # The type of an array may differ from the one in its header.
    arrays = {name: content[name] for name in ("X", "y")}
    _check_mat(path, {k: (a.dtype, a.shape) for k, a in arrays.items()}, count)
    labels = content["y"][:, 0]
    if labels.min() < 1 or labels.max() > 10:
        at = int(np.flatnonzero((labels < 1) | (labels > 10))[0])
        raise damaged(path, f"label {labels[at]} in record {at}", "labels 1 to 10")
    images = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(0, count, 500):  # as in _channels_last
        images[i : i + 500] = content["X"][..., i : i + 500].transpose(3, 0, 1, 2)
    return images, (labels % 10).astype(np.int32)  # label 10 is the digit 0


def read_svhn(train: Path) -> Dataset:
    """Reads SVHN from both MATLAB files; ``train`` is the path of the first."""
    files = [train.with_name(name) for name in _SVHN_FILES]

    def read() -> Dataset:
        training, test = map(_read_mat, files, RECORDS["svhn"])
        return make_dataset(training, test, _DIGITS)

    return keep("svhn", [file for file in files if file.is_file()], read)
