"""Tests how students learn: layer pairs, projectors, own distances, features only."""

import copy
import io
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import KEEP, NETWORK, SMALL, TINY, call, results_of
from rich.console import Console

import kddm_jax
from kddm_jax import Distance, checkpoint
from kddm_jax.experiment import choose_weights
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import curves, embedding, table
from kddm_jax.experiment.settings import change
from kddm_jax.experiment.training import (
    from_teacher,
    methods,
    models,
    outputs,
    problems,
    runs,
    train,
)
from kddm_jax.experiment.training.lookup import weight_of
from kddm_jax.experiment.training.train import Teacher
from kddm_jax.train_step import create_state, make_train_step

of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
STUDENT = {
    "features": of(8, 6),
    "logits": of(8, 10),
    "maps": {"a": of(8, 4, 4, 3), "b": of(8, 2, 2, 6)},
    "modules": ("body", "top", "fc"),
}
TEACHER = {
    "features": of(8, 12),
    "logits": of(8, 10),
    "maps": {"p": of(8, 4, 4, 5), "q": of(8, 1, 1, 12)},
    "modules": ("body", "fc"),
}


def make(*line, name=None):
    settings = parse(["--dataset", "digits", *line])
    name = name or settings.method.distances[0]
    method = methods.make(settings, name, STUDENT, TEACHER)
    methods.check(name, method, STUDENT, TEACHER, 8)
    return method


def test_without_layers_the_catalogue_s_entry():
    wide = {**TEACHER, "features": of(8, 6)}
    settings = parse(["--distances", "w2"])
    method = methods.make(settings, "w2", STUDENT, wide)
    assert method.distance == "w2"
    assert method.options == {"normalization": "unit"}
    assert (method.projectors, method.head) == ({}, None)


def test_layers_are_terms_with_their_shares():
    line = ("--layers", "a:p", "b:q:0.5", "--projector", "conv", "--positions", "each")
    method = make(*line, "--distances", "l2")
    first, second = method.distance
    assert (first.name, first.weight, first.layers) == ("l2@a", 1.0, ("a", "p"))
    assert (second.name, second.weight, second.layers) == ("l2@b", 0.5, ("b", "q"))
    assert {first.positions, second.positions} == {"each"}
    assert method.projectors["a"].features == 5
    assert method.projectors["b"].grid == (1, 1)


def test_projector_alone_maps_the_pooled_features():
    method = make("--projector", "dense", "--distances", "w2")
    (term,) = method.distance
    assert term.name == "w2"
    assert term.layers == ("features", "features")
    assert method.projectors["features"].features == 12


def loss_of(method, x, y, weight):
    """The loss of a method without its projectors, and without the task."""
    terms = [replace(t, layers=(t.layers[1],) * 2) for t in method.distance]
    labels, logits = np.zeros(8, np.int32), np.zeros((8, 10), np.float32)
    loss, values = kddm_jax.distill_loss(
        *(x, y, labels, logits), distance=terms, weight=weight, **method.options
    )
    return loss - values["task"]


