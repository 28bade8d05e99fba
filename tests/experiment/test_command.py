"""Tests the command ``kddm``: subcommands, help, and the error without the extra."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import environ

import kddm_jax
from kddm_jax import __main__ as kddm
from kddm_jax.experiment import outputs
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import parts_of
from kddm_jax.experiment.training.lookup import weight_of

ROOT = Path(kddm_jax.__file__).parents[1]


def python(code):
    """Returns the output of a program that runs without ``OPENBLAS_NUM_THREADS``."""
    env = environ()
    env.pop("OPENBLAS_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=env,
    )
    return done.stdout


@pytest.mark.parametrize("line", [[], ["-h"], ["--help"]])
def test_help_names_every_command(line, capsys):
    assert kddm.main(line) == 0
    out = capsys.readouterr().out
    for name in kddm.COMMANDS:
        assert f"\n  {name} " in out


def test_help_is_fast():
    code = (
        "import sys; from kddm_jax.__main__ import main; main(['--help']);"
        "print([name for name in ('jax', 'numpy') if name in sys.modules])"
    )
    assert python(code).endswith("\n[]\n")


@pytest.mark.parametrize("name", kddm.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        kddm.main([name, "--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_unknown_command(capsys):
    assert kddm.main(["distil", "--dataset", "digits"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command 'distil'; known: distill, ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("line", [[], ["distill", "--dataset", "digits"]])
def test_without_the_extra(line, capsys, monkeypatch):
    missing = ("tyro", "grain")
    find = lambda name: None if name in missing else SimpleNamespace()
    monkeypatch.setattr(kddm.importlib.util, "find_spec", find)
    assert kddm.main(line) == 2
    assert capsys.readouterr().err == (
        'error: kddm needs grain, tyro; install the extra: pip install "kddm-jax'
        '[experiments]"\n'
    )


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*/*.md"))]
BASH = re.compile("```bash\n(.*?)```", re.S)


def commands_of(page):
    """Returns the words of the commands in the page's blocks."""
    text = "".join(BASH.findall(page.read_text())).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines()]


def test_commands_of_the_pages_are_accepted_and_have_weights():
    """They start as on the page; only data and files are not there."""
    found = []
    for page in PAGES:
        for program, name, *words in filter(lambda w: len(w) > 1, commands_of(page)):
            if (program, name) == ("kddm", "outputs"):
                words = outputs._parser(name).parse_args(words).settings
            elif (program, name) != ("kddm", "distill"):
                continue
            settings = parse(words)
            parts = {p for d in settings.method.distances for p in parts_of(d)}
            known = {part for part in parts if ":" not in part}  # no module own.py here
            if name == "distill":
                assert all(weight_of(settings, part) for part in known)
            found.append((page.name, name))
    assert len(found) > 10
    for page in ("statistics.md", "outputs.md"):
        assert {(page, "outputs"), (page, "distill")} <= {*found}


def test_solvers_have_one_thread():
    """OpenBLAS reads its environment when NumPy or SciPy is imported."""
    code = (
        "import kddm_jax.__main__, numpy, scipy.linalg; "
        "from threadpoolctl import threadpool_info as info; "
        "print(*{i['num_threads'] for i in info() if i['user_api'] == 'blas'})"
    )
    assert python(code) == "1\n"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/venv/bin/kddm", "distill", "--lr", "1"], "kddm distill --lr 1"),
        (["/x/kddm_jax/__main__.py", "distill"], "kddm distill"),
        (["experiments/cifar.py", "--lr", "1"], "python experiments/cifar.py --lr 1"),
    ],
)
def test_the_command_is_recorded(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert records._command() == command


def test_an_installed_package_records_its_version(monkeypatch, tmp_path):
    """Even if the environment is inside a checkout of another project."""
    place = tmp_path / "kddm_jax" / "experiment" / "machine" / "records.py"
    monkeypatch.setattr(records, "__file__", str(place))
    assert records._commit() == f"version {version('kddm-jax')}"
