"""Tests the HTML page of a command: completeness, safety, and reproducibility."""

import html
import json
import re
import shutil
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from commands import (
    EXPERIMENTS,
    call,
    command,
    environ,
    results_of,
    small_results,
    tiny,
)

from kddm_jax.experiment import render
from kddm_jax.experiment.recipes import defaults
from kddm_jax.experiment.report import curves, embedding, table
from kddm_jax.experiment.report import page as page_module
from kddm_jax.experiment.settings import Settings, as_json, change

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Reads a page, and checks that all elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables = [], [], []
        self.heading, self.headings = "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += text
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += text

    def count(self, tag, **attributes):
        return sum(
            name == tag and attributes.items() <= found.items()
            for name, found in self.elements
        )


def full_results():
    """Returns `small_results` with all settings, as the command writes them."""
    results = small_results()
    settings = as_json(defaults("digits", "laptop"))
    results["settings"] = {**settings, "seeds": [0, 1], "distances": ["w2"]}
    return results


def page_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------
# The page of a command.


def test_page_stands_alone(finished):
    """The page loads nothing and runs nothing, and adapts to phones and dark mode."""
    text = page_of(finished / "out")
    page = Page(text)
    assert not re.search(r"@import|url\((?!#)|javascript:", text)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data"} & set(attributes)
        own = attributes.get("xlink:href", "#")  # for parts of figures
        assert own.startswith(("#", "data:image/png;base64,"))
        assert not [name for name in attributes if name.startswith("on")]
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert links == ["results.json", "table.md", "curves.png"]
    assert all((finished / "out" / link).is_file() for link in links)
    assert page.count("meta", name="viewport")
    assert "prefers-color-scheme: dark" in text
    scrolls = sum("scroll" in a.get("class", "") for _, a in page.elements)
    assert scrolls == page.count("table") + page.count("svg")


def test_page_holds_every_run(finished):
    results = results_of(finished / "out")
    accuracy, runs, solver, environment, settings = Page(
        page_of(finished / "out")
    ).tables
    names = table.columns(results)
    assert accuracy == [list(names), *map(list, table.table(results))]
    header, teacher, *rows = runs
    assert header == list(page_module.RUN_COLUMNS)
    assert teacher[3] == f"{results['teacher']['accuracy']:.2f}"
    assert len(rows) == len(results["runs"])
    for row, run in zip(rows, results["runs"], strict=True):
        timing = run["timing"]
        assert timing["images_per_second"] > 0
        assert row == [
            *(run["title"], str(run["seed"])),
            f"{run['weight']:g}" if run["weight"] else "",
            *(f"{run['accuracy']:.2f}", f"{timing['seconds']:.1f}"),
            f"{timing['seconds_to_first_step']:.1f}",
            *(f"{timing['images_per_second']:.0f}", "0"),
        ]
    assert [row[0] for row in solver] == ["", "W2 (E)"]  # the only one with iterations
    assert ["jax", results["environment"]["jax"]] in environment
    assert {name for name, _ in settings} == set(results["settings"])
    assert ["distances", "w2, w2_gaussian"] in settings


def test_page_shows_features(finished):
    """It shows the teacher, the student alone, and the first seed of each distance."""
    kept = json.loads((finished / "out" / "embedding.json").read_text())
    names = ["teacher", "student", "w2", "w2_gaussian"]
    assert [panel["name"] for panel in kept["panels"]] == names
    # Both distances compare coordinates, so these panels use the teacher's axes.
    tied = [panel["behind"] is not None for panel in kept["panels"]]
    assert tied == [False, False, True, True]
    assert len(kept["labels"]) == 100
    for panel in kept["panels"]:
        points = np.array(panel["points"])
        assert points.shape == (100, 2)
        assert np.isfinite(points).all()
        assert (points.std(0) > 0).all()
    page = Page(page_of(finished / "out"))
    assert page.headings == [
        *("digits, recipe laptop", "Accuracy", "Learning curves"),
        *("Features", "Runs and time", "Solvers", "Environment"),
    ]
    assert page.count("svg") == 3


