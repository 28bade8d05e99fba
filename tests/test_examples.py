"""Tests that each example stands alone, and runs as its docstring says."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kddm_jax
from kddm_jax import data

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("installed without the examples", allow_module_level=True)

SMALL = ("flax_nnx", "equinox_mlp", "sharded", "plain_jax")
CHOSEN = ROOT / "experiments" / "results" / "examples.json"
PERCENT = r"teacher (\S+) %, student alone (\S+) %, distilled (\S+) %"


def numbers(text):
    """Returns the accuracies of teacher, student alone and distilled student."""
    return [float(value) for value in re.search(PERCENT, text).groups()]


def said_by(name):
    """Returns an example's docstring on one line."""
    text = (EXAMPLES / f"{name}.py").read_text()
    return " ".join(ast.get_docstring(ast.parse(text)).split())


@pytest.mark.parametrize("name", SMALL)
def test_small_examples_stand_alone(name):
    """Examples can be copied: they are short and import only the package."""
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    tree = ast.parse(text)
    assert f"    python examples/{name}.py\n" in ast.get_docstring(tree, clean=False)
    beside = {path.stem for path in EXAMPLES.glob("*.py")} | {"experiments", "tests"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        assert beside.isdisjoint(module.split(".")[0] for module in modules)


@pytest.mark.parametrize("name", SMALL)
def test_small_examples_quote_measured_numbers(name):
    """Their lambda is the best on held-out digits, and a command made their numbers."""
    rows = {row["name"]: row for row in json.loads(CHOSEN.read_text())["found"]}
    held_out, test = rows[name]["held_out"], np.array(rows[name]["test"])
    best = float(max(held_out, key=held_out.get))
    assert min(map(float, held_out)) < best < max(map(float, held_out))
    text = (EXAMPLES / f"{name}.py").read_text()
    assert float(re.search(r"^WEIGHT, STEPS = (\S+),", text, re.M)[1]) == best
    said = said_by(name)
    assert numbers(said) == pytest.approx(test[0].tolist(), abs=0.051)
    means = re.search(r"seeds 0 to 2: (\S+) and (\S+) %", said).groups()
    assert [float(mean) for mean in means] == pytest.approx(
        test.mean(0)[1:].tolist(), abs=0.051
    )


def run_small(name, **more):
    """Returns the accuracies that an example prints; warnings are errors."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env={
            **kept,
            "PYTHONPATH": str(Path(kddm_jax.__file__).parents[1]),
            "PYTHONWARNINGS": "error",
            "JAX_PLATFORMS": "cpu",
            **more,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return numbers(done.stdout)


@pytest.mark.bench
@pytest.mark.parametrize("name", SMALL)
def test_small_examples_distil(name):
    """Results are those of the docstring, up to a few of the 355 test digits."""
    teacher, alone, distilled = found = run_small(name)
    assert teacher > distilled > alone + 2
    assert found == pytest.approx(numbers(said_by(name)), abs=5 * 100 / 355)


@pytest.mark.bench
def test_a_sharded_loss_is_of_all_devices():
    """With two devices or four, the student is the same up to rounding."""
    two, four = (run_small("sharded", JAX_NUM_CPU_DEVICES=n) for n in ("2", "4"))
    assert two == pytest.approx(four, abs=2 * 100 / 355)


@pytest.mark.bench
def test_choose(tmp_path, monkeypatch, capsys):
    import choose
    import plain_jax

    from kddm_jax.experiment.report import table as report

    monkeypatch.setattr(plain_jax, "STEPS", 30)
    line = ["--examples", "plain_jax", "--grid", "0.5", "2"]
    choose.main([*line, "--json", str(tmp_path / "it.json")])
    results = json.loads((tmp_path / "it.json").read_text())
    (found,) = results["found"]
    assert list(found["held_out"]) == ["0.5", "2"]
    assert found["held_out"][f"{found['best']:g}"] == max(found["held_out"].values())
    # percent of 300 held-out digits, and of 355 test digits
    for value in found["held_out"].values():
        assert 3 * value * 3 == pytest.approx(round(3 * value * 3), abs=1e-3)
    hits = np.array(found["test"]) * 3.55
    np.testing.assert_allclose(hits, hits.round(), atol=1e-3)
    assert "plain_jax: lambda 2, held-out" in capsys.readouterr().out
    assert "| plain_jax |" in report.markdown(results)


def test_held_out_digits_are_training_digits():
    import choose

    digits = data.load("digits")
    parts = choose.without_test(digits)
    assert len(parts.test_labels) == 300
    assert len(parts.train_labels) == len(digits.train_labels) - 300
    rows = lambda images: {image.tobytes() for image in images}
    both = rows(parts.train_images) | rows(parts.test_images)
    assert both == rows(digits.train_images)
    assert len(rows(parts.test_images) & rows(parts.train_images)) < 3  # duplicates
