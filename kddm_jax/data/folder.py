"""Reads images from ``train/<class>/`` and ``test/<class>/`` or ``val/<class>/``.

Folders within the folder of a class belong to the class.  All files that Pillow can
read are read.  Hidden files, text and tables (`COMPANIONS`) are ignored; any other file
is an error, or with ``skip_damaged`` is left out with a warning.  Images are decoded
once (`kddm_jax.data.images`) into a cache (`kddm_jax.data.cache`): 60,000 small images
take ten seconds the first time and a fraction of a second afterwards.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kddm_jax.data.cache import Writer, cached, key_of, list_files
from kddm_jax.data.dataset import DataError, Dataset, Options
from kddm_jax.data.images import Encoded, Split, endings, write_images

# Files that often accompany images.  Any other file is reported, because it may be an
# image, and ignoring it silently would make a smaller data set.
COMPANIONS = frozenset(
    (
        *(".txt", ".md", ".rst", ".json", ".xml", ".csv", ".tsv", ".yaml", ".yml"),
        *(".html", ".htm", ".ini", ".log", ".py", ".db"),
    )
)


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


def _has_images(folder):
    read = endings()
    return any(_ending(entry.name) in read for entry in _entries(folder))


def find_flat(folders: Sequence[Path]) -> DataError | None:
    """Makes the error for folders of classes that are not in ``train/`` and ``test/``.

    Args:
      folders: data folders without ``train/``.

    Returns:
      The error, or None if no folder has folders with images.
    """
    for where in filter(Path.is_dir, folders):
        if names := [name for name in _classes(where) if _has_images(where / name)]:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            return DataError(
                f"found class folders {some} in {where}, but no train/; move the "
                "images to train/<class>/ and test/<class>/"
            )
    return None


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
    except OSError as error:  # a broken link
        raise DataError(f"{entry.path}: {error.strerror}") from error


def _files(folder: Path, name: str, above: tuple = ()):
    """Yields name and entry of each file of a folder, then of the folders within it."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise DataError(f"{folder}: a link leads back to a folder around it; remove it")
    entries = _entries(folder)
    for entry in entries:
        if not entry.is_dir():
            yield f"{name}/{entry.name}", entry
    for entry in entries:
        if entry.is_dir():
            yield from _files(
                folder / entry.name, f"{name}/{entry.name}", (*above, here)
            )


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class _Listing(NamedTuple):
    """Contains the files of both splits, by their names below the data folder.

    Attributes:
      images: names and labels of the images of each split.
      unread: names of files that Pillow cannot read.
      outside: names of files outside the folders of classes.
    """

    images: dict[str, list[tuple[str, int]]]
    unread: list[str]
    outside: list[str]

    def scan(
        self, folders: Mapping[str, Path], classes: Sequence[str]
    ) -> Iterator[tuple[str, os.stat_result]]:
        """Fills the lists, and yields the names and stats that identify the listing."""
        read = endings()
        for split, folder in folders.items():
            for entry in _entries(folder):
                if not entry.is_dir() and _ending(entry.name) not in COMPANIONS:
                    self.outside.append(f"{folder.name}/{entry.name}")
                    yield f"outside: {self.outside[-1]}", _stat(entry)
            for label, name in enumerate(classes):
                for path, entry in _files(folder / name, f"{folder.name}/{name}"):
                    ending = _ending(entry.name)
                    if ending in read:
                        self.images[split].append((path, label))
                        yield path, _stat(entry)
                    elif ending not in COMPANIONS:
                        self.unread.append(path)
                        yield f"unread: {path}", _stat(entry)

    def check(self, where: Path, skip: bool) -> None:
        """Raises an error for files that would be left out, unless ``skip`` is True."""
        leave = "or leave such files out with skip_damaged=True (--skip-damaged)"
        if self.unread and not skip:
            kinds = sorted({_ending(name) or "no ending" for name in self.unread})
            raise DataError(
                f"{_first(where, self.unread)}: cannot be read ({', '.join(kinds)}); "
                f"convert images to .png, {leave}"
            )
        if self.outside and not skip:
            raise DataError(
                f"{_first(where, self.outside)}: in the folder of no class; move it "
                f"into one, {leave}"
            )


def _first(where: Path, names: Sequence[str]) -> str:
    others = len(names) - 1
    more = f" and {others} more file{'s' * (others > 1)}" if others else ""
    return f"{where / names[0]}{more}"


def _check_full(listing: _Listing, folders: Mapping[str, Path], classes) -> None:
    """Checks that every class has images in both splits."""
    for split, folder in folders.items():
        full = {label for _, label in listing.images[split]}
        for label, name in enumerate(classes):
            if label not in full:
                raise DataError(
                    f"{folder / name} holds no images (.jpg, .png, .webp, .tif and "
                    "others that Pillow reads); put some into it, or remove it from "
                    "train/ and test/"
                )


def read_folder(train: Path, options: Options) -> Dataset:
    """Reads ``train`` and the folder ``test`` or ``val`` next to it.

    Args:
      train: the folder of the training images' classes.
      options: options of the reader.

    Returns:
      The data set; its images are memory maps.

    Raises:
      DataError: the classes differ, an image is damaged or cannot be read, all pixels
        are equal, or the images differ in size and ``image_size`` is None.
    """
    where = train.parent
    if not train.is_dir():
        raise DataError(
            f"{train} is a file; images of a folder are in {train}/<class>/"
        )
    folders = {"train": train, "test": _test_folder(where)}
    classes = _check_classes(*folders.values())
    listing = _Listing({"train": [], "test": []}, [], [])
    digest = list_files(listing.scan(folders, classes))
    listing.check(where, options.skip_damaged)
    _check_full(listing, folders, classes)
    key = key_of("folder", where, digest, options)

    def encoded(split):
        for name, label in listing.images[split]:
            yield Encoded(str(where / name), where / name, label)

    def build(writer: Writer):
        splits = {
            split: Split(len(images), lambda split=split: encoded(split))
            for split, images in listing.images.items()
        }
        unread = [str(where / name) for name in listing.outside + listing.unread]
        return classes, unread + write_images(writer, splits, options)

    return cached(key, build)
