"""Tests settings: recipes, the command line, schedules, optimizers, parts of data."""

import ast
import inspect
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from commands import EXPERIMENTS

from kddm_jax import DISTANCES, data
from kddm_jax.adapters import STEMS
from kddm_jax.experiment import checks, options
from kddm_jax.experiment import settings as settings_module
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.options import Mark
from kddm_jax.experiment.recipes import RECIPES, parse
from kddm_jax.experiment.settings import Settings, change, flat
from kddm_jax.experiment.training import models, optimizers, problems, runs
from kddm_jax.experiment.training.lookup import weight_of
from kddm_jax.networks import projectors


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_arrives(recipe):
    found = parse(["--dataset", "cifar10", "--recipe", recipe])
    expected = RECIPES[recipe]("cifar10")
    cache = expected.run.compilation_cache.expanduser()
    assert found == change(expected, compilation_cache=cache)
    assert (found.data.dataset, found.run.recipe) == ("cifar10", recipe)


def test_names_of_settings_are_unique():
    names = [f.name for kind in settings_module.GROUPS.values() for f in fields(kind)]
    assert len(set(names)) == len(names)


def test_paper_recipe_is_the_papers():
    """Compares with KD2M, arXiv 2504.01757, section 4, and its released code."""
    found = parse(["--dataset", "cifar10", "--recipe", "paper"])
    networks, optimizer = found.networks, found.optimizer
    assert (networks.teacher_model, networks.student_model) == ("ResNet34", "ResNet18")
    assert (networks.stem, networks.width) == ("imagenet", 64)
    assert (optimizer.batch_size, optimizer.epochs) == (128, 15)
    assert (optimizer.lr, optimizer.lr_end, optimizer.momentum) == (1e-2, 1e-4, 0.9)
    assert (optimizer.weight_decay, optimizer.nesterov) == (0.0, False)
    assert optimizer.schedule == "cosine-epoch"
    assert (found.data.train_images, found.data.student_images) == (None, None)


def test_crd_recipe_is_repdistillers():
    """Compares with the defaults of RepDistiller's train_student.py."""
    found = parse(["--dataset", "cifar100", "--recipe", "crd"])
    optimizer = found.optimizer
    assert (optimizer.epochs, optimizer.teacher_epochs) == (240, 240)
    assert (optimizer.batch_size, optimizer.optimizer) == (64, "sgd")
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
    assert optimizer.weight_decay == 5e-4
    assert found.augmentation == settings_module.Augmentation(padding=4, flip=True)
    steps = 50_000 // 64
    schedule = optimizers.make_schedule(optimizer, steps, 240)
    for epoch, before in {150: 0.05, 180: 5e-3, 210: 5e-4}.items():
        rates = [float(schedule(epoch * steps + i)) for i in (-1, 0)]
        assert rates == pytest.approx([before, before / 10])


def test_imagenet_recipe_is_torchdistills():
    """Compares with kd-resnet18_from_resnet34.yaml."""
    found = parse(["--dataset", "imagenet2012", "--recipe", "imagenet"])
    networks, optimizer = found.networks, found.optimizer
    assert (networks.teacher_model, networks.student_model) == ("ResNet34", "ResNet18")
    assert (networks.stem, found.data.image_size) == ("imagenet", 224)
    assert (optimizer.batch_size, optimizer.epochs, optimizer.lr) == (256, 100, 0.1)
    assert (optimizer.weight_decay, optimizer.momentum) == (1e-4, 0.9)
    assert not optimizer.nesterov
    assert found.augmentation == settings_module.Augmentation(
        padding=0, smallest_area=0.08
    )
    schedule = optimizers.make_schedule(optimizer, 5004, 100)
    for epoch, before in {30: 0.1, 60: 0.01, 90: 1e-3}.items():
        rates = [float(schedule(epoch * 5004 + i)) for i in (-1, 0)]
        assert rates == pytest.approx([before, before / 10])