def samples(shapes, seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape.shape).astype(np.float32)
    return {name: draw(shape) for name, shape in methods.layers_of(shapes).items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


FEATURE_ONLY = ("--recipe", "feature_only")


def test_features_alone_compares_pooled_features_of_unit_length():
    settings = parse(["--dataset", "digits", *FEATURE_ONLY])
    wide = {**STUDENT, "features": of(8, 12)}
    method = methods.make(settings, "feature_only", wide, TEACHER)
    methods.check("feature_only", method, wide, TEACHER, 8)
    assert [t.layers for t in method.distance] == [("features", "features")]
    assert method.options == {"normalization": "unit"}
    assert method.projectors == {}  # of equal widths, in spite of the recipe's conv
    assert method.head == ("fc",)
    assert methods.teacher_layers(method) == ()
    x, y = samples(TEACHER, 0), samples(TEACHER, 1)
    cosines = np.sum(unit(x["features"]) * unit(y["features"]), axis=1)
    found = loss_of(method, x, y, 10.0)
    np.testing.assert_allclose(found, 10 * np.mean(2 - 2 * cosines), rtol=1e-5)


@pytest.mark.parametrize("kind", ["None", "conv"])
def test_features_alone_projects_pooled_features_of_other_widths(kind):
    method = make(*FEATURE_ONLY, "--projector", kind, name="feature_only")
    assert type(method.projectors["features"]).__name__ == "DenseProjector"
    assert method.projectors["features"].features == 12


PAIRS = ("a:p", "b:q:0.5")


def test_released_is_the_mean_squared_error_of_the_layers():
    """Whatever --normalization says, exactly the loss of version 0.2.0."""
    line = [*FEATURE_ONLY, "--head", "top", "fc", "--layers", "released"]
    settings = methods.released(parse(line), PAIRS)
    method = methods.make(settings, "feature_only", STUDENT, TEACHER)
    methods.check("feature_only", method, STUDENT, TEACHER, 8)
    assert [t.weight for t in method.distance] == [1.0 / 2 / 5, 0.5 / 2 / 12]
    assert {t.positions for t in method.distance} == {"each"}
    assert {type(p).__name__ for p in method.projectors.values()} == {"ConvProjector"}
    assert (method.options, method.head) == ({"normalization": None}, ("top", "fc"))
    x, y = samples(TEACHER, 0), samples(TEACHER, 1)
    error = {name: np.mean((x[name] - y[name]) ** 2) for name in x}
    expected = (error["p"] + 0.5 * error["q"]) / 2
    np.testing.assert_allclose(loss_of(method, x, y, 2.0), 2 * expected, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["None", "unit", "standardized"])
def test_features_alone_of_pairs_is_normalized(normalization):
    line = (*FEATURE_ONLY, "--normalization", normalization)
    method = make(*line, "--layers", *PAIRS, name="feature_only")
    x, y = samples(TEACHER, 0), samples(TEACHER, 1)

    def distance(name):
        flat = [side[name].reshape(-1, side[name].shape[-1]) for side in (x, y)]
        if normalization == "standardized":
            flat = [(side - side.mean(0)) / side.std(0) for side in flat]
        if normalization == "unit":  # the sum over channels, on average over positions
            return np.mean(np.sum((unit(flat[0]) - unit(flat[1])) ** 2, axis=1))
        return np.mean((flat[0] - flat[1]) ** 2)

    expected = (distance("p") + 0.5 * distance("q")) / 2
    np.testing.assert_allclose(loss_of(method, x, y, 2.0), 2 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("line", "weight"),
    [
        ((), 10.0),
        (("--layers", "a:p"), 10.0),
        (("--normalization", "teacher"), 1.0),
        (("--normalization", "None"), 1.0),
        (("--layers", "released"), 1.0),
        (("--layers", "released", "--weight", "3"), 3.0),
    ],
)
def test_features_alone_has_a_default_weight(line, weight):
    assert weight_of(parse([*FEATURE_ONLY, *line]), "feature_only") == weight


def test_labels_train_only_the_head_of_features_alone():
    """Other labels give the backbone the same step, and the head another one."""
    networks = ("--teacher-model", NETWORK, "--student-model", NETWORK)
    settings = parse(["--dataset", "digits", *FEATURE_ONLY, *networks])
    model = models.build(NETWORK, num_classes=10, stem="cifar", width=4)
    shapes = models.shapes(NETWORK, model, (8, 8, 1), 6)
    method = methods.make(settings, "feature_only", shapes, shapes)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    student, teacher = (
        model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1))) for seed in (0, 1)
    )
    step = jax.jit(
        make_train_step(
            *(models.network_apply(model),) * 2,
            (tx := optax.sgd(0.1)),
            augment=lambda key, image: image / 255.0,
            distance=method.distance,
            head=method.head,
            axis_name=None,
            **method.options,
        )
    )
    state = create_state(student, tx, weight=10.0)
    labels = np.arange(6), np.arange(6)[::-1].copy()
    new = [step(state, teacher, images, of_images)[0].params for of_images in labels]
    backbone = [{k: v for k, v in params.items() if k != "fc"} for params in new]
    jax.tree.map(np.testing.assert_array_equal, *backbone)
    moved = jax.tree.leaves(
        jax.tree.map(
            jnp.array_equal,
            backbone[0],
            {k: v for k, v in state.params.items() if k != "fc"},
        )
    )
    assert not all(moved)  # by the features
    assert not np.array_equal(new[0]["fc"]["kernel"], new[1]["fc"]["kernel"])


