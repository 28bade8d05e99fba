"""Decodes images with Pillow into ``uint8`` arrays of one size.

An image is turned upright by its EXIF orientation, palettes become RGB, 16 bits become
8, and transparency is dropped, as in torchvision and TFDS.  For an animation, the first
image is read.  A set with only grey images has one channel, and any other has three.
With ``image_size`` the middle square of each image is resized.
"""

import contextlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kddm_jax.data.cache import Writer
from kddm_jax.data.dataset import DataError, Dataset, Options, make_dataset
from kddm_jax.extras import extra

# Number of images in memory at a time, and number that a thread takes at a time.  With
# fewer, passing them to the thread would cost more than decoding 32 x 32 pixels.
_PIECE, _SHARE = 256, 16


# Formats that Pillow lists but cannot decode by itself.
_UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def endings() -> set[str]:
    """Returns the endings of files that Pillow reads, such as ``.jpg``."""
    with extra("kddm_jax.data"):
        from PIL import Image

    formats = Image.registered_extensions()
    # An MPO contains JPEGs, and Pillow opens it as a JPEG.
    decoded = ({*Image.OPEN} | {"MPO"}) - _UNDECODED
    return {ending for ending, format in formats.items() if format in decoded}


class Encoded(NamedTuple):
    """Contains an image to decode: name for messages, file or bytes, and label."""

    name: str
    content: Path | bytes
    label: int


class Split(NamedTuple):
    """Contains the number of images of a split, and a function that yields them."""

    number: int
    images: Callable[[], Iterable[Encoded]]


class _Damaged(NamedTuple):
    """Replaces an image that cannot be decoded."""

    reason: str


class _RangeUnknownError(Exception):
    """Is raised for pixels that no convention maps to 0, ..., 255."""


class _ColourFoundError(Exception):
    """Is raised if an image has colours and all images before it were grey."""


def _fit(image, size):
    """Crops the middle square and resizes it in one pass, to limit memory."""
    from PIL import Image

    if image.size == (size, size):
        return image
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _bits(image):
    """Returns the bits of a grey pixel: 12 in some TIFF files, otherwise 16."""
    stored = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample
    return stored if 8 < stored < 16 else 16


def _is_grey(image):
    return image.mode in {"1", "L", "LA", "La"} or image.mode.startswith(("I", "F"))


