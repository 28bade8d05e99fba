"""Tests students that learn from a file of a teacher's outputs, and such files."""

import json

import chex
import jax
import numpy as np
import pytest
from commands import KEEP, SMALL, assert_same_arrays, call, final_arrays, results_of

from kddm_jax import adapters
from kddm_jax.experiment import outputs
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import table
from kddm_jax.experiment.training import statistics, stored

LINE = (*SMALL, *KEEP, "--devices", 1, "--unlabelled-images", 32, "--views", 2)
LINE = (*LINE, "--student-images", 64, "--normalization", "unit")
LINE = (*LINE, "--embedding", "none")
LAYERS = ("--layers", "map:map")
FORMS = {
    "outputs-2-views": (),
    "outputs-2-views-half-top3": ("--half", "--top", 3),
}


def store(own, *arguments):
    """Runs ``kddm outputs`` in this process."""
    try:
        return outputs.main([*map(str, own), "--", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of every form, of one teacher."""
    out = tmp_path_factory.mktemp("stored")
    for own in FORMS.values():
        assert store(own, *LINE, *LAYERS, "--out", out) == 0
    return out


def file_of(made, name="outputs-2-views"):
    return made / f"{name}.npz"


def train(out, file, *arguments):
    return call(*LINE, "--teacher-outputs", file, "--out", out, *arguments)


# ----------------------------------------------------------------------- arrays


def random_outputs(classes=6):
    draw = np.random.default_rng(0).normal
    maps = {"map": draw(size=(5, 2, 2, 3)).astype("f4")}
    logits = (3 * draw(size=(5, classes))).astype("f4")
    return adapters.Outputs(logits, draw(size=(5, 4)).astype("f4"), maps)


def test_all_logits_in_float32_come_back_bit_by_bit():
    found = random_outputs()
    chex.assert_trees_all_equal(stored.unpack(stored.pack(found), 6), found)


def test_half_precision_is_rounded_only():
    found = random_outputs()
    arrays = stored.pack(found, half=True)
    assert {array.dtype for array in arrays.values()} == {np.dtype("f2")}
    back = stored.unpack(arrays, 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype("f4")}
    chex.assert_trees_all_close(back, found, rtol=2**-11)


@pytest.mark.parametrize("top", [1, 3, 5])
def test_probabilities_of_the_largest_logits_are_exact(top):
    found = random_outputs()
    back = stored.unpack(stored.pack(found, top=top), 6)
    expected, given = (np.asarray(jax.nn.softmax(o.logits)) for o in (found, back))
    order = np.argsort(-found.logits, axis=1)
    of_top = lambda array: np.take_along_axis(array, order[:, :top], 1)
    of_others = lambda array: np.take_along_axis(array, order[:, top:], 1)
    np.testing.assert_allclose(of_top(given), of_top(expected), rtol=1e-5)
    np.testing.assert_array_equal(of_top(back.logits), of_top(found.logits))
    others = of_others(given)
    np.testing.assert_allclose(others, np.broadcast_to(others[:, :1], others.shape))
    np.testing.assert_allclose(others.sum(1), of_others(expected).sum(1), rtol=1e-5)


def test_a_thousand_classes_have_places():
    logits = np.arange(2000, dtype="f4").reshape(2, 1000)
    arrays = stored.pack(adapters.Outputs(logits, logits, {}), top=2)
    assert arrays["classes"].dtype == np.uint16
    back = stored.unpack(arrays, 1000)
    assert back.logits.argmax(1).tolist() == [999, 999]


def test_numbers_beyond_float16_are_refused():
    large = random_outputs()._replace(features=np.float32([[7e4]]))
    with pytest.raises(UserError, match="features is 70000.*leave --half out"):
        stored.pack(large, half=True)


# ------------------------------------------------------------------------ files


def test_files_hold_what_their_name_says(made):
    whole, less = (dict(np.load(file_of(made, name))) for name in FORMS)
    rows = 2 * (64 + 32)
    assert whole["logits"].shape == (rows, 10)
    assert whole["features"].shape == (rows, 32)
    flat = whole["maps/map"].reshape(rows, -1)
    np.testing.assert_array_equal(flat, whole["features"])
    assert len(np.unique(whole["indices"])) == 96
    assert "logits" not in less
    assert less["top"].shape == less["classes"].shape == (rows, 3)
    np.testing.assert_array_equal(less["features"], whole["features"].astype("f2"))
    first, second = (stored.read(file_of(made, name)) for name in FORMS)
    settings = parse(["--normalization", "unit"])
    assert first.words_for(settings, "kd") == ""
    words = "the 3 largest logits and float16 outputs"
    assert second.words_for(settings, "kd") == words
    assert second.words_for(settings, "l2+kd") == words
    assert second.words_for(settings, "l2") == "float16 outputs"
    of_logits = parse(["--layers", "logits:logits"])
    assert second.words_for(of_logits, "l2") == words
    assert first.about["teacher"] == second.about["teacher"]
    assert first.digest != second.digest


def is_mapped(array):
    """Returns whether an array lies in a file that is mapped into memory."""
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_files_are_mapped_into_memory(made):
    whole, half = (stored.read(file_of(made, name)) for name in FORMS)
    assert is_mapped(whole.outputs.logits)
    assert is_mapped(whole.of(("map",)).maps["map"])
    assert is_mapped(half.maps["map"])  # read when a method compares it
    assert half.maps["map"].dtype == np.float16
    found = half.of(("map",))
    assert found.maps["map"].dtype == np.float32
    assert half.size(("map",)) == sum(leaf.nbytes for leaf in jax.tree.leaves(found))
    with np.load(file_of(made)) as arrays:
        np.testing.assert_array_equal(whole.outputs.features, arrays["features"])
        np.testing.assert_array_equal(whole.maps["map"], arrays["maps/map"])


def test_compressed_files_are_read(made, tmp_path):
    file = tmp_path / "compressed.npz"
    np.savez_compressed(file, **np.load(file_of(made)))
    expected, found = (stored.read(path) for path in (file_of(made), file))
    chex.assert_trees_all_equal(found.of(("map",)), expected.of(("map",)))
    content = bytearray(file.read_bytes())
    content[200:300] = bytes(100)
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        stored.read(file)


def test_other_processes_get_the_arrays(made):
    content = stored.load(file_of(made))
    sent, error = processes._read(processes._written(content, None))
    assert error is None
    found = stored.parse(file_of(made), sent)
    expected = stored.read(file_of(made))
    chex.assert_trees_all_equal(found.of(("map",)), expected.of(("map",)))
    assert (found.about, found.digest) == (expected.about, expected.digest)


def test_a_file_is_neither_computed_again_nor_replaced(made, monkeypatch, capsys):
    file = file_of(made)
    before, changed = file.read_bytes(), file.stat().st_mtime_ns
    fail = lambda *arguments: pytest.fail("the outputs were computed again")
    monkeypatch.setattr("kddm_jax.experiment.training.views.Views.compute", fail)
    assert store((), *LINE, *LAYERS, "--out", made) == 0  # the same again
    assert store((), *LINE, "--out", made) == 2  # without the map
    assert "choose another --out" in capsys.readouterr().err
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, changed)


# ---------------------------------------------------------------------- students


@pytest.mark.parametrize("placebo", [(), ("--placebo", "pairs")])
def test_a_student_from_the_file_has_the_bits_of_one_from_the_network(
    made, tmp_path, placebo
):
    file = tmp_path / "given.npz"
    file.write_bytes(file_of(made).read_bytes())
    more = ("--weight", 1, "--distances", "l2+kd", *LAYERS, *placebo)
    teacher = made / "teacher" / "seed0"
    assert call(*LINE, "--teacher", teacher, "--out", tmp_path / "net", *more) == 0
    assert train(tmp_path / "file", file, *more) == 0
    assert not (tmp_path / "file" / "teacher").exists()
    assert not (tmp_path / "file" / "teacher-outputs").exists()
    for name in ("student", "l2+kd"):
        runs = (final_arrays(tmp_path / out, name) for out in ("net", "file"))
        assert_same_arrays(*runs)
    network, found = (results_of(tmp_path / out) for out in ("net", "file"))
    for what in ("digest", "accuracy", "model", "width"):
        assert found["teacher"][what] == network["teacher"][what]
    runs = zip(network["runs"], found["runs"], strict=True)
    assert all(run["settings"] == other["settings"] for run, other in runs)
    assert "from" not in table.markdown(found)


def test_runs_from_reduced_outputs_are_others(made, tmp_path, capsys):
    more = ("--weight", 1, "--distances", "kd")
    out, file = tmp_path / "out", file_of(made, "outputs-2-views-half-top3")
    assert train(out, file, *more) == 0
    found = results_of(out)
    assert found["runs"][-1]["settings"]["outputs_digest"] == stored.read(file).digest
    assert "KD, from the 3 largest logits and float16" in table.markdown(found)
    capsys.readouterr()
    assert train(out, file_of(made), *more) == 2
    assert "choose another --out" in capsys.readouterr().err
    given = ("--teacher", made / "teacher" / "seed0")
    assert call(*LINE, *given, "--out", out, *more) == 2
    assert "choose another --out" in capsys.readouterr().err


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--views", 3), "pass --views 2"),
        (("--views", "None"), "holds outputs on 2 fixed views of each image; add --vi"),
        (("--padding", 2), "made with padding="),
        (("--dtype", "bfloat16"), "made with dtype=float32"),
        (("--student-images", 96), "on 96 images, students see 128"),
        (("--student-images", 96, "--unlabelled-images", 0), "other images"),
        (("--held-out", 100), "--teacher-saw-held-out"),
        (("--distances", "kdpp"), "class_means"),
        (("--distances", "wkd_logits"), "class_cost"),
        (("--distances", "feature_only", *("--layers", "released")), "name the layers"),
        (("--distances", "l2", "--layers", "map:other"), "no layer 'other'"),
        (("--teacher", "runs/x"), "--teacher runs/x"),
        (("--teacher-statistics", "x.npz"), "--teacher-statistics x.npz"),
        (("--pretrained-teacher", "x.npz"), "--pretrained-teacher x.npz"),
    ],
)
def test_errors_come_before_training(made, tmp_path, capsys, change, words):
    assert train(tmp_path / "out", file_of(made), "--weight", 1, *change) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def rewrite(made, file, drop=(), **about):
    """Writes a file with other words about its content, or without some arrays."""
    arrays = dict(np.load(file_of(made)))
    about = {**json.loads(str(arrays.pop("about"))), **about}
    kept = {name: array for name, array in arrays.items() if name not in drop}
    statistics.write(file, kept, about)
    return file


def test_maps_that_are_not_stored_are_refused(made, tmp_path, capsys):
    file = rewrite(made, tmp_path / "no-map.npz", drop=["maps/map"])
    for change in (LAYERS, ("--distances", "nst")):
        assert train(tmp_path / "out", file, "--weight", 1, *change) == 2
        error = capsys.readouterr().err
        assert "has no maps; make a file with --layers STUDENT:map" in error
        assert error.count("\n") == 1


def test_files_of_something_else_are_refused(made, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(file_of(made).read_bytes()[:-100])
    flipped = bytearray(file_of(made).read_bytes())
    flipped[1000] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name, place in (("method", 10), ("flag", 8)):
        content = bytearray(file_of(made).read_bytes())
        content[content.rindex(b"PK\x01\x02") + place] ^= 99
        (tmp_path / f"{name}.npz").write_bytes(content)
    other = tmp_path / "other.npz"
    np.savez(other, features=np.zeros(3))
    arrays = dict(np.load(file_of(made)))
    objects = tmp_path / "objects.npz"
    np.savez(objects, **arrays, more=np.array([{}] * 3))
    of_statistics = tmp_path / "statistics.npz"
    statistics.write(of_statistics, {}, {"kind": "means"})
    for file, words in (
        (of_statistics, "holds statistics; pass it as --teacher-statistics"),
        (broken, "damaged"),
        (tmp_path / "flipped.npz", "damaged"),
        (tmp_path / "method.npz", "damaged"),
        (tmp_path / "flag.npz", "damaged"),
        (other, "no file of kddm outputs"),
        (objects, "no file of kddm outputs"),
        (tmp_path / "none.npz", "No such file"),
        (rewrite(made, tmp_path / "a.npz", dataset="mnist"), "is of mnist"),
        (rewrite(made, tmp_path / "b.npz", drawn="0"), "other views"),
    ):
        assert train(tmp_path / "out", file, "--distances", "l2", "--weight", 1) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_outputs_beyond_the_memory_are_refused(made, tmp_path, capsys, monkeypatch):
    compared = stored.read(file_of(made)).of(())  # without the stored map
    size = sum(array.nbytes for array in jax.tree.leaves(compared))
    monkeypatch.setattr(
        "kddm_jax.experiment.training.problems.Problem.memory", 4 * size - 4
    )
    options = ("--distances", "l2", "--weight", 1)
    assert train(tmp_path / "out", file_of(made), *options) == 2
    assert "GB; make a file of fewer --views" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "change", "words"),
    [
        ((), ("--views", "None"), "add --views"),
        (("--top", 10), (), "has 10 logits; lower it"),
        (("--top", 0), (), "at least 1"),
        (("--count", 3), (), "--count 3 is for --statistics"),
        (("--statistics", "means", "--half"), (), "--half is for outputs"),
        (("--statistics", "means", "--top", 2), (), "--top 2 is for outputs"),
        ((), ("--layers", "map:other"), "no layer 'other'"),
        ((), ("--teacher-outputs", "x.npz"), "pass --teacher instead"),
    ],
)
def test_what_is_not_stored(tmp_path, capsys, own, change, words):
    assert store(own, *LINE, *change, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