def test_released_layers_are_for_features_alone():
    line = ("--layers", "released", "--distances")
    with pytest.raises(UserError, match="--layers released is for .*, not for l2; put"):
        make(*line, "l2")
    assert make(*line, "kd").distance == "kd"  # has no layers
    with pytest.raises(UserError, match="--layers 'released': write STUDENT:TEACHER"):
        make("--layers", "released", "a:p", "--distances", "l2")


WIDE = {**TEACHER, "features": of(8, 6)}


def test_a_sum_has_each_distance_with_its_own_lambda():
    line = ("--distances", "cw2+kd+nst", "--weights", "cw2", "3", "nst", "0.5")
    settings = parse(["--dataset", "digits", *line, "--normalization", "unit"])
    method = methods.make(settings, "cw2+kd+nst", STUDENT, WIDE)
    found = [(t.name, t.weight, t.layers) for t in method.distance]
    assert found == [("cw2", 3.0, None), ("kd", 1.0, None), ("nst", 0.5, ("b", "q"))]
    assert weight_of(settings, "cw2+kd+nst") == 1.0
    assert methods.teacher_layers(method) == ("q",)
    # Normalization and projectors apply to the distances of features only.
    rng = np.random.default_rng(0)
    draw = lambda shapes: {k: rng.normal(size=v.shape) for k, v in shapes.items()}
    x, y = draw(methods.layers_of(STUDENT)), draw(methods.layers_of(WIDE))
    y["q"] = rng.normal(size=(8, 1, 1, 6))
    s, t = rng.normal(size=(2, 8, 10)).astype(np.float32)
    labels, options = np.arange(8) % 3, dict(method.options)
    assert options == {"normalization": "unit"}
    loss, values = kddm_jax.distill_loss(
        x, y, labels, s, t, distance=method.distance, weight=1.0, **options
    )
    alone = lambda name, x, y, **options: kddm_jax.distill_loss(
        x, y, labels, s, t, distance=name, weight=1.0, **options
    )[1][name]
    cw2 = alone("cw2", x["features"], y["features"], normalization="unit")
    np.testing.assert_allclose(values["cw2"], cw2, rtol=1e-5)
    np.testing.assert_allclose(values["kd"], alone("kd", {}, {}), rtol=1e-5)
    total = 3 * values["cw2"] + values["kd"] + 0.5 * values["nst"]
    np.testing.assert_allclose(loss - values["task"], total, rtol=1e-5)


def test_layers_and_projectors_of_a_sum():
    line = ("--layers", "a:p", "b:q:0.5", "--projector", "conv", "--positions", "each")
    method = make(*line, "--distances", "l2+kd", "--weights", "l2", "4", "kd", "2")
    found = [(term.name, term.weight) for term in method.distance]
    assert found == [("l2@a", 4.0), ("l2@b", 2.0), ("kd", 2.0)]
    assert {*method.projectors} == {"a", "b"}


def test_what_is_known_of_a_sum_is_known_of_its_parts(own):
    assert methods.title("l2+kd") == "paired L2 + KD"
    assert methods.needed_arrays("l2+wkd_logits") == ("class_cost",)
    assert methods.needed_arrays("kdpp") == ("class_means",)
    assert methods.needed_arrays("l2+kd") == ()
    assert methods.normalizes("kd+l2")
    assert not methods.normalizes("kd+nst")
    assert methods.is_zero("kd+mmd_linear", "centered")
    assert not methods.is_zero("kd+l2", "centered")
    assert methods.digest("l2+kd") is None
    digest = methods.digest("own_distances:ROW")
    assert methods.digest("kd+own_distances:ROW") == digest
    wide = change(parse(["--dataset", "digits"]), projector="dense")
    assert embedding.ties_axes("kd+l2", parse(["--dataset", "digits"]))
    assert not embedding.ties_axes("kd+cka", parse(["--dataset", "digits"]))
    assert not embedding.ties_axes("kd+l2", wide)


