"""Tests that a step on 4 and 8 devices equals the step on one, for every distance.

`eight_devices.py` makes the steps in another process, which has the devices.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import KINDS as BY_KIND

import kddm_jax
from kddm_jax import DISTANCES

SCRIPT = Path(__file__).with_name("eight_devices.py")
# Rounding errors of sums over the batch in another order.
OF_STATE = {"float32": 1e-5, "float64": 1e-9}
OF_CURVE = 1e-3
KINDS = tuple(BY_KIND.values())


def deviations(command):
    """Returns the deviations from one device, ``{what: {distance: ...}}``."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *command.split()],
        env={**os.environ, "PYTHONPATH": str(Path(kddm_jax.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_same(found, dtype, *, whats, rows):
    assert list(found) == whats
    for what, by_row in found.items():
        assert list(by_row) == list(rows), what
        for name, row in by_row.items():
            assert row["finite"], (what, name)
            assert row["equal"], (what, name)  # all shards of state and metrics
            assert row["distance"] != 0, (what, name)
            assert row["step"] <= OF_STATE[dtype], (what, name, row)
            assert row["curve"] <= OF_CURVE, (what, name, row)


@pytest.mark.slow
def test_every_row_on_one_device_is_on_eight():
    found = deviations("--counts 8")
    assert_same(found, "float32", whats=["8"], rows=DISTANCES)


@pytest.mark.slow
def test_kinds_of_rows_in_double_precision():
    found = deviations(f"--dtype float64 --counts 8 --rows {' '.join(KINDS)}")
    assert_same(found, "float64", whats=["8"], rows=KINDS)


@pytest.mark.slow
def test_kinds_of_rows_on_four_devices_and_in_groups_of_two():
    line = f"--counts 4 --groups 2 --steps 5 --rows {' '.join(KINDS)}"
    found = deviations(line)
    assert_same(found, "float32", whats=["4", "groups of 2"], rows=KINDS)
    for name, row in found["groups of 2"].items():
        # With groups the loss is another, except for means over images.
        whole = found["4"][name]["distance"]
        same = row["distance"] == pytest.approx(whole, rel=1e-4)
        assert same == DISTANCES[name].per_sample, name


@pytest.mark.slow
def test_kinds_of_rows_by_shard_map():
    found = deviations(f"--how shard_map --counts 8 --rows {' '.join(KINDS)}")
    assert_same(found, "float32", whats=["8"], rows=KINDS)


@pytest.mark.slow
def test_resnet_with_batchnorm_on_eight_devices():
    rows = ("cw2_gaussian", "nst")
    line = f"--network resnet --rows {' '.join(rows)} --counts 8 --steps 5"
    found = deviations(line)
    assert_same(found, "float32", whats=["8"], rows=rows)
