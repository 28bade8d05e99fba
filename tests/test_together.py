"""Seeds that train in one program are those that train alone, however they are cut."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_experiments import (  # the fixtures are used by name
    assert_same_arrays,
    call,
    final_arrays,
    finished,  # noqa: F401
    results_of,
    settings_of_jax,  # noqa: F401
    shared,  # noqa: F401
    timeless,
    tiny,
)

from kddm_jax import checkpoint

import choose_weights  # isort: skip
import cifar  # isort: skip
import problems  # isort: skip
import records  # isort: skip
import runs  # isort: skip
import training  # isort: skip
from progress import Progress, RunError  # isort: skip
from settings import parse  # isort: skip
from teacher import find_teacher, load_teacher  # isort: skip

STEPS = 4  # in an epoch of TINY, which has two
SEEDS = ("--seeds", "1", "2")


@pytest.fixture
def line(shared, finished):  # noqa: F811
    """A command whose teacher is trained already."""
    teacher = ("--teacher", finished / "out" / "teacher" / "seed0")
    return (*tiny(shared, None)[:-2], *teacher, "--devices", 1)


def of(line, out, *more):
    return [*map(str, (*line, "--out", out, *more))]


def alone(line, out, name, seed, batches):
    """The result of one run, on the batches of another's seed."""
    settings = parse(of(line, out, "--seeds", seed, "--distances", "w2"))
    problem = problems.prepare(settings, out)
    source = find_teacher(problem)
    runs.check_distances(problem, source.model)
    teacher = load_teacher(source, None)
    every = runs.student_runs(problem, teacher.digest)
    run = next(run for run in every if run.name == name)
    run = replace(run, batches=batches)
    model = problem.model(settings.student_model, settings.width)
    return training.train(problem, run, model, teacher, lambda *_, **__: None)


def assert_near(left, right):
    """What rounding leaves of the same steps in another program."""
    for (key, a), (_, b) in zip(left[1], right[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=str(key))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "distances"), [("loop", ["w2"]), ("vmap", [])])
def test_together_is_alone(line, tmp_path, how, distances, capsys):
    out, names = tmp_path / "out", ["student", *distances]
    whole = of(line, out, *SEEDS, "--distances", *distances, "--together", how)
    assert call(*whole) == 0
    said = capsys.readouterr().out
    for name in names:
        assert f"{name} seed 1: epoch 2 " in said
        assert f"{name} seed 2: epoch 2 " in said
    results = results_of(out)
    found = {(run["name"], run["seed"]): run for run in results["runs"]}
    assert list(found) == [(n, s) for n in names for s in (1, 2)]
    assert {p.name for p in (out / "student").iterdir()} == {"seed1", "seed2"}
    for (name, seed), run in found.items():
        expected = alone(line, tmp_path / f"alone{seed}", name, seed, 1)
        assert run["settings"]["batches"] == (None if seed == 1 else 1)
        assert run["timing"]["together"] == 2
        for record, other in zip(run["history"], expected["history"], strict=True):
            assert list(record) == list(other)
            for metric in ("loss", "task"):
                assert record[metric] == pytest.approx(other[metric], rel=1e-3)
        assert_near(
            final_arrays(out, name, seed),
            final_arrays(tmp_path / f"alone{seed}", name, seed),
        )
    one, two = (found["student", seed]["history"][0]["loss"] for seed in (1, 2))
    assert abs(one - two) > 1e-3  # each has its own initialisation

    # --- nothing is left to do; then another seed, on the same batches -------------
    assert call(*whole) == 0
    assert ": epoch" not in capsys.readouterr().out
    more = of(line, out, "--seeds", 1, 2, 3, "--distances", "--together", how)
    assert call(*more) == 0
    said = capsys.readouterr().out
    assert "student seed 3: epoch 2 " in said
    assert "student seed 2: epoch" not in said
    last = results_of(out)["runs"][-1]
    assert (last["seed"], last["settings"]["batches"]) == (3, 1)
    assert "together" not in last["timing"]


@pytest.fixture
def cut(monkeypatch):
    """Ends a command as if it were killed: as a step is shown, or at a file's write."""
    moments = []
    show, write = cifar.Reporter.__call__, records.write_json

    def show_and_end(self, run, **shown):
        if moments and moments[0] == (run.name, run.seed, shown["done"]):
            moments.pop()
            raise KeyboardInterrupt
        show(self, run, **shown)

    def end_or_write(path, value):
        if moments and isinstance(moments[0], str) and path.match(moments[0]):
            moments.pop()
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(training, "LOOK_SECONDS", 0)
    monkeypatch.setattr(cifar.Reporter, "__call__", show_and_end)
    monkeypatch.setattr(records, "write_json", end_or_write)
    return moments


