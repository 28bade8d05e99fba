"""Tests the paper's figures: toys, finished runs that are read again, and plots."""

import json
import shutil
import sys
from types import ModuleType

import figures
import jax
import numpy as np
import pytest
import toys
from commands import EXPERIMENTS, KEEP, SMALL, command, results_of
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from kddm_jax.experiment import choose_weights
from kddm_jax.experiment import finished as reading
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import curves
from kddm_jax.experiment.settings import Settings, as_json, change, from_json
from kddm_jax.experiment.training.outputs import outputs_of

LARGEST = 120_000  # bytes of a plot


# ---------------------------------------------------------------------------
# Toys.


@pytest.fixture(scope="module")
def pairing():
    return toys.two_classes()


@pytest.fixture(scope="module")
def shapes():
    return toys.two_shapes()


def best_pairs(x, y):
    """Returns the partner of each sample, computed by SciPy."""
    return linear_sum_assignment(cdist(x, y, "sqeuclidean"))[1]


@pytest.mark.slow
def test_w2_pairs_across_classes_and_cw2_does_not(pairing):
    x, y, labels = (np.asarray(z) for z in pairing[:3])
    n = len(labels)
    for plan in pairing.plans.values():
        entries = np.asarray(plan)
        assert ((entries > 0).sum(0) == 1).all()
        assert ((entries > 0).sum(1) == 1).all()
        np.testing.assert_allclose(entries[entries > 0], 1 / n, rtol=1e-6)
    free, masked = pairing.plans["W2 (E)"], pairing.plans["CW2 (E)"]
    np.testing.assert_array_equal(np.argmax(free, axis=1), best_pairs(x, y))
    for label in (0, 1):
        (mine,) = np.nonzero(labels == label)
        partners = np.argmax(masked, axis=1)[mine]
        np.testing.assert_array_equal(partners, mine[best_pairs(x[mine], y[mine])])
    assert toys.crossing(free, pairing.labels) > 0.5
    assert toys.crossing(masked, pairing.labels) == 0


def test_crossing_is_the_mass_between_classes():
    plan = jax.numpy.array([[0.1, 0.2, 0.0], [0.0, 0.3, 0.0], [0.25, 0.0, 0.15]])
    assert toys.crossing(plan, jax.numpy.array([0, 1, 0])) == pytest.approx(0.2)


def moments(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), np.cov(x.T, ddof=0)


