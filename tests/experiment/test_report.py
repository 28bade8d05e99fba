"""Tests what readers see of runs: tables, gaps closed, curves, and grids of weights."""

import io
import json
import re

import numpy as np
import pytest
from commands import command, environ, small_results, table_lines
from rich.console import Console
from scipy import stats

from kddm_jax.experiment import distill, render
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.report import accuracies, curves, table


@pytest.mark.parametrize(
    ("accuracy", "student", "teacher", "images", "expected"),
    [
        # Two seeds have an error of sqrt(2) / sqrt(2) = 1, the teacher sqrt(90 * 10 /
        # 100) = 3, both together 3.16. The gap of 9 is more than twice that.
        (84.6, [80.0, 82.0], 90.0, 100, 40.0),
        (81.0, [80.0, 82.0], 90.0, 100, 0.0),
        (76.5, [80.0, 82.0], 90.0, 100, -50.0),
        (94.5, [80.0, 82.0], 90.0, 100, 150.0),
        # With a quarter of the images the error is sqrt(1 + 36) = 6.1, and 9 is less
        # than twice that.
        (84.6, [80.0, 82.0], 90.0, 25, None),
        # Seeds that differ by 16 have an error of 8 sqrt(2) / sqrt(2) = 8; 15 is less
        # than 16.
        (90.0, [72.0, 88.0], 95.0, 10_000, None),
        # One seed: sqrt(25 + 22.44) = 6.9; 16 is more than 13.8, 13 is less.
        (58.0, [50.0], 66.0, 100, 50.0),
        (58.0, [50.0], 63.0, 100, None),
        # The teacher is worse than the student, equal, or both are perfect.
        (60.0, [80.0], 70.0, 10_000, None),
        (80.0, [80.0], 80.0, 10_000, None),
        (100.0, [100.0], 100.0, 100, None),
        (100.0, [100.0, 100.0], 100.0, 100, None),
    ],
)
def test_gap_closed(accuracy, student, teacher, images, expected):
    found = accuracies.gap_closed(accuracy, student, teacher, images)
    assert found == (None if expected is None else pytest.approx(expected))


def test_difference_is_paired_by_seed():
    """By hand: differences 1, 2, 3 have deviation 1, and t is 4.303 for 2 degrees."""
    alone = {0: 10.0, 1: 50.0, 2: 90.0}  # far apart, but that is paired away
    distilled = {2: 93.0, 0: 11.0, 1: 52.0}
    mean, (low, high) = accuracies.difference(distilled, alone)
    assert mean == pytest.approx(2.0)
    assert high - mean == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_interval_is_that_of_the_paired_t_test(count):
    rng = np.random.default_rng(count)
    alone = dict(enumerate(rng.normal(60, 2, count)))
    distilled = {seed: value + rng.normal(1, 0.5) for seed, value in alone.items()}
    found = accuracies.difference(distilled, alone)
    pair = [*distilled.values()], [*alone.values()]
    expected = stats.ttest_rel(*pair).confidence_interval(0.95)
    np.testing.assert_allclose(found.interval, expected)


def test_only_common_seeds_are_compared():
    alone = {0: 80.0, 1: 82.0, 7: 0.0}
    assert accuracies.difference({0: 84.0, 1: 85.2, 5: 0.0}, alone).mean == (
        pytest.approx(3.6)
    )
    assert accuracies.difference({1: 85.0, 5: 0.0}, alone) == (3.0, None)
    assert accuracies.difference({5: 0.0}, alone) is None


@pytest.mark.parametrize(
    ("mean", "interval", "text"),
    [
        (3.14, (2.36, 3.92), "+3.1 [+2.4, +3.9]"),
        (-3.14, None, "-3.1"),
        (0.4, (-0.02, 0.82), "+0.4 [-0.0, +0.8]"),  # contains zero
        (0.42, (0.02, 0.82), "+0.4 [+0.0, +0.8]"),
    ],
)
def test_differences_are_written_with_signs(mean, interval, text):
    assert str(accuracies.Difference(mean, interval)) == text


