"""Finds and loads image data sets by name.

``digits`` comes with scikit-learn and needs no file.  The other named sets are read
from the files that their authors publish, and ``folder`` from ``train/<class>/`` and
``test/<class>/``.  Any other name is the name of an image classification set of
TensorFlow Datasets (TFDS).  Loading downloads nothing; ``kddm prepare NAME`` downloads
and prepares a TFDS set.  These folders are searched:

1. ``data_dir`` if given,
2. else ``$KDDM_DATA_DIR`` if set,
3. else ``./data`` and then ``~/.cache/kddm_jax``.

Without ``data_dir``, sets prepared by TFDS are then searched in ``$TFDS_DATA_DIR`` and
``~/tensorflow_datasets``.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from kddm_jax.data import prepared
from kddm_jax.data.archives import (
    find_python_version,
    how_to_get_cifar,
    idx_places,
    read_cifar,
    read_mnist,
    read_svhn,
)
from kddm_jax.data.dataset import DataError, Dataset, Options, make_dataset
from kddm_jax.data.folder import find_flat, read_folder
from kddm_jax.data.images import resized
from kddm_jax.data.sampling import ranks
from kddm_jax.extras import extra


def _folders(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Lists the folders to search, in order."""
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    if os.environ.get("KDDM_DATA_DIR"):
        return [Path(os.environ["KDDM_DATA_DIR"]).expanduser()]
    return [Path("data"), Path("~/.cache/kddm_jax").expanduser()]


def _missing(
    name: str, folders: Sequence[Path], tfds_folders: Sequence[Path]
) -> DataError:
    """Makes the error for missing files, with the searched folders and the remedies."""
    source = DATASETS[name]
    show = lambda f: f"{f.absolute()}{'' if f.is_dir() else ' (no such folder)'}"
    looked = f"They were searched for {', '.join(source.places)}"
    ways = [
        '--dataset digits, or load("digits"): real images, needs no file',
        source.get,
        "another folder: data_dir=..., or the variable KDDM_DATA_DIR",
    ]
    if source.tfds:
        others = ", ".join(show(f) for f in tfds_folders if f not in folders)
        looked += f", and for {source.tfds} as prepared by TFDS"
        looked += f", which may also be in {others}" if others else ""
        ways.append(
            f"kddm prepare {name} --data-dir {shlex.quote(str(folders[0]))} "
            f"downloads and prepares it by TFDS, after {prepared.INSTALL}"
        )
    return DataError(
        "\n".join(
            [
                f"{name} was not found. These folders were searched, in this order:",
                *[f"  {show(folder)}" for folder in folders],
                f"{looked}.",
                "What you can do:",
                *[f"  {way}" for way in ways],
            ]
        )
    )


def _unknown(name: str, folders: Sequence[Path]) -> DataError:
    return DataError(
        f"unknown data set {name!r}; known: {', '.join(DATASETS)}, or a set prepared "
        f"by TFDS: none of that name in {', '.join(map(str, folders))}; "
        "kddm prepare NAME prepares one"
    )


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    skip_damaged: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Loads a data set by its name.

    Official files are read into memory.  Images of ``folder`` and of sets prepared by
    TFDS are decoded once into a cache and memory-mapped.

    Args:
      name: a key of ``DATASETS``, or the name of a set prepared by TFDS: ``name``,
        ``name/config``, ``name:version``.  Official files are tried first.
      data_dir: folder with the data.  By default ``$KDDM_DATA_DIR``, or if that is
        not set ``./data`` and then ``~/.cache/kddm_jax``; for prepared sets then
        ``$TFDS_DATA_DIR`` and ``~/tensorflow_datasets``.
      image_size: side in pixels to which the middle square of every image is resized;
        with None images are kept and must have one size.
      skip_damaged: whether to leave out files that cannot be read or decoded, with a
        warning that lists them, instead of raising an error.
      progress: function that is called with the number of decoded images and the number
        of all images; by default a bar is shown on a terminal.

    Returns:
      The data set, with mean and standard deviation of its training images.

    Raises:
      DataError: the name is unknown, the files are not found (the message lists the
        searched folders and how to get the files), a file is damaged or truncated,
        images differ in size, or the set's format needs TensorFlow, which is not
        installed.

    Examples:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.test_images.shape
      ((1442, 8, 8, 1), (355, 8, 8, 1))
      >>> digits.mean, digits.std
      ((0.305,), (0.376,))
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    options = Options(image_size, skip_damaged, progress)
    source, folders = DATASETS.get(name), _folders(data_dir)
    if source is not None:
        if not source.places:
            return source.read(None, options)
        for folder in folders:
            for place in source.places:
                if (folder / place).exists():
                    return source.read(folder / place, options)
    tfds_folders = [*folders, *(() if data_dir else prepared.default_folders())]
    tfds_name = source.tfds if source else name
    if tfds_name and (found := prepared.find(tfds_name, tfds_folders)):
        return prepared.read_prepared(found, options)
    if source is None:
        raise _unknown(name, tfds_folders)
    if found := find_python_version(name, folders):
        raise found
    if name == "folder" and (found := find_flat(folders)):
        raise found
    raise _missing(name, folders, tfds_folders)