@pytest.mark.slow
def test_one_mean_and_covariance_but_another_shape(shapes):
    for mine, theirs in zip(moments(shapes.x), moments(shapes.y), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert abs(toys.DISTANCES["W2 (G)"](shapes.x, shapes.y)) < 1e-5
    assert toys.DISTANCES["W2 (E)"](shapes.x, shapes.y) > 0.3


@pytest.mark.slow
def test_flow_down_the_gaussian_distance_keeps_the_shape(shapes):
    start, end = (np.asarray(shapes.flows["W2 (G)"][i]) for i in (0, -1))
    assert toys.DISTANCES["W2 (G)"](start, shapes.y) > 20
    assert abs(toys.DISTANCES["W2 (G)"](end, shapes.y)) < 1e-4
    assert toys.DISTANCES["W2 (E)"](end, shapes.y) > 0.3
    # The shape does not change: an affine map takes the start to the end.
    design = np.column_stack([start, np.ones(len(start))])
    solution, *_ = np.linalg.lstsq(design, end, rcond=None)
    np.testing.assert_allclose(design @ solution, end, atol=1e-3)


def test_flow_down_the_empirical_distance_reaches_the_target(shapes):
    start, end = (np.asarray(shapes.flows["W2 (E)"][i]) for i in (0, -1))
    between = cdist(end, np.asarray(shapes.y))
    assert between.min(0).max() < 5e-3
    assert between.min(1).max() < 5e-3
    design = np.column_stack([start, np.ones(len(start))])
    solution, *_ = np.linalg.lstsq(design, end, rcond=None)
    assert np.abs(design @ solution - end).max() > 0.3  # is not affine


@pytest.mark.slow
def test_a_step_of_the_flow_goes_a_share_of_the_way():
    x = jax.numpy.array([[0.0, 0.0], [1.0, 0.0]])
    path = toys.flow(toys.DISTANCES["W2 (E)"], x, x + 8.0, steps=3, rate=0.25)
    assert path.shape == (4, 2, 2)
    left = [8 * 0.75**k for k in range(4)]
    np.testing.assert_allclose((x + 8.0 - path)[:, 0, 1], left, rtol=1e-6)


# ---------------------------------------------------------------------------
# What the figures are made of.


def run_of(name, accuracies, *, distance=None, seed=0):
    history = [
        {"epoch": i + 1, "task": 1 / (i + 1), **({name: distance} if distance else {})}
        for i in range(len(accuracies))
    ]
    for record, accuracy in zip(history, accuracies, strict=True):
        if accuracy is not None:
            record["test_accuracy"] = accuracy
    return {"name": name, "title": name, "seed": seed, "history": history}


def test_series_is_mean_and_spread_over_seeds():
    seeds = [run_of("w2", [None, 10.0, 30.0]), run_of("w2", [None, 20.0, 60.0])]
    epochs, mean, spread = curves.series(seeds, lambda r: r.get("test_accuracy"))
    assert epochs == [2, 3]
    np.testing.assert_allclose(mean, [15, 45])
    np.testing.assert_allclose(spread, np.array([10, 30]) / 2**0.5)
    epochs, mean, spread = curves.series(seeds[:1], lambda r: r["task"])
    assert epochs == [1, 2, 3]
    np.testing.assert_allclose(spread, 0)


def test_the_distilled_student_to_show():
    made = lambda *pairs: {"runs": [{"name": n, "seed": s} for n, s in pairs]}
    both = made(("student", 1), ("w2", 1), ("w2", 2), ("cw2", 1))
    assert figures.distilled(both, None, None) == ("cw2", 1)
    assert figures.distilled(both, "w2", 2) == ("w2", 2)
    assert figures.distilled(made(("l2", 3), ("w2", 3)), None, None) == ("l2", 3)
    with pytest.raises(UserError, match="--distance jw2: there are w2, cw2"):
        figures.distilled(both, "jw2", None)
    with pytest.raises(UserError, match="--seed 2: there are 1"):
        figures.distilled(both, "cw2", 2)
    with pytest.raises(UserError, match="no distilled student; .* --distances"):
        figures.distilled(made(("student", 0)), None, None)


def test_embedding_is_umap_where_it_is_installed(monkeypatch):
    find = figures.importlib.util.find_spec
    there = lambda found: lambda name: found if name == "umap" else find(name)
    monkeypatch.setattr(figures.importlib.util, "find_spec", there(None))
    assert figures.embedding_of("auto") == "tsne"
    with pytest.raises(UserError, match="pip install umap-learn"):
        figures.embedding_of("umap")
    monkeypatch.setattr(figures.importlib.util, "find_spec", there("found"))
    assert figures.embedding_of("auto") == "umap"
    assert figures.embedding_of("tsne") == "tsne"
    # A class with UMAP's name, which records its options and requests.
    asked = {}

    class Umap:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, points):
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", ModuleType("umap"))
    sys.modules["umap"].UMAP = Umap
    title, embed = figures.EMBEDDINGS["umap"]
    assert title == "UMAP"
    assert embed(np.ones((5, 3))).shape == (5, 2)
    assert asked == {"n_neighbors": 15, "random_state": 42, "n_jobs": 1}