@pytest.mark.slow
def test_cut_anywhere_the_results_are_the_same(line, tmp_path, cut):
    whole, parts = tmp_path / "whole", tmp_path / "out"
    more = (*SEEDS, "--distances", "w2", "--together", "loop")
    more = (*more, "--checkpoint-seconds", "0")
    assert call(*of(line, whole, *more)) == 0
    # Within the first epoch, within the second, between the two results, after them.
    shared_folder = parts / "w2" / "together" / "checkpoints"
    for moment in (
        ("w2", 2, STEPS - 1),
        ("w2", 1, STEPS + 2),
        "w2/seed2/result.json",
        "out/results.json",
    ):
        cut.append(moment)
        assert call(*of(line, parts, *more)) == 130
        assert not cut
        left = checkpoint.latest(shared_folder)
        assert (left is None) == (moment == "out/results.json")
    assert call(*of(line, parts, *more)) == 0
    assert not shared_folder.parent.exists()
    for name in ("student", "w2"):
        for seed in (1, 2):
            assert_same_arrays(*(final_arrays(o, name, seed) for o in (whole, parts)))
    assert timeless(results_of(parts))["runs"] == timeless(results_of(whole))["runs"]


@pytest.mark.slow
def test_what_others_began_is_not_taken_over(line, tmp_path, cut, capsys):
    """Other settings or seeds than those that were cut are refused, to the end."""
    more = ("--distances", "--together", "loop", "--checkpoint-seconds", "0")
    cut.append(("student", 2, STEPS + 1))
    assert call(*of(line, tmp_path, *SEEDS, *more)) == 130
    shared_folder = tmp_path / "student" / "together"
    before = checkpoint.latest(shared_folder / "checkpoints")
    assert before is not None
    for seeds in (("1", "2", "3"), ("1",)):
        capsys.readouterr()
        assert call(*of(line, tmp_path, "--seeds", *seeds, *more)) == 2
        error = capsys.readouterr().err
        assert f"{shared_folder} holds runs of seeds 1 2, cut before" in error
        assert error.count("\n") == 1
    # Another seed alone needs the folder not, neither to train nor once it has ended.
    for _ in range(2):
        assert call(*of(line, tmp_path, "--seeds", 3, "--distances")) == 0
        assert checkpoint.latest(shared_folder / "checkpoints") == before
    assert call(*of(line, tmp_path, "--seeds", 3, *more)) == 0
    assert checkpoint.latest(shared_folder / "checkpoints") == before
    for seed in ("seed1", "seed2"):  # as the refusal of other settings says
        shutil.rmtree(tmp_path / "student" / seed)
    assert call(*of(line, tmp_path, *SEEDS, *more, "--lr", "0.01")) == 2
    assert "holds runs of seeds 1 2" in capsys.readouterr().err
    assert checkpoint.latest(shared_folder / "checkpoints") == before
    assert call(*of(line, tmp_path, *SEEDS, *more)) == 0
    assert "student seed 1: epoch 1 " not in capsys.readouterr().out


@pytest.mark.slow
def test_lambdas_together_are_lambdas_alone(line, tmp_path, cut, capsys):
    """Cut, gone on with in another order, and joined by two that diverge."""
    apart, out = tmp_path / "apart", tmp_path / "out"
    more = ("--held-out", 100, "--teacher-saw-held-out", "--distances", "w2")
    together = ("--together", "loop", "--checkpoint-seconds", 0)

    def grid(folder, *weights, how=together):
        settings = of(line, folder, *more, *how)
        return choose_weights.main(["--grid", *weights, "--", *settings])

    cut.append(("w2", 1, STEPS + 1))
    assert grid(out, "0.5", "2") == 130
    assert "w2 λ = 2 seed 1: epoch 1 " in capsys.readouterr().out
    assert checkpoint.latest(out / "w2" / "together" / "checkpoints") is not None
    with cifar.only_one(out):
        assert grid(out, "2", "0.5") == 2
    assert "another command is at work in this folder" in capsys.readouterr().err
    assert grid(out, "2", "0.5") == 0
    said = capsys.readouterr().out
    assert "seed 1: epoch 1 " not in said
    assert "w2 λ = 2 seed 1: epoch 2 " in said
    assert not list((out / "w2").iterdir())
    assert grid(out, "0.5", "1e38", "2", "2e38") == 0
    said = capsys.readouterr().out
    assert ": epoch" not in said
    for weight in ("1e+38", "2e+38"):
        assert f"λ = {weight} seed 1: loss or gradient not finite at step 1 " in said

    assert grid(apart, "0.5", "2", how=()) == 0
    arrays = {}
    for weight in ("0.5", "2"):
        both = [final_arrays(f / f"weight-{weight}", "w2") for f in (out, apart)]
        assert_near(*both)
        arrays[weight] = dict(both[0][1])
    one, two = arrays.values()
    assert any(np.any(one[key] != two[key]) for key in one)
    chosen = records.read_json(out / "weights.json", "")["held_out_accuracy"]["w2"]
    assert chosen["1e+38"] == chosen["2e+38"] == 0
    assert min(chosen["0.5"], chosen["2"]) > 0