def _convert(image, channels):
    """Converts an image of any mode to grey (1 channel) or RGB (3)."""
    from PIL import Image

    if image.mode == "F":
        raise _RangeUnknownError("pixels are floating-point numbers")
    if image.mode.startswith("I"):  # up to 16 bits, which Pillow would clip to 255
        values, bits = np.asarray(image), _bits(image)
        if values.min() < 0 or values.max() > 65535:
            raise _RangeUnknownError("pixels have more than 16 bits")
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _decode(content, channels, image_size):
    """Decodes one image to ``uint8`` ``[h, w, channels]``."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        if channels == 1 and not _is_grey(image):
            raise _ColourFoundError
        ImageOps.exif_transpose(image, in_place=True)
        converted = _convert(image, channels)
    if image_size is not None:
        converted = _fit(converted, image_size)
    pixels = np.asarray(converted)
    return pixels.reshape(*pixels.shape[:2], channels)


def _read(image):
    if isinstance(image.content, bytes):
        return image.content
    try:
        return image.content.read_bytes()
    except OSError as error:
        raise DataError(f"{image.name}: {error.strerror}") from error


def _decode_share(images, channels, image_size):
    """Decodes the images of one thread; a damaged image gives a ``_Damaged``."""
    from PIL import UnidentifiedImageError

    decoded = []
    for image in images:
        content = _read(image)
        try:
            decoded.append(_decode(content, channels, image_size))
        except (_ColourFoundError, MemoryError):
            raise
        except UnidentifiedImageError:
            why = f"damaged image ({len(content):,} bytes that are no image)"
            decoded.append(_Damaged(why))
        except _RangeUnknownError as error:
            decoded.append(_Damaged(f"{error}, whose range is not known"))
        # For damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error
        # and others.  Its warning about too many pixels is an error in `write_images`.
        except Exception as error:
            decoded.append(_Damaged(f"damaged image ({' '.join(str(error).split())})"))
    return decoded


def _decode_pieces(pool, images, channels, image_size):
    """Yields lists of pairs of an image and its array."""
    iterator = iter(images)
    work = partial(_decode_share, channels=channels, image_size=image_size)
    while piece := list(itertools.islice(iterator, _PIECE)):
        shares = [piece[i : i + _SHARE] for i in range(0, len(piece), _SHARE)]
        arrays = itertools.chain.from_iterable(pool.map(work, shares))
        yield list(zip(piece, arrays, strict=True))


def _without_damaged(pairs, skip_damaged):
    """Returns the undamaged pairs of a list, and the names of the other images."""
    bad = [(image.name, a.reason) for image, a in pairs if isinstance(a, _Damaged)]
    if bad and not skip_damaged:
        raise DataError(
            f"{bad[0][0]}: {bad[0][1]}; replace it, or leave such images out with "
            "skip_damaged=True (--skip-damaged)"
        )
    whole = [pair for pair in pairs if not isinstance(pair[1], _Damaged)]
    return whole, [name for name, _ in bad]


def _check_sizes(pairs, first):
    """Checks that all images have the size of the first."""
    for image, array in pairs:
        if array.shape != first[1].shape:
            sizes = [f"{w}x{h}" for h, w, _ in (first[1].shape, array.shape)]
            raise DataError(
                f"images differ in size: {first[0].name} is {sizes[0]}, {image.name} "
                f"is {sizes[1]}; pass image_size (--image-size) to resize them"
            )


def _write_splits(writer, splits, pool, channels, options, progress):
    """Writes all images, and returns the names of those left out."""
    left_out, done, first = [], 0, None
    total = sum(split.number for split in splits.values())
    for name, split in splits.items():
        written = False
        pieces = _decode_pieces(pool, split.images(), channels, options.image_size)
        for pairs in pieces:
            whole, bad = _without_damaged(pairs, options.skip_damaged)
            left_out += bad
            if whole:
                first = first or whole[0]
                _check_sizes(whole, first)
                labels = np.array([image.label for image, _ in whole])
                writer.add(name, np.stack([array for _, array in whole]), labels)
                written = True
            done += len(pairs)
            progress(done, total)
        if not written:
            raise DataError(f"{name}: all {len(left_out)} images are damaged")
    return left_out


@contextlib.contextmanager
def _show_progress(progress: Callable[[int, int], None] | None):
    """Yields the caller's function, or one that shows a bar on a terminal."""
    if progress is not None:
        yield progress
        return
    with extra("kddm_jax.data"):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("decoding images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check_contrast(writer, images):
    """Checks that pixels differ; the error's reason comes from the first image."""
    from PIL import Image

    if not writer.is_constant():
        return
    why = ""
    for image in images:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(_read(image))) as it:
            if it.has_transparency_data:
                why = " without their transparency, which is dropped"
            elif it.mode.startswith("I"):
                why = (
                    " in 8 bits: of 16 the upper 8 are kept, below 256 nothing is left"
                )
            break
    raise DataError(
        f"all pixels of the training images are equal{why}; save as 8-bit grey or RGB "
        "what the images should show"
    )


def _usable_cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def write_images(
    writer: Writer,
    splits: Mapping[str, Split],
    options: Options,
    *,
    channels: Sequence[int] = (1, 3),
) -> list[str]:
    """Decodes all images into a cache.

    Args:
      writer: writer of the cache.
      splits: the splits "train" and "test".
      options: options of the reader.
      channels: numbers of channels to try, in order.

    Returns:
      The names of the damaged images that were left out.

    Raises:
      DataError: an image is damaged, images differ in size, or all pixels are equal.
    """
    with extra("kddm_jax.data"):
        from PIL import Image

    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(_usable_cores()) as pool,
        _show_progress(options.progress) as progress,
    ):
        # Pillow warns about dropped transparency, and about EXIF that it cannot read.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for number in channels:
            try:
                left_out = _write_splits(
                    *(writer, splits, pool, number, options, progress)
                )
            except _ColourFoundError:
                writer.restart()
            else:
                _check_contrast(writer, splits["train"].images())
                return left_out
    raise DataError("an image has colours in a set that says it is grey")


def resized(dataset: Dataset, image_size: int | None) -> Dataset:
    """Resizes the images of a data set in memory, in the same way as a folder's."""
    if image_size is None:
        return dataset
    with extra("kddm_jax.data"):
        from PIL import Image
    channels = dataset.train_images.shape[-1]
    shape = (image_size, image_size, channels)
    if dataset.train_images.shape[1:] == shape:
        return dataset

    def resize(images):
        small = np.empty((len(images), *shape), np.uint8)
        for i, image in enumerate(images):
            squeezed = Image.fromarray(image[..., 0] if channels == 1 else image)
            small[i] = np.asarray(_fit(squeezed, image_size)).reshape(shape)
        return small

    return make_dataset(
        (resize(dataset.train_images), dataset.train_labels),
        (resize(dataset.test_images), dataset.test_labels),
        dataset.class_names,
    )