def test_tsne_keeps_two_far_clouds_apart():
    rng = np.random.default_rng(0)
    far = rng.normal(size=(30, 5)) + np.repeat([[0.0], [50.0]], 15, 0)
    plane = figures.EMBEDDINGS["tsne"][1](far.astype(np.float32))
    assert plane.shape == (30, 2)
    within = max(cdist(part, part).mean() for part in (plane[:15], plane[15:]))
    assert cdist(plane[:15], plane[15:]).mean() > 2 * within


def test_student_and_teacher_are_embedded_together():
    x, y = np.zeros((3, 4)), np.ones((5, 4))
    seen = []
    mine, theirs = figures.together(lambda z: seen.append(z) or z[:, :2], x, y)
    assert [z.shape for z in seen] == [(8, 4)]
    np.testing.assert_array_equal(mine, 0)
    np.testing.assert_array_equal(theirs, 1)
    assert (mine.shape, theirs.shape) == ((3, 2), (5, 2))
    with pytest.raises(UserError, match="width 4, the teacher's 6"):
        figures.together(lambda z: z, x, np.ones((5, 6)))


@pytest.mark.slow
def test_w2_is_in_units_of_the_teachers_deviation():
    y = np.float32([[1, 0], [-1, 0], [0, 1], [0, -1]])  # mean squared deviation 1
    assert figures.relative_w2(y + 2, y) == pytest.approx(8)
    assert figures.relative_w2(10 * y + 20, 10 * y) == pytest.approx(8)


def test_settings_are_read_as_they_were_written():
    line = ["--distances", "w2", "--weights", "w2", "0.5", "--out", "a", "--flip"]
    settings = parse([*line, "--layers", "features:features", "--data-dir", "b"])
    assert from_json(json.loads(json.dumps(as_json(settings)))) == settings
    expected = change(Settings(), dataset="mnist")
    assert from_json({"dataset": "mnist", "later": 1}) == expected


# ---------------------------------------------------------------------------
# Finished runs.


