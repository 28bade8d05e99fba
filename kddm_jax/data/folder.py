"""Reads images from ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``.

Images are decoded once (`kddm_jax.data.images`) into a cache (`kddm_jax.data.cache`):
60,000 small images take ten seconds the first time and a fraction of one afterwards.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kddm_jax.data.cache import Writer, cached, key_of, list_files
from kddm_jax.data.dataset import DataError, Dataset, Options
from kddm_jax.data.images import Encoded, Split, write_images

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# These are images, too: leaving them out silently would make a smaller data set.
_OTHER_ENDINGS = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic")


def _entries(folder):
    """Lists the entries of a folder by name, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    return sorted(visible, key=lambda entry: entry.name)


def _classes(folder):
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _test_folder(where):
    for name in ("test", "val"):
        if (where / name).is_dir():
            return where / name
    raise DataError(
        f"{where} has train/ and neither test/ nor val/; put the images to test on "
        "into test/<class>/"
    )


def _check_classes(train, test) -> list[str]:
    """Returns the sorted class names, which must be the same in both folders."""
    names, others = _classes(train), _classes(test)
    if not names:
        raise DataError(f"{train} has no folders; put images into {train}/<class>/")
    if odd := sorted({*names} ^ {*others}):
        has, lacks = (train, test) if odd[0] in names else (test, train)
        raise DataError(
            f"{lacks} has no class {odd[0]!r}, which {has} has; the folders of both "
            "must have the same names"
        )
    return names


def _stat(entry):
    try:
        return entry.stat()
    except OSError as error:  # a link to nowhere
        raise DataError(f"{entry.path}: {error.strerror}") from error


def _scan(
    split: Path, classes: Sequence[str]
) -> Iterator[tuple[str, int, os.stat_result]]:
    """Yields path below the data folder, label and status of each image of a split."""
    for label, name in enumerate(classes):
        found = False
        for entry in _entries(split / name):
            ending = os.path.splitext(entry.name)[1].lower()
            if ending in _OTHER_ENDINGS:
                raise DataError(
                    f"{entry.path}: cannot read {ending}; convert it to one of "
                    f"{', '.join(ENDINGS)}"
                )
            if ending in ENDINGS:
                found = True
                yield f"{split.name}/{name}/{entry.name}", label, _stat(entry)
        if not found:
            raise DataError(
                f"{split / name} holds no images ({', '.join(ENDINGS)}); put them "
                "right into it, or remove it from train/ and test/"
            )


def read_folder(train: Path, options: Options) -> Dataset:
    """Reads ``train`` and the folder ``test`` or ``val`` next to it.

    Args:
      train: the folder of the training images' classes.
      options: size, damaged images, progress.

    Returns:
      The data set; its images are memory maps.

    Raises:
      DataError: the classes differ, an image is damaged, or the images differ in size
        and ``image_size`` is None.
    """
    where = train.parent
    folders = {"train": train, "test": _test_folder(where)}
    classes = _check_classes(*folders.values())
    found: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}

    def scan():
        for split, folder in folders.items():
            for name, label, stat in _scan(folder, classes):
                found[split].append((name, label))
                yield name, stat

    key = key_of("folder", where, list_files(scan()), options)

    def encoded(split):
        for name, label in found[split]:
            yield Encoded(str(where / name), where / name, label)

    def build(writer: Writer):
        splits = {
            split: Split(len(images), lambda split=split: encoded(split))
            for split, images in found.items()
        }
        return classes, write_images(writer, splits, options)

    return cached(key, build)
