"""Tests folders of images: all kinds of images, all mistakes, and the cache."""

import errno
import json
import os
import pty
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from kddm_jax import data
from kddm_jax.data import cache, images


@pytest.fixture(autouse=True)
def several_threads(monkeypatch):
    """Decodes images by several threads, although a worker has one core."""
    monkeypatch.setattr(images, "_usable_cores", lambda: 4)


def pixels(seed, height=6, width=6, channels=3):
    rng = np.random.default_rng(seed)
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return rng.integers(256, size=shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


# Two classes with the numbers of their images: the content of ``write``'s folder.
TRAIN = {"ant": [0, 1, 2], "bee": [3, 4]}
TEST = {"ant": [5], "bee": [6, 7]}


def write(root, test="test", **options):
    """Writes a small folder, with its files in another order than they are read in."""
    for split, classes in (("train", TRAIN), (test, TEST)):
        for name, seeds in reversed(classes.items()):
            for seed in reversed(seeds):
                save(root / split / name / f"{seed}.png", pixels(seed, **options))
    return root


def load(root, **options):
    return data.load("folder", data_dir=root, **options)


def assert_refused(root, *parts, **options):
    """Asserts a one-line error with each of ``parts``, and that there is no cache."""
    with pytest.raises(data.DataError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    assert list(root.glob(".kddm_jax/*")) == []


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("channels", [1, 3])
def test_folder_against_its_pixels(tmp_path, test, channels):
    folder = load(write(tmp_path, test, channels=channels))
    assert folder.class_names == ("ant", "bee")
    for found, labels, classes in (
        (folder.train_images, folder.train_labels, TRAIN),
        (folder.test_images, folder.test_labels, TEST),
    ):
        expected = [pixels(s, channels=channels) for c in classes.values() for s in c]
        expected = np.stack(expected).reshape(-1, 6, 6, channels)
        np.testing.assert_array_equal(found, expected)
        assert (found.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(
            labels, np.repeat([0, 1], [len(s) for s in classes.values()])
        )
        # A memory-mapped file, so that images may take as much space as the disk has.
        assert isinstance(found, np.memmap)
    values = np.asarray(folder.train_images).reshape(-1, channels) / 255
    np.testing.assert_allclose(folder.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(folder.std, values.std(0), rtol=1e-12)


def test_test_comes_before_val(tmp_path):
    write(tmp_path)
    save(tmp_path / "val" / "ant" / "9.png", pixels(9))
    assert len(load(tmp_path).test_images) == 3


def test_other_files_are_skipped(tmp_path):
    write(tmp_path)
    expected = load(tmp_path)
    (tmp_path / "train" / "ant" / "README.txt").write_text("ants")
    (tmp_path / "train" / "ant" / ".hidden.png").write_text("no image")
    (tmp_path / "train" / ".git").mkdir()
    np.testing.assert_array_equal(load(tmp_path).train_images, expected.train_images)


def test_folders_within_a_class(tmp_path):
    """The files of a folder come before the files of its folders, as in torchvision."""
    write(tmp_path)
    save(tmp_path / "train" / "ant" / "b" / "c" / "0.png", pixels(11))
    save(tmp_path / "train" / "ant" / "b" / "1.png", pixels(10))
    save(tmp_path / "train" / "ant" / ".hidden" / "1.png", pixels(12))
    for split in ("train", "test"):
        save(tmp_path / split / "cat" / "only" / "deep" / "1.png", pixels(13))
    folder = load(tmp_path)
    expected = [pixels(seed) for seed in (0, 1, 2, 10, 11, 3, 4, 13)]
    np.testing.assert_array_equal(folder.train_images, expected)
    np.testing.assert_array_equal(folder.train_labels, [0] * 5 + [1] * 2 + [2])
    assert folder.class_names == ("ant", "bee", "cat")
    assert len(folder.test_images) == 4


def test_links_to_folders(tmp_path):
    write(tmp_path)
    (tmp_path / "train" / "ant" / "link").symlink_to(tmp_path / "test" / "bee")
    folder = load(tmp_path)
    expected = [pixels(seed) for seed in (0, 1, 2, 6, 7, 3, 4)]
    np.testing.assert_array_equal(folder.train_images, expected)


def test_link_to_a_folder_around_it(tmp_path):
    link = write(tmp_path) / "train" / "ant" / "link"
    link.symlink_to(tmp_path / "train")
    assert_refused(tmp_path, f"{link / 'ant'}: a link leads back")


@pytest.mark.parametrize("change", ["add", "rename"])
def test_cache_of_folders_within_a_class(tmp_path, change):
    deep = save(write(tmp_path) / "train" / "ant" / "b" / "0.png", pixels(10))
    load(tmp_path)
    if change == "add":
        save(deep.with_name("1.png"), pixels(11))
    else:
        deep.parent.rename(tmp_path / "train" / "bee" / "b")
    ants = [0, 1, 2, 10, 11] if change == "add" else [0, 1, 2]
    bees = [3, 4] if change == "add" else [3, 4, 10]
    expected = [pixels(seed) for seed in ants + bees]
    np.testing.assert_array_equal(load(tmp_path).train_images, expected)
    assert len(caches(tmp_path)) == 1


def test_cache_of_an_earlier_version_is_removed(tmp_path, decoded, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(cache, "_FORMAT", 1)
        load(write(tmp_path))
    decoded[0] = 0
    load(tmp_path)
    assert decoded == [8]
    assert len(caches(tmp_path)) == 1


def test_more_images_than_are_decoded_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_PIECE", 4)
    monkeypatch.setattr(images, "_SHARE", 3)
    write(tmp_path)
    for seed in range(100, 121):
        save(tmp_path / "train" / "bee" / f"{seed}.png", pixels(seed))
    folder = load(tmp_path)
    order = sorted([*TRAIN["bee"], *range(100, 121)], key=str)
    expected = [pixels(s) for s in [*TRAIN["ant"], *order]]
    np.testing.assert_array_equal(folder.train_images, expected)


# Each function returns the image to save, its options, and the expected RGB values
# (None if these are the saved ones).
def palette(array):
    return Image.fromarray(array).quantize(256)


def transparent(array, mode):
    image = Image.fromarray(array).convert("RGB").convert(mode)
    image.putalpha(Image.fromarray(pixels(1, channels=1)))
    return image


def with_transparency(array):
    image = palette(array)
    image.info["transparency"] = bytes(range(256))
    return image


# Pillow can write these, but not all of them in every version.
ENDINGS = {
    **dict.fromkeys(("apng", "bmp", "dib", "pcx", "ppm", "pnm", "sgi", "rgb")),
    **dict.fromkeys(("tga", "icb", "tif", "tiff", "TGA", "BMP", "Tiff", "qoi")),
    "jfif": "jpeg",
    "jpe": "jpeg",
    "JFIF": "jpeg",
    "jp2": "jpeg2000",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_that_pillow_reads(tmp_path, ending):
    smooth = np.indices((6, 6, 3)).sum(0).astype(np.uint8) * 15
    path = write(tmp_path) / "train" / "ant" / f"0 image.{ending}"
    format = ENDINGS[ending] or Image.registered_extensions()[f".{ending.lower()}"]
    try:
        save(path, smooth, format=format)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow writes no {ending}: {error}")
    found = load(tmp_path).train_images
    assert len(found) == 6
    tolerance = 12 if "jp" in str(ENDINGS[ending]) else 0
    assert np.abs(found[0].astype(int) - smooth).max() <= tolerance


def test_grey_and_palette_of_other_endings(tmp_path):
    grey = write(tmp_path, channels=1) / "train" / "ant"
    save(grey / "8.pgm", pixels(8, channels=1))
    save(grey / "9.pbm", Image.fromarray(pixels(9, channels=1) > 127))
    folder = load(tmp_path)
    assert folder.train_images.shape == (7, 6, 6, 1)
    np.testing.assert_array_equal(folder.train_images[3, ..., 0], pixels(8, channels=1))
    save(grey / "7.gif", palette(pixels(7)))
    np.testing.assert_array_equal(load(tmp_path).train_images[3], pixels(7))


def test_first_image_of_an_animation(tmp_path):
    frames = [palette(pixels(seed)) for seed in (20, 21)]
    path = write(tmp_path) / "train" / "ant" / "0 moves.gif"
    save(path, frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load(tmp_path).train_images[0], pixels(20))


KINDS = {
    "rgb.png": (lambda a: Image.fromarray(a), {}),
    "rgba.png": (lambda a: transparent(a, "RGBA"), {}),
    "palette.png": (palette, {}),
    "transparent palette.png": (with_transparency, {}),
    "upper case.PNG": (lambda a: Image.fromarray(a), {}),
    "lossless.webp": (lambda a: Image.fromarray(a), {"lossless": True}),
    "jpeg.jpg": (lambda a: Image.fromarray(a), {"quality": 95}),
    "jpeg.JPEG": (lambda a: Image.fromarray(a), {"quality": 95}),
    "cmyk.jpg": (lambda a: Image.fromarray(a).convert("CMYK"), {"quality": 95}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(tmp_path, kind):
    make, options = KINDS[kind]
    write(tmp_path)
    smooth = np.indices((6, 6, 3)).sum(0).astype(np.uint8) * 15  # suits JPEG
    image = make(smooth)
    save(tmp_path / "train" / "ant" / f"0 {kind}", image, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(tmp_path).train_images[0]
    if kind == "cmyk.jpg" or "jp" in kind:
        assert np.abs(found.astype(int) - smooth).max() <= 12
    else:
        np.testing.assert_array_equal(found, smooth)


GREYS = {
    "bits": (lambda a: Image.fromarray(a > 127), lambda a: (a > 127) * 255),
    "grey and alpha": (lambda a: transparent(a, "LA"), lambda a: a),
    "16 bits": (
        lambda a: Image.fromarray(a.astype(np.uint16) * 256 + 255 - a),
        lambda a: a,
    ),
}


@pytest.mark.parametrize("kind", GREYS)
def test_kinds_of_grey(tmp_path, kind):
    make, expect = GREYS[kind]
    write(tmp_path, channels=1)
    grey = pixels(0, channels=1)
    save(tmp_path / "train" / "ant" / "0.png", make(grey))
    found = load(tmp_path).train_images
    assert found.shape[-1] == 1
    np.testing.assert_array_equal(found[0, ..., 0], expect(grey))


def tiff_of_12_bits(values):
    """Encodes a grey image as TIFF; Pillow only reads these."""
    height, width = values.shape
    bits = ["".join(f"{v:012b}" for v in row) for row in values]
    content = b"".join(int(b, 2).to_bytes(len(b) // 8) for b in bits)
    short, long = 3, 4
    tags = [
        *((256, short, width), (257, short, height), (258, short, 12)),
        *((259, short, 1), (262, short, 1), (273, long, 8), (277, short, 1)),
        *((278, short, height), (279, long, len(content))),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content
    return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_grey_of_12_bits(tmp_path):
    write(tmp_path, channels=1)
    grey = pixels(0, channels=1)
    path = tmp_path / "train" / "ant" / "0.png"
    path.write_bytes(tiff_of_12_bits(grey.astype(int) * 16 + 15))
    np.testing.assert_array_equal(load(tmp_path).train_images[0, ..., 0], grey)


def test_a_lab_image_has_colours(tmp_path):
    write(tmp_path, channels=1)
    colours = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = Image.fromarray(pixels(7))
    lab = ImageCms.profileToProfile(image, *colours, outputMode="LAB")
    (tmp_path / "test" / "bee" / "7.png").unlink()
    lab.save(tmp_path / "test" / "bee" / "7.tif")
    found = load(tmp_path).test_images[-1]
    assert np.abs(found.astype(int) - pixels(7)).max() < 40  # LAB has few bits


def test_one_colour_image_makes_all_rgb(tmp_path):
    # The colour image is found last, when all others have been written as grey.
    write(tmp_path, channels=1)
    save(tmp_path / "test" / "bee" / "9.png", pixels(9))
    folder = load(tmp_path)
    grey = pixels(0, channels=1)[..., None]
    np.testing.assert_array_equal(folder.train_images[0], np.repeat(grey, 3, -1))
    np.testing.assert_array_equal(folder.test_images[-1], pixels(9))
    assert folder.train_images.shape == (5, 6, 6, 3)
    assert len(folder.mean) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = pixels(0)
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path)
    stored = np.ascontiguousarray(stored)
    save(tmp_path / "train" / "ant" / "0.png", stored, exif=exif)
    np.testing.assert_array_equal(load(tmp_path).train_images[0], upright)


def test_images_with_broken_exif_are_read(tmp_path):
    # A table of nine entries that ends in the first: Pillow warns and continues.
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x09\x01\x12\0\x03"
    write(tmp_path)
    save(tmp_path / "train" / "ant" / "0.jpg", np.zeros((6, 6, 3), np.uint8), exif=exif)
    assert (load(tmp_path).train_images[0] == 0).all()


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(9, 15, 3), (15, 9, 3), (8, 16, 4), (6, 10, 12), (10, 6, 9), (7, 7, 5)],
)
def test_resizing_against_resize_and_crop(tmp_path, height, width, size):
    write(tmp_path)
    array = pixels(0, height, width)
    save(tmp_path / "train" / "ant" / "0.png", array)
    folder = load(tmp_path, image_size=size)
    assert folder.train_images.shape == (5, size, size, 3)
    # First the short side, then the crop. With the sizes above, the long side is whole.
    short = min(height, width)
    whole = (width * size // short, height * size // short)
    resized = Image.fromarray(array).resize(whole, Image.Resampling.BILINEAR)
    left, top = (whole[0] - size) // 2, (whole[1] - size) // 2
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    # The same filter at the same places, except for the last bit of its weights.
    assert np.abs(folder.train_images[0] - expected.astype(int)).max() <= 1


def test_resizing_keeps_images_of_that_size(tmp_path):
    write(tmp_path)
    np.testing.assert_array_equal(
        load(tmp_path, image_size=6).train_images, load(tmp_path).train_images
    )


def test_long_image_is_not_blown_up(tmp_path):
    # If the whole image were resized, its long side would have 320,000 pixels.
    write(tmp_path)
    save(tmp_path / "train" / "ant" / "0.png", np.full((1, 10_000, 3), 7, np.uint8))
    assert (load(tmp_path, image_size=32).train_images[0] == 7).all()


def test_progress(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(images, "_PIECE", 2)
    seen = []
    load(write(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 8), (4, 8), (5, 8), (7, 8), (8, 8)]
    # By default it shows nothing if there is no terminal.
    load(tmp_path, image_size=3)
    assert capfd.readouterr() == ("", "")


PROGRAM = """
from kddm_jax import data
folder = data.load("folder", data_dir=sys.argv[1])
print(len(folder.train_images), folder.train_images.sum())
"""


@pytest.fixture
def start(bare):
    """Returns a function that starts a process, which loads a folder."""
    command = [sys.executable, "-c", bare + PROGRAM]
    return lambda root, **options: subprocess.Popen(
        [*command, root], stdout=subprocess.PIPE, text=True, **options
    )


def test_progress_on_a_terminal(start, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, end = pty.openpty()
    process = start(write(tmp_path), stderr=end)
    process.communicate(timeout=60)
    os.close(end)
    assert process.returncode == 0
    assert b"decoding images" in os.read(terminal, 10_000)
    os.close(terminal)


# ---------------------------------------------------------------------- constants


def write_all(root, make):
    """Writes the folder of ``write``, with ``make`` applied to all pixels."""
    for path in write(root).glob("t*/*/*.png"):
        save(path, make(pixels(int(path.stem))))
    return root


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("channels", [[2], [0, 1]])
def test_constant_channels(tmp_path, value, channels):
    def make(array):
        array[..., channels] = value
        return array

    folder = load(write_all(tmp_path, make))
    constant = [folder.std[c] == 0 for c in range(3)]
    assert constant == [c in channels for c in range(3)]
    np.testing.assert_allclose(np.array(folder.mean)[channels], value / 255)


def alpha(mode):
    def make(array):
        image = Image.new(mode[:-1], (6, 6))
        image.putalpha(Image.fromarray(array[..., 0]))
        return image

    return make


def transparent_colour(array):
    image = Image.new("P", (6, 6))
    image.info["transparency"] = bytes(range(256))
    return image


ALL_CONSTANT = {
    "one colour": (lambda a: np.full_like(a, 7), "are equal;"),
    "three values": (lambda a: np.full_like(a, [0, 128, 255]), "are equal;"),
    "grey": (lambda a: np.full_like(a[..., 0], 7), "are equal;"),
    "bits": (lambda a: Image.new("1", (6, 6)), "are equal;"),
    "RGBA": (alpha("RGBA"), "transparency, which is dropped"),
    "LA": (alpha("LA"), "transparency, which is dropped"),
    "palette": (transparent_colour, "transparency, which is dropped"),
    "16 bits": (lambda a: a[..., 0].astype(np.uint16), "of 16 the upper 8 are kept"),
}


@pytest.mark.parametrize("kind", ALL_CONSTANT)
def test_constant_images(tmp_path, kind):
    make, why = ALL_CONSTANT[kind]
    assert_refused(write_all(tmp_path, make), "all pixels of the training images", why)


# ---------------------------------------------------------------------- mistakes


def test_nothing_at_hand(tmp_path):
    with pytest.raises(data.DataError, match="folder was not found") as caught:
        load(tmp_path)
    assert "train/<class>/" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_test_images(tmp_path):
    save(tmp_path / "train" / "ant" / "0.png", pixels(0))
    assert_refused(tmp_path, tmp_path, "neither test/ nor val/", "test/<class>/")


def test_no_classes(tmp_path):
    save(tmp_path / "train" / "0.png", pixels(0))
    (tmp_path / "test").mkdir()
    assert_refused(tmp_path, tmp_path / "train", "has no folders", "<class>")


@pytest.mark.parametrize("count", [2, 4])
def test_folders_of_classes_without_train(tmp_path, count):
    names = ["circle", "line", "ring", "square"][:count]
    for name in names:
        save(tmp_path / name / "0.png", pixels(0))
    (tmp_path / "notes").mkdir()
    some = "circle, line" if count == 2 else "circle, line, ring, ..."
    expected = f"found class folders {some} in {tmp_path}, but no train/; move "
    assert_refused(tmp_path, expected, "to train/<class>/ and test/<class>/")


@pytest.mark.parametrize(("has", "lacks"), [("train", "test"), ("test", "train")])
def test_classes_differ(tmp_path, has, lacks):
    write(tmp_path)
    save(tmp_path / has / "cat" / "0.png", pixels(0))
    found = f"{tmp_path / lacks} has no class 'cat', which {tmp_path / has} has"
    assert_refused(tmp_path, found, "same names")


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_without_images(tmp_path, split):
    write(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir()
        if part != split:
            save(tmp_path / part / "cat" / "0.png", pixels(0))
    (tmp_path / split / "cat" / "cats.txt").write_text("no image")
    assert_refused(tmp_path, tmp_path / split / "cat", "no images", ".png")


UNREAD = ["heic", "HEIC", "svg", "cr2", "jxl", "mp4", "h5", "mpg", "eps", "wmf", "pdf"]


@pytest.mark.parametrize("name", [*(f"9.{ending}" for ending in UNREAD), "9", "9.5"])
@pytest.mark.parametrize("deep", ["", "more"])
def test_file_that_is_not_read(tmp_path, name, deep):
    path = write(tmp_path) / "train" / "bee" / deep / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"content")
    ending = path.suffix.lower() or "no ending"
    assert_refused(tmp_path, f"{path}: ", f"({ending})", "convert", "--skip-damaged")
    for _ in range(2):  # first decoded, then from the cache
        with pytest.warns(UserWarning, match="left out 1 ") as caught:
            folder = load(tmp_path, skip_damaged=True)
        assert str(path) in str(caught[0].message)
        assert len(folder.train_images) == 5


def test_files_that_are_not_read_are_counted(tmp_path):
    write(tmp_path)
    paths = [tmp_path / "train" / "ant" / f"{i}.heic" for i in range(3)]
    paths += [tmp_path / "test" / "bee" / "9.svg"]
    for path in paths:
        path.write_bytes(b"content")
    assert_refused(tmp_path, f"{paths[0]} and 3 more files:", "(.heic, .svg)")
    with pytest.warns(UserWarning, match="left out 4 "):
        load(tmp_path, skip_damaged=True)
    paths[0].unlink()  # counted, although it was never decoded
    with pytest.warns(UserWarning, match="left out 3 "):
        load(tmp_path, skip_damaged=True)


def test_ending_that_a_new_pillow_reads(tmp_path, monkeypatch):
    """A cache that leaves files out is rebuilt when Pillow can read these files."""
    write(tmp_path)
    path = tmp_path / "train" / "ant" / "9.heic"
    save(path, pixels(9), format="png")
    with pytest.warns(UserWarning, match="left out 1 "):
        load(tmp_path, skip_damaged=True)
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(tmp_path, skip_damaged=True).train_images
    np.testing.assert_array_equal(found[3], pixels(9))


@pytest.mark.parametrize("split", ["train", "test"])
def test_image_outside_of_the_classes(tmp_path, split):
    path = save(write(tmp_path) / split / "9.jpe", pixels(9), format="jpeg")
    (tmp_path / split / "README.md").write_text("ants")
    assert_refused(tmp_path, f"{path}: ", "class")
    with pytest.warns(UserWarning, match="left out 1 "):
        assert len(load(tmp_path, skip_damaged=True).train_images) == 5


@pytest.mark.parametrize("kind", ["float", "32 bits"])
def test_pixels_of_unknown_range(tmp_path, kind):
    values = pixels(9, channels=1).astype(np.float32) / 255
    if kind == "32 bits":
        values = pixels(9, channels=1).astype(np.int32) * 65536
    path = save(write(tmp_path) / "train" / "ant" / "9.tif", values)
    assert_refused(tmp_path, f"{path}: pixels", "range is not known")
    with pytest.warns(UserWarning, match="left out 1 "):
        load(tmp_path, skip_damaged=True)


def test_train_is_a_file(tmp_path):
    (tmp_path / "train").write_bytes(b"\x80\x04")
    assert_refused(tmp_path, f"{tmp_path / 'train'} is a file", "train/<class>/")


def test_link_to_nowhere(tmp_path):
    link = write(tmp_path) / "train" / "ant" / "9.png"
    link.symlink_to(tmp_path / "nowhere.png")
    assert_refused(tmp_path, link, "No such file")


def test_images_that_differ_in_size(tmp_path):
    path = save(write(tmp_path) / "test" / "bee" / "9.png", pixels(0, 6, 8))
    first = tmp_path / "train" / "ant" / "0.png"
    found = f"{first} is 6x6, {path} is 8x6"
    assert_refused(tmp_path, found, "image_size", "--image-size")
    assert load(tmp_path, image_size=5).train_images.shape == (5, 5, 5, 3)


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_of_nothing(tmp_path, size):
    assert_refused(write(tmp_path), "image_size", f"got {size}", image_size=size)


def encode(ending, array):
    path = Path(f"image{ending}")
    save(path, array)
    return path.read_bytes()


DAMAGES = {
    "empty": (".png", lambda c: b""),
    "text": (".jpg", lambda c: b"<!DOCTYPE html><title>404</title>"),
    "png cut": (".png", lambda c: c[: len(c) // 2]),
    "png header cut": (".png", lambda c: c[:20]),
    "png wrong length": (".png", lambda c: c[:8] + b"\xff" * 4 + c[12:]),
    "png wrong stream": (".png", lambda c: c[:60] + b"\xff" * 40 + c[100:]),
    "jpeg cut": (".jpg", lambda c: c[: len(c) // 2]),
    "jpeg header cut": (".jpg", lambda c: c[:100]),
    "webp cut": (".webp", lambda c: c[: len(c) // 2]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_image(tmp_path, monkeypatch, damage):
    ending, change = DAMAGES[damage]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path) / "train" / "ant" / f"9{ending}"
    path.write_bytes(change(encode(ending, pixels(9))))
    assert_refused(tmp_path, f"{path}: damaged image (", "skip_damaged", "--skip-dam")
    if damage in ("empty", "text"):
        assert_refused(tmp_path, f"{path.stat().st_size} bytes that are no image")
    for _ in range(2):  # first decoded, then from the cache
        with pytest.warns(UserWarning, match=r"left out 1 damaged.*9\.") as caught:
            folder = load(tmp_path, skip_damaged=True)
        assert str(path) in str(caught[0].message)
        assert len(caught) == 1
        np.testing.assert_array_equal(folder.train_labels, [0, 0, 0, 1, 1])
        expected = [pixels(seed) for seeds in TRAIN.values() for seed in seeds]
        np.testing.assert_array_equal(folder.train_images, expected)
    # Leaving the image out once does not leave it out without the option.
    with pytest.raises(data.DataError, match="damaged image"):
        load(tmp_path)


def test_many_damaged_images(tmp_path):
    write(tmp_path)
    for i in range(30):
        (tmp_path / "test" / "ant" / f"bad{i:02}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"30 damaged.*bad19\.png and 10 more"):
        assert len(load(tmp_path, skip_damaged=True).test_images) == 3


def test_only_damaged_images(tmp_path):
    for path in write(tmp_path).glob("test/*/*"):
        path.write_bytes(b"")
    assert_refused(tmp_path, "test: all 3 images are damaged", skip_damaged=True)


@pytest.mark.parametrize("limit", [99, 20])  # Pillow warns, or raises
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    path = save(write(tmp_path) / "train" / "bee" / "9.png", pixels(0, 10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for other in tmp_path.glob("t*/*/*"):
        if other != path and limit == 20:
            save(other, pixels(0, 4, 4))
    assert_refused(tmp_path, path, "100 pixels", "bomb", image_size=4)
    with pytest.warns(UserWarning, match="left out 1 damaged"):
        load(tmp_path, image_size=4, skip_damaged=True)


@pytest.mark.parametrize("side", [60_000, 2**31 - 1])
def test_png_whose_header_claims_too_much(tmp_path, monkeypatch, side):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path) / "train" / "bee" / "9.png"
    content = bytearray(encode(".png", pixels(0)))
    content[16:24] = side.to_bytes(4, "big") * 2  # width and height, in the IHDR
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    for image_size in (None, 4):
        assert_refused(
            tmp_path, f"{path}: damaged image (", "bomb", image_size=image_size
        )


# ---------------------------------------------------------------------- the cache


def caches(root):
    return sorted(root.glob(".kddm_jax/*"))


@pytest.fixture
def decoded(monkeypatch):
    """Counts images decoded."""
    count = [0]
    decode = images._decode

    def counting(*arguments):
        image = decode(*arguments)
        count[0] += 1
        return image

    monkeypatch.setattr(images, "_decode", counting)
    return count


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_images_are_decoded_once(tmp_path, decoded):
    first = load(write(tmp_path))
    assert decoded == [8]
    assert_same(load(tmp_path), first)
    assert decoded == [8]


def rewrite(root):
    path = save(root / "train" / "ant" / "0.png", pixels(77))
    os.utime(path, ns=(10**9, 10**9))


def touch(root):
    os.utime(root / "train" / "ant" / "0.png", ns=(0, 0))


def add(root):
    save(root / "test" / "bee" / "9.png", pixels(9))


def remove(root):
    (root / "test" / "bee" / "7.png").unlink()


def rename(root):
    path = root / "train" / "ant" / "0.png"
    path.rename(path.with_name("5.png"))


def rename_class(root):
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "cat")


CHANGES = [rewrite, touch, add, remove, rename, rename_class]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_read_again(tmp_path, decoded, change):
    # All files have the same age and size, so only the change itself can be noticed.
    paths = list(write(tmp_path).glob("t*/*/*"))
    for path in paths:
        path.write_bytes(path.read_bytes().ljust(300, b"\0"))
        os.utime(path, ns=(10**9, 10**9))
    assert {path.stat().st_size for path in paths} == {300}
    load(tmp_path)
    (old,) = caches(tmp_path)
    change(tmp_path)
    decoded[0] = 0
    found = load(tmp_path)
    assert decoded[0] >= 7
    # The result equals that without any cache, and the old cache is gone.
    (new,) = caches(tmp_path)
    assert new != old
    new.rename(tmp_path / "aside")
    assert_same(load(tmp_path), found)


def test_options_have_caches_of_their_own(tmp_path, decoded):
    write(tmp_path)
    options = [{}, {"image_size": 3}, {"image_size": 4}, {"skip_damaged": True}]
    for choice in options:
        load(tmp_path, **choice)
    assert len(caches(tmp_path)) == 4
    decoded[0] = 0
    for choice in options:
        size = choice.get("image_size", 6)
        assert load(tmp_path, **choice).train_images.shape == (5, size, size, 3)
    assert decoded == [0]


def cut(folder):
    os.truncate(folder / "train_images.npy", 200)


def no_labels(folder):
    (folder / "test_labels.npy").unlink()


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def broken_manifest(folder):
    (folder / "manifest.json").write_text("{")


def list_for_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def other_key(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["key"]["format"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGED_CACHES = [
    *(cut, no_labels, no_manifest, broken_manifest, list_for_manifest, other_key)
]


@pytest.mark.parametrize("damage", DAMAGED_CACHES)
def test_damaged_cache_is_built_again(tmp_path, decoded, damage):
    expected = [np.array(array) for array in load(write(tmp_path))[:4]]
    (folder,) = caches(tmp_path)
    damage(folder)
    decoded[0] = 0
    assert_same(load(tmp_path)[:4], expected)
    assert decoded == [8]
    assert caches(tmp_path) == [folder]
    assert_same(load(tmp_path)[:4], expected)
    assert decoded == [8]


def test_killed_build_leaves_no_cache(tmp_path, decoded):
    class Killed(BaseException):
        pass

    def kill(done, total):
        raise Killed

    with pytest.raises(Killed):
        load(write(tmp_path), progress=kill)
    # A killed process leaves its unfinished files behind.
    fresh = tmp_path / ".kddm_jax" / ".partial-fresh"
    stale = tmp_path / ".kddm_jax" / ".partial-stale"
    for folder, age in ((fresh, 3600), (stale, 100_000)):
        folder.mkdir(parents=True)
        (folder / "train_images.npy").write_bytes(b"\x93NUMPY")
        old = time.time() - age
        os.utime(folder / "train_images.npy", (old, old))
    decoded[0] = 0
    assert len(load(tmp_path).train_images) == 5
    assert decoded == [8]
    assert fresh.exists()  # another process may still be writing
    assert not stale.exists()


def test_another_process_removes_its_files_meanwhile(tmp_path, decoded, monkeypatch):
    write(tmp_path)
    other = tmp_path / ".kddm_jax" / ".partial-other"
    other.mkdir(parents=True)
    (other / "gone.npy").write_bytes(b"")
    whole, looked_at = Path.stat, []

    def stat(path, **options):
        if path.name == "gone.npy":
            looked_at.append(path)
            path.unlink(missing_ok=True)
        return whole(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert len(load(tmp_path).train_images) == 5
    assert looked_at


def blocked(folder):
    """Puts a file where the folder would be; not even root can write into it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


def test_cache_of_a_read_only_folder(tmp_path, home, decoded):
    blocked(write(tmp_path / "data") / ".kddm_jax")
    first = load(tmp_path / "data")
    assert list((home / ".cache" / "kddm_jax" / "images").glob("folder-*"))
    assert_same(load(tmp_path / "data"), first)
    assert decoded == [8]
    # Two data folders share the other place, but not their caches.
    blocked(write(tmp_path / "other", channels=1) / ".kddm_jax")
    load(tmp_path / "other")
    assert_same(load(tmp_path / "data"), first)
    assert decoded == [16]


def test_no_place_for_the_cache(tmp_path, home):
    write(tmp_path / "data")
    blocked(tmp_path / "data" / ".kddm_jax")
    blocked(home / ".cache")
    with pytest.raises(data.DataError, match="cannot write .* writable") as caught:
        load(tmp_path / "data")
    assert str(tmp_path / "data" / ".kddm_jax") in str(caught.value)
    assert str(home / ".cache") in str(caught.value)


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    assert_refused(write(tmp_path), tmp_path, "No space left", "free space")


@pytest.mark.slow
def test_processes_that_build_at_once(start, tmp_path):
    write(tmp_path)
    for seed in range(100, 400):
        save(tmp_path / "train" / "ant" / f"{seed}.png", pixels(seed))
    processes = [start(tmp_path) for _ in range(4)]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    folder = load(tmp_path)
    assert printed == {f"305 {folder.train_images.sum()}\n"}
    assert len(caches(tmp_path)) == 1


def test_cache_that_another_process_removes(tmp_path, monkeypatch):
    """Another process removes the cache after it is built and before it is opened."""
    build, built = cache._build, []

    def build_and_lose(*arguments):
        build(*arguments)
        built.append(1)
        if len(built) == 1:
            (folder,) = caches(tmp_path)
            (folder / "manifest.json").unlink()

    monkeypatch.setattr(cache, "_build", build_and_lose)
    assert len(load(write(tmp_path)).train_images) == 5
    assert len(built) == 2