# By hand: means 81 and 84.6, standard deviations sqrt(2) and 0.6 sqrt(2);
# (84.6 - 81) / (90 - 81) = 40 %.  Differences 4 and 3.2 have the standard error 0.4,
# and t is 12.706 for one degree of freedom: 3.6 ± 5.08.
GOLDEN = """\
|  | accuracy % | difference to alone | gap closed | λ | seeds | seconds |
|---|---|---|---|---|---|---|
| student | 81.00 ± 1.41 |  |  |  | 2 | 12 |
| teacher | 90.00 |  |  |  |  | 61 |
| W2 (E) | 84.60 ± 0.85 | +3.6 [-1.5, +8.7] | 40 % | 0.0001 | 2 | 20 |

digits, recipe laptop: ResNet18 (width 32) to ResNet9 (width 16), cifar stem; \
accuracy after the last epoch on 100 test images; 2 seeds; 2 × Some GPU, JAX 1.2.3, \
commit abc1234. Differences and "gap closed" refer to "student". ± is the standard \
deviation over seeds; brackets are 95 % intervals of the mean difference, paired by \
seed (Student's t). All seeds share one teacher, the same labelled images and the same \
test images, so intervals do not cover other teachers or other samples. \
`python experiments/cifar.py --dataset digits --seeds 0 1`
"""


def test_markdown():
    assert table.markdown(small_results()) == GOLDEN


def test_the_command_has_what_changes_results():
    """Folders of the machine are left out, but not that the teacher was given."""
    results = small_results()
    results["settings"] |= {
        "teacher": "/home/me/runs/teacher/seed0",
        "data_dir": "/data",
        "checkpoint_seconds": 5.0,
        "stream_above": 100.0,
        "coordinator": "host:1234",
        "processes": 2,
        "process": 1,
        "log": "tensorboard",
        "profile": 20,
        "lr": 0.5,
    }
    found = table.command_of(results).removeprefix("python experiments/cifar.py ")
    assert found == "--dataset digits --seeds 0 1 --teacher CHECKPOINT --lr 0.5"


def test_top_5_accuracy_is_shown_where_it_was_measured():
    """By hand: the mean of 94 and 96 is 95, their deviation sqrt(2)."""
    results = small_results()
    results["teacher"]["top5"] = 98.5
    for run, top5 in zip(results["runs"], (90.0, 92.0, 94.0, 96.0), strict=True):
        run["top5"] = top5
    place = table.columns(results).index("top-5 %")
    cells = [row[place] for row in table.table(results)]
    assert cells == ["91.00 ± 1.41", "98.50", "95.00 ± 1.41"]
    del results["runs"][2]["top5"]  # a run of an earlier version
    assert table.table(results)[2][place] == ""


def test_a_grid_of_version_0_2_0_is_refused(tmp_path, capsys):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"held_out_accuracy": {"w2": {"1": 60.0}}}))
    assert render.main([str(path)]) == 2
    assert f"{path} is a grid of version 0.2.0; render it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        small_results()["runs"][0],  # a run's file, a letter away from results.json
        {"rows": [], "claims": []},  # of a benchmark
        {"runs": [], "settings": {}},  # of experiments/text.py
        [{"a": 1}],
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    assert render.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is neither results.json of kddm distill nor weights.json" in error
    assert error.count("\n") == 1


