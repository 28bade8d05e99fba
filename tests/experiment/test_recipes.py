"""Tests that the recipes of published tables train, in a few steps on the digits."""

import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import NETWORK, call, results_of

from kddm_jax import DISTANCES
from kddm_jax.experiment import checks
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.training import lookup, models

PAGE = Path(__file__).parents[2] / "docs" / "command" / "tables.md"

FEW = (
    *("--dataset", "digits", "--width", 4, "--batch-size", 32),
    *("--teacher-epochs", 2, "--epochs", 4, "--eval-every", 4, "--no-equal-compute"),
    *("--train-images", 128, "--student-images", 64, "--test-images", 50),
    *("--compilation-cache", "None"),
)


def losses(folder, name):
    (run,) = [run for run in results_of(folder)["runs"] if run["name"] == name]
    return [epoch["loss"] for epoch in run["history"]]


def train(tmp_path, *line):
    assert call(*FEW, *line, "--out", tmp_path) == 0
    return tmp_path


def test_commands_of_the_page():
    """All are accepted, write into folders of their own, and cover the networks."""
    text = PAGE.read_text().replace("\\\n", " ")
    (crd,) = re.findall(r'crd="kddm distill (.*)"', text)
    lines = re.findall(r"^ *\$crd (.*)$", text, re.MULTILINE)
    found = [parse([*shlex.split(crd), *shlex.split(line)]) for line in lines]
    outs = {settings.run.out for settings in found}
    assert len(outs) == len(found) == 7
    (pair,) = re.findall(r'pair="\$crd (.*)"', text)
    more = re.findall(r"^\$pair (.*)$", text, re.MULTILINE)
    found += [parse(shlex.split(" ".join((crd, pair, line)))) for line in more]
    outs = {settings.run.out for settings in found}
    assert len(outs) == len(found) == 10
    for settings in found:
        if given := settings.networks.teacher:
            assert given.name == "seed0"
            assert given.parents[1] in outs
    named = {settings.networks.teacher_model for settings in found}
    named |= {settings.networks.student_model for settings in found}
    cifar = {name for name in models.NETWORKS if re.match(r"WRN|VGG|.*\dx4", name)}
    assert named == cifar | {f"ResNet{depth}" for depth in (20, 32, 56, 110)}
    imagenet = re.findall(r"kddm distill (.*--recipe imagenet[^\"\n]*)", text)
    assert len(imagenet) == 3
    for line in imagenet:
        assert parse(shlex.split(line)).data.image_size == 224


def test_attention_of_the_page_is_repdistillers(x64):
    """With the page's weights, it is 1000 times the means over positions, summed."""
    text = PAGE.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^\$pair (.*--distances attention .*)$", text, re.MULTILINE)
    settings = parse(["--recipe", "crd", *shlex.split(line)])
    pairs = checks.layer_pairs(settings)
    entry, found, expected = DISTANCES["attention"], 0.0, 0.0
    for (layer, _, share), side in zip(pairs, (32, 16, 8), strict=True):
        keys = jax.random.split(jax.random.key(side))
        maps = [jax.random.normal(key, (2, side, side, 3)) for key in keys]
        found += lookup.weight_of(settings, "attention") * share * entry.fn(*maps)
        expected += 1000 * entry.fn(*maps, compat="released")
        assert layer.startswith(f"stage{32 // side if side > 8 else 3}_")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_released_forms_of_the_page(tmp_path, monkeypatch):
    """The page's own.py gives them, with RepDistiller's weights."""
    (block,) = re.findall(
        r"```python\n(import dataclasses.*?)```", PAGE.read_text(), re.S
    )
    (tmp_path / "own.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    settings = parse(["--recipe", "crd"])
    for key, name, weight in (("pkt", "own:PKT", 3e4), ("attention", "own:AT", 1000)):
        entry = lookup.find(name)
        assert (entry.fn, entry.inputs) == (DISTANCES[key].fn, DISTANCES[key].inputs)
        assert dict(entry.options) == {"compat": "released"}
        assert lookup.weight_of(settings, name) == weight
    sys.modules.pop("own")


@pytest.mark.slow
def test_imagenet_recipe_trains(tmp_path):
    """Small networks flatten images, so the size stays that of the digits."""
    line = ("--recipe", "imagenet", "--image-size", 8, "--distances", "kd")
    models = ("--teacher-model", NETWORK, "--student-model", NETWORK)
    out = train(tmp_path, *line, *models, "--lr", "0.02")
    assert results_of(out)["settings"]["smallest_area"] == 0.08
    found = losses(out, "kd")
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("ResNet8x4", "ResNet8x4"), ("WRN16x2", "WRN16x2"), ("VGG13", "VGG8")],
)
def test_crd_recipe_trains(tmp_path, teacher, student):
    models = ("--teacher-model", teacher, "--student-model", student)
    out = train(tmp_path, "--recipe", "crd", *models, "--distances", "l2", "attention")
    for name in ("student", "l2"):  # the command stops if a loss is not finite
        found = losses(out, name)
        assert found[-1] < found[0], name
