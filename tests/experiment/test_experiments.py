"""Tests the experiment command: its files, resuming, and errors for mistakes.

The expensive runs are made once per session, by the first worker that needs them, and
share one cache of compiled programs.
"""

import functools
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from commands import (
    DISTANCE_NAMES,
    TINY,
    assert_same_arrays,
    call,
    command,
    final_arrays,
    results_of,
    table_lines,
    timeless,
    tiny,
    tree,
    unwanted_training,
)
from PIL import Image
from rich.console import Console

from kddm_jax import DISTANCES, checkpoint, data, resnet
from kddm_jax.data import archives
from kddm_jax.experiment import study
from kddm_jax.experiment.machine import records, terminal
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import rows, table
from kddm_jax.experiment.settings import Settings, change
from kddm_jax.experiment.training import models, pretrained, problems, runs, train
from kddm_jax.experiment.training.teacher import (
    find_checkpoint,
    find_teacher,
    known_digest,
    load_teacher,
)
from kddm_jax.experiment.training.train import Teacher
from kddm_jax.networks import surgery, torchvision, weights

once_for_all = functools.cache(models.shapes)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Makes all commands share the tracing of networks, of which the tests have few."""
    monkeypatch.setattr(models, "shapes", once_for_all)


# ---------------------------------------------------------------------------
# End to end.


def test_results_are_written(finished):
    results = results_of(finished / "out")
    assert results["eval_images"] == 100
    assert results["student_images"] == 128
    assert results["settings"]["distances"] == list(DISTANCE_NAMES)
    assert results["settings"]["width"] == 4
    assert [run["name"] for run in results["runs"]] == ["student", *DISTANCE_NAMES]
    for run in results["runs"]:
        assert run["seed"] == 1
        folder = finished / "out" / run["name"] / "seed1"
        assert run == json.loads((folder / "result.json").read_text())
        history = run["history"]
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        assert [*lines] == [{"step": 4 * r["epoch"], **r} for r in history]
        assert [record["epoch"] for record in history] == [1, 2]
        assert run["accuracy"] == history[-1]["test_accuracy"]
        assert run["best_accuracy"] == max(r["test_accuracy"] for r in history)
        assert run["best_accuracy"] == history[run["best_epoch"] - 1]["test_accuracy"]
        assert run["timing"]["seconds"] >= run["timing"]["seconds_to_first_step"] > 0
        for record in history:
            # Accuracies are of whole images; the training accuracy is the mean of four
            # batches.
            assert record["test_accuracy"] == round(record["test_accuracy"])
            assert record["accuracy"] * 128 == pytest.approx(
                round(record["accuracy"] * 128), abs=1e-4
            )
            weight, distance = run["weight"], record.get(run["name"], 0.0)
            assert record["loss"] == pytest.approx(
                record["task"] + weight * distance, rel=1e-5
            )
            assert 0.5 < record["task"] < 5  # about log(10), and not NaN
    distilled = {run["name"]: run for run in results["runs"][1:]}
    for name, run in distilled.items():
        assert run["weight"] == DISTANCES[name].weights["teacher"]
        assert run["settings"]["teacher"] == results["teacher"]["digest"]
        assert all(record[name] > 0 for record in run["history"])
    assert re.fullmatch("[0-9a-f]{16}", results["teacher"]["digest"])
    assert len(results["teacher"]["history"]) == 2
    assert results["teacher"]["pretrained"] is None
    environment = results["environment"]
    assert environment["jax"] == jax.__version__
    assert environment["device_count"] == 1
    assert environment["command"].startswith("python experiments/cifar.py --dataset")


def test_table_and_curves_are_written(finished):
    results = results_of(finished / "out")
    text = (finished / "out" / "table.md").read_text()
    assert text == table.markdown(results)
    from matplotlib import pyplot as plt

    image = plt.imread(finished / "out" / "curves.png")
    assert image.shape[:2] == (396, 1320)
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20


def test_table_is_printed(finished):
    stdout = (finished / "stdout.txt").read_text()
    assert "128 images for the teacher, 128 for students, 100 to evaluate" in stdout
    for name in ("teacher", "student seed 1", "w2 seed 1", "w2_gaussian seed 1"):
        for epoch in (1, 2):
            assert len(re.findall(rf"^{name}: epoch {epoch} ", stdout, re.M)) == 1
    lines = "\n".join(table_lines(stdout))
    results = results_of(finished / "out")
    for run in results["runs"]:
        assert re.search(
            rf"│ {re.escape(run['title'])} +│ +{run['accuracy']:.2f} │", lines
        )
    assert re.search(rf"│ teacher +│ +{results['teacher']['accuracy']:.2f} │", lines)


def test_lines_are_not_broken(finished):
    """Logs are searched by line, so lines are never broken."""
    stdout = (finished / "stdout.txt").read_text()
    for line in stdout.splitlines():
        if re.search(r"epoch \d", line):
            assert re.search(r" [1-9]\d* images/s$| %$", line), line


@pytest.mark.slow
def test_same_command_trains_nothing(shared, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("seed*/**/*")}
    assert len(before) > 20
    first = (finished / "stdout.txt").read_text()
    again = command(*tiny("out"), cwd=finished)
    assert again.returncode == 0, again.stderr
    assert not re.search(r"epoch \d", again.stdout)
    assert table_lines(again.stdout) == table_lines(first) != []
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("seed*/**/*")} == before


# ---------------------------------------------------------------------------
# Resume and determinism.


@pytest.mark.slow
def test_killed_run_was_in_the_middle(resumed):
    """The next test is meaningful only if the run was killed within an epoch."""
    killed = resumed / "killed"
    assert (killed / "student" / "seed1" / "result.json").exists()
    assert not (killed / "w2" / "seed1" / "result.json").exists()
    assert not (killed / "w2_gaussian").exists()
    latest = checkpoint.latest(killed / "w2" / "seed1" / "checkpoints")
    assert latest.name == "step-00000001"
    stdout = (resumed / "stdout.txt").read_text()
    for epoch in (1, 2):
        assert f"w2 seed 1: epoch {epoch} " in stdout
    for absent in ("teacher: epoch", "student seed 1: epoch"):
        assert absent not in stdout


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(finished, resumed):
    assert_same_arrays(
        final_arrays(resumed / "out", "w2"), final_arrays(finished / "out", "w2")
    )
    left, right = (
        json.loads((folder / "out" / "w2" / "seed1" / "result.json").read_text())
        for folder in (resumed, finished)
    )
    assert left["history"] == right["history"]
    assert timeless(left) == timeless(right)


@pytest.mark.slow
def test_same_command_in_another_folder_gives_the_same(finished, resumed):
    """Compares the runs that were not interrupted."""
    for name, seed in (("teacher", 0), ("student", 1), ("w2_gaussian", 1)):
        assert_same_arrays(
            final_arrays(resumed / "out", name, seed),
            final_arrays(finished / "out", name, seed),
        )
    left, right = (results_of(folder / "out") for folder in (resumed, finished))
    assert timeless(left) == timeless(right)


def test_killed_between_last_checkpoint_and_result(shared, finished, tmp_path):
    """The last checkpoint contains everything that a result needs."""
    run_folder = finished / "out" / "w2" / "seed1"
    shutil.copytree(run_folder, tmp_path / "w2" / "seed1")
    (tmp_path / "w2" / "seed1" / "result.json").unlink()
    settings = parse([*map(str, tiny(tmp_path)), "--devices", "1"])
    problem = problems.prepare(settings, tmp_path)
    digest = results_of(finished / "out")["teacher"]["digest"]
    run = next(r for r in runs.student_runs(problem, digest) if r.name == "w2")
    model = problem.model("small_network:Small", 4)
    teacher = Teacher(model, 4, {}, digest, 0.0, None)
    runs.check_distances(problem, model)
    result = train.train(problem, run, model, teacher, unwanted_training)
    assert timeless(result) == timeless(
        json.loads((run_folder / "result.json").read_text())
    )


@pytest.mark.slow
def test_two_devices_are_one(shared, finished, tmp_path, capsys):
    """Results depend on the global batch, not on how many devices share it."""
    assert len(jax.local_devices()) >= 2
    shutil.copytree(finished / "out" / "student", tmp_path / "out" / "student")
    teacher = finished / "out" / "teacher" / "seed0"
    line = (*tiny(tmp_path / "out"), "--distances", "w2_gaussian")
    status = call(*line, "--devices", 2, "--teacher", teacher)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert "2 cpu device(s)" in out
    assert "student seed 1: epoch" not in out  # reused from one device
    one, two = results_of(finished / "out"), results_of(tmp_path / "out")
    assert two["environment"]["device_count"] == 2
    assert two["teacher"]["accuracy"] == one["teacher"]["accuracy"]
    assert two["teacher"]["digest"] == one["teacher"]["digest"]
    left, right = (
        next(run for run in results["runs"] if run["name"] == "w2_gaussian")
        for results in (one, two)
    )
    for a, b in zip(left["history"], right["history"], strict=True):
        # An image between two classes may change its class.
        assert a.pop("accuracy") == pytest.approx(b.pop("accuracy"), abs=1.5 / 128)
        assert a.pop("test_accuracy") == pytest.approx(b.pop("test_accuracy"), abs=1.5)
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.slow
def test_groups_of_devices_are_another_run(shared, finished, tmp_path, capsys):
    shutil.copytree(finished / "out" / "student", tmp_path / "out" / "student")
    teacher = finished / "out" / "teacher" / "seed0"
    line = (*tiny(tmp_path / "out"), "--distances", "w2_gaussian")
    line = (*line, "--teacher", teacher, "--devices", 2)
    assert call(*line, "--distance-group", 1) == 0
    whole, groups = (
        next(run for run in results_of(out)["runs"] if run["name"] == "w2_gaussian")
        for out in (finished / "out", tmp_path / "out")
    )
    assert groups["settings"]["group_images"] == 16
    assert whole["settings"]["group_images"] is None
    of_batch, of_group = (run["history"][0]["w2_gaussian"] for run in (whole, groups))
    assert of_group > 1.1 * of_batch  # smaller samples are further apart
    assert call(*line) == 2
    assert "was made with group_images=16" in capsys.readouterr().err


@pytest.mark.slow
def test_streamed_run_is_the_resident_one(shared, finished, tmp_path):
    """Images above the limit are streamed, with bitwise equal results."""
    folder = tmp_path / "out"
    line = (*tiny(folder), "--distances", "w2_gaussian")
    for run in ("student", "teacher"):
        shutil.copytree(finished / "out" / run, folder / run)
    done = command(*line, "--stream-above", 0.001, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images are streamed from the host" in done.stdout
    one, two = (root / "w2_gaussian" / "seed1" for root in (finished / "out", folder))
    left, right = (json.loads((r / "result.json").read_text()) for r in (one, two))
    assert left["history"] == right["history"]
    arrays = [
        checkpoint.restore_arrays(checkpoint.latest(r / "checkpoints"))[0]
        for r in (one, two)
    ]
    chex.assert_trees_all_equal(*arrays)


def test_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert call(*TINY, "--compilation-cache", "None", "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "stopped; rerun the command to resume\n"


def test_live_bar():
    """On a terminal, each run has a bar with its newest numbers, and no other lines."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200, color_system=None)
    reporter = terminal.Reporter(console, live=True)
    run = runs.Run("w2", 3, 1e-3, 2, np.arange(4), Settings(), {})
    step = {
        "loss": np.array([1.5]),
        "w2": np.array([0.25]),
        "accuracy": np.array([0.5]),
    }
    epoch = {"epoch": 1, "loss": 1.25, "w2": 0.125, "accuracy": 0.75}
    with reporter.progress:
        reporter(run, epoch=0, done=1, total=4, metrics=step, speed=10.0)
        reporter(
            run, epoch=0, done=2, total=4, metrics={**epoch, "test_accuracy": 81.0},
            speed=11.0,
        )  # fmt: skip
    shown = file.getvalue()
    assert "w2 seed 3" in shown
    assert "loss 1.250  distance 0.125  train 75.0 %  eval 81.0 %  11 images/s" in shown
    assert "epoch 1" not in shown
    reporter.remove(run)
    assert reporter.progress.tasks == []
    reporter.remove(run)  # it has none now