@pytest.mark.slow
def test_same_command_leaves_the_page(finished, tmp_path, monkeypatch, capsys):
    """Features are computed once. Lost checkpoints only remove their picture."""
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    path = folder / "out" / "embedding.json"
    before = page_of(folder / "out"), path.stat().st_mtime_ns
    again = command(*tiny("out"), cwd=folder)  # as before, in another process
    assert (again.returncode, again.stderr) == (0, "")
    assert (page_of(folder / "out"), path.stat().st_mtime_ns) == before

    monkeypatch.chdir(folder)
    line = tiny("out")
    warned = lambda: capsys.readouterr().err
    path.write_text("{")  # damaged, so it is computed again
    assert (call(*line), warned()) == (0, "")
    assert page_of(folder / "out") == before[0]

    (folder / "out" / "report.html").unlink()
    assert (render.main(["out"]), warned()) == (0, "")
    assert page_of(folder / "out") == before[0]

    shutil.rmtree(folder / "out" / "w2" / "seed1" / "checkpoints")
    assert (call(*line), warned()) == (0, "")
    assert page_of(folder / "out") == before[0]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert call(*line, "--embedding", "tsne") == 0
    assert warned() == "warning: no picture of w2: its checkpoints are gone\n"
    names = [panel["name"] for panel in json.loads(path.read_text())["panels"]]
    assert names == ["teacher", "student", "w2_gaussian"]
    assert "t-SNE" in page_of(folder / "out")
    assert (call(*line, "--embedding", "none"), warned()) == (0, "")
    assert "Features" not in page_of(folder / "out")


@pytest.mark.slow
def test_no_command_waits_for_the_report():
    """The modules that draw the page are imported only if there is a page to draw."""
    late = ("sklearn.manifold", "matplotlib", "jinja2")
    code = (
        "import sys; from kddm_jax.experiment import distill; "
        f"print([n for n in {late} if n in sys.modules])"
    )
    done = command(script=("-c", code), cwd=EXPERIMENTS, env=environ())
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---------------------------------------------------------------------------
# The page of any results.

HOSTILE = """</title><script src="//x">alert('1')</script><b onload="x">&amp;`{{ 1 }}"""


def test_strings_are_escaped():
    """Users may choose any name for a folder, a class or a module."""
    results = full_results()
    results["settings"].update(dataset=HOSTILE, out=HOSTILE, student_model=HOSTILE)
    results["teacher"]["model"] = HOSTILE
    for run in results["runs"]:
        run["title"] = HOSTILE
        run["environment"] = {**run["environment"], "device": HOSTILE}
    kept = {
        "made_of": {"method": "pca"},
        "classes": [HOSTILE, "b"],
        "labels": [0, 1, 1],
        "panels": [
            {
                "name": "w2",
                "title": HOSTILE,
                "points": [[0, 0], [1, 1], [2, 0]],
                "behind": None,
            }
        ],
    }
    page = Page(page_module.render(results, kept))
    assert not {"script", "b"} & {
        tag for tag, attributes in page.elements if attributes
    }
    assert page.headings[0] == f"{HOSTILE}, recipe laptop"
    _, runs, environment, settings = page.tables
    assert [row[0] for row in runs[2:]] == [HOSTILE] * 4
    assert ["device", f"{HOSTILE}, Some GPU"] in environment
    assert ["dataset", HOSTILE] in settings


def test_page_without_distilled_students_or_teacher_run():
    results = full_results()
    del results["runs"][2:]
    results["teacher"].update(small_results(given=True)["teacher"])
    page = Page(page_module.render(results))
    accuracy, runs, *_ = page.tables
    assert [row[0] for row in accuracy] == ["", "student", "teacher"]
    assert [row[0] for row in runs] == ["", "student", "student"]
    assert "Solvers" not in page.headings
    assert page.count("svg") == 1


