"""What a reader sees of runs: tables, shares of the gap, curves, grids of weights."""

import io
import json
import re

import pytest
from commands import command, environ, small_results, table_lines
from rich.console import Console

from kddm_jax.experiment import render
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.report import curves, table, weights


@pytest.mark.parametrize(
    ("accuracy", "student", "teacher", "images", "expected"),
    [
        # Two seeds: error sqrt(2) / sqrt(2) = 1; teacher sqrt(90 * 10 / 100) = 3;
        # together 3.16, and the gap of 9 is more than twice that.
        (84.6, [80.0, 82.0], 90.0, 100, 40.0),
        (81.0, [80.0, 82.0], 90.0, 100, 0.0),
        (76.5, [80.0, 82.0], 90.0, 100, -50.0),
        (94.5, [80.0, 82.0], 90.0, 100, 150.0),
        # A quarter of the images: sqrt(1 + 36) = 6.1, twice that exceeds 9.
        (84.6, [80.0, 82.0], 90.0, 25, None),
        # Seeds 16 apart: 8 sqrt(2) / sqrt(2) = 8, and 15 is less than 16.
        (90.0, [72.0, 88.0], 95.0, 10_000, None),
        # One seed: sqrt(25 + 22.44) = 6.9; 16 is more than 13.8, 13 is not.
        (58.0, [50.0], 66.0, 100, 50.0),
        (58.0, [50.0], 63.0, 100, None),
        # A teacher that is worse, equal, or perfect like its student.
        (60.0, [80.0], 70.0, 10_000, None),
        (80.0, [80.0], 80.0, 10_000, None),
        (100.0, [100.0], 100.0, 100, None),
        (100.0, [100.0, 100.0], 100.0, 100, None),
    ],
)
def test_gap_closed(accuracy, student, teacher, images, expected):
    found = table.gap_closed(accuracy, student, teacher, images)
    assert found == (None if expected is None else pytest.approx(expected))


# By hand: means 81 and 84.6, standard deviations sqrt(2) and 0.6 sqrt(2), of the best
# ones sqrt(2) and 0.4 sqrt(2); (84.6 - 81) / (90 - 81) = 40 %.
GOLDEN = """\
|  | last epoch % | best epoch % | gap closed | λ | seconds |
|---|---|---|---|---|---|
| student | 81.00 ± 1.41 | 81.50 ± 1.41 | – |  | 12 |
| teacher | 90.00 | 91.50 |  |  | 61 |
| W2 (E) | 84.60 ± 0.85 | 85.60 ± 0.57 | 40 % | 0.0001 | 20 |

digits, recipe laptop: ResNet34 (width 32) to ResNet18 (width 16), cifar stem; \
accuracy on 100 test images; 2 seeds; 2 × Some GPU, JAX 1.2.3, commit abc1234. \
`python experiments/cifar.py --dataset digits --seeds 0 1`
"""


def test_markdown():
    assert table.markdown(small_results()) == GOLDEN


def chosen(accuracy, **settings):
    """What choose_weights.py writes."""
    environment = {"device": "Some GPU", "jax": "1.2.3", "commit": "abc1234"}
    settings = {"dataset": "digits", "held_out": 300, "seeds": [0], **settings}
    made = {"teacher": 90.0, "environment": environment}
    return {"settings": settings, "held_out_accuracy": accuracy, **made}