@pytest.mark.parametrize(("speed", "end"), [(11.0, "  11 images/s\n"), (0.0, "\n")])
def test_an_epoch_that_only_compiled_has_no_speed(speed, end):
    file = io.StringIO()
    reporter = terminal.Reporter(Console(file=file, width=200), live=False)
    run = runs.Run("student", 3, 0.0, 2, np.arange(4), Settings(), {})
    metrics = {"epoch": 1, "loss": 1.25, "accuracy": 0.75}
    reporter(run, epoch=0, done=2, total=4, metrics=metrics, speed=speed)
    assert file.getvalue().endswith(f"train 75.0 %{end}")


def test_folders_from_before_schedules_are_read_as_constant(tmp_path, monkeypatch):
    problem = problems.prepare(parse(list(map(str, TINY))), tmp_path)
    *_, run = runs.student_runs(problem, None)
    assert run.identity["weight_schedule"] == "constant"
    older = {k: v for k, v in run.identity.items() if k != "weight_schedule"}
    run.folder(tmp_path).mkdir(parents=True)
    (run.folder(tmp_path) / "run.json").write_text(json.dumps(older))
    runs.check_folder(run, tmp_path)
    changed = replace(run, identity={**run.identity, "weight_schedule": "decay"})
    with pytest.raises(UserError, match="weight_schedule=constant"):
        runs.check_folder(changed, tmp_path)


