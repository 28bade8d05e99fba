"""Tests sets of TFDS: finding them, reading them without TensorFlow, preparing them.

The prepared sets come from ``tests/prepare_tfds.py``, which runs where TensorFlow is
installed. ``KDDM_TEST_TFDS`` is their folder.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare_tfds as tiny
import pytest

from kddm_jax import data
from kddm_jax.data import images, loading, prepared

HERE = Path(__file__).parents[1]
PREPARED = os.environ.get("KDDM_TEST_TFDS")
needs_sets = pytest.mark.skipif(
    PREPARED is None,
    reason="need prepared sets (tests/prepare_tfds.py DIR, then KDDM_TEST_TFDS=DIR)",
)
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason='need TensorFlow (pip install -e ".[prepare,test]")',
)
TRAIN, TEST = tiny.COUNTS["train"], tiny.COUNTS["test"]
# File formats that TFDS reads without TensorFlow.
FREE = ("array_record", "parquet")


def copy(root, name, file_format="array_record", to=None):
    """Copies a prepared set, without a cache."""
    source = Path(PREPARED) / file_format / name
    shutil.copytree(source, root / (to or name))
    return root / (to or name)


def expected(name, split):
    """Returns the labels and images of a split, sorted."""
    pairs = [
        (tiny.label(split, i), tiny.image(name, split, i).tobytes())
        for i in range(tiny.COUNTS[split])
    ]
    return sorted(pairs)


def found(images, labels):
    return sorted(zip(labels.tolist(), map(bytes, map(np.array, images)), strict=True))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_refused(*parts, **arguments):
    """Asserts that loading fails with a one-line error that has each of ``parts``."""
    with pytest.raises(data.DataError) as caught:
        data.load(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# ---------------------------------------------------------------------- finding


def make_version(folder):
    folder.mkdir(parents=True)
    for file in ("dataset_info.json", "features.json"):
        (folder / file).write_text("{}")


@pytest.fixture
def shelf(tmp_path):
    """Makes two data folders of empty sets."""
    first, second = tmp_path / "first", tmp_path / "second"
    for version in ("1.2.0", "1.10.0", "1.9.3"):
        make_version(first / "plain" / version)
    (first / "plain" / "2.0.0").mkdir()  # begun, but not prepared
    (first / "plain" / "2.0.0" / "features.json").write_text("{}")
    make_version(first / "plain" / "incomplete.XYZ_3.0.0")
    make_version(second / "plain" / "7.0.0")
    make_version(second / "elsewhere" / "1.0.0")
    for config in ("small", "large"):
        make_version(first / "two" / config / "1.0.0")
    make_version(first / "one" / "only" / "1.0.0")
    for name, default in (("default", "small"), ("half", "absent")):
        shutil.copytree(first / "two", first / name)
        (first / name / ".config").mkdir()
        (first / name / ".config" / "metadata.json").write_text(
            json.dumps({"default_config_name": default})
        )
    shutil.rmtree(first / "half" / "large")
    return [first, second]


@pytest.mark.parametrize(
    ("name", "folder", "path"),
    [
        ("plain", 0, "plain/1.10.0"),
        ("plain:1.9.3", 0, "plain/1.9.3"),
        ("plain:7.0.0", 1, "plain/7.0.0"),
        ("elsewhere", 1, "elsewhere/1.0.0"),
        ("two/large", 0, "two/large/1.0.0"),
        ("two/large:1.0.0", 0, "two/large/1.0.0"),
        ("one", 0, "one/only/1.0.0"),
        ("default", 0, "default/small/1.0.0"),
        ("default/large", 0, "default/large/1.0.0"),
        ("half", 0, "half/small/1.0.0"),
    ],
)
def test_find(shelf, name, folder, path):
    assert prepared.find(name, shelf) == prepared.Prepared(shelf[folder], path)


@pytest.mark.parametrize(
    "name",
    ["plain:3.0.0", "plain:2.0.0", "two/middle", "other", "../first/plain", "", "A b"],
)
def test_find_nothing(shelf, name):
    assert prepared.find(name, shelf) is None
    assert_refused(repr(name), "known: digits", "TFDS", name=name, data_dir=shelf[0])


def test_several_configs(shelf):
    assert_refused("two/large", "small", name="two", data_dir=shelf[0])


def test_unknown_name_tells_every_place(tmp_path, home, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    assert_refused(
        *("'plain'", "digits, cifar10, ", ", folder, or a set prepared by TFDS"),
        *(tmp_path / "mine", home / "tensorflow_datasets", "kddm prepare"),
        name="plain",
    )


def test_a_name_needs_no_tfds(run, monkeypatch):
    """TFDS is not imported to find a set, nor to report that it is missing."""
    program = "from kddm_jax import data\ntry: data.load('no_such_set')\n"
    program += "except data.DataError: import sys; print('tensorflow_datasets' in "
    done = run(f"{program}sys.modules)")
    assert done.stdout == "False\n"


# ---------------------------------------------------------------------- reading


@pytest.fixture
def run(bare):
    """Returns a function that runs a program without importing JAX."""
    return lambda program, *arguments: subprocess.run(
        [sys.executable, "-W", "error", "-c", bare + program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


@needs_sets
@pytest.mark.parametrize("file_format", FREE)
def test_read_without_tensorflow(run, tmp_path, file_format):
    copy(tmp_path, "tiny_fixed", file_format)
    program = (
        "from kddm_jax import data\n"
        "tiny = data.load('tiny_fixed', data_dir=sys.argv[1])\n"
        "print(len(tiny.train_images), 'tensorflow_datasets' in sys.modules, \n"
        "    sorted({'tensorflow', 'jax', 'torch', 'cv2'} & set(sys.modules)))\n"
    )
    assert run(program, tmp_path).stdout == f"{TRAIN} True []\n"


@needs_sets
@pytest.mark.parametrize("file_format", FREE)
def test_images_and_labels(tmp_path, file_format):
    copy(tmp_path, "tiny_fixed", file_format)
    dataset = data.load("tiny_fixed", data_dir=tmp_path)
    for split, pictures, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),  # not those of validation
    ):
        assert found(pictures, labels) == expected("tiny_fixed", split)
        assert pictures.shape == (tiny.COUNTS[split], 8, 8, 3)
        assert (pictures.dtype, labels.dtype) == (np.uint8, np.int32)
        assert isinstance(pictures, np.memmap)
    # The supervised keys name "label", not "coarse".
    assert dataset.class_names == tiny.CLASSES
    values = np.asarray(dataset.train_images).reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, values.std(0), rtol=1e-12)


@needs_sets
def test_images_are_decoded_once(tmp_path, monkeypatch):
    copy(tmp_path, "tiny_fixed")
    first = data.load("tiny_fixed", data_dir=tmp_path)
    monkeypatch.setattr(prepared, "_import_tfds", lambda: pytest.fail("read again"))
    assert_same(data.load("tiny_fixed", data_dir=tmp_path), first)
    monkeypatch.undo()
    # A set that was prepared again is read again.
    os.utime(tmp_path / "tiny_fixed/1.0.0/features.json", ns=(0, 0))
    decoded, decode = [], images._decode
    monkeypatch.setattr(images, "_decode", lambda *a: decoded.append(a) or decode(*a))
    assert_same(data.load("tiny_fixed", data_dir=tmp_path), first)
    assert len(decoded) == TRAIN + TEST


@needs_sets
def test_more_images_than_are_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_PIECE", 4)
    copy(tmp_path, "tiny_fixed")
    dataset = data.load("tiny_fixed", data_dir=tmp_path)
    train = found(dataset.train_images, dataset.train_labels)
    assert train == expected("tiny_fixed", "train")


@needs_sets
def test_images_that_differ_in_size(tmp_path):
    copy(tmp_path, "tiny_sizes")
    sizes = {"name": "tiny_sizes", "data_dir": tmp_path}
    assert_refused("differ in size", "train[", "--image-size", **sizes)
    dataset = data.load(**sizes, image_size=8)
    assert dataset.train_images.shape == (TRAIN, 8, 8, 3)
    # Without a test split, the validation split is used.
    assert dataset.test_images.shape == (4, 8, 8, 3)
    labels = [tiny.label("validation", i) for i in range(tiny.COUNTS["validation"])]
    assert sorted(dataset.test_labels) == sorted(labels)


@needs_sets
def test_configs_and_grey(tmp_path):
    copy(tmp_path, "tiny_grey")
    second = data.load("tiny_grey", data_dir=tmp_path)
    assert second.train_images.shape == (TRAIN, 8, 8, 1)
    train = found(second.train_images, second.train_labels)
    assert train == expected("tiny_grey", "train")
    assert_same(data.load("tiny_grey/second", data_dir=tmp_path), second)
    assert_same(data.load("tiny_grey/second:1.0.0", data_dir=tmp_path), second)
    first = data.load("tiny_grey/first", data_dir=tmp_path)
    np.testing.assert_array_equal(first.train_images, 255 - second.train_images)


@needs_sets
def test_training_split_alone_is_shared(tmp_path):
    copy(tmp_path, "tiny_train")
    dataset = data.load("tiny_train", data_dir=tmp_path)
    labels = [tiny.label("train", i) for i in range(TRAIN)]
    np.testing.assert_array_equal(
        np.bincount(dataset.test_labels, minlength=3),
        np.bincount(labels, minlength=3) // 5,
    )
    both = found(
        np.concatenate([dataset.train_images, dataset.test_images]),
        np.concatenate([dataset.train_labels, dataset.test_labels]),
    )
    assert both == expected("tiny_train", "train")


@needs_sets
def test_validation_stands_in_for_a_test_split_without_labels(tmp_path):
    copy(tmp_path, "tiny_unlabelled")
    dataset = data.load("tiny_unlabelled", data_dir=tmp_path)
    test = found(dataset.test_images, dataset.test_labels)
    assert test == expected("tiny_unlabelled", "validation")


UNFIT = {
    "tiny_text": ("one image", "found label (ClassLabel), text (Text)"),
    "tiny_floats": ("one image (of integers)", "found image (Image), label"),
    "tiny_half": ("train[0] has no label",),
    "tiny_test": ("no split train, only test, validation",),
}


@needs_sets
@pytest.mark.parametrize("name", UNFIT)
def test_sets_that_do_not_fit(tmp_path, name):
    folder = copy(tmp_path, name) / "1.0.0"
    assert_refused(folder, *UNFIT[name], name=name, data_dir=tmp_path)


@needs_sets
def test_damaged_images(tmp_path):
    folder = copy(tmp_path, "tiny_damaged")
    damaged = {"name": "tiny_damaged", "data_dir": tmp_path}
    assert_refused(f"{folder / '1.0.0'} train[", "damaged image", "--skip", **damaged)
    with pytest.warns(UserWarning, match="left out 2 damaged") as caught:
        dataset = data.load(**damaged, skip_damaged=True)
    assert "test[" in str(caught[0].message)
    kept = [p for p in expected("tiny_damaged", "test") if p[1] != broken("test", 0)]
    assert found(dataset.test_images, dataset.test_labels) == kept
    assert len(dataset.train_images) == TRAIN - 1


def broken(split, index):
    return tiny.image("tiny_damaged", split, index).tobytes()


def empty(path):
    path.write_bytes(b"")


def wrong_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


@needs_sets
@pytest.mark.parametrize("file_format", FREE)
@pytest.mark.parametrize("damage", [empty, wrong_bytes, Path.unlink])
def test_damaged_records(tmp_path, damage, file_format):
    folder = copy(tmp_path, "tiny_fixed", file_format) / "1.0.0"
    damage(next(folder.glob("*train*")))
    parts = ("cannot read split train of", folder)
    assert_refused(*parts, name="tiny_fixed", data_dir=tmp_path)


@needs_sets
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("damage", [empty, wrong_bytes])
def test_damaged_description(tmp_path, damage, file):
    folder = copy(tmp_path, "tiny_fixed") / "1.0.0"
    damage(folder / file)
    assert_refused("cannot read", folder, name="tiny_fixed", data_dir=tmp_path)


@needs_sets
def test_where_prepared_sets_are_looked_for(tmp_path, home, monkeypatch):
    # The sets differ in their numbers of images, which shows the set that was read.
    places = ["data", "mine", "home/tensorflow_datasets"]
    kinds = ["tiny_fixed", "tiny_train", "tiny_grey"]
    for place, kind in zip(places, kinds, strict=True):
        copy(tmp_path / place, kind, to="mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    shapes = [(TEST, 8, 8, 3), (7, 8, 8, 3), (TEST, 8, 8, 1)]
    for place, shape in zip(places, shapes, strict=True):
        assert data.load("mnist").test_images.shape == shape
        shutil.rmtree(tmp_path / place)
    # If the user names a folder, no other folder is searched.
    copy(home / "tensorflow_datasets", "tiny_fixed", to="mnist")
    with pytest.raises(data.DataError, match="for mnist as prepared by TFDS"):
        data.load("mnist", data_dir=tmp_path)
    with pytest.raises(data.DataError, match=f"may also be in {tmp_path}/mine .*home"):
        data.load("cifar10")


@needs_sets
def test_names_that_tfds_spells_otherwise(tmp_path):
    copy(tmp_path, "tiny_fixed", to="svhn_cropped")
    for name in ("svhn", "svhn_cropped"):
        assert len(data.load(name, data_dir=tmp_path).train_images) == TRAIN


@needs_sets
def test_official_files_come_first(tmp_path):
    copy(tmp_path, "tiny_fixed", to="cifar10")
    assert len(data.load("cifar10", data_dir=tmp_path).train_images) == TRAIN
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"damaged")
    assert_refused("cifar-10-binary.tar.gz", name="cifar10", data_dir=tmp_path)


# --------------------------------------------------------------------- TensorFlow


@needs_sets
def test_tfrecord_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_has_tensorflow", lambda: False)
    folder = copy(tmp_path, "tiny_fixed", "tfrecord")
    parts = (folder, "tfrecord", "TensorFlow", 'pip install "kddm-jax[prepare]"')
    assert_refused(*parts, name="tiny_fixed", data_dir=tmp_path)


@needs_sets
@needs_tensorflow
@pytest.mark.parametrize("name", ["tiny_fixed", "tiny_grey", "tiny_train"])
def test_tfrecord_is_the_same_set(tmp_path, name):
    for file_format in ("tfrecord", "array_record"):
        copy(tmp_path / file_format, name, file_format)
    record = data.load(name, data_dir=tmp_path / "tfrecord")
    assert_same(record, data.load(name, data_dir=tmp_path / "array_record"))


@needs_sets
@needs_tensorflow
def test_tfrecord_cut_short(tmp_path):
    folder = copy(tmp_path, "tiny_fixed", "tfrecord") / "1.0.0"
    path = next(folder.glob("*train*"))
    content = path.read_bytes()
    # A record is its length, a checksum, the data, and a checksum. Cut after the first.
    first = int.from_bytes(content[:8], "little") + 16
    for cut, found in ((first, "only 21 element"), (len(content) // 2, "")):
        path.write_bytes(content[:cut])
        parts = (folder, "cannot read split train of", found)
        assert_refused(*parts, name="tiny_fixed", data_dir=tmp_path)


@needs_sets
@needs_tensorflow
def test_tfrecord_is_decoded_once(tmp_path, monkeypatch):
    copy(tmp_path, "tiny_fixed", "tfrecord")
    first = data.load("tiny_fixed", data_dir=tmp_path)
    monkeypatch.setattr(prepared, "_has_tensorflow", lambda: False)
    assert_same(data.load("tiny_fixed", data_dir=tmp_path), first)


@pytest.fixture(scope="session")
def registered():
    """Registers a set that can be prepared with TFDS, and one that cannot."""
    import tensorflow_datasets as tfds

    (fixed, *_) = tiny.make_builders()

    class TinyKnown(fixed):
        pass

    class TinyOffline(fixed):
        def _split_generators(self, dl_manager):
            raise OSError("no\nnetwork")

    return TinyKnown, TinyOffline, tfds


@needs_tensorflow
def test_prepare(tmp_path, registered, capfd):
    assert loading.main(["tiny_known", "--data-dir", str(tmp_path / "made")]) == 0
    printed = capfd.readouterr()
    folder = tmp_path / "made" / "tiny_known" / "1.0.0"
    assert printed.out.endswith(f"tiny_known is prepared in {folder}\n")
    assert "Generating train examples" in printed.err  # the progress
    assert list(folder.glob("*.array_record-*"))
    dataset = data.load("tiny_known", data_dir=tmp_path / "made")
    assert len(dataset.train_images) == TRAIN
    # Run again, the command does nothing.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert loading.main(["tiny_known", "--data-dir", str(tmp_path / "made")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@needs_tensorflow
def test_prepare_goes_where_load_looks(tmp_path, registered, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    assert loading.main(["tiny_known"]) == 0
    assert (tmp_path / "mine" / "tiny_known").is_dir()
    assert len(data.load("tiny_known").train_images) == TRAIN


@needs_tensorflow
def test_prepare_leaves_other_formats(tmp_path, registered):
    builder = registered[0](data_dir=tmp_path, file_format="tfrecord")
    builder.download_and_prepare()
    assert loading.main(["tiny_known", "--data-dir", str(tmp_path)]) == 0
    assert len(data.load("tiny_known", data_dir=tmp_path).train_images) == TRAIN


@needs_tensorflow
@pytest.mark.parametrize(
    ("name", "part"),
    [("tiny_offline", "cannot prepare tiny_offline: no network"), ("no_set", "knows")],
)
def test_prepare_that_fails(tmp_path, registered, capsys, name, part):
    assert loading.main([name, "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.split("error: ")[-1]
    assert part in error
    assert error.count("\n") == 1


def test_prepare_without_tensorflow(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared, "_has_tensorflow", lambda: False)
    assert loading.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        'error: preparing cifar10 needs TensorFlow: pip install "kddm-jax[prepare]"\n'
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_prepare_what_needs_no_preparation(name, capsys):
    assert loading.main([name]) == 2
    expected = f"error: {name} is no TFDS set and needs no preparation\n"
    assert capsys.readouterr().err == expected