def test_those_that_diverge_are_left_out(line, tmp_path, monkeypatch, capsys):
    """Of five lambdas two diverge at once, then another; none is tried again."""
    trained = []

    def train(problem, group, *_):
        trained.append([run.weight for run in group])
        for run in group:
            run.folder(problem.out).mkdir(parents=True, exist_ok=True)
        bad = [i for i, run in enumerate(group) if run.weight in (2, 4)]
        bad = bad or [i for i, run in enumerate(group) if run.weight == 3]
        if bad:
            raise RunError("w2: loss not finite at step 1 (loss inf); lower --lr", bad)
        return [{"accuracy": 10 * run.weight} for run in group]

    monkeypatch.setattr(training, "train_together", train)
    more = ("--held-out", 100, "--teacher-saw-held-out", "--distances", "w2")
    settings = of(line, tmp_path, *more, "--together", "loop")
    command = ["--grid", "1", "2", "3", "4", "5", "--", *settings]
    for times in ([[1, 2, 3, 4, 5], [1, 3, 5], [1, 5]], [[1, 5]]):
        trained.clear()
        assert choose_weights.main(command) == 0
        assert trained == times
        said = capsys.readouterr().out
        assert "w2 λ = 3 seed 1: loss not finite at step 1 (loss inf); counts" in said
        chosen = records.read_json(tmp_path / "weights.json", "")
        expected = {"1": 10, "2": 0, "3": 0, "4": 0, "5": 50}
        assert chosen["held_out_accuracy"]["w2"] == expected
    # A result is a result, and skipping such steps is another way.
    (tmp_path / "weight-2" / "w2" / "seed1" / "result.json").write_text("{}")
    trained.clear()
    choose_weights.main(command)
    assert trained[0] == [1, 2, 5]
    trained.clear()
    choose_weights.main([*command, "--on-nonfinite", "skip"])
    assert trained[0] == [1, 2, 3, 4, 5]

    command[1:6] = ["0.1", "0.1234567", "0.1234568"]
    assert choose_weights.main(command) == 2
    error = capsys.readouterr().err
    assert "--grid: 0.1234567 and another are one number to six digits" in error


@pytest.mark.parametrize("how", [(), ("--together", "loop")])
def test_a_grid_is_refused_before_it_begins(how, line, tmp_path, monkeypatch, capsys):
    """Its last folder is of another command; the first ones are not there yet."""

    def unwanted(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(training, "train_together", unwanted)
    more = ("--held-out", 100, "--teacher-saw-held-out", "--distances", "w2")
    command = ["--grid", "1", "5", "--", *of(line, tmp_path / "out", *more, *how)]
    folder = tmp_path / "out" / "weight-5" / "w2" / "seed1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"dataset": "mnist"}')
    assert choose_weights.main(command) == 2
    error = capsys.readouterr().err
    assert f"{folder} was made with dataset=mnist, this command says digits" in error
    assert not (tmp_path / "out" / "weight-1").exists()
    (tmp_path / "file").touch()
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "file")
    assert choose_weights.main(command) == 2
    assert f"--out {tmp_path / 'file'}" in capsys.readouterr().err


def test_progress_of_several_names_the_one_that_is_not_finite(tmp_path):
    state = {"a": np.zeros(2)}
    both = Progress(["a seed 1", "a seed 2"], tmp_path, {"run": {}}, STEPS, state)
    fine = {"loss": np.array([[1.0, 3.0]]), "finite": np.array([[True, True]])}
    both.take(fine, stop=True)
    bad = {"loss": np.array([[1.0, np.inf]]), "finite": np.array([[True, False]])}
    with pytest.raises(RunError, match="^a seed 2: loss .* at step 2"):
        both.take(bad, stop=True)
    assert [tally.steps for tally in both.tallies] == [1, 1]
    both.take(bad, stop=False)
    assert [tally.skipped for tally in both.tallies] == [0, 1]
    with pytest.warns(UserWarning, match="^a seed 2: epoch 1: 1 of 2 steps skipped"):
        assert both.means() == [{"loss": 1.0}, {"loss": 3.0}]
    both.save()
    again = Progress(both.titles, tmp_path, {"run": {}}, STEPS, state)
    assert again.tallies == both.tallies


def test_runs_of_other_batches_are_refused(line, tmp_path, capsys):
    settings = parse(of(line, tmp_path, *SEEDS, "--distances"))
    problem = problems.prepare(settings, tmp_path)
    _, first = runs.student_runs(problem, None)  # of seed 2
    assert first.identity["batches"] is None
    folder = first.folder(tmp_path)
    folder.mkdir(parents=True)
    older = {k: v for k, v in first.identity.items() if k != "batches"}
    (folder / "run.json").write_text(json.dumps(older))
    runs.check_folder(first, tmp_path)  # folders of earlier versions go on
    command = of(line, tmp_path, *SEEDS, "--distances", "--together", "loop")
    assert call(*command) == 2
    assert "was made with batches=None, this command says 1" in capsys.readouterr().err
    assert call(*command, "--together", "both") == 2
    assert "unknown together 'both'; known: None, vmap, loop" in capsys.readouterr().err