@pytest.mark.parametrize("form", ["--lr 0.5", "--lr=0.5"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_command_line_comes_last(recipe, form):
    found = parse([*form.split(), "--recipe", recipe, "--width", "8"])
    assert (found.optimizer.lr, found.networks.width) == (0.5, 8)
    assert found.optimizer.batch_size == RECIPES[recipe]("digits").optimizer.batch_size


def test_digits_on_a_laptop_is_the_default():
    found = parse([])
    assert (found.data.dataset, found.run.recipe) == ("digits", "laptop")
    assert found.run.data_dir is None
    networks = found.networks.teacher_model, found.networks.student_model
    assert networks == ("ResNet18", "ResNet9")
    assert (found.optimizer.teacher_epochs, found.optimizer.epochs) == (15, 100)
    assert (found.data.student_images, found.data.train_images) == (64, None)
    assert found.run.seeds == (0, 1, 2)
    assert not found.augmentation.flip  # digits are never mirrored
    assert found.augmentation.padding == 1
    assert found.method.distances == settings_module.HELPFUL
    for name in found.method.distances:  # all have a default
        assert weight_of(found, name) > 0


def test_digits_of_another_recipe_keeps_its_epochs():
    found = parse(["--recipe", "strong"])
    assert found.optimizer.epochs == RECIPES["strong"]("cifar10").optimizer.epochs
    assert found.data.student_images is None
    assert not found.augmentation.flip
    assert parse(["--dataset", "cifar10"]).augmentation.flip


def test_weights_come_before_weight_before_the_catalogue():
    line = ["--distances", "w2", "cw2", "jw2"]
    found = parse([*line, "--weights", "w2", "0.5", "cw2", "0", "--weight", "0.25"])
    assert [weight_of(found, name) for name in found.method.distances] == [
        0.5,
        0.0,
        0.25,
    ]
    found = parse([*line, "--weights", "w2", "0.5", "--normalization", "teacher"])
    assert weight_of(found, "w2") == 0.5
    assert weight_of(found, "cw2") == DISTANCES["cw2"].weights["teacher"]
    found = parse([*line, "--weight", "0"])
    assert weight_of(found, "w2") == 0.0
    found = parse(["--distances", "l2", "cw2", "--normalization", "unit"])
    assert [weight_of(found, name) for name in ("l2", "cw2")] == [10.0, 10.0]


def test_only_the_paper_recipe_has_the_released_weight():
    """Elsewhere, raw features have the catalogue's default."""
    line = ["--dataset", "cifar10", "--normalization", "None"]
    for name in ("pkt", "dkd", "attention"):
        expected = DISTANCES[name].weights[None]
        for recipe in ("crd", "laptop", "strong"):
            assert weight_of(parse([*line, "--recipe", recipe]), name) == expected
        assert weight_of(parse([*line, "--recipe", "paper"]), name) == 1e-4
    assert weight_of(parse([*line, "--recipe", "paper"]), "w2") == 1e-4


def test_the_losses_of_repdistiller_have_defaults():
    found = parse(["--dataset", "cifar100", "--recipe", "crd"])
    names = ("kd", "attention", "pkt", "dkd", "similarity")
    assert [weight_of(found, name) for name in names[:4]] == [1.0, 15.625, 468.75, 1.0]
    with pytest.raises(UserError, match="similarity has no default"):
        weight_of(found, "similarity")  # its rows of the Gram matrix change


@pytest.mark.parametrize("normalization", ["unit", "centered", "standardized", None])
def test_a_normalization_without_default_weights_asks_for_one(normalization):
    line = ["--distances", "w2", "kd", "nst", "--normalization", str(normalization)]
    found = parse(line)
    with pytest.raises(UserError) as error:
        weight_of(found, "w2")
    assert str(error.value) == (
        f"w2 has no default weight with --normalization {normalization}; pass "
        "--weights w2 NUMBER, or --normalization teacher (λ = 0.01)"
    )
    for name in ("kd", "nst"):  # these compare no features
        assert weight_of(found, name) == DISTANCES[name].weights[None]
    assert weight_of(parse([*line, "--weight", "3"]), "w2") == 3.0
    assert weight_of(parse([*line, "--weights", "w2", "2"]), "w2") == 2.0


def test_settings_as_json():
    found = parse(["--out", "a/b", "--weights", "l2", "0.5"])
    values = json.loads(json.dumps(settings_module.as_json(found)))
    assert set(values) == {*settings_module.GROUP_OF}
    assert values["out"] == "a/b"
    assert values["weights"] == {"l2": 0.5}
    assert values["teacher"] is None


def described():
    """Returns the docstring of each setting."""
    body = ast.parse(Path(settings_module.__file__).read_text()).body
    groups = {kind.__name__ for kind in settings_module.GROUPS.values()}
    return {
        field.target.id: text.value.value
        for node in body
        if getattr(node, "name", "") in groups
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_explains_every_option(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse(["--recipe", recipe, "--help"])
    assert stop.value.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    squeezed = re.sub(r"[\s│|]+", "", plain)
    texts = described()
    for group in settings_module.GROUPS:
        assert re.search(rf"\W {group} options \W", plain)
    for name in settings_module.GROUP_OF:
        assert f"--{name.replace('_', '-')}" in plain, name
        text = re.sub(r"[\s│|]+", "", texts[name])
        assert text in squeezed, name
    # The recipe's own values are the defaults shown.
    for name in ("lr", "epochs"):
        value = flat(parse(["--recipe", recipe]))[name]
        option = squeezed[squeezed.index(f"--{name.replace('_', '-')}") :]
        assert f"(default:{value})" in option[:200], name


def test_schedules():
    """Checks the ends, the middle, and a step within an epoch of ten steps."""

    def rates(*line, steps):
        settings = parse(["--lr", "0.5", "--lr-end", "0.1", *line])
        schedule = optimizers.make_schedule(settings.optimizer, 10, 4)
        return [float(schedule(step)) for step in steps]

    constant = rates("--schedule", "constant", steps=[0, 20, 39])
    assert constant == pytest.approx([0.5, 0.5, 0.5])
    cosine = ("--schedule", "cosine", "--warmup")
    found = rates(*cosine, "0", steps=[0, 20, 40])
    assert found == pytest.approx([0.5, 0.3, 0.1])
    found = rates(*cosine, "0.25", steps=[0, 5, 10, 25, 40])
    assert found == pytest.approx([0.0, 0.25, 0.5, 0.3, 0.1])
    found = rates("--schedule", "cosine-epoch", steps=[0, 9, 20, 29])
    assert found == pytest.approx([0.5, 0.5, 0.3, 0.3])
    step = ("--schedule", "step", "--drops", "0.75", "0.25")
    found = rates(*step, steps=[0, 9, 10, 29, 30, 39])
    assert found == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    # Both drops of a run that is too short for them happen at one step.
    found = rates("--schedule", "step", "--drops", "0.5", "0.501", steps=[19, 20])
    assert found == pytest.approx([0.5, 0.005])
    found = rates("--schedule", "onecycle", steps=[0, 6, 12, 26, 40])
    assert found == pytest.approx([0.02, 0.26, 0.5, 0.25, 2e-6], rel=1e-4)


def test_adamw_decays_apart_from_its_moments():
    line = ["--optimizer", "adamw", "--lr", "0.5", "--weight-decay", "0.1"]
    settings = parse(line)
    tx = optimizers.make_optimizer(settings.optimizer, 0.5)
    params = {"w": np.float32([2.0, -1.0])}
    gradient = {"w": np.float32([3.0, 0.0])}
    updates, _ = tx.update(gradient, tx.init(params), params)
    # A first step of Adam is of size lr; the decay is lr * 0.1 * w.
    np.testing.assert_allclose(updates["w"], [-0.5 - 0.1, 0.05], rtol=1e-4)


def test_epoch_order_is_of_seed_and_epoch():
    run = lambda seed: runs.Run(
        *("student", seed, 0.0, 2, np.arange(100, 170), Settings(), {})
    )
    first = runs.epoch_order(run(0), 0, 32)
    assert first.shape == (2, 32)  # the last 6 images are in another epoch's batches
    assert first.dtype == np.int32
    assert len(np.unique(first)) == 64
    assert set(first.ravel()) <= set(range(100, 170))
    np.testing.assert_array_equal(first, runs.epoch_order(run(0), 0, 32))
    assert (first != runs.epoch_order(run(0), 1, 32)).any()
    assert (first != runs.epoch_order(run(1), 0, 32)).any()


def test_parts_are_nested_and_disjoint():
    settings = parse(["--train-images", "800", "--student-images", "200"])
    settings = change(settings, held_out=300, unlabelled_images=100)
    digits = data.load("digits")
    parts = problems.split(digits, settings)
    assert (len(parts.teacher), len(parts.student)) == (800, 200)
    assert set(parts.student) <= set(parts.teacher)
    assert len(parts.eval_labels) == 300
    # No image is used both for training and for evaluation.
    training = {digits.train_images[i].tobytes() for i in parts.teacher}
    held_out = {image.tobytes() for image in parts.eval_images}
    assert not training & held_out
    np.testing.assert_array_equal(np.bincount(digits.train_labels[parts.student]), 20)


def few(train, test=10, classes=3):
    """Makes a data set of few images."""
    images = lambda n: np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1)
    labels = lambda n: np.arange(n, dtype=np.int32) % classes
    names = tuple("abcdefgh"[:classes])
    return data.Dataset(
        *(images(train), labels(train), images(test), labels(test)),
        *(names, (0.5,), (0.1,)),
    )


LAPTOP = ("--dataset", "folder")
# Name: command line, number of training images, number of devices; the sizes of the
# teacher's, the student's and the evaluation set and of the batch; the lowered options.
LOWERED = {
    "images": ("", 36, 1, (36, 36, 10, 36), "train student test batch"),
    "devices": ("", 36, 8, (36, 36, 10, 32), "train student test batch"),
    "few students": ("", 100, 1, (100, 100, 10, 64), "train student test"),
    "held out": ("--held-out 30", 100, 1, (70, 70, 30, 64), "train student"),
    "teacher": ("--train-images 90", 100, 1, (90, 90, 10, 64), "student test"),
    "student": ("--student-images 9", 100, 1, (100, 9, 10, 9), "train test batch"),
    "all images": (
        "--train-images None",
        36,
        1,
        (36, 36, 10, 36),
        "student test batch",
    ),
    "typed batch": ("--batch-size 32", 36, 1, (36, 36, 10, 32), "train student test"),
    "typed test": ("--test-images 4", 36, 1, (36, 36, 4, 36), "train student batch"),
    "devices alone": ("--batch-size 60", 9999, 3, (5000, 2500, 10, 60), "test"),
    "odd devices": ("", 9999, 3, (5000, 2500, 10, 63), "test batch"),
    "paper": ("--recipe paper", 36, 1, (36, 36, 10, 36), "batch"),
    "strong": ("--recipe strong", 36, 1, (36, 36, 10, 36), "batch"),
    "feature_only": ("--recipe feature_only", 36, 1, (36, 36, 10, 36), "batch"),
    "nothing": ("--test-images 10", 9999, 2, (5000, 2500, 10, 64), ""),
}


@pytest.mark.parametrize("case", LOWERED)
def test_defaults_of_a_recipe_are_lowered(case):
    line, images, devices, expected, options = LOWERED[case]
    before = parse([*LAPTOP, *line.split()])
    dataset = few(images)
    after, lines = problems.lower(before, dataset, devices)
    parts = problems.split(dataset, after)
    found = (len(parts.teacher), len(parts.student), len(parts.eval_labels))
    assert (*found, after.optimizer.batch_size) == expected
    lowered = [
        "--batch-size" if o == "batch" else f"--{o}-images" for o in options.split()
    ]
    assert [line.split()[0] for line in lines] == lowered
    for option, line in zip(lowered, lines, strict=True):
        name = option[2:].replace("-", "_")
        assert line.startswith(f"{option} {flat(after)[name]} instead of the recipe's ")
        assert f"recipe's {flat(before)[name]}: " in line
    names = {option[2:].replace("-", "_") for option in lowered}
    assert names == {k for k, v in flat(after).items() if v != flat(before)[k]}
    # Lowering again changes nothing, so a repeated command is the same run.
    assert problems.lower(after, dataset, devices) == (after, ())
    json.dumps(settings_module.as_json(after))


TYPED = {
    "--train-images 5000": "--train-images 5000: there are only 36 images",
    "--student-images 2500": "--student-images 2500: there are only 36 images",
    "--test-images 2000": "--test-images 2000: there are only 10 test images",
    "--held-out 36": "--held-out 36: there are only 36 training images",
}


@pytest.mark.parametrize("line", TYPED)
def test_typed_numbers_are_not_lowered(line):
    """Not even if they are equal to the recipe's numbers."""
    settings, _ = problems.lower(parse([*LAPTOP, *line.split()]), few(36), 1)
    with pytest.raises(UserError, match=TYPED[line]):
        problems.split(few(36), settings)


def test_few_images_and_a_constant_channel(tmp_path, monkeypatch):
    """A command that gives no number of images starts to train."""
    images = np.zeros((36, 4, 4, 2), np.uint8)
    images[..., 0] = np.arange(36)[:, None, None]
    labels = np.arange(36, dtype=np.int32) % 3
    parts = ((images, labels), (images[:9], labels[:9]))
    dataset = data.dataset.make_dataset(*parts, "abc")
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    settings = parse([*LAPTOP, "--devices", "1", "--compilation-cache", "None"])
    problem = problems.prepare(settings, tmp_path)
    assert len(problem.lowered) == 4
    assert problem.settings.optimizer.batch_size == 36
    found = np.asarray(problem.augment(jax.random.key(0), images[3]))
    assert np.isfinite(found).all()
    assert not found[..., 1].any()


def test_test_images_do_not_matter_with_held_out_ones():
    settings = parse([*LAPTOP, "--held-out", "6", "--test-images", "2000"])
    settings, _ = problems.lower(settings, few(36), 1)
    assert len(problems.split(few(36), settings).eval_labels) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NETWORKS)
def test_networks_by_name(name):
    assert tuple(models.NETWORKS) == settings_module.MODELS
    model = models.build(
        name, num_classes=7, stem="cifar", width=4, dtype=np.float32, axis_name="batch"
    )
    found = models.shapes(name, model, (8, 8, 1), 2)
    assert found["logits"].shape == (2, 7)
    assert found["features"].ndim == 2
    assert found["maps"]
    text = inspect.cleandoc(described()["teacher_model"])
    assert name in re.findall(r"\w+", text)


def test_settings_errors_are_user_errors():
    with pytest.raises(UserError, match="unknown stem"):
        parse(["--stem", "other"])


def noted(kind):
    """Returns each setting that has an annotation of this kind, with the annotation."""
    return [
        (name, note)
        for name, option in settings_module.OPTIONS.items()
        for note in options.notes(option)
        if isinstance(note, kind)
    ]


# Other settings without which a setting is an error.
NEEDED = {
    "processes": {"coordinator": "host:1", "process": 0},
    "placebo": {"views": 4},
    "placebo_share": {"views": 4, "placebo": "pairs"},
}


@pytest.mark.parametrize(("name", "choices"), noted(options.Choices))
def test_choices_are_checked(name, choices):
    settings = change(Settings(), **NEEDED.get(name, {}))
    for value in choices.known:
        checks.check(change(settings, **{name: value}))
    known = ", ".join(str(value) for value in choices.known)
    own = [] if choices.own else ["a:b"]
    for value in ("other", "other:", ":other", *own):
        message = f"unknown {name} {value!r}; known: {known}"
        with pytest.raises(UserError, match=re.escape(message)):
            checks.check(change(settings, **{name: value}))
    if choices.own:
        checks.check(change(settings, **{name: "a:b"}))


LIMITS = {
    options.POSITIVE: ((1e-3, 7), (0, -1, math.nan)),
    settings_module.TRAINED: ((1, 7), (0, -1)),
    options.NOT_NEGATIVE: ((0, 7), (-1e-3, math.nan)),
    options.SHARE: ((0, 0.99), (-1e-3, 1, math.nan)),
    options.PART: ((1e-3, 0.5, 1), (0, -0.5, 1.01, math.nan)),
}


@pytest.mark.parametrize(("name", "numbers"), noted(options.Range))
def test_ranges_are_checked(name, numbers):
    settings = change(Settings(), **NEEDED.get(name, {}))
    inside, outside = LIMITS[numbers]
    for value in inside:
        checks.check(change(settings, **{name: value}))
    for value in outside:
        option = f"--{name.replace('_', '-')}"
        message = f"{option} must be {numbers.wanted}, got {value}"
        with pytest.raises(UserError, match=re.escape(message) + "$"):
            checks.check(change(settings, **{name: value}))


def test_every_number_has_a_range():
    """Three are checked elsewhere: with other settings, or to be finite."""
    numbers = {
        name
        for kind in settings_module.GROUPS.values()
        for name, hint in get_type_hints(kind).items()
        if {int, float} & {hint, *get_args(hint)}
    }
    assert "lr" in numbers
    assert "views" in numbers
    ranged = {name for name, _ in noted(options.Range)}
    assert ranged == numbers - {"process", "seeds", "weight"}


def test_choices_are_those_of_the_library():
    choices = dict(noted(options.Choices))
    assert choices["stem"].known == tuple(STEMS)
    assert choices["projector"].known == (None, *projectors.PROJECTORS)


def test_schedules_of_lambda_start_and_end_where_they_say():
    make = lambda name, steps=100: optimizers.make_weight_schedule(
        parse(["--weight-schedule", name]).method, steps
    )
    assert make("constant") is None
    factors = [[float(make(name)(i)) for i in (0, 25, 50, 100)] for name in RISES]
    np.testing.assert_allclose(factors, list(RISES.values()), atol=1e-6)
    assert make("warmup", 1)(1) == 1  # with one step, the factor is not zero


RISES = {"warmup": [0, 0.5, 1, 1], "decay": [1, (1 + 0.5**0.5) / 2, 0.5, 0]}


RESULTS = {
    path.stem: found["settings"]
    for path in sorted((EXPERIMENTS / "results").glob("*.json"))
    if "dataset" in (found := json.loads(path.read_text())).get("settings", {})
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_earlier_versions_are_read(name):
    """Settings are flat, two had other names, and missing ones have defaults."""
    recorded = settings_module.renamed(RESULTS[name])
    assert not {"scale", "view"} & {*recorded}
    found = settings_module.as_json(settings_module.from_json(RESULTS[name]))
    expected = settings_module.as_json(Settings())
    expected |= {k: v for k, v in recorded.items() if k in expected}
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(expected))


def test_identity_is_everything_but_the_run():
    """Settings with a mark are part of the identity of some runs only."""
    settings = parse(["--distances", "feature_only"])
    named = {
        group: {f.name for f in fields(kind)}
        for group, kind in settings_module.GROUPS.items()
    }
    found = {*settings_module.identity(settings, "feature_only")}
    marked = {
        mark: {name for name, found in noted(Mark) if found is mark} for mark in Mark
    }
    others = marked[Mark.NAMED_OTHERWISE] | marked[Mark.OF_TEACHER]
    every = set().union(*named.values())
    assert found == every - named["run"] - others
    alone = {*settings_module.identity(settings, "student")}
    assert alone == found - named["method"]
    teacher = {*settings_module.identity(settings, "teacher")}
    assert not teacher & (marked[Mark.OF_STUDENTS] | named["method"])
    assert marked[Mark.OF_TEACHER] < teacher
    assert "head" in found
    others = {*settings_module.identity(settings, "w2")}
    assert others == found - marked[Mark.OF_FEATURE_ONLY]


def test_a_recipes_numbers_have_a_type_of_their_own():
    """tyro keeps the types of defaults by their hash: 64 is not "at most 64"."""
    assert hash(settings_module.AtMost(64)) != hash(64)
    assert {settings_module.AtMost(64): 1} == {settings_module.AtMost(64): 1}