def test_distance_of_a_sum_has_the_weights_of_its_parts():
    record = {"l2@a": 1.0, "l2@b": 2.0, "kd": 4.0, "kd/iterations": 9.0, "loss": 5.0}
    assert records.distance_of(record, "l2+kd", {"l2": 10.0, "kd": 0.5}) == 32.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("l2+k", "unknown distance 'k' in 'l2\\+k'; known: w2, cw2, "),
        ("l2+", "unknown distance '' in 'l2\\+'"),
        ("l2+kd+l2", "'l2\\+kd\\+l2' names one distance twice"),
        ("l2+kd kd+l2", "--distances names one twice"),
        ("kd+feature_only", "'kd\\+feature_only': feature_only is a whole method"),
        ("l2+kd --weights l2+kd 2", "write --weights l2 NUMBER kd NUMBER"),
        ("l2+kd --weights w2 2", "'w2', which is not among --distances \\(l2, kd\\)"),
        ("l2+kd --weights kd -1", "weight of kd must be a number >= 0"),
    ],
)
def test_mistakes_about_sums(line, message):
    with pytest.raises(UserError, match=message):
        parse(["--dataset", "digits", "--distances", *line.split()])


def test_sums_are_not_tuned(capsys):
    line = [*TINY, "--distances", "l2+kd", "--held-out", "100", "--seeds", "0", "1"]
    assert choose_weights.main(["--", *line]) == 2
    error = capsys.readouterr().err
    assert "has its own lambda, but the grid has one; tune them alone" in error
    assert "--distances l2 kd" in error


def test_another_lambda_in_a_sum_is_another_run(tmp_path):
    line = [*TINY, "--distances", "l2+kd", "l2", "--compilation-cache", "None"]

    def planned(*weights):
        settings = parse([*line, "--devices", "1", "--weights", *weights])
        problem = problems.prepare(settings, tmp_path)
        *_, summed, single = runs.student_runs(problem, None)
        return summed, single

    summed, single = planned("l2", "10", "kd", "1")
    assert (summed.weight, summed.weights) == (1.0, {"l2": 10.0, "kd": 1.0})
    assert summed.title == "paired L2 + KD"
    assert (single.weight, single.weights) == (10.0, {})
    assert "weights" not in single.identity
    summed.folder(tmp_path).mkdir(parents=True)
    records.write_json(summed.folder(tmp_path) / "run.json", summed.identity)
    runs.check_folder(planned("kd", "1.0", "l2", "10")[0], tmp_path)
    with pytest.raises(UserError, match="weights=.*'kd': 1.0.*'kd': 2.0"):
        runs.check_folder(planned("l2", "10", "kd", "2")[0], tmp_path)


def test_sums_share_a_program_only_with_equal_lambdas(tmp_path):
    line = [*TINY, "--distances", "l2+kd", "--compilation-cache", "None"]
    problem = problems.prepare(parse([*line, "--devices", "1"]), tmp_path)
    model = problem.student
    teacher = SimpleNamespace(model=model)
    runs.check_distances(problem, model)

    def program(*weights):
        settings = parse([*line, "--weights", *weights])
        run = runs.student_run(problem, None, "l2+kd", 0, settings=settings)
        method = runs.method_of(problem, run.name, settings)
        tx = optax.sgd(0.1)
        return train._train_program(problem, run, method, model, teacher, tx, 1)

    assert program("l2", "2", "kd", "1") is program("l2", "2", "kd", "1")
    assert program("l2", "2", "kd", "1") is not program("l2", "3", "kd", "1")


