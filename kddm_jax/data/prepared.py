"""Reads sets that TensorFlow Datasets (TFDS) has prepared, and prepares them.

TFDS reads sets in ArrayRecord format without TensorFlow, with the parts of
``tfds.data_source``; its default, TFRecord, needs TensorFlow.  Images are read encoded
and are decoded once into a cache, like images of a folder.  ``prepare`` downloads and
prepares a set, for which TFDS needs TensorFlow.
"""

import contextlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kddm_jax.data.cache import Writer, cached, key_of, list_files
from kddm_jax.data.dataset import DataError, Dataset, Options
from kddm_jax.data.images import Encoded, Split, write_images
from kddm_jax.extras import extra

# "name", "name/config", "name:1.0.0" or "name/config:1.0.0".
_NAME = re.compile(r"([a-z]\w*)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_PIECE = 256  # number of records read at a time
_FREE = {"array_record", "parquet"}  # formats that TFDS reads without TensorFlow
INSTALL = 'pip install "kddm-jax[prepare]"'


class Prepared(NamedTuple):
    """Contains the data folder of a prepared set, and the set's path within it."""

    root: Path
    path: str


def default_folders() -> list[Path]:
    """Lists the folders that TFDS itself searches."""
    variable = os.environ.get("TFDS_DATA_DIR")
    folders = [variable] if variable else []
    return [Path(f).expanduser() for f in (*folders, "~/tensorflow_datasets")]


def _versions(folder: Path) -> list[str]:
    """Lists the versions prepared in a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [
        path.parent.name
        for path in folder.glob("*/features.json")
        if _VERSION.fullmatch(path.parent.name)
        and (path.parent / "dataset_info.json").is_file()
    ]
    return sorted(found, key=lambda v: [int(n) for n in v.split(".")], reverse=True)


def _default_config(folder: Path) -> str | None:
    """Returns the prepared config that is used for a name without a config."""
    configs = sorted(path.name for path in folder.glob("*") if _versions(path))
    with contextlib.suppress(OSError, ValueError, KeyError):
        text = (folder / ".config" / "metadata.json").read_text()
        default = json.loads(text)["default_config_name"]
        configs = [default] if default in configs else configs
    if len(configs) > 1:
        names = " or ".join(f"{folder.name}/{config}" for config in configs)
        raise DataError(f"{folder} has several configs; name one: {names}")
    return configs[0] if configs else None


def find(name: str, folders: Sequence[Path]) -> Prepared | None:
    """Finds a prepared set.

    Args:
      name: ``name``, ``name/config``, ``name:version`` or ``name/config:version``;
        by default TFDS' default config and the newest version.
      folders: data folders, in order.

    Returns:
      The set, or None if it is in none of the folders.

    Raises:
      DataError: the set has several configs and none is named.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    base, config, version = match.groups()
    for root in folders:
        path = base
        if config or (not _versions(root / base) and (root / base).is_dir()):
            path = f"{base}/{config or _default_config(root / base)}"
        versions = _versions(root / path)
        if versions and version in (None, *versions):
            return Prepared(root, f"{path}/{version or versions[0]}")
    return None


def _import_tfds():
    """Imports TFDS, which takes half a second and does not import TensorFlow."""
    # Silences messages of TensorFlow's C++ code, which every import prints.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with extra("kddm_jax.data"):
        import tensorflow_datasets as tfds

    return tfds


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


class _Source(NamedTuple):
    """Contains an opened set.

    Attributes:
      tfds: the library.
      builder: TFDS builder that reads the set.
      folder: folder of the set's files.
      image: name of the feature with the image.
      label: name of the feature with the class.
    """

    tfds: Any
    builder: Any
    folder: Path
    image: str
    label: str

    def formats(self) -> set[str]:
        """Returns the file formats that the set is prepared in."""
        return {f.value for f in self.builder.info.available_file_formats()}

    def decoders(self) -> dict[str, object]:
        """Returns decoders that keep images encoded, because Pillow decodes them."""
        features, image = self.builder.info.features, self.tfds.features.Image
        skip = self.tfds.decode.SkipDecoding
        return {k: skip() for k, f in features.items() if isinstance(f, image)}


def _image_and_label(tfds, info) -> tuple[str, str]:
    """Finds the names of the features with the image and its class."""

    def find_one(kind):
        names = [name for name, f in info.features.items() if isinstance(f, kind)]
        # CIFAR-100 has two labels; its supervised keys contain the one to use.
        meant = [name for name in names if name in (info.supervised_keys or ())]
        return meant or names

    images, labels = find_one(tfds.features.Image), find_one(tfds.features.ClassLabel)
    # TFDS stores an image of floats as an image with four channels of bytes.
    pixels = [name for name in images if info.features[name].np_dtype != np.float32]
    if len(pixels) != 1 or len(labels) != 1:
        kinds = sorted(info.features.items())
        found = [f"{name} ({type(feature).__name__})" for name, feature in kinds]
        raise ValueError(
            "no image classification: needs one image (of integers) and one class "
            f"label, found {', '.join(found)}"
        )
    return pixels[0], labels[0]


def _open(folder: Path) -> _Source:
    tfds = _import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        image, label = _image_and_label(tfds, builder.info)
    except Exception as error:  # errors of JSON, protocol buffers, the set's features
        raise _unreadable(folder, error) from error
    source = _Source(tfds, builder, folder, image, label)
    if not source.formats() & _FREE and not _has_tensorflow():
        raise DataError(
            f"{folder} is prepared as {', '.join(sorted(source.formats()))}, which "
            f"only TensorFlow reads: {INSTALL}"
        )
    return source


def _unreadable(what: object, error: Exception) -> DataError:
    # TensorFlow's messages begin with the name of the operation in braces.
    reason = " ".join(re.sub(r"\{\{.*?\}\}", "", str(error)).split())
    return DataError(f"cannot read {what}: {reason}")


def _array_records(source, split) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split, without TensorFlow."""
    records = source.builder.as_data_source(split, decoders=source.decoders())
    for start in range(0, len(records), _PIECE):
        piece = range(start, min(start + _PIECE, len(records)))
        yield from records.__getitems__(list(piece))


def _tf_records(source, split) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split with TensorFlow, in the order of the files."""
    import tensorflow as tf  # pyright: ignore[reportMissingModuleSource]

    with contextlib.suppress(RuntimeError):  # TensorFlow is running already
        tf.config.set_visible_devices([], "GPU")  # JAX uses them
    in_order = source.tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    examples = source.builder.as_dataset(
        split, decoders=source.decoders(), read_config=in_order
    )
    yield from source.tfds.as_numpy(examples)


def _examples(source: _Source, split: str) -> Iterator[Encoded]:
    """Yields the encoded images of a split."""
    read = _array_records if source.formats() & _FREE else _tf_records
    try:
        for i, example in enumerate(read(source, split)):
            name = f"{source.folder} {split}[{i}]"
            yield Encoded(name, example[source.image], int(example[source.label]))
    except Exception as error:  # errors of ArrayRecord, TensorFlow, buffers
        raise _unreadable(f"split {split} of {source.folder}", error) from error


def _share(
    source: _Source, split: str, ranks: Collection[int] = range(5)
) -> Iterator[Encoded]:
    """Yields, of every five examples of a class, those with these ranks."""
    seen = Counter()
    for example in _examples(source, split):
        if example.label < 0:
            raise DataError(f"{example.name} has no label; the set cannot be used")
        if seen[example.label] % 5 in ranks:
            yield example
        seen[example.label] += 1


def _splits(source: _Source) -> dict[str, Split]:
    """Returns training and test examples, both from "train" if there is no other."""
    counts = {k: s.num_examples for k, s in source.builder.info.splits.items()}
    if not counts.get("train"):
        found = ", ".join(counts)
        raise DataError(f"{source.folder} has no split train, only {found}")
    train, share = counts["train"], partial(_share, source)
    for name in _TEST_SPLITS:
        # ImageNet's test split has no labels; they are -1.
        if counts.get(name) and next(_examples(source, name)).label >= 0:
            test = Split(counts[name], partial(share, name))
            return {"train": Split(train, partial(share, "train")), "test": test}
    return {
        "train": Split(train - train // 5, partial(share, "train", range(4))),
        "test": Split(train // 5, partial(share, "train", (4,))),
    }


def read_prepared(found: Prepared, options: Options) -> Dataset:
    """Reads a prepared set.

    Training images are the split "train".  Test images are the first of the splits
    "test" and "validation" that has labels; if there is none, every fifth training
    image of each class is a test image.

    Args:
      found: the set, from `find`.
      options: options of the reader.

    Returns:
      The data set; its images are memory maps.

    Raises:
      DataError: the set has no images or no labels, is damaged, or is in a format that
        needs TensorFlow, which is not installed.
    """
    folder = found.root / found.path
    files = sorted(path for path in folder.iterdir() if path.is_file())
    listing = list_files((path.name, path.stat()) for path in files)

    def build(writer: Writer):
        source = _open(folder)
        features = source.builder.info.features
        grey = features[source.image].shape[-1] != 3
        left_out = write_images(
            writer, _splits(source), options, channels=(1, 3) if grey else (3,)
        )
        return features[source.label].names, left_out

    return cached(key_of(found.path, found.root, listing, options), build)


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Downloads a set and prepares it as ArrayRecord, with TFDS' progress bars.

    Args:
      name: name of the set, as in `find`.
      data_dir: data folder; None uses TFDS' own, ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``.

    Returns:
      The folder of the prepared set.

    Raises:
      DataError: TensorFlow is not installed, or the set is unknown to TFDS or cannot be
        downloaded or prepared.
    """
    if not _has_tensorflow():
        raise DataError(f"preparing {name} needs TensorFlow: {INSTALL}")
    tfds = _import_tfds()
    root = Path(data_dir).expanduser() if data_dir else default_folders()[0]
    try:
        builder = tfds.builder(name, data_dir=root)
        if not builder.is_prepared():  # else it may be prepared in another format
            builder = tfds.builder(name, data_dir=root, file_format="array_record")
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"TFDS knows no set {name!r}; tfds.list_builders() lists those it knows"
        ) from error
    except Exception as error:  # errors of the network, archives, the set's code
        what = " ".join(str(error).split())
        raise DataError(f"cannot prepare {name}: {what}") from error
    return Path(builder.data_dir)