def test_page_compares_with_the_better_student_alone():
    results = full_results()
    name = {"name": "student_longer", "title": "student, longer"}
    results["runs"] += [
        {**run, **name, "accuracy": run["accuracy"] + 2} for run in results["runs"][:2]
    ]
    text = page_module.render(results)
    accuracy, runs, *_ = Page(text).tables
    names = ["student", "student, longer", "teacher", "W2 (E)"]
    assert [row[0] for row in accuracy[1:]] == names
    assert accuracy[-1][2] == "+1.6 [-3.5, +6.7]"  # that to the student, less 2
    assert [row[0] for row in runs[1:6:2]] == ["teacher", "student", "student, longer"]
    for note in table.notes(results):
        assert note in html.unescape(text)
    cards = re.findall(r"<li>(.*?)<b>(.*?) %</b></li>", text)
    assert cards == [
        ("student, longer", "83.00 ± 1.41"),
        *(("teacher", "90.00"), ("W2 (E)", "84.60 ± 0.85")),
    ]


RESULTS = sorted((EXPERIMENTS / "results").glob("*.json"))
RESULTS = [path for path in RESULTS if '"eval_images"' in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_of_earlier_versions_have_a_page(path, monkeypatch):
    # Rendering takes most of a second, and is the same for all files.
    monkeypatch.setattr(curves, "svg", lambda figure: curves.plt.close(figure) or "")
    results = json.loads(path.read_text())
    _, runs, *_ = Page(page_module.render(results)).tables
    assert len([row for row in runs[1:] if row[0] != "teacher"]) == len(results["runs"])


def test_settings_that_are_not_the_recipe_s_are_marked():
    results = full_results()
    page = Page(page_module.render(results))
    changed = [
        name
        for name, _, other in page_module.settings_rows(results["settings"])
        if other
    ]
    assert changed == ["distances", "seeds"]
    assert page.count("tr", **{"class": "changed"}) == 2


def _brightness(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_colours_are_seen_on_either_paper():
    """WCAG 2.2 asks for a contrast of text of at least 4.5."""
    text = page_module.render(full_results())
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        assert len(colours) == 6
        paper = _brightness(colours["paper"])
        for name, colour in colours.items():
            low, high = sorted([_brightness(colour), paper])
            contrast = (high + 0.05) / (low + 0.05)
            if name in ("ink", "soft", "link"):
                assert contrast > 4.5, name


# ---------------------------------------------------------------------------
# Figures.


def test_a_figure_is_one_element_of_the_page():
    """The figure is the same each time, contains its text, and is closed afterwards."""

    def figure():
        made, axes = curves.plt.subplots()
        axes.set_title(curves.plain("a $b$ <c>"))
        axes.plot([1, 2], [3, 400])
        axes.set_yscale("log")
        return made

    others = curves.plt.get_fignums()  # from earlier tests in this process
    text = curves.svg(figure())
    assert text == curves.svg(figure())
    page = Page(text)
    assert page.elements[0][0] == "svg"
    assert "a $b$ &lt;c&gt;" in text
    assert ">$\\mathdefault" not in text  # an undrawn formula
    assert "dc:date" not in text
    assert curves.plt.get_fignums() == others


def embedding_of(count, classes=3, images=6):
    """Makes an ``embedding.json`` of random points, some with the teacher's."""
    points = lambda i: np.random.default_rng(i).normal(size=(images, 2)).tolist()
    return {
        "made_of": {"method": "pca"},
        "classes": [f"class {c}" for c in range(classes)],
        "labels": [i % classes for i in range(images)],
        "panels": [
            {
                "name": str(i),
                "title": f"network {i}",
                "points": points(i),
                "behind": points(i + 100) if i % 2 else None,
            }
            for i in range(count)
        ],
    }


@pytest.mark.parametrize("count", [1, 4, 6])
def test_features_have_a_panel_for_each_network(count):
    kept = embedding_of(count)
    figure = page_module.features(kept)
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == count
    for axes, panel in zip(shown, kept["panels"], strict=True):
        behind, points = (dots.get_offsets() for dots in axes.collections)
        np.testing.assert_allclose(points, panel["points"])
        np.testing.assert_allclose(behind, np.reshape(panel["behind"] or [], (-1, 2)))
        whose = "the teacher's axes" if panel["behind"] else "its own axes"
        assert axes.get_title() == f"{panel['title']}, {whose}"
        colours = axes.collections[1].get_facecolors()
        assert len(np.unique(colours, axis=0)) == 3
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == kept["classes"]
    curves.plt.close(figure)


def test_many_classes_have_no_legend():
    figure = page_module.features(embedding_of(2, classes=21, images=42))
    assert figure.legends == []
    curves.plt.close(figure)


def test_a_page_of_nothing_is_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    missing, broken = tmp_path / "nowhere", tmp_path
    for folder, said in (
        (missing, f"{missing} is not a folder"),
        (broken, f"{broken / 'results.json'} is not readable"),
    ):
        assert render.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}")
        assert error.count("\n") == 1


def test_statistics_of_solvers():
    results = full_results()
    for run, iterations in zip(results["runs"][2:], (10.0, 30.0), strict=True):
        for record, share in zip(run["history"], (0.5, 1.0), strict=True):
            record["w2/converged"] = share
            record["w2/iterations"] = iterations
            record["w2/marginal_error"] = 2e-4 / share
    (row,) = page_module.solvers(results)
    assert row == ("W2 (E)", "75 % (50 %)", "20.0 (30.0)", "0.0003 (0.0004)")
    figure = page_module.solver_curves(results)
    converged, iterations, error = figure.axes
    (line,) = converged.lines
    assert line.get_label() == "W2 (E)"
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.5], [2, 1.0]])
    np.testing.assert_allclose(iterations.lines[0].get_ydata(), [20.0, 20.0])
    np.testing.assert_allclose(error.lines[0].get_ydata(), [4e-4, 2e-4])
    curves.plt.close(figure)
    assert page_module.solver_curves(full_results()) is None