@pytest.mark.slow
def test_a_sum_trains(tmp_path, capsys):
    out = tmp_path / "out"
    line = (*SMALL, *KEEP, "--devices", 1, "--out", out, "--distances", "l2+kd")
    assert call(*line, "--weights", "l2", 0.25, "kd", 2) == 0
    run = results_of(out)["runs"][-1]
    assert (run["name"], run["title"]) == ("l2+kd", "paired L2 + KD")
    first, last = run["history"][0], run["history"][-1]
    for record in (first, last):
        total = record["task"] + 0.25 * record["l2"] + 2 * record["kd"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert last["l2"] < first["l2"]
    assert last["kd"] < first["kd"]
    assert (out / "l2+kd" / "seed1" / "result.json").exists()
    assert "│ 0.25, 2 │" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "paired L2 + KD" in page
    assert "0.25, 2" in page
    assert call(*line, "--weights", "l2", 0.25, "kd", 3) == 2
    assert "was made with weights=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "who", "message"),
    [
        (("--distances", "nst"), "student", "compares maps, but the student has none"),
        (("--distances", "nst"), "teacher", "compares maps, but the teacher has none"),
        (("--layers", "a:p", "a:q"), None, "names the student's layer 'a' twice"),
    ],
)
def test_mistakes_about_layers(line, who, message):
    bare = lambda shapes, name: {**shapes, "maps": {}} if name == who else shapes
    shapes = bare(STUDENT, "student"), bare(TEACHER, "teacher")
    settings = parse(["--dataset", "digits", "--distances", "l2", *line])
    with pytest.raises(UserError, match=message):
        methods.make(settings, settings.method.distances[0], *shapes)


RESNET18 = ("--distances", "feature_only", "--student-model", "ResNet18")


def test_features_alone_needs_maps_of_the_student():
    settings = parse([*RESNET18, "--projector", "conv"])
    with pytest.raises(UserError, match="released: the student has no maps; leave out"):
        methods.check_choice_of_layers(settings, {**STUDENT, "maps": {}}, TEACHER)


def test_logits_are_a_layer_without_a_projector():
    line = ("--layers", "logits:logits", "a:p", "--projector", "conv")
    method = make(*line, "--distances", "cka")
    assert [term.layers for term in method.distance] == [("logits",) * 2, ("a", "p")]
    assert {*method.projectors} == {"a"}
    assert methods.teacher_layers(method) == ("p",)
    with pytest.raises(UserError, match="10 and 12.*; logits are not projected, so"):
        make("--layers", "logits:features", "--projector", "dense", name="l2")
    with pytest.raises(UserError, match="detaches the student's logits"):
        make(*line, "--distances", "feature_only")


def test_tokens_are_projected_one_by_one():
    tokens = lambda width: {**STUDENT, "maps": {"a": of(8, 5, width)}}
    settings = parse(["--dataset", "digits", "--layers", "a:a", "--projector", "conv"])
    pair = tokens(3), tokens(7)
    method = methods.make(settings, "l2", *pair)
    methods.check("l2", method, *pair, 8)
    assert method.projectors["a"].features == 7


def test_dense_projector_of_maps_is_that_of_every_position():
    line = ("--layers", "a:p", "features:features", "--projector", "dense")
    method = make(*line, "--distances", "l2")
    assert type(method.projectors["a"]).__name__ == "ConvProjector"
    assert type(method.projectors["features"]).__name__ == "DenseProjector"


def test_head_is_a_module_of_the_student():
    line = ("--layers", "a:p", "--projector", "conv")
    with pytest.raises(UserError, match="no module nothing; .*--head, .* top, fc"):
        make(*line, "--head", "nothing", name="feature_only")
    for student, head in {"ViT": "heads_head", "MobileNetV2": "classifier_1"}.items():
        with pytest.raises(
            UserError, match=f"no module {head}; "
        ):  # without these modules
            make("--student-model", student, *line, name="feature_only")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ((), ["widths [3, 5, 6, 12]", "--projector conv"]),
        (
            ("--projector", "conv", "--head", "x"),
            ["no module x; name its head by --head"],
        ),
    ],
)
def test_choice_of_layers_is_checked_before_there_is_a_teacher(line, parts):
    settings = parse([*RESNET18, *line])
    with pytest.raises(UserError) as caught:
        methods.check_choice_of_layers(settings, STUDENT, TEACHER)
    for part in parts:
        assert part in str(caught.value)
    few = {**TEACHER, "maps": {"p": of(8, 4, 4, 5)}}
    settings = parse([*RESNET18, "--projector", "conv"])
    with pytest.raises(UserError, match="released: the teacher has 1 layers"):
        methods.check_choice_of_layers(settings, STUDENT, few)