@pytest.fixture
def kept(monkeypatch):
    """Collects the figures that are saved, by file name, and leaves them open."""
    found, close = {}, curves.plt.close
    monkeypatch.setattr(curves.plt, "close", lambda figure: None)
    save = curves.save

    def save_and_keep(figure, path):
        found[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(curves, "save", save_and_keep)
    yield found
    close("all")


def assert_pictures(*paths):
    for path in paths:
        assert path.stat().st_size < LARGEST, path
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 600
            assert len(image.getcolors(256)) > 10


def call(*arguments):
    return figures.main([str(argument) for argument in arguments])


def test_curves_are_the_histories(finished, tmp_path, kept, capsys):
    assert call(finished / "out", "--figures", "curves", "--to", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}/curves.png\n"
    assert_pictures(tmp_path / "curves.png")
    results = results_of(finished / "out")
    accuracy, task, distance = kept["curves.png"].axes
    lines = {line.get_label(): line.get_ydata() for line in accuracy.lines}
    assert list(lines) == [*(run["title"] for run in results["runs"]), "teacher"]
    for i, run in enumerate(results["runs"]):
        history = run["history"]
        expected = [record["test_accuracy"] for record in history]
        np.testing.assert_allclose(lines[run["title"]], expected)
        drawn = task.lines[i].get_ydata()
        np.testing.assert_allclose(drawn, [record["task"] for record in history])
    assert len(distance.lines) == 2  # the student alone has no distance
    w2 = np.array([record["w2"] for record in results["runs"][1]["history"]])
    np.testing.assert_allclose(distance.lines[0].get_ydata(), w2 / w2[0])


def test_a_finished_student_is_read_back(finished):
    opened = reading.load(finished / "out")
    assert len(opened.problem.devices) == 1
    parts = opened.problem.parts
    assert opened.teacher.digest == opened.results["teacher"]["digest"]
    for run in opened.results["runs"][:2]:
        model, variables = opened.student(run["name"], run["seed"])
        found = outputs_of(opened.problem, model, variables, parts.eval_images)
        assert found.features.shape == (100, 32)
        right = np.argmax(found.logits, axis=1) == parts.eval_labels
        assert 100 * right.mean() == pytest.approx(run["accuracy"])


@pytest.mark.slow
def test_features_of_teacher_and_student_in_one_plane(
    finished,
    tmp_path,
    kept,
):
    line = (finished / "out", "--to", tmp_path, "--images", "60")
    assert call(*line, "--embedding", "tsne", "--distance", "w2") == 0
    names = ["curves.png", "embedding-w2.png", "toy-classes.png", "toy-shapes.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert_pictures(*tmp_path.iterdir())
    for axes in kept["embedding-w2.png"].axes:
        teacher, student = axes.collections
        assert len(teacher.get_offsets()) == len(student.get_offsets()) == 60
        colours = student.get_facecolors()
        np.testing.assert_array_equal(teacher.get_facecolors()[:, :3], colours[:, :3])
        assert len(np.unique(colours, axis=0)) == 10
    before, after = (axes.get_title() for axes in kept["embedding-w2.png"].axes)
    assert before.startswith("before: student, ")
    assert after.startswith("after: W2 (E), ")
    # W2 matches some samples across classes, and their lines are coloured.
    lines = {
        axes.get_title().split(":")[0]: {line.get_color() for line in axes.lines}
        for axes in kept["toy-classes.png"].axes
    }
    assert lines == {"W2 (E)": {"grey", "tab:orange"}, "CW2 (E)": {"grey"}}


def test_plans_are_those_of_the_runs_that_report_them(tmp_path, kept):
    masses = [[0.1, 0.4], [0.3, 0.8]]  # of two seeds and two epochs

    def run(name, seed):
        record = lambda i: {
            "epoch": i + 1,
            f"{name}/diagonal": masses[seed][i],
            f"{name}/within_class": 1.0,
        }
        return {"name": name, "title": "own", "history": [record(0), record(1)]}

    plain = {"name": "l2", "title": "l2", "history": [{"epoch": 1, "l2/x": 1.0}]}
    results = {
        "settings": {"dataset": "digits"},
        "runs": [plain, run("own:ROW", 0), run("own:ROW", 1)],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert call(tmp_path, "--figures", "plans") == 0
    assert_pictures(tmp_path / "figures" / "plans.png")
    diagonal, within = kept["plans.png"].axes
    (line,) = diagonal.lines
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.6])
    np.testing.assert_allclose(within.lines[0].get_ydata(), [1, 1])
    assert "2 seeds" in kept["plans.png"].get_suptitle()


def tried(name, accuracy=50.0, seed=1, epochs=2, **choices):
    """A record of ``weights.json``."""
    place = "-".join(map(str, (epochs, *choices.values())))
    record = {"name": name, "seed": seed, "epochs": epochs, **choices}
    return {**record, "place": place, "accuracy": accuracy}


def candidate(weight, accuracy=50.0, normalization="unit", **more):
    choices = {"lr": 0.1, "normalization": normalization, "weight": weight}
    return tried("w2", accuracy, **choices, **more)


def choice(*tried, seeds=(1, 2)):
    """Returns a weights.json in which the student alone has a learning rate of 0.1."""
    normalizations = dict.fromkeys(r["normalization"] for r in tried if "weight" in r)
    return {
        "settings": {"dataset": "digits", "seeds": [1, 2], "epochs": 2, "lr": 0.1},
        "alone": {"lr": 0.1, "weight_decay": 0.0},
        "tried": list(tried),
        "chosen": [
            {"name": "w2", "normalization": n, "seeds": len(seeds), "lr": 0.1}
            for n in normalizations
        ],
    }


ALONE = [
    tried("student", seed=seed, lr=lr, weight_decay=0.0)
    for lr in (0.1, 0.3)
    for seed in (1, 2)
]


@pytest.fixture(scope="module")
def grid(finished, tmp_path_factory):
    """As choose_weights.py leaves it: the runs of a coarse and of a finer grid.

    Of the finer one, λ = 10 did not stay finite, and λ = 3 only for one seed.
    """
    folder = tmp_path_factory.mktemp("grid")
    fine = [
        candidate(weight, accuracy, seed=seed)
        for weight, *both in ((10.0, 0, 0), (0.5, 40, 50), (3.0, 0, 50))
        for seed, accuracy in zip((1, 2), both, strict=True)
    ]
    coarse = [candidate(1.0, epochs=1), candidate(0.1, epochs=1, normalization=None)]
    chosen = choice(*ALONE, *coarse, *fine)
    for record in chosen["tried"]:
        if record["accuracy"]:
            place = folder / record["place"] / record["name"] / f"seed{record['seed']}"
            place.mkdir(parents=True)
            path = finished / "out" / record["name"] / "seed1" / "result.json"
            result = {**json.loads(path.read_text()), "place": record["place"]}
            (place / "result.json").write_text(json.dumps(result))
    chosen["chosen"] = [
        {"name": "w2", "normalization": "unit", "seeds": 2, "lr": 0.1},
        {"name": "w2", "normalization": None, "seeds": 1, "lr": 0.1},
    ]
    chosen["tried"].append(tried("student", epochs=1, lr=0.1, weight_decay=0.0))
    place = folder / chosen["tried"][-1]["place"]
    shutil.copytree(folder / ALONE[0]["place"], place)
    (folder / "weights.json").write_text(json.dumps(chosen))
    return folder


def test_lambdas_rise_and_one_may_be_too_large(grid, tmp_path, kept):
    """Those of the finer grid; a method without one has those of the coarse grid."""
    chosen = json.loads((grid / "weights.json").read_text())
    found = figures.of_lambda(grid, chosen)
    counts = {
        pair: {w: len(runs) for w, runs in r.items()} for pair, r in found.items()
    }
    assert counts == {
        ("w2", "unit"): {0: 2, 0.5: 2, 3: 1, 10: 0},
        ("w2", None): {0: 1, 0.1: 1},
    }
    assert [list(row) for row in counts.values()] == [[0, 0.5, 3, 10], [0, 0.1]]
    assert {run["place"] for run in found["w2", "unit"][0]} == {ALONE[0]["place"]}
    assert call(grid, "--figures", "ablation", "--to", tmp_path) == 0
    assert_pictures(tmp_path / "ablation-w2.png", tmp_path / "ablation-w2-unit.png")
    axes = kept["ablation-w2-unit.png"].axes
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == ["λ = 0", "λ = 0.5", "λ = 3", "λ = 10: not finite"]
    title = "digits, W2 (E), normalization unit: 1 seed"
    assert kept["ablation-w2-unit.png"].get_suptitle() == title
    # The distance of the student alone is not measured.
    expected = [record["w2"] for record in found["w2", "unit"][0.5][0]["history"]]
    assert len(axes[2].lines) == 2
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), expected)