def _read_digits(_: None) -> Dataset:
    """Reads the digits; every fifth image of each class is a test image."""
    with extra("kddm_jax.data"):  # imported here: it takes a second
        from sklearn.datasets import load_digits

    digits: Any = load_digits()  # a Bunch, which declares no attributes
    levels = np.asarray(digits.images)[..., None]  # 0, ..., 16
    images = np.round(levels * (255 / 16)).astype(np.uint8)
    labels = np.asarray(digits.target).astype(np.int32)
    # The split follows a rule, so that no change of a random generator alters it.
    is_test = ranks(labels, np.arange(len(labels))) % 5 == 4
    return make_dataset(
        (images[~is_test], labels[~is_test]),
        (images[is_test], labels[is_test]),
        [str(name) for name in digits.target_names],
    )


class Source(NamedTuple):
    """Describes an entry of ``DATASETS``.

    Attributes:
      title: name for tables.
      places: paths below a data folder, in the order tried; empty if the data set
        needs no file.
      read: function that reads the data set from the first of ``places`` that exists
        (None if there are no places) with ``Options``.
      get: a line that explains how to get the files.
      tfds: name of the set in TFDS, None if TFDS has no such set.
    """

    title: str
    places: tuple[str, ...]
    read: Callable[..., Dataset]
    get: str
    tfds: str | None = None


def _official(read: Callable[..., Dataset]):
    """Makes a reader that resizes the images of official files."""
    return lambda path, options: resized(read(path), options.image_size)


_SVHN = Source(
    title="SVHN",
    places=tuple(f"{f}train_32x32.mat" for f in ("svhn/", "SVHN/", "")),
    read=_official(read_svhn),
    get="put train_32x32.mat and test_32x32.mat from "
    "http://ufldl.stanford.edu/housenumbers/ into a folder above",
    tfds="svhn_cropped",
)
DATASETS: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source(
            title="Digits",
            places=(),
            read=_official(_read_digits),
            get="pip install scikit-learn",
        ),
        "cifar10": Source(
            title="CIFAR-10",
            places=("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
            read=_official(partial(read_cifar, "cifar10")),
            get=how_to_get_cifar("cifar10"),
            tfds="cifar10",
        ),
        "cifar100": Source(
            title="CIFAR-100",
            places=("cifar-100-binary", "cifar-100-binary.tar.gz"),
            read=_official(partial(read_cifar, "cifar100")),
            get=how_to_get_cifar("cifar100"),
            tfds="cifar100",
        ),
        "svhn": _SVHN,
        "svhn_cropped": _SVHN,
        "mnist": Source(
            title="MNIST",
            places=idx_places("mnist/", "MNIST/raw/", ""),
            read=_official(partial(read_mnist, "mnist")),
            get="put the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz "
            "from https://ossci-datasets.s3.amazonaws.com/mnist/ into mnist/ of a "
            "folder above",
            tfds="mnist",
        ),
        "fashion_mnist": Source(
            title="Fashion-MNIST",
            places=idx_places("fashion_mnist/", "FashionMNIST/raw/"),
            read=_official(partial(read_mnist, "fashion_mnist")),
            get="put the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz "
            "from https://github.com/zalandoresearch/fashion-mnist into "
            "fashion_mnist/ of a folder above",
            tfds="fashion_mnist",
        ),
        "folder": Source(
            title="Folder",
            places=("train",),
            read=read_folder,
            get="put images (jpg, png, webp, tif, ...) into train/<class>/ and "
            "test/<class>/ of a folder above",
        ),
    }
)


def main(arguments: Sequence[str]) -> int:
    """Downloads and prepares a TFDS set, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="kddm prepare",
        description="Downloads a set of TensorFlow Datasets and prepares it as "
        "ArrayRecord, which is read without TensorFlow afterwards. Preparing needs "
        f"TensorFlow: {prepared.INSTALL}",
    )
    parser.add_argument("name", help="cifar10, svhn_cropped, name/config, ...")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where to put it; by default $TFDS_DATA_DIR or ~/tensorflow_datasets",
    )
    given = parser.parse_args(arguments)
    source = DATASETS.get(given.name)
    try:
        name = given.name if source is None else source.tfds
        if name is None:
            raise DataError(f"{given.name} is no TFDS set and needs no preparation")
        folder = prepared.prepare(name, given.data_dir)
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{name} is prepared in {folder}\n")
    return 0