def test_a_folder_is_its_json_file(tmp_path, capsys):
    """Folders of ``kddm choose-weights`` have no results.json."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for path in folders:
        path.mkdir()
    grid = json.dumps({"held_out_accuracy": {}})
    (folders[0] / "weights.json").write_text(grid)
    (folders[1] / "results.json").write_text(json.dumps(small_results()))
    said = lambda *paths: (render.main([*map(str, paths)]), capsys.readouterr().err)
    for paths in (folders[:1], folders[1::-1]):
        status, error = said(*paths)
        assert status == 2
        assert f"{folders[0] / 'weights.json'} is a grid of version 0.2.0" in error
    for paths in (folders[2:], folders[1:]):
        status, error = said(*paths)
        assert (status, error.count("\n")) == (2, 1)
        assert f"{folders[2]} has no results.json: it is not finished" in error
    assert "is not a folder" in said(tmp_path / "absent")[1]


def test_a_page_that_cannot_be_rendered_is_left(tmp_path, capsys):
    page = tmp_path / "page.md"
    old = "<!-- table: a.json b.json -->\nold\n<!-- /table -->\n"
    page.write_text(old)
    said = lambda: (render.main([str(page)]), capsys.readouterr().err)
    status, error = said()
    assert status == 2
    assert error.startswith(f"error: {tmp_path / 'a.json'} is not readable as JSON; ")
    assert error.count("\n") == 1
    (tmp_path / "a.json").write_text(json.dumps(small_results()))
    (tmp_path / "b.json").write_text(json.dumps({"tried": []}))
    status, error = said()
    assert (status, error.count("\n")) == (2, 1)
    assert "or all are grids of kddm choose-weights" in error
    assert page.read_text() == old


def test_no_gap_is_a_dash():
    text = table.markdown(small_results(teacher=86.0))
    row = "| W2 (E) | 84.60 ± 0.85 | +3.6 [-1.5, +8.7] | – | 0.0001 | 2 | 20 |"
    assert row in text.splitlines()


def test_given_teacher_has_no_time():
    text = table.markdown(small_results(given=True))
    assert "| teacher | 90.00 |  |  |  |  |  |" in text


def test_one_seed_has_no_spread():
    results = small_results()
    results["runs"] = results["runs"][::2]
    results["settings"]["seeds"] = [0]
    results["eval_images"] = 400  # with errors of 2 and 1.5, a gap of 10 counts
    text = table.markdown(results)
    assert "| W2 (E) | 84.00 | +4.0 | 40 % | 0.0001 | 1 | 20 |" in text
    assert "; 1 seed; " in text
    assert "One seed gives no interval." in text
    assert "±" not in text
    assert "All seeds" not in text


def test_seeds_that_are_missing_are_not_compared():
    results = small_results()
    del results["runs"][1]  # the student alone of seed 1
    results["eval_images"] = 400
    text = table.markdown(results)
    # The accuracy is that of both seeds, the difference is 84 - 80.
    assert "| W2 (E) | 84.60 ± 0.85 | +4.0 | 40 % | 0.0001 | 2 | 20 |" in text
    assert "; 1 to 2 seeds; " in text
    results["runs"][0]["seed"] = 5
    text = table.markdown(results)
    assert "| W2 (E) | 84.60 ± 0.85 | – | – | 0.0001 | 2 | 20 |" in text


def test_caption_says_what_seeds_share():
    results = small_results()
    shared = lambda: table.notes(results)[-1]
    assert "the same labelled images and the same test images" in shared()
    results["settings"].update(train_images=500, student_images=None)
    assert "the same 500 labelled images and" in shared()
    results["settings"].update(student_images=128, views=4, held_out=100)
    assert "128 labelled images in 4 fixed views and the same held-out" in shared()
    results["student_images"] = 64
    results["settings"]["pretrained_student"] = "resnet18.safetensors"
    assert "one teacher, the same pretrained weights, the same 64 label" in shared()


def longer(accuracy):
    """Two seeds of the student alone with the compute of a distilled run."""
    title = "student alone, compute of a distilled run"
    name = {"name": "student_longer", "title": title}
    alone = small_results()["runs"][:2]
    return [{**run, **name, "accuracy": accuracy + run["seed"]} for run in alone]


def test_the_better_student_alone_is_the_reference():
    results = small_results()
    results["runs"] += longer(84.0)  # after W2, but shown above the teacher
    names = [row[0] for row in table.table(results)]
    title = results["runs"][-1]["title"]
    assert names == ["student", title, "teacher", "W2 (E)"]
    text = table.markdown(results)
    # Differences of W2 are 0 and 0.2, so that t gives 0.1 ± 12.706 x 0.1; the gap is
    # 0.1 of 5.5.  Those of the student are -4 and -3.
    assert f"| {title} | 84.50 ± 0.71 |  |  |  | 2 | 12 |" in text
    assert "| student | 81.00 ± 1.41 | -3.5 [-9.9, +2.9] |  |  | 2 | 12 |" in text
    assert "+0.1 [-1.2, +1.4] | – | 0.0001" in text  # gap of less than two errors
    assert f'refer to "{title}", the best student alone.' in text
    results["eval_images"] = 1000
    assert "+0.1 [-1.2, +1.4] | 2 % | 0.0001" in table.markdown(results)

    results["runs"][-2:] = longer(70.0)
    text = table.markdown(results)
    assert 'refer to "student", the best student alone.' in text
    assert "| W2 (E) | 84.60 ± 0.85 | +3.6 [-1.5, +8.7] |" in text


def test_a_teacher_that_is_no_better_than_the_better_student_alone():
    file = io.StringIO()
    results = small_results(teacher=85.0)
    distill._warn_of_weak_teacher(results, Console(file=file, width=500))
    assert file.getvalue() == ""
    results["runs"] += longer(84.5)  # 84.5 and 85.5
    distill._warn_of_weak_teacher(results, Console(file=file, width=500))
    assert "no better than the student alone (85.00 %)" in file.getvalue()
    file.truncate(0)
    better = small_results(teacher=85.2)  # than the mean, but not than the best seed
    better["runs"] += longer(84.5)
    distill._warn_of_weak_teacher(better, Console(file=file, width=500))
    assert file.getvalue() == ""


def test_a_table_needs_a_student_alone():
    results = small_results()
    del results["runs"][:2]
    with pytest.raises(UserError, match="no student alone"):
        table.markdown(results)


def test_students_alone_have_no_differences():
    results = small_results()
    del results["runs"][2:]
    text = table.markdown(results)
    assert "Differences" not in text
    assert "brackets" not in text
    assert "± is the standard deviation over seeds. All seeds share" in text


def test_held_out_images_are_called_so():
    results = small_results()
    results["settings"]["held_out"] = 100
    assert "epoch on 100 held-out training images" in table.markdown(results)


@pytest.mark.slow
def test_report_is_rendered_again_from_json(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(small_results()))
    script = ("-m", "kddm_jax", "report")
    env = environ(PYTHONIOENCODING="utf-8")
    done = command("results.json", script=script, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == GOLDEN.strip()


def test_curves_of_runs_with_few_evaluations(tmp_path):
    """The last epoch is always evaluated; other epochs may not be."""
    results = small_results()
    for run in results["runs"]:
        del run["history"][0]["test_accuracy"]
    curves.save(curves.of_runs(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_two_distances_of_one_title(tmp_path):
    """A user's distance may be a catalogue entry with other options."""
    results = small_results()
    again = [dict(run, name="own:W2") for run in results["runs"] if run["name"] == "w2"]
    results["runs"] += again[:1]
    assert again[0]["title"] == "W2 (E)"
    curves.save(curves.of_runs(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_have_the_titles_of_the_table():
    results = small_results()
    results["runs"] += longer(84.0)
    for run, normalization in zip(results["runs"][2:4], ("unit", None), strict=True):
        run["settings"] = {"normalization": normalization}
    figure = curves.of_runs(results)
    (legend,) = figure.legends
    titles = [text.get_text() for text in legend.get_texts()]
    assert titles == [
        *("student", "student alone, compute of a distilled run"),
        *("W2 (E), unit rows", "W2 (E), raw", "teacher"),
    ]
    styles = [line.get_linestyle() for line in legend.get_lines()[:2]]
    assert styles == ["--", ":"]
    curves.plt.close(figure)


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
    names = table.columns(small_results())
    assert rows == [list(names), *map(list, table.table(small_results()))]
    assert file.getvalue().splitlines()[-3:] == table.notes(small_results())


def test_a_narrow_terminal_breaks_no_number():
    results = small_results()
    results["runs"] += longer(84.0)
    file = io.StringIO()
    table.show(results, Console(file=file, width=60))
    lines = table_lines(file.getvalue())
    text = "\n".join(lines)
    for title, *cells in table.table(results):
        assert all(part in text for part in (*title.split(), *cells))
    assert "…" not in text
    assert not any(results["runs"][-1]["title"] in line for line in lines)  # broken
    assert len({len(line) for line in lines}) == 1


def test_an_installed_package_has_a_version():
    results = small_results()
    for run in results["runs"]:
        run["environment"]["commit"] = "version 1.2"
    results["teacher"]["environment"]["commit"] = "version 1.2"
    results["environment"]["command"] = "kddm distill --seeds 0 1"
    text = table.markdown(results)
    assert ", JAX 1.2.3, version 1.2. " in text
    assert text.endswith("`kddm distill --dataset digits --seeds 0 1`\n")