@pytest.mark.slow
def test_ablation_of_a_real_grid(tmp_path, capsys):
    settings = [*SMALL, "--held-out", "100", "--distances", "w2", "--out", tmp_path]
    settings += [*KEEP, "--no-progress", "--seeds", 1, 2]
    line = ["--grid", "0.5", "1e38", "--", *map(str, settings)]
    assert choose_weights.main(line) == 0
    assert "λ = 1e+38, lr 0.02, 2 epochs, seed 1: loss or gradient not fin" in (
        capsys.readouterr().out
    )
    place = tmp_path / "epochs-2-lr-0.02-normalization-teacher-weight-1e+38"
    assert (place / "w2" / "seed1" / "diverged.json").exists()
    assert call(tmp_path) == 0
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert pictures == ["ablation-w2-teacher.png", "toy-classes.png", "toy-shapes.png"]
    assert_pictures(*(tmp_path / "figures").iterdir())


# ---------------------------------------------------------------------------
# Mistakes.


def alone(source, folder):
    """Keeps the student alone and removes all other runs."""
    results = results_of(source)
    results["runs"] = results["runs"][:1]
    (folder / "results.json").write_text(json.dumps(results))


def no_checkpoint(source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "w2" / "seed1" / "checkpoints")


def other_teacher(source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "teacher" / "seed0")
    shutil.copytree(folder / "student" / "seed1", folder / "teacher" / "seed0")