def test_distance_of_a_record_has_no_diagnostics_in_it():
    record = {"w2@a": 1.0, "w2@b": 2.0, "w2@a/iterations": 10.0, "w2_gaussian": 5.0}
    assert records.distance_of(record, "w2") == 3.0
    assert records.distance_of(record, "cw2") is None


OWN = """
import jax.numpy as jnp
from kddm_jax import Distance

def huber(x, y):
    r = jnp.abs(x - y)
    return jnp.mean(jnp.where(r < 1, r * r / 2, r - 0.5))

ROW = Distance(huber, title="Huber")
WEIGHTED = Distance(huber, weights={"unit": 1000.0})
NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_distances.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_distances", None)


def test_edited_distance_is_another_run(own, tmp_path):
    before = methods.digest("own_distances:ROW")
    (tmp_path / "own_distances.py").write_text(OWN + "# edited\n")
    assert methods.digest("own_distances:ROW") != before
    assert methods.digest("w2") is None
    assert methods.digest("feature_only") is not None  # None in version 0.2.0


def test_own_distance_is_found_by_module_and_name(own):
    assert isinstance(methods.find("own_distances:huber"), Distance)
    assert methods.title("own_distances:huber") == "huber"
    assert methods.title("own_distances:ROW") == "Huber"
    for name, text in {
        "own_distances:absent": "absent",
        "no_such_module:f": "no_such_module",
        "own_distances:NUMBER": "int",
    }.items():
        with pytest.raises(UserError, match=text):
            methods.find(name)


def test_own_distance_has_its_own_default_weight(own):
    name = "own_distances:WEIGHTED"
    of = lambda *line: weight_of(parse(["--distances", name, *line]), name)
    assert of("--normalization", "unit") == 1000.0
    assert of("--normalization", "unit", "--weight", "2") == 2.0
    with pytest.raises(UserError, match=r"no default .* teacher; .* unit \(λ = 1000"):
        of("--normalization", "teacher")
    for plain in ("own_distances:ROW", "own_distances:huber"):
        assert weight_of(parse(["--normalization", "unit"]), plain) == 1.0


@pytest.mark.slow
def test_own_distance_trains(own, tmp_path):
    line = (*SMALL, "--compilation-cache", "None", "--devices", 1, "--out", "out")
    assert call(*line, "--distances", "own_distances:ROW") == 0
    run = results_of(tmp_path / "out")["runs"][1]
    assert run["name"] == "own_distances:ROW"
    assert run["title"] == "Huber"
    values = [record["own_distances:ROW"] for record in run["history"]]
    assert values[-1] < values[0]
    assert (tmp_path / "out" / "own_distances.ROW" / "seed1" / "result.json").exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (("--layers", "a"), ["--layers 'a'", "STUDENT:TEACHER"]),
        (("--layers", "a:p:-1"), ["--layers 'a:p:-1'"]),
        (("--layers", "a:p:x"), ["--layers 'a:p:x'"]),
        (("--layers", "z:p"), ["student has no layer 'z'", "a, b, features, logits"]),
        (("--layers", "a:z"), ["teacher has no layer 'z'", "p, q, features, logits"]),
        (("--layers", "a:p"), ["3 and 5", "--projector"]),
        ((), ["6 and 12", "--projector"]),
    ],
)
def test_layers_that_do_not_fit_are_one_line(line, parts):
    with pytest.raises(UserError) as caught:
        make(*line, "--distances", "l2")
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_shapes_keep_the_order_of_the_layers():
    model = models.build("ResNet9", num_classes=10, stem="cifar", width=4)
    maps = models.shapes("ResNet9", model, (8, 8, 1), 2)["maps"]
    assert list(maps) == ["stem", *(f"stage{i}_block1" for i in (1, 2, 3, 4))]


def problem_of(student, monkeypatch, tmp_path, *line):
    settings = parse([*TINY, "--devices", "1", "--student-model", student, *line])
    problem = problems.prepare(change(settings, compilation_cache=None), tmp_path)
    runs.check_distances(problem, problem.model("ResNet18", 4))
    return problem


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("ResNet9", [f"stage{i}_block1" for i in (1, 2, 3, 4)]),
        ("ResNet18", [f"stage{i}_block2" for i in (1, 2, 3, 4)]),
        ("StudentMLP", ["hidden1", "hidden2", "hidden3"]),
    ],
)
def test_student_layers(student, expected, monkeypatch, tmp_path):
    line = ("--distances", "feature_only", "--projector", "conv")
    line = (*line, "--layers", "released")
    problem = problem_of(student, monkeypatch, tmp_path, *line)
    assert list(methods.student_layers(problem.settings, problem.shapes[0])) == expected


def test_wide_maps_are_max_pooled(monkeypatch):
    monkeypatch.setattr(outputs, "WIDEST", 12)
    maps = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    pooled = outputs._pool(maps, maps.shape[1:])
    expected = maps.reshape(2, 2, 2, 2, 2, 3).max((2, 4))
    np.testing.assert_array_equal(pooled, expected)
    flat = maps.reshape(2, -1)
    assert outputs._pool(flat, flat.shape[1:]) is flat


# ------------------------------------------------------------ quality of layers


@pytest.fixture
def rated(monkeypatch, tmp_path):
    """A problem whose layers are chosen by quality, and an untrained teacher."""
    line = ("--distances", "feature_only", "--projector", "conv")
    line = (*line, "--layers", "released", "--quality-images", "100")
    problem = problem_of("ResNet9", monkeypatch, tmp_path, *line)
    model = problem.model("ResNet18", 4)
    return problem, Teacher(model, 4, problem.init(model, 0), "a", 0.0, None)


def test_record_of_an_earlier_version_is_made_again(rated, tmp_path):
    problem, teacher = rated
    asked = {"teacher": "a", "images": 100, "student": "ResNet9"}
    old = {**asked, "layers": {}, "pairs": ["stage1_block1:stem"]}
    (tmp_path / "quality.json").write_text(json.dumps(old))
    drawn = []
    prepare = lambda: from_teacher.prepare(*rated, lambda *of: drawn.append(of))
    record = prepare()
    blocks = [f"stage{i}_block{j}" for i in (1, 2, 3, 4) for j in (1, 2)]
    assert list(record["layers"]) == ["stem", *blocks, "features"]
    for layer in record["layers"].values():
        assert set(layer) == {*"SIEQK", "probe"}
        assert 0 <= layer["probe"] <= 100
    assert record["teacher_accuracy"] < 50  # untrained
    assert record["pairs"][-1].endswith(":stage4_block2")
    assert problem.chosen_layers == tuple(record["pairs"])
    (term, *_) = runs.method_of(problem, "feature_only").distance
    assert term.layers == tuple(record["pairs"][0].split(":"))
    assert prepare() == record == json.loads((tmp_path / "quality.json").read_text())
    assert len(drawn) == 1  # the second time it was read


def test_copies_among_the_teachers_layers_are_left_out(rated, monkeypatch):
    """The student's last layers follow what remains; the best of copies is one."""
    problem, teacher = rated
    names = list(problem.shapes[1]["maps"])
    layers = {name: {"Q": float("block2" in name)} for name in names}
    stages = np.array([name.split("_")[0] for name in names])
    alike = (stages[:, None] == stages[None, :]) * 0.99
    monkeypatch.setattr(from_teacher, "features_of", lambda *_: None)
    monkeypatch.setattr(from_teacher, "layer_similarity", lambda layers: alike)
    expected = [f"stage{i}_block1:stage{i}_block2" for i in (1, 2, 3, 4)]
    assert from_teacher._select(problem, teacher, layers) == expected
    monkeypatch.setattr(from_teacher, "layer_similarity", lambda layers: alike + 0.99)
    assert from_teacher._select(problem, teacher, layers) == expected[-1:]