# ---------------------------------------------------------------------------
# Features in the plane.


def test_pca_on_the_teacher_s_axes():
    """The axes are the teacher's principal axes."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(50, 4)) * [1.0, 9.0, 0.1, 4.0] + 3.0
    student = rng.normal(size=(20, 4))
    points, behind = embedding.project("pca", student, teacher)
    assert points.shape == (20, 2)
    np.testing.assert_allclose(behind.mean(0), 0, atol=1e-12)
    spread = np.linalg.svd(teacher - teacher.mean(0))[1][:2]
    np.testing.assert_allclose(np.linalg.norm(behind, axis=0), spread)
    moved, _ = embedding.project("pca", student + [0, 1, 0, 0], teacher)
    assert np.abs(moved - points)[:, 0].min() > 0.9  # almost along the first axis


def test_pca_on_its_own_axes():
    features = np.random.default_rng(0).normal(size=(30, 3)) * [1, 5, 0.1]
    points, behind = embedding.project("pca", features)
    assert behind is None
    spread = np.linalg.svd(features - features.mean(0))[1][:2]
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), spread)


@pytest.mark.slow
def test_tsne_tells_clusters_apart():
    rng = np.random.default_rng(0)
    centres = np.repeat(20 * np.eye(3), 10, axis=0)
    features = centres + rng.normal(size=centres.shape)
    points, behind = embedding.project("tsne", features, features)
    again, _ = embedding.project("tsne", features, features)
    np.testing.assert_array_equal(points, again)
    assert behind.shape == (30, 2)
    groups = points.reshape(3, 10, 2)
    radius = np.linalg.norm(groups - groups.mean(1, keepdims=True), axis=-1).max()
    gaps = np.linalg.norm(groups.mean(1)[[0, 1, 2]] - groups.mean(1)[[1, 2, 0]], axis=1)
    assert gaps.min() > 2 * radius


@pytest.mark.parametrize(
    ("name", "changes", "tied"),
    [
        ("w2", {}, True),
        ("l2", {}, True),
        ("jw2", {}, True),
        ("student", {}, False),
        ("cka", {}, False),  # invariant to rotations
        ("kd", {}, False),  # compares predictions
        ("nst", {}, False),  # compares maps
        ("feature_only", {}, False),
        ("w2", {"layers": ("a:b",)}, False),
        ("w2", {"projector": "dense"}, False),
    ],
)
def test_methods_that_share_the_teachers_axes(name, changes, tied):
    assert embedding.ties_axes(name, change(Settings(), **changes)) is tied
