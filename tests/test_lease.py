"""Measurements in short leases: what is finished is passed over, the rest goes on."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from test_experiments import (
    TINY,
    environ,
    settings_of_jax,  # noqa: F401  (a fixture)
)

import lease  # isort: skip

TOUCH = """
import json, pathlib, signal, sys, time
target, seconds, status = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
count = target.with_suffix(".count")
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
def stop(*_):
    target.with_suffix(".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
time.sleep(seconds)
target.write_text(json.dumps({"at": str(target), "n": [1, None]}))
sys.exit(int(status))
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Parts of a script that takes given seconds: the other tests need no training."""
    script = tmp_path / "touch.py"
    script.write_text(TOUCH)
    seconds, status = {"one": 0, "two": 0}, {"one": 0, "two": 0}

    def parts(options):
        return [
            lease.Part(
                name,
                (script, options.out / f"{name}.json", seconds[name], status[name]),
                options.out / f"{name}.json",
            )
            for name in seconds
        ]

    as_words = lambda options: [
        part._replace(command=tuple(map(str, part.command))) for part in parts(options)
    ]
    monkeypatch.setattr(lease, "parts", as_words)
    return seconds, status


def count(out, name):
    path = out / f"{name}.count"
    return int(path.read_text()) if path.exists() else 0


def test_finished_parts_are_passed_over(tmp_path, scripted, capsys):
    seconds, status = scripted
    out = tmp_path / "out"
    line = ["--out", str(out), "--minutes", "5"]
    status["two"] = 7
    assert lease.main(line) == 7
    status["two"] = 0
    assert lease.main(line) == 0
    assert (count(out, "one"), count(out, "two")) == (1, 2)
    assert "one: finished before" in capsys.readouterr().out
    kept = out / "results" / "one.json"
    assert json.loads(kept.read_text()) == {"at": "one.json", "n": [1, None]}
    (out / "one.json").unlink()  # without its result it is not finished
    assert lease.main([*line, "--parts", "one"]) == 0
    assert (count(out, "one"), count(out, "two")) == (2, 2)


def test_a_part_is_told_to_save_when_the_time_is_up(
    tmp_path, scripted, capsys, monkeypatch
):
    seconds, _ = scripted
    seconds["one"] = 100
    out = tmp_path / "out"
    monkeypatch.setattr(lease, "LEAST", 0.5)
    line = ["--out", str(out)]
    assert lease.main([*line, "--minutes", "0.15"]) == lease.TIME_IS_UP
    assert "one: the time is up" in capsys.readouterr().out
    assert (out / "one.saved").exists()
    assert (count(out, "one"), count(out, "two")) == (1, 0)
    assert lease.main([*line, "--minutes", "0.001"]) == lease.TIME_IS_UP
    assert "one: not begun" in capsys.readouterr().out
    assert count(out, "one") == 1
    seconds["one"] = 0
    assert lease.main([*line, "--minutes", "5"]) == 0
    assert (count(out, "one"), count(out, "two")) == (2, 1)


def test_a_step_without_all_its_rows_is_not_finished(tmp_path, capsys, monkeypatch):
    """By benchmarks/step.py itself, whose rows have no time."""
    environment = environ()
    for name in ("PYTHONPATH", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(lease, "LEAST", 1.0)
    line = ["--out", str(tmp_path), "--parts", "step", "--minutes", "0.9"]
    assert lease.main(line) == lease.TIME_IS_UP
    assert "rows are missing" in capsys.readouterr().out
    assert not (tmp_path / "lease.json").exists()


def test_a_slow_step_does_not_end_the_lease(tmp_path):
    step = lease.parts(lease.parse_options(["--out", str(tmp_path)]))[0]
    assert "--no-assert" in step.command  # or its status would end the lease


def test_unknown_parts_are_refused(tmp_path, scripted, capsys):
    out = tmp_path / "out"
    assert lease.main(["--out", str(out), "--parts", "one", "three"]) == 2
    assert capsys.readouterr().err == "error: --parts three: known are one, two\n"
    assert not out.exists()


def test_places_are_left_out():
    value = {
        "command": "python cifar.py --out /home/me/runs/a --data-dir=/data -- '/a b'",
        "n": [1.5, None, "/data/x.tar.gz", "runs/a", "https://a.b/c", "a / b", "~/x/y"],
    }
    assert lease.portable(value) == {
        "command": "python cifar.py --out a --data-dir=data -- 'a b'",
        "n": [1.5, None, "x.tar.gz", "runs/a", "https://a.b/c", "a / b", "y"],
    }


def test_the_chosen_weights_are_the_tables(tmp_path, capsys):
    options = lease.parse_options(["--out", str(tmp_path), "--weights-file", "w"])
    names = ["step"]
    for data in lease.DATASETS:
        names += [f"{data}-alone", f"{data}-weights", data]
    assert [part.name for part in lease.parts(options)] == [*names, "paper"]
    without = lease.parse_options(["--out", str(tmp_path)])
    assert [part.name for part in lease.parts(without)] == names
    assert "--weights" not in lease.parts(options)[3].command
    assert lease.main(["--out", str(tmp_path), "--parts", "cifar10"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "error: --parts cifar10: its lambdas come from cifar10-weights first\n"
    )
    (tmp_path / "cifar10-weights").mkdir()
    text = json.dumps({"weights": {"w2": 1e-4, "kd": 3.0}})
    (tmp_path / "cifar10-weights" / "weights.json").write_text(text)
    assert shlex.join(lease.parts(options)[3].command).endswith(
        "--distances w2 kd --weights w2 0.0001 kd 3"
    )


@pytest.mark.slow
def test_a_whole_table(tmp_path, monkeypatch):
    """On digits: alone, lambda, table, each by its own command."""
    for name, value in environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease, "DISTANCES", ("l2", "cw2_gaussian"))
    monkeypatch.setattr(lease, "GRID", ("0.1", "1"))
    at = TINY.index("--distances")  # the parts have their own
    settings = (*TINY[:at], *TINY[at + 3 :], "--dtype", "float32", "--seeds", "1")
    settings = (*settings, "--compilation-cache", tmp_path / "cache")
    out = tmp_path / "out"

    def run(name, *more):
        line = ("--out", out, "--minutes", "20", "--parts", name, "--")
        return lease.main([*map(str, (*line, *settings, *more))])

    assert run("cifar10-alone") == 0
    assert run("cifar10-weights", "--held-out", "300") == 0
    assert run("cifar10") == 0
    table = json.loads((out / "results" / "cifar10.json").read_text())
    chosen = json.loads((out / "results" / "cifar10-weights.json").read_text())
    assert table["settings"]["weights"] == chosen["weights"]
    assert {run["name"] for run in table["runs"]} == {"student", "l2", "cw2_gaussian"}
    assert table["settings"]["out"] == "cifar10"
    for place in (tmp_path, Path(sys.executable).parent, Path.home()):
        assert str(place) not in json.dumps([table, chosen])