# A quality.json of version 0.2.0, without some of its layers.  It has no probe.
RECORDED = {
    "teacher": "5f047cc15ed79b69",
    "images": 5000,
    "student": "ResNet9",
    "layers": {
        "stem": {"S": 0.013, "I": 0.320, "E": 0.430, "Q": 0.384, "K": 1.002},
        "stage1_block3": {"S": 0.024, "I": 0.445, "E": 0.933, "Q": 0.669, "K": 1.002},
        "stage2_block1": {"S": 0.054, "I": 0.578, "E": 1.084, "Q": 0.846, "K": 1.004},
        "stage2_block2": {"S": 0.081, "I": 0.591, "E": 1.065, "Q": 0.874, "K": 1.004},
        "stage4_block3": {"S": 0.271, "I": 0.188, "E": 0.123, "Q": 0.423, "K": 1.017},
        "features": {"S": 0.271, "I": 0.188, "E": 0.123, "Q": 0.423, "K": 1.017},
    },
    "pairs": ["stage1_block1:stage2_block1", "stage2_block1:stage2_block2"],
}


@pytest.mark.parametrize("probe", [None, 63.44])
def test_quality_is_shown_and_drawn_with_and_without_a_probe(probe, tmp_path):
    record = copy.deepcopy(RECORDED)
    if probe is not None:
        for layer in record["layers"].values():
            layer["probe"] = probe
    console = Console(record=True, width=120, file=io.StringIO())
    table.show_quality(record, console)
    text = console.export_text()
    assert "probe %" in text
    assert "63.4" in text if probe else "–" in text
    assert "warning" not in text
    assert curves.of_layers(record, tmp_path / "q.png").stat().st_size > 10_000