# ---------------------------------------------------------------------------
# Mistakes.


def weights_file(folder, seed=0, **architecture):
    """Writes a file of torchvision's names, by default with colours and 7 classes."""
    fitting = {"blocks": (1, 1, 1, 1), "stem": "cifar", "width": 4, "num_classes": 7}
    given = torchvision.Architecture(**{**fitting, **architecture})
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda of: rng.uniform(0.1, 0.2, of.shape).astype(np.float32), given.shapes()
    )
    path = folder / f"weights{seed}.npz"
    weights.save(path, variables)
    return path


def with_weights(who, **architecture):
    """Returns options that start a network from such a file."""
    return lambda tmp_path, trained: [
        f"--pretrained-{who}",
        weights_file(tmp_path, **architecture),
    ]


def damaged_weights(tmp_path, trained):
    path = weights_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    return ["--pretrained-teacher", path]


def started_from_others(tmp_path, trained):
    """Makes the folder of a student that started from other weights."""
    return [*made_with(pretrained="f" * 64)(tmp_path, trained)]


def started_afresh(tmp_path, trained):
    """Makes folders without pretrained weights, as of versions without the option."""
    made_with()(tmp_path, trained)
    for path in (tmp_path / "out").rglob("run.json"):
        found = json.loads(path.read_text())
        del found["pretrained"]
        records.write_json(path, found)
    return ["--pretrained-student", weights_file(tmp_path)]


def converted_teacher(tmp_path, trained):
    """Makes a checkpoint from such a file; its classes are not those of the digits."""
    weights.convert(weights_file(tmp_path, channels=1), tmp_path / "converted")
    return ["--teacher", tmp_path / "converted"]