def test_grids_of_weights_are_one_table(tmp_path):
    files = {
        "a.json": chosen({"w2": {"0.01": 80.0, "1e-05": 81.04}, "l2": {"1": 0.0}}),
        "b.json": chosen({"w2": {"1": 60.0}, "mine:ROW": {"1": 70.0}}),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: a.json b.json -->\nold\n<!-- /table -->\n")
    assert render.fill(page).splitlines()[1:-1] == [
        "| λ | 1e-05 | 0.01 | 1 |",
        "|---|---|---|---|",
        "| W2 (E) | **81.0** | 80.0 | 60.0 |",
        "| paired L2 |  |  | diverged |",
        "| mine:ROW |  |  | **70.0** |",
        "",
        "digits: accuracy on 300 held-out training images, 1 seed; teacher 90.00; "
        "Some GPU, JAX 1.2.3, commit abc1234.",
    ]


def test_grids_of_other_settings_are_no_table():
    one, other = chosen({"w2": {"1": 60.0}}), chosen({"w2": {"2": 61.0}}, seeds=[0, 1])
    with pytest.raises(UserError, match="seeds"):
        weights.markdown([one, other])
    saw = chosen({"w2": {"1": 60.0}}, teacher_saw_held_out=True)
    assert "which the teacher has seen" in weights.markdown([saw])


def test_a_page_that_cannot_be_rendered_is_left(tmp_path, capsys):
    page = tmp_path / "page.md"
    old = "<!-- table: a.json b.json -->\nold\n<!-- /table -->\n"
    page.write_text(old)
    said = lambda: (render.main([str(page)]), capsys.readouterr().err)
    status, error = said()
    assert status == 2
    assert error.startswith(f"error: {tmp_path / 'a.json'} is not readable as JSON; ")
    assert error.count("\n") == 1
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(small_results()))
    status, error = said()
    assert (status, error.count("\n")) == (2, 1)
    assert "only grids of kddm choose-weights" in error
    assert page.read_text() == old


def test_no_gap_is_a_dash():
    text = table.markdown(small_results(teacher=86.0))
    assert "| W2 (E) | 84.60 ± 0.85 | 85.60 ± 0.57 | – | 0.0001 | 20 |" in text
    assert "%" not in text.splitlines()[4]


def test_given_teacher_has_no_time():
    text = table.markdown(small_results(given=True))
    assert "| teacher | 90.00 |  |  |  |  |" in text


def test_one_seed_has_no_spread():
    results = small_results()
    results["runs"] = results["runs"][::2]
    results["settings"]["seeds"] = [0]
    results["eval_images"] = 400  # errors of 2 and 1.5: the gap of 10 counts
    text = table.markdown(results)
    assert "| W2 (E) | 84.00 | 86.00 | 40 % | 0.0001 | 20 |" in text
    assert "; 1 seed; " in text
    assert "±" not in text


def test_held_out_images_are_called_so():
    results = small_results()
    results["settings"]["held_out"] = 100
    assert "accuracy on 100 held-out training images" in table.markdown(results)


@pytest.mark.slow
def test_report_is_rendered_again_from_json(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(small_results()))
    script = ("-m", "kddm_jax", "report")
    env = environ(PYTHONIOENCODING="utf-8")
    done = command("results.json", script=script, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == GOLDEN.strip()


def test_curves_of_runs_with_few_evaluations(tmp_path):
    """The last epoch always is evaluated, others may not be."""
    results = small_results()
    for run in results["runs"]:
        del run["history"][0]["test_accuracy"]
    curves.save(curves.of_runs(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_two_distances_of_one_title(tmp_path):
    """One's own distance may be a row of the catalogue with other options."""
    results = small_results()
    again = [dict(run, name="own:W2") for run in results["runs"] if run["name"] == "w2"]
    results["runs"] += again[:1]
    assert again[0]["title"] == "W2 (E)"
    curves.save(curves.of_runs(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_without_distilled_students(tmp_path):
    results = small_results()
    del results["runs"][2:]
    curves.save(curves.of_runs(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_named_without_their_place():
    results = small_results()
    results["settings"]["pretrained_teacher"] = "/home/me/resnet18.safetensors"
    text = table.markdown(results)
    assert "--seeds 0 1 --pretrained-teacher resnet18.safetensors`" in text


def test_terminal_table_says_what_markdown_says():
    file = io.StringIO()
    table.show(small_results(), Console(file=file, width=120))
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in table_lines(file.getvalue())
    ]
    assert rows == [list(table.COLUMNS), *map(list, table.table(small_results()))]


def test_an_installed_package_has_a_version():
    results = small_results()
    for run in results["runs"]:
        run["environment"]["commit"] = "version 1.2"
    results["teacher"]["environment"]["commit"] = "version 1.2"
    results["environment"]["command"] = "kddm distill --seeds 0 1"
    text = table.markdown(results)
    assert ", JAX 1.2.3, version 1.2. `kddm distill --dataset digits --seeds" in text