@pytest.mark.parametrize(("accuracy", "warns"), [(89.9, True), (90.0, False)])
def test_a_teacher_that_does_not_fit_is_told_in_one_line(accuracy, warns):
    record = {**RECORDED, "teacher_accuracy": accuracy}
    console = Console(record=True, width=80, file=io.StringIO())
    table.show_quality(record, console)
    lines = [line for line in console.export_text().splitlines() if "warning" in line]
    assert len(lines) == warns
    if warns:
        assert "89.9 % of its training images" in lines[0]
        assert lines[0].endswith("name the pairs by --layers")


@pytest.mark.slow
def test_features_alone_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Chooses layers by quality, shows them all in the table, and resumes."""
    line = (
        *TINY,
        *(*KEEP, "--devices", 1),
        *("--out", tmp_path / "out", "--teacher-model", "ResNet18"),
        *("--projector", "conv", "--distances", "feature_only"),
        *("--layers", "released"),
    )
    assert call(*line) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "quality.json").read_text())
    names = ["stem", *(f"stage{i}_block{j}" for i in (1, 2, 3, 4) for j in (1, 2))]
    assert list(record["layers"]) == [*names, "features"]
    chosen = [pair.split(":")[1] for pair in record["pairs"]]
    assert 2 <= len(chosen) <= 4  # fewer if others are copies of these
    assert chosen == [name for name in names if name in chosen]
    best = max(names, key=lambda name: record["layers"][name]["Q"])
    assert chosen[-1] == names[-1]
    assert best in chosen or len(chosen) < 4
    assert "knowledge quality" in printed
    assert "warning: the teacher classifies" in printed
    assert (tmp_path / "out" / "quality.png").stat().st_size > 10_000
    run = results_of(tmp_path / "out")["runs"][1]
    assert run["name"] == "feature_only"
    last = run["history"][-1]
    followers = {pair.split(":")[0] for pair in record["pairs"]}
    assert {f"feature_only@{layer}" for layer in followers} <= set(last)

    # The evaluated network has no projectors, but its checkpoint has.
    folder = tmp_path / "out" / "feature_only" / "seed1"
    path = checkpoint.latest(folder / "checkpoints")
    arrays, _ = checkpoint.restore_arrays(path)
    assert set(arrays["params"]["projectors"]) == followers
    (folder / "result.json").unlink()
    kept = run["history"]
    shutil.rmtree(tmp_path / "out" / "student")
    assert call(*line) == 0
    again = results_of(tmp_path / "out")["runs"][1]
    assert again["history"] == kept