def write_idx(path, array):
    shape = np.asarray(array.shape, ">u4").tobytes()
    header = bytes([0, 0, 8, array.ndim]) + shape
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def cifar_folder(root, label):
    """Makes an unpacked CIFAR-10 with two images per file."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    record = bytes([3, *(3072 * [0])])
    wrong = bytes([label, *(3072 * [0])])
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(record + record)
    (folder / "test_batch.bin").write_bytes(record + wrong)
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta.txt").write_text("\n".join(names))
    return folder


def cut_archive(tmp_path, trained):
    folder = cifar_folder(tmp_path, 3)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    for file in folder.glob("*.bin"):
        noise = np.random.default_rng(0).integers(0, 10, 2 * 3073, np.uint8)
        file.write_bytes(noise.tobytes())
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    return ["--dataset", "cifar10", "--data-dir", tmp_path]


def wrong_label(tmp_path, trained):
    cifar_folder(tmp_path, 12)
    return ["--dataset", "cifar10", "--data-dir", tmp_path]


def other_teacher(tmp_path, trained):
    """A teacher of other data; the rest of its settings is the same."""
    return ["--teacher", trained / "mnist"]


def cut_teacher(tmp_path, trained):
    """Makes a copy of a single checkpoint, and truncates it."""
    path = tmp_path / "step-00000002"
    shutil.copytree(trained / "digits" / "checkpoints" / path.name, path)
    file = max(
        (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1])
    return ["--teacher", path]


def made_with(**changes):
    """Makes a folder of runs of all kinds, with other settings."""

    def make(tmp_path, trained):
        out = tmp_path / "out"
        settings = parse([*TINY, "--devices", "1"])
        problem = problems.prepare(settings, out)
        every = [runs.teacher_run(problem), *runs.student_runs(problem, "0" * 16)]
        for run in every:
            folder = run.folder(out)
            folder.mkdir(parents=True)
            known = {k: v for k, v in changes.items() if k in run.identity}
            records.write_json(folder / "run.json", {**run.identity, **known})
            (folder / "mine").write_text("mine")
        if "teacher" in changes:  # the teacher was given, not trained
            shutil.rmtree(out / "teacher")
            return ["--teacher", trained / "digits"]
        return []

    return make


def out_is_a_file(tmp_path, trained):
    (tmp_path / "out").write_text("mine")
    return []


def unreadable_record(tmp_path, trained):
    folder = tmp_path / "out" / "w2" / "seed1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    return []


# Name: options, or a function that prepares the case and returns options; and parts of
# the message, which names the thing, what was found, and what to do.
def a_model(*lines):
    """Writes a user's function into the working folder."""

    def make(tmp_path, trained):
        (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
        sys.modules.pop("mine", None)
        return ["--student-model", "mine:make"]

    return make


MISTAKES = {
    "dataset": ("--dataset cifar11", ["'cifar11'", "digits, cifar10"]),
    "distance": ("--distances w3", ["'w3'", "w2, cw2"]),
    "distance twice": ("--distances w2 w2", ["--distances", "twice", "w2"]),
    "recipe": ("--recipe weak", ["'weak'", "paper, strong, laptop"]),
    "model": ("--student-model ResNet50", ["student.model", "'ResNet50'", "ResNet18"]),
    "model of no module": (
        "--student-model nowhere:make",
        ["'nowhere:make'", "No module named 'nowhere'", "working folder"],
    ),
    "model without name": (
        "--student-model kddm_jax.networks.mlp:Nothing",
        ["'kddm_jax.networks.mlp:Nothing'", "Nothing", "working folder"],
    ),
    "model without classes": (
        "--student-model kddm_jax.data.augment:normalize",
        ["kddm_jax.data.augment:normalize", "num_classes"],
    ),
    "model that is none": (
        a_model("def make(num_classes): return num_classes"),
        ["mine:make", "gives int", "flax.linen.Module"],
    ),
    "model that gives one array": (
        a_model(
            "from flax import linen as nn",
            "class make(nn.Module):",
            "    num_classes: int = 3",
            "    @nn.compact",
            "    def __call__(self, images, train=False):",
            "        return nn.Dense(self.num_classes)(images[:, 0, 0])",
        ),
        ["mine:make", r"\[8, 8, 1\]", "logits, features and maps"],
    ),
    "weights for another kind": (
        "--teacher-model StudentMLP --student-model StudentMLP "
        "--pretrained-student weights.npz",
        ["--pretrained-student weights.npz", "StudentMLP", "choose a ResNet"],
    ),
    "dtype": ("--dtype float16", ["dtype", "'float16'", "bfloat16"]),
    "schedule": ("--schedule linear", ["schedule", "'linear'", "cosine"]),
    "data cut short": (cut_archive, ["tar.gz", "[0-9,]+ bytes", "download it"]),
    "label": (wrong_label, ["test_batch.bin", "label 12", "labels 0 to 9"]),
    "no teacher": ("--teacher nowhere", ["no checkpoint", "nowhere", "--teacher out"]),
    "teacher cut short": (cut_teacher, ["step-00000002", "damaged", "delete"]),
    "teacher of other data": (other_teacher, ["mnist", "digits", "pass a teacher"]),
    "teacher of other stem": (
        lambda tmp_path, trained: ["--teacher", trained / "digits", "--stem=imagenet"],
        ["cifar stem", "--stem cifar"],
    ),
    "teacher of another network": (
        lambda tmp, trained: [
            "--teacher",
            trained / "digits",
            "--teacher-model=ResNet34",
        ],
        ["has --teacher-model ResNet9, this command says ResNet34; leave .* out"],
    ),
    "teacher of another width": (
        lambda tmp, trained: ["--teacher", trained / "digits", "--teacher-width", 8],
        ["has --teacher-width 4, this command says 8; leave --teacher-width out"],
    ),
    "teacher wider": (
        lambda tmp_path, trained: ["--teacher", trained / "digits", "--width", 8],
        ["distance w2", "64 and 32", "projectors"],
    ),
    "teacher of other classes": (
        converted_teacher,
        ["converted", "num_classes=7", "10", "--pretrained-teacher weights0.npz"],
    ),
    "trained teacher and weights": (
        "--teacher a --pretrained-teacher b.npz",
        ["--teacher a", "leave out", "--pretrained-teacher b.npz"],
    ),
    "no weights": (
        "--pretrained-student nowhere.npz",
        ["--pretrained-student", "cannot read nowhere.npz", "No such file"],
    ),
    "weights cut short": (damaged_weights, ["weights0.npz: damaged", "get it again"]),
    "weights in a folder": (
        lambda tmp_path, trained: ["--pretrained-teacher", trained / "digits"],
        ["--pretrained-teacher", "digits is a folder", "kddm convert"],
    ),
    "weights of other stem": (
        with_weights("teacher", stem="imagenet"),
        ["--pretrained-teacher", "imagenet stem", "--stem imagenet"],
    ),
    "weights wider": (
        with_weights("student", width=6),
        ["--pretrained-student", "width 6", "the student 4", "--width 6"],
    ),
    "weights deeper": (
        with_weights("student", blocks=(1, 1, 2, 1)),
        ["--pretrained-student", r"\(1, 1, 2, 1\)", "ResNet9", "--student-model"],
    ),
    "weights of other channels": (
        with_weights("student", channels=2),
        ["--pretrained-student", "2 channels", "these have 1"],
    ),
    "weights not of a ResNet": (
        lambda tmp_path, trained: ["--pretrained-student", trained / "a.txt"],
        ["--pretrained-student", "a.txt", ".safetensors, .npz, .pth"],
    ),
    "other weights": (started_from_others, ["pretrained=ffff", "None", "--out"]),
    "weights after all": (
        started_afresh,
        ["student", "pretrained=None", "this command says [0-9a-f]{64};", "--out"],
    ),
    "weight": ("--weight -1", ["--weight", "-1", ">= 0"]),
    "weights": ("--weights w2 -1", ["w2", "-1", ">= 0"]),
    "nan weight": ("--weight nan", ["--weight", "nan", ">= 0"]),
    "nan weights": ("--weights w2 nan", ["w2", "nan", ">= 0"]),
    "infinite weight": ("--weight inf", ["--weight", "inf", ">= 0"]),
    "no default weight": (
        "--distances w2 --normalization unit",
        ["w2 has no default weight with --normalization unit", "--weights w2 NUMBER"],
    ),
    "always zero": (
        "--distances mmd_linear --normalization centered --weight 1",
        ["mmd_linear: .*'centered' makes mmd_linear zero", "take 'teacher', 'unit'"],
    ),
    "normalization": (
        "--normalization student",
        ["normalization 'student'", "teacher, unit, centered, standardized"],
    ),
    "weight of none": ("--weights cw2 1", ["cw2", "w2, w2_gaussian"]),
    "batch": (
        "--batch-size 33 --devices 2",
        ["--batch-size 33", "2 devices", "multiple of 2"],
    ),
    "devices": ("--devices 9", ["--devices 9", "has 2", "lower"]),
    "weight schedule": (
        "--weight-schedule rise",
        ["weight_schedule 'rise'", "constant, warmup, decay"],
    ),
    "group": (
        "--distance-group 3 --devices 2",
        ["--distance-group 3", "2 devices", "divisor of 2"],
    ),
    "no group": ("--distance-group 0", ["--distance-group", "positive", "0"]),
    "images of a group": (
        "--devices 2 --distance-group 1 --distances linear_projection",
        ["linear_projection", "16 samples", "--projector"],
    ),
    "student images": (
        "--student-images 129",
        ["--student-images 129", "128 images", "lower"],
    ),
    "train images": ("--train-images 9999", ["--train-images", "1442", "lower"]),
    "no batch": (
        "--student-images 31",
        ["--student-images 31", "batch of 32", "lower --batch-size"],
    ),
    "test images": ("--test-images 356", ["--test-images 356", "355", "lower"]),
    "held out": ("--held-out 1442", ["--held-out", "1442", "lower"]),
    "no images": ("--student-images 0", ["--student-images", "positive", "0"]),
    "image size": ("--image-size 0", ["--image-size", "positive", "0"]),
    "rate": ("--lr nan", ["--lr", "positive", "nan"]),
    "drops": ("--drops 0.5 1", ["--drops", "0.5, 1", "< 1"]),
    "area": ("--smallest-area 0", ["--smallest-area", "> 0 and <= 1"]),
    "warmup": ("--warmup 2", ["--warmup", "2", "< 1"]),
    "padding": ("--padding -1", ["--padding", "-1", ">= 0"]),
    "decay": ("--weight-decay -1", ["--weight-decay", "-1", ">= 0"]),
    "no seed": ("--seeds", ["--seeds", "at least one"]),
    "seed": ("--seeds -1", ["--seeds", "-1"]),
    "large seed": ("--seeds 4294967296", ["--seeds", "4294967296"]),
    "seed twice": ("--seeds 1 1", ["--seeds", "twice", "1"]),
    "other rate": (made_with(lr=0.2), ["lr=0.2", "says 0.02", "--out", "delete"]),
    "other weight": (made_with(weight=0.5), ["w2", "weight=0.5", "--out"]),
    "other teacher": (
        made_with(teacher="f" * 16),
        ["w2", "teacher=ffff", "--out"],
    ),
    "other group": (made_with(group_images=16), ["w2", "group_images=16", "--out"]),
    "other images": (made_with(data="f" * 16), ["data=ffff", "--out"]),
    "unreadable": (unreadable_record, ["run.json", "not readable", "--out"]),
    "out is a file": (out_is_a_file, ["--out", "out", "choose another"]),
    "out in a file": (
        lambda *a: [*out_is_a_file(*a), "--out", a[0] / "out" / "below"],
        ["--out", "below", "choose another"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, tmp_path, trained, capsys, monkeypatch):
    make, expected = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds a folder
    monkeypatch.setitem(archives.RECORDS, "cifar10", (2, 2))
    more = make.split() if isinstance(make, str) else make(tmp_path, trained)
    before = tree(tmp_path)
    monkeypatch.setattr(train, "train", unwanted_training)
    line = (*TINY, "--compilation-cache", "None", "--devices", 1, "--out", "out")
    assert call(*line, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in expected:
        assert re.search(part, error), (part, error)
    # Nothing was written or changed.
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # written by Python
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_teacher_that_is_not_finite_is_named(tmp_path, trained, capsys):
    """The message blames neither the student's weights nor its learning rate."""
    arrays, meta = checkpoint.restore_arrays(
        checkpoint.latest(trained / "small" / "checkpoints")
    )
    arrays = jax.tree.map(lambda a: np.full_like(a, np.nan), arrays)
    checkpoint.save(tmp_path / "teacher" / "checkpoints", 2, arrays, meta)
    line = (*tiny(tmp_path / "out"), "--teacher", tmp_path / "teacher", "--devices", 1)
    assert call(*line, "--distances", "l2", "--normalization", "teacher") != 0
    error = capsys.readouterr().err
    assert "features or logits of the teacher not finite at step 1 " in error
    assert "check the teacher's weights" in error
    assert "--lr" not in error


def test_two_commands_in_one_folder(tmp_path, capsys, monkeypatch):
    """The second command is refused while the first runs, and accepted afterwards."""
    out = tmp_path / "out"
    line = (*TINY, "--compilation-cache", "None", "--devices", 1, "--out", out)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    out.mkdir()
    with study.only_one(out):
        assert call(*line) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: --out .*out: another command is running", error), error
    assert error.count("\n") == 1
    assert call(*line) == 130


# A program that is interrupted, or finds the disk full, after the first checkpoint.
TROUBLE = """
import os, shutil, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
what = sys.argv.pop(1)
from kddm_jax.experiment import distill
from kddm_jax import checkpoint
save = checkpoint.save
def save_then_trouble(folder, *arguments, **options):
    path = save(folder, *arguments, **options)
    if what == "ctrl-c":
        os.kill(os.getpid(), signal.SIGINT)
    else:
        full = shutil.disk_usage(folder)._replace(free=4096)
        shutil.disk_usage = lambda folder: full
    return path
checkpoint.save = save_then_trouble
sys.exit(distill.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("ctrl-c", 130, "stopped; rerun the command to resume"),
        ("no space", 2, r"error: cannot write .* 4,096 left; free space"),
    ],
)
def test_an_error_keeps_the_last_checkpoint(
    what, status, message, shared, finished, tmp_path
):
    """The error is one line, and the same command finishes when it is repeated."""
    line = (*tiny("out"), "--checkpoint-seconds", "0", "--distances")
    trouble = (what, *line)
    done = command(*trouble, script=("-c", TROUBLE), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert re.search(message, done.stderr)
    assert done.stderr.count("\n") == 1
    checkpoints = tmp_path / "out" / "teacher" / "seed0" / "checkpoints"
    assert checkpoint.latest(checkpoints).name == "step-00000001"
    done = command(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left, right = (
        json.loads((folder / "teacher" / "seed0" / "result.json").read_text())
        for folder in (finished / "out", tmp_path / "out")
    )
    assert left["history"] == right["history"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--no-such-option", "1"), ["no-such-option"]),
        (("--epochs", "many"), ["--epochs", "many"]),
        (("--out", "/sys/kddm"), ["--out", "/sys/kddm", "choose another"]),
        (("--dataset", "cifar10"), ["cifar10 was not found", "--dataset digits"]),
    ],
)
def test_mistake_in_the_real_command(options, parts, tmp_path):
    done = command(*TINY, "--compilation-cache", "None", *options, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


MODEL_OF_MINE = """
from flax import linen as nn
from kddm_jax.adapters import Outputs

class Mine(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Dense(16)(images.reshape(images.shape[0], -1)))
        return Outputs(nn.Dense(self.num_classes)(x), x, {"hidden": x})
"""


@pytest.mark.slow
def test_model_of_mine_is_teacher_and_student(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "networks.py").write_text(MODEL_OF_MINE)
    mine = ("--teacher-model", "networks:Mine", "--student-model", "networks:Mine")
    line = (*TINY, *mine, "--compilation-cache", "None", "--devices", 1)
    assert call(*line, "--distances", "w2_gaussian", "--out", "out") == 0
    results = results_of(tmp_path / "out")
    assert results["teacher"]["model"] == "Mine"
    assert results["settings"]["student_model"] == "networks:Mine"
    assert [r["name"] for r in results["runs"]] == ["student", "w2_gaussian"]
    last = results["runs"][1]["history"][-1]
    assert last["w2_gaussian"] < results["runs"][1]["history"][0]["w2_gaussian"]


def test_settings_of_data_reach_the_reader(tmp_path):
    digits = data.load("digits")
    pixels = [Image.fromarray(image[..., 0]) for image in digits.train_images[:40]]
    made = []
    for folder, first in (("one", pixels[0]), ("other", pixels[1])):
        for i, image in enumerate([first, *pixels[2:]]):
            path = tmp_path / folder / ("train", "test")[i % 2] / "ab"[i // 2 % 2]
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{i}.png")
        (path / "damaged.png").write_bytes(b"")
        line = (*TINY, "--dataset", "folder", "--data-dir", tmp_path / folder)
        sizes = ("--batch-size", 4, "--train-images", 18, "--student-images", 18)
        sizes = (*sizes, "--test-images", 19)
        more = ("--image-size", 6, "--skip-damaged", "--no-progress", "--devices", 1)
        settings = parse([str(word) for word in (*line, *sizes, *more)])
        with pytest.warns(UserWarning, match="left out 1 damaged"):
            made.append(problems.prepare(settings, tmp_path / "out"))
    assert made[0].dataset.train_images.shape == (20, 6, 6, 1)
    assert made[0].resident[0].shape == (20, 6, 6, 1)
    # Folders with other images give other runs, even if all settings are equal.
    identities = [runs.teacher_run(problem).identity for problem in made]
    differ = {k for k in identities[0] if identities[0][k] != identities[1][k]}
    assert differ == {"data"}


def test_mistakes_start_from_a_good_command(tmp_path, monkeypatch, trained):
    """Without a mistake, the command of the previous test starts to train."""
    monkeypatch.chdir(tmp_path)
    made_with()(tmp_path, trained)
    shutil.rmtree(tmp_path / "out" / "teacher")
    shutil.rmtree(tmp_path / "out" / "w2")
    shutil.rmtree(tmp_path / "out" / "w2_gaussian")
    monkeypatch.setattr(train, "train", unwanted_training)
    line = (*TINY, "--compilation-cache", "None", "--devices", 1, "--out", "out")
    with pytest.raises(AssertionError, match="something was trained"):
        call(*line)


def test_unknown_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*TINY, "--epoch", "3") == 2
    said = "".join(capsys.readouterr())
    assert "--epoch" in said
    assert "--help" in said
    assert tree(tmp_path) == {}


def test_missing_data_is_one_line_with_a_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = (*TINY, "--compilation-cache", "None", "--dataset", "cifar100")
    assert call(*line, "--out", "out", "--data-dir", tmp_path / "nowhere") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cifar100 was not found")
    assert str(tmp_path / "nowhere") in error
    assert "cifar-100-binary.tar.gz" in error
    assert "--dataset digits" in error
    assert tree(tmp_path) == {}


def test_missing_data_names_every_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KDDM_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    line = (*TINY, "--compilation-cache", "None", "--dataset", "mnist")
    assert call(*line, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mnist was not found")
    assert str(tmp_path / "data") in error
    assert str(tmp_path / ".cache" / "kddm_jax") in error
    assert "--dataset digits" in error
    assert tree(tmp_path) == {}


def test_batch_that_the_devices_do_not_divide(tmp_path, monkeypatch, capsys):
    """Without --devices all devices are used, here two."""
    monkeypatch.chdir(tmp_path)
    line = (*TINY, "--compilation-cache", "None", "--batch-size", "33", "--out", "out")
    assert call(*line) == 2
    assert capsys.readouterr().err == (
        "error: --batch-size 33 does not divide among 2 devices; "
        "choose a multiple of 2\n"
    )
    assert tree(tmp_path) == {}


def test_damaged_teacher_without_an_older_one(tmp_path, trained, monkeypatch, capsys):
    """Warnings are single lines, too, without excerpts of source code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "digits", tmp_path / "teacher")
    (tmp_path / "teacher/checkpoints/step-00000002/manifest.json").unlink()
    before = tree(tmp_path)
    line = (*TINY, "--compilation-cache", "None", "--out", "out")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert call(*line, "--teacher", "teacher") == 2
    *warned, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: all checkpoints in teacher/checkpoints are damaged")
    assert [line.partition(":")[0] for line in warned] == ["warning"]
    assert "step-00000002" in warned[0]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("given", ["digits", "digits/checkpoints"])
def test_teacher_by_run_or_checkpoint_folder(given, trained):
    path = trained / "digits" / "checkpoints" / "step-00000002"
    assert find_checkpoint(trained / given) == path
    assert find_checkpoint(path) == path


def test_given_teacher_is_read_once(trained, tmp_path, monkeypatch):
    """Reading 85 MB of arrays also means hashing them."""
    read, restore = [], checkpoint.restore_arrays
    monkeypatch.setattr(
        checkpoint, "restore_arrays", lambda path: read.append(path) or restore(path)
    )
    monkeypatch.setattr(problems, "evaluate", lambda *arguments: {"accuracy": 12.5})
    line = (*TINY, "--compilation-cache", "None", "--teacher", trained / "digits")
    problem = problems.prepare(parse([*map(str, line)]), tmp_path)
    source = find_teacher(problem)
    teacher = load_teacher(source, unwanted_training)
    assert (teacher.digest, teacher.accuracy) == (known_digest(source), 12.5)
    assert [path.name for path in read] == ["step-00000002"]


# ---------------------------------------------------------------------------
# Weights of a file.


def fitted(path, seed, blocks=(1, 1, 1, 1)):
    """Returns the variables that a network of the digits starts from, step by step."""
    grown, head = jax.random.split(jax.random.key(seed))
    variables = surgery.grow(grown, weights.load(path), blocks)
    return surgery.replace_head(head, surgery.sum_channels(variables), 10)


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def states(monkeypatch):
    """Collects the variables that runs start from, and ends the runs there."""
    found = []

    def stop(variables, *arguments, **options):
        found.append(variables)
        raise RunError("seen enough")

    monkeypatch.setattr(train.train_step, "create_state", stop)
    return found


@pytest.mark.slow
def test_runs_start_from_the_file(trained, tmp_path, capsys, states):
    path = weights_file(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    line = (*TINY, "--compilation-cache", "None", "--out", tmp_path / "out")
    assert call(*line, "--pretrained-teacher", path) == 1
    said = f"weights0.npz (sha256 {digest[:8]})"
    summed = "first convolution summed over the colours for grey images"
    replaced = "7 classes: head replaced by one for 10"
    spoken = f"starts from {said}; {summed}; {replaced}\n"
    out = capsys.readouterr().out
    assert f"teacher {spoken}" in out
    assert "student starts" not in out
    given = ("--teacher", trained / "digits", "--pretrained-student", path)
    assert call(*line, *given) == 1
    out = capsys.readouterr().out
    assert f"student {spoken}" in out
    assert "teacher starts" not in out
    teacher, student = states
    assert_same_tree(teacher, fitted(path, 0))
    assert_same_tree(student, fitted(path, 1))
    for name, seed in (("teacher", 0), ("student", 1)):
        record = tmp_path / "out" / name / f"seed{seed}" / "run.json"
        assert json.loads(record.read_text())["pretrained"] == digest


@pytest.mark.slow
def test_another_file_is_another_run(tmp_path, capsys, states):
    paths = [weights_file(tmp_path, seed) for seed in (0, 1)]
    first, other = (hashlib.sha256(p.read_bytes()).hexdigest() for p in paths)
    line = (*TINY, "--compilation-cache", "None", "--out", tmp_path / "out")
    assert call(*line, "--pretrained-teacher", paths[0]) == 1
    shutil.move(paths[0], tmp_path / "renamed.npz")  # the same file with another name
    assert call(*line, "--pretrained-teacher", tmp_path / "renamed.npz") == 1
    capsys.readouterr()
    assert call(*line, "--pretrained-teacher", paths[1]) == 2
    error = capsys.readouterr().err
    assert f"was made with pretrained={first}, this command says {other}" in error
    assert call(*line) == 2
    assert f"{first}, this command says None" in capsys.readouterr().err
    assert len(states) == 2


def test_weights_are_grown(tmp_path):
    path = weights_file(tmp_path, num_classes=10, channels=3)
    model = resnet.ResNet18(width=4)
    found = pretrained.load("--pretrained-teacher", path, model, 3)
    assert found.changes == (
        "ResNet9 grown to ResNet18, the added blocks start as the identity",
    )
    assert str(found).endswith(f"); {found.changes[0]}")
    key = jax.random.split(jax.random.key(5))[0]
    expected = surgery.grow(key, weights.load(path), (2, 2, 2, 2))
    assert_same_tree(found.variables_of(5), expected)


def test_weights_that_fit_are_left_alone(tmp_path):
    path = weights_file(tmp_path, num_classes=10, channels=1)
    model = resnet.ResNet9(width=4)
    found = pretrained.load("--pretrained-teacher", path, model, 1)
    assert found.changes == ()
    assert_same_tree(found.variables_of(3), weights.load(path))
    assert re.fullmatch(r"weights0\.npz \(sha256 [0-9a-f]{8}\)", str(found))


@pytest.mark.parametrize(
    ("who", "option"), [("teacher", "--teacher-width"), ("student", "--width")]
)
def test_weights_of_another_width(tmp_path, who, option):
    path = weights_file(tmp_path)
    with pytest.raises(UserError, match=f"the {who} 8; pass {option} 4$"):
        pretrained.load(f"--pretrained-{who}", path, resnet.ResNet9(width=8), 3)


def test_students_of_one_seed_share_their_head(tmp_path):
    path = weights_file(tmp_path)
    found = pretrained.load("--x", path, resnet.ResNet9(width=4), 3)
    head = lambda seed: found.variables_of(seed)["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(head(1), head(1))
    assert (head(1) != head(2)).any()


@pytest.mark.slow
def test_converted_teacher_is_taken(trained, tmp_path, monkeypatch):
    """Converting to a file and back gives the same arrays."""
    weights.convert(trained / "digits", tmp_path / "a.safetensors")
    weights.convert(tmp_path / "a.safetensors", tmp_path / "converted")
    monkeypatch.setattr(problems, "evaluate", lambda *arguments: {"accuracy": 12.5})
    found = []
    for folder in (trained / "digits", tmp_path / "converted"):
        line = (*TINY, "--compilation-cache", "None", "--teacher", folder)
        problem = problems.prepare(parse([*map(str, line)]), tmp_path)
        found.append(load_teacher(find_teacher(problem), unwanted_training))
    assert found[0].digest == found[1].digest
    assert (found[1].model, found[1].width) == (found[0].model, 4)
    settings = parse([*map(str, line), "--held-out", "100"])
    with pytest.raises(UserError, match="may have seen these images"):
        find_teacher(problems.prepare(settings, tmp_path))
    allowed = change(settings, teacher_saw_held_out=True)
    assert find_teacher(problems.prepare(allowed, tmp_path)).given


def test_teacher_of_other_classes(trained, tmp_path, monkeypatch):
    """The message gives numbers of classes instead of the name of a parameter."""
    line = (*TINY, "--compilation-cache", "None", "--teacher", trained / "digits")
    problem = problems.prepare(parse([*map(str, line)]), tmp_path)
    read = checkpoint.read_meta
    few = lambda path: {**read(path), "num_classes": 7}
    monkeypatch.setattr(checkpoint, "read_meta", few)
    with pytest.raises(UserError, match="has 7 classes, this data has 10; pass a tea"):
        find_teacher(problem)


def test_an_unfinished_teacher_is_refused(trained, tmp_path, monkeypatch):
    """Its checkpoint may be given itself."""
    read = checkpoint.read_meta
    short = lambda path: {**read(path), "history": [{"epoch": 1}]}
    monkeypatch.setattr(checkpoint, "read_meta", short)

    def find(folder):
        line = (*TINY, "--compilation-cache", "None", "--teacher", folder)
        return find_teacher(problems.prepare(parse([*map(str, line)]), tmp_path))

    with pytest.raises(UserError, match=r"was trained for 1 of 2 epochs; run its") as e:
        find(trained / "digits")
    assert find(str(e.value).rpartition("--teacher ")[2]).given


def test_a_teacher_of_other_images_may_have_seen_those_held_out(
    trained, tmp_path, monkeypatch
):
    line = (*TINY, "--compilation-cache", "None", "--teacher", trained / "digits")
    settings = parse([*map(str, line), "--held-out", "100"])
    read = checkpoint.read_meta

    def other(path):
        meta = read(path)
        return {**meta, "run": {**meta["run"], "held_out": 100, "data": "abc"}}

    monkeypatch.setattr(checkpoint, "read_meta", other)
    with pytest.raises(UserError, match="was trained on other images of this name"):
        find_teacher(problems.prepare(settings, tmp_path))
    allowed = change(settings, teacher_saw_held_out=True)
    assert find_teacher(problems.prepare(allowed, tmp_path)).given


def test_a_finished_teacher_without_checkpoints(tmp_path):
    settings = parse([*TINY, "--compilation-cache", "None", "--devices", "1"])
    problem = problems.prepare(settings, tmp_path)
    folder = runs.teacher_run(problem).folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is finished, but its checkpoints are gone; "):
        _ = find_teacher(problem).trained


def test_broken_pairs_are_grouped_by_share_and_seed(tmp_path):
    import broken

    results = Path(broken.__file__).parent / "results"
    files = sorted(results.glob("broken-digits-*.json"))
    study = rows.merge({str(f): json.loads(f.read_text()) for f in files})
    found, alone = broken.points_of(study)
    assert set(found) == {"paired L2", "CW2 (E)"}
    for by_share in found.values():
        assert sorted(by_share) == [0, 0.25, 0.5, 1]
        assert all(sorted(seeds) == [0, 1, 2, 3, 4] for seeds in by_share.values())
    assert len(alone) == 5
    assert broken.draw([study], tmp_path / "figure.png").stat().st_size > 1000
    run = {**study["runs"][-1], "weight": 2.0}
    with pytest.raises(UserError, match="two runs of seed"):
        broken.points_of({**study, "runs": [*study["runs"], run]})
    run["settings"] = {**run["settings"], "placebo": "labels"}
    with pytest.raises(UserError, match="figure is of broken pairs"):
        broken.points_of({**study, "runs": [run]})
