"""Tests accelerator.sh: its commands in order, the chosen weights, the time limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "accelerator.sh"
# Replaces Python: records each command, and writes the files that later commands read.
PYTHON = """#!{bash}
if [ "$1" = -c ]; then exec {python} "$@"; fi
echo "$(basename "$1") ${{@:2}}" >> "$LOG"
case "$*" in *"$SLOW"*) exec sleep 60 ;; esac
case "$1" in
  *step.py) echo "$STEP" > "${{@: -1}}" ;;
  *choose_weights.py)
    for word in "$@"; do [ "$last" = --out ] && out=$word; last=$word; done
    mkdir -p "$out"
    echo "$CHOSEN" > "$out/weights.json" ;;
esac
"""


MEASURED = '{"claims": []}'
CHOSEN = [
    "--lr 0.3 --weight-decay 0.0005 --distances",
    "--lr 0.1 --normalization unit --distances w2 cw2 --weights w2 0.1 cw2 1",
    "--lr 0.3 --normalization unit --distances kd --weights kd 3",
]


def run(tmp_path, minutes, *weights, slow="no such word", step=MEASURED):
    """Returns the script's status and the commands that it ran."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    python.write_text(PYTHON.format(bash="/bin/bash", python=sys.executable))
    python.chmod(0o755)
    log.write_text("")
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPT, str(minutes), tmp_path / "out", "data", *weights],
        env={
            **os.environ,
            **{"PATH": path, "LOG": str(log), "SLOW": slow, "STEP": step},
            "CHOSEN": json.dumps({"options": CHOSEN}),
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, log.read_text().splitlines()


def test_all_parts_run_in_their_order(tmp_path):
    status, lines = run(tmp_path, 1, "w.safetensors")
    assert status == 0
    table = ["cifar.py", "choose_weights.py", *["cifar.py"] * 3]
    expected = ["step.py", *table, *table, "cifar.py"]
    assert [line.split()[0] for line in lines] == expected
    assert lines[1].endswith("cifar10 --no-equal-compute --distances")
    assert "--held-out 5000" in lines[2]
    assert "--seeds 0 1 " in lines[2]
    assert "--rates 0.03 0.1 0.3 -- " in lines[2]
    ends = [line.partition("/cifar10-")[2] for line in lines[3:6]]
    once = "--no-equal-compute"
    assert ends == [f"0 {CHOSEN[0]}", *(f"{i} {once} {CHOSEN[i]}" for i in (1, 2))]
    assert "--pretrained-student w.safetensors" in lines[-1]
    # Run again, the script skips the measured step, and all other commands resume.
    status, again = run(tmp_path, 1)
    assert (status, again) == (0, lines[1:-1])


@pytest.mark.parametrize("step", ["{}", '{"claims": [], "note": "out of time"}'])
def test_a_step_that_is_not_measured_to_its_end_is_measured_again(tmp_path, step):
    run(tmp_path, 1, step=step)
    _, lines = run(tmp_path, 1)
    assert lines[0].startswith("step.py ")


@pytest.mark.slow
def test_the_part_at_work_is_stopped_when_the_time_is_up(tmp_path):
    status, lines = run(tmp_path, 0, slow="cifar10 ")
    assert status == 124
    assert [line.split()[0] for line in lines] == ["step.py", "cifar.py"]
