"""Runs the Python of the README and the pages, and tests the README's claims."""

import itertools
import json
import re
from pathlib import Path

import pytest

from kddm_jax import DISTANCES
from kddm_jax.experiment.report.accuracies import difference

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "docs/index.md"]
PAGES += sorted(f"docs/questions/{page.name}" for page in ROOT.glob("docs/questions/*"))


def blocks(page):
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_question_has_its_page():
    asked = re.findall(r"^questions/\w+$", (ROOT / "docs/index.md").read_text(), re.M)
    assert sorted(f"docs/{page}.md" for page in asked) == PAGES[2:]
    assert len(asked) >= 6


def test_the_index_links_each_page_of_its_contents():
    text = (ROOT / "docs/index.md").read_text()
    listed = re.findall(
        r"^- \[[^]]+\]\((?:\.\./)?([\w/]+?)(?:/README)?\.md\)$", text, re.M
    )
    trees = re.findall(r"```\{toctree\}\n.*?\n\n(.*?)```", text, re.DOTALL)
    assert listed == " ".join(trees).split()


# The snippets of the questions call distances one operation at a time, which is slow.
@pytest.mark.parametrize(
    "page",
    [*PAGES[:2], *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES[2:])],
)
def test_snippets_run_and_print_what_they_say(page, capsys):
    """The snippets run one after the other; comments at a print give its output."""
    names = {"__name__": "page"}
    assert blocks(page)
    for i, block in enumerate(blocks(page)):
        exec(compile(block, f"{page} block {i}", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        promised = re.findall(r"print\(.*\)\s+# (.*)", block)
        assert promised, "a snippet shows at least one printed value"
        assert printed == promised


@pytest.mark.parametrize("page", PAGES[2:])
def test_pages_are_short(page):
    assert len((ROOT / page).read_text().splitlines()) < 80


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) < 120
    places = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(places) >= 8
    for place in places:
        assert (ROOT / place).exists(), place


def test_every_distance_has_its_formula():
    page = (ROOT / "docs" / "api" / "distances.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rows == list(DISTANCES)


def test_every_distance_has_its_family():
    rows = re.findall(r"^\| \w+ \| .* \| (`.*`) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 7
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert sorted(keys) == sorted(DISTANCES)


WITH_TABLES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*/*.md", "docs/*/*.md")
    for path in sorted(ROOT.glob(pattern))
    if "<!-- table: " in path.read_text()
]


def test_the_pages_of_results_have_tables():
    assert {"examples/README.md", "experiments/README.md"} <= {*WITH_TABLES}


def test_every_result_is_used_by_a_page():
    pages = README + "".join(p.read_text() for p in ROOT.glob("*/README.md"))
    results = sorted((ROOT / "experiments" / "results").iterdir())
    assert {path.suffix for path in results} == {".json", ".png"}
    for path in results:
        assert f"results/{path.name}" in pages, path.name


def test_results_name_no_folder_of_a_machine():
    for path in (ROOT / "experiments" / "results").glob("*.json"):
        assert not re.search(r"[\" ]/(root|home|Users|tmp|work)/", path.read_text()), (
            path
        )


def test_the_comparison_with_the_paper_has_the_numbers_of_its_table():
    page = (ROOT / "experiments" / "README.md").read_text()
    place = "<!-- table: results/cifar10-paper.json -->(.*?)<!-- /table -->"
    table = re.search(place, page, re.S)[1]
    comparison = re.search(r"^\| \| paper \| here \|\n.*\n((?:\|.*\n)+)", page, re.M)[1]
    rows = re.findall(r"^\| (.*) \| .* \| (.*) \|$", comparison, re.M)
    names = {"student alone": "student"}
    found = dict(re.findall(r"^\| (.*?) \| ([\d.]+) \|", table, re.M))
    assert {names.get(name, name): here for name, here in rows} == found


GAIN = r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]"


def test_gains_are_those_of_the_table():
    """Other pages repeat differences with their intervals; the table is rendered."""
    page = (ROOT / "experiments" / "README.md").read_text()
    blocks = re.findall("<!-- table: .*? -->(.*?)<!-- /table -->", page, re.S)
    known = {*re.findall(GAIN, "".join(blocks))}
    guide = (ROOT / "docs" / "questions" / "distance.md").read_text()
    for text in (README, guide, page):
        assert (found := re.findall(GAIN, text))
        assert {*found} <= known


@pytest.mark.parametrize("task", ["sst2", "cola"])
def test_differences_between_distances_of_sentences(task):
    """They are not in the table, whose differences are to the student alone."""
    page = (ROOT / "experiments" / "README.md").read_text()
    file = ROOT / "experiments" / "results" / f"text-{task}.json"
    results = json.loads(file.read_text())

    def scores(*row):
        test = [run for run in results["runs"] if run["part"] == "test"]
        is_of = lambda run: (run["method"], run["layer"]) == row
        return {run["seed"]: run["score"] for run in test if is_of(run)}

    names = {"procrustes": "Procrustes", "gram": "feature Gram"}
    layers = {"first": "first token", "tokens": "all tokens"}
    for key, layer in itertools.product(names, layers):
        cells = [f"{names[key]}, {layers[layer]}"]
        for other in ("cka", "linear"):
            mean, (low, high) = difference(scores(key, layer), scores(other, layer))
            cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(
    ("row", "other", "words"),
    [
        (("gram", "tokens"), ("kd", None), "of all tokens (+2.4, from +0.5 to +4.4)"),
        (("l2", "first"), ("kd", None), "first token L2 (+2.2, from +0.9 to +3.5)"),
        (("linear", "first"), ("kd", None), "projection (+1.2, from +0.0 to +2.4)"),
        (("l2", "first"), ("l2", "tokens"), "than for all tokens (+0.0 to +4.1)"),
    ],
)
def test_differences_on_cola(row, other, words):
    page = (ROOT / "experiments" / "README.md").read_text()
    file = ROOT / "experiments" / "results" / "text-cola.json"
    runs = [r for r in json.loads(file.read_text())["runs"] if r["part"] == "test"]
    scores = [
        {r["seed"]: r["score"] for r in runs if (r["method"], r["layer"]) == of}
        for of in (row, other)
    ]
    mean, (low, high) = difference(*scores)
    assert f"{low:+.1f} to {high:+.1f}" in words
    assert f"{mean:+.1f}" in words or f"{mean:.1f} points better" in page
    assert words in " ".join(page.split())


FIELD = [f"cifar10-2000-field-{part}" for part in ("features", "maps", "logits")]
PARTS = ("unit", "features", "maps", "logits")
CIFAR100 = [f"cifar100-10000-{part}" for part in PARTS]


@pytest.mark.parametrize(
    ("files", "better", "worse", "words"),
    [
        (FIELD, "attention", "kd", "3.1 points more than KD (+2.2 to +4.0)"),
        (FIELD, "dct", "kd", "(DCT) 3.1 (+1.0 to +5.3)"),
        (FIELD, "contrastive", "kd", "InfoNCE 2.2 (+0.3 to +4.1)"),
        (FIELD, "dist", "kd", "DIST gains 4.4 less (-8.1 to -0.7)"),
        (FIELD, "jsd", "kd", "JSD 5.1 less (-6.4 to -3.8)"),
        (CIFAR100, "contrastive", "kd", "1.6 points less than KD (-2.6 to -0.6)"),
        (CIFAR100, "pkt", "kd", "PKT 2.1 less (-3.1 to -1.1)"),
        (CIFAR100, "rkd_distance", "kd", "distances 2.7 less (-4.2 to -1.2)"),
        (CIFAR100, "attention", "kd", "attention transfer 3.0 less (-4.4 to -1.5)"),
        (CIFAR100, "dist", "kd", "DIST 3.1 less (-3.6 to -2.7)"),
        (CIFAR100, "jsd", "kd", "JSD 2.5 less (-4.8 to -0.3)"),
    ],
)
def test_differences_between_losses_of_images(files, better, worse, words):
    """They are not in the table, whose differences are to the student alone."""
    scores = {better: {}, worse: {}}
    for file in files:
        path = ROOT / "experiments" / "results" / f"{file}.json"
        for run in json.loads(path.read_text())["runs"]:
            if run["name"] in scores:
                scores[run["name"]][run["seed"]] = run["accuracy"]
    mean, (low, high) = difference(scores[better], scores[worse])
    assert f"{abs(mean):.1f}" in words
    assert f"({low:+.1f} to {high:+.1f})" in words
    page = (ROOT / "experiments" / "README.md").read_text()
    assert words in " ".join(page.split())


def test_cw2_and_l2_of_cifar100():
    """They are in two files; the file of CW2 has another L2."""
    scores = []
    for file, name in (("standardized", "l2"), ("unit", "cw2")):
        path = ROOT / "experiments" / "results" / f"cifar100-10000-{file}.json"
        runs = json.loads(path.read_text())["runs"]
        of = {run["seed"]: run["accuracy"] for run in runs if run["name"] == name}
        scores.append(of)
    mean, (low, high) = difference(*scores)
    page = (ROOT / "experiments" / "README.md").read_text()
    words = f"CW2 gains {mean:.1f} points less than L2 of standardized features "
    assert words + f"({low:.1f} to {high:.1f})" in " ".join(page.split())


def test_links_of_the_results_lead_somewhere():
    folder = ROOT / "experiments"
    page = (folder / "README.md").read_text()
    headings = re.findall(r"^##+ (.*)$", page, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for place in re.findall(r"\]\(\s*(?!https?:)([^)]+)\)", page):
        path, _, anchor = place.partition("#")
        assert (folder / path).exists() if path else anchor in anchors, place


@pytest.mark.parametrize("page", WITH_TABLES)
def test_tables_are_rendered_from_their_json(page, monkeypatch):
    from kddm_jax.experiment import render

    text = (ROOT / page).read_text()
    assert render.fill(ROOT / page) == text