def only(name):
    return lambda source, folder: shutil.copy(source / name, folder)


def written(name, text):
    return lambda source, folder: (folder / name).write_text(text)


nothing = lambda source, folder: None

# Name: a function that makes the folder, the command line, and parts of the error.
MISTAKES = {
    "no folder": (nothing, "/none", ["/none is not a folder", "--out"]),
    "nothing given": (nothing, None, ["RUN_DIR is missing", "--figures toys --to"]),
    "not finished": (nothing, "", ["results.json", "weights.json", "not finished"]),
    "damaged": (written("results.json", "{"), "", ["results.json is not readable"]),
    "no grid": (
        only("results.json"),
        "--figures ablation",
        ["--figures ablation", "no weights.json", "choose_weights.py"],
    ),
    "no runs": (
        written("weights.json", "{}"),
        "--figures curves",
        ["--figures curves", "no results.json", "cifar.py"],
    ),
    "grid without runs": (
        written("weights.json", json.dumps(choice(*ALONE, candidate(1.0), seeds=[1]))),
        "",
        ["result.json is not readable", "run its command again"],
    ),
    "grid of version 0.2.0": (
        written("weights.json", '{"held_out_accuracy": {"w2": {"1": 9}}}'),
        "",
        ["is of version 0.2.0", "choose_weights.py again with another --out"],
    ),
    "no distilled": (alone, "", ["no distilled student", "--distances"]),
    "no such distance": (
        only("results.json"),
        "--distance jw2",
        ["--distance jw2", "w2, w2_gaussian"],
    ),
    "no such seed": (only("results.json"), "--seed 7", ["--seed 7", "there are 1"]),
    "no plans": (
        only("results.json"),
        "--figures plans",
        ["--figures plans", "no distance", "fused:W2_K01"],
    ),
    "few images": (only("results.json"), "--images 3", ["--images", "10", "3"]),
    "no teacher": (
        only("results.json"),
        "",
        ["the teacher of", "no checkpoint", "--teacher"],
    ),
    "no student": (
        no_checkpoint,
        "--distance w2 --images 20",
        ["w2/seed1 has no checkpoint", "--distance"],
    ),
    "other teacher": (
        other_teacher,
        "--distance w2 --images 20",
        ["was made with teacher=", "found here is", "pass the teacher"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, finished, tmp_path, capsys):
    make, line, said = MISTAKES[name]
    folder = tmp_path / "runs"
    folder.mkdir()
    make(finished / "out", folder)
    before = sorted(folder.rglob("*"))
    if line is not None:
        given = f"{folder}{line}" if line.startswith("/") else f"{folder} {line}"
    else:
        given = ""
    assert call(*given.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in said:
        assert part in captured.err
    assert captured.out == ""
    pictures = [path for path in folder.rglob("*") if path not in before]
    assert [p for p in pictures if p.suffix == ".png"] == []


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        figures.parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = vars(figures.parse(["there"]))
    for name in options.keys() - {"folder"}:
        assert f"--{name.replace('_', '-')}" in text
    assert options["images"] == figures.EMBEDDED
    assert f"(default {figures.EMBEDDED})" in text


@pytest.mark.slow
def test_toys_need_no_run(tmp_path):
    line = ("--figures", "toys", "--to", tmp_path / "pictures")
    done = command(*line, script=(str(EXPERIMENTS / "figures.py"),), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert_pictures(
        *(tmp_path / "pictures" / f"toy-{n}.png" for n in ("classes", "shapes"))
    )
