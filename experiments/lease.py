"""Measures what an accelerator is for, in as many short leases of one as it takes.

    python experiments/lease.py --minutes 9 --data-dir DIR --weights-file FILE
    python experiments/lease.py --list

The parts, in their order: the speed of the step; on CIFAR-10 and CIFAR-100 teacher and
students alone, lambda of every distance on held-out images, the table of three seeds;
the paper's recipe from ImageNet weights (FILE, a torchvision ResNet18).  Each is a
command that resumes: when the minutes are over, the one at work is told to save and
stop, and the same command goes on in the next lease, given the same ``--out``.
Finished parts are passed over.  What is worth keeping, JSON without this machine's
places, lies in ``OUT/results``.  Status 0: all is finished; 3: the time is up; else
that of the part that failed.
"""

import argparse
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cifar  # sets the environment before JAX is imported
import records
from settings import KD2M, UserError

HERE = Path(__file__).resolve().parent
TIME_IS_UP = 3
GRACE = 60.0  # seconds in which a part that is told to stop saves
LEAST = 20.0  # seconds: with less, no part is begun
STEP = "step"
DATASETS = ("cifar10", "cifar100")
DISTANCES = (*KD2M, "kd", "l2", "procrustes")
GRID = ("1e-3", "1e-2", "0.1", "1", "10")
# From scratch in an accelerator's minutes: the strong recipe, a third of its epochs.
SHORT = (
    *("--recipe", "strong", "--dtype", "bfloat16"),
    *("--epochs", "30", "--teacher-epochs", "30", "--eval-every", "5"),
)
# Under the paper's 15 epochs a grown ResNet34 is no better than the ResNet18 that it
# was grown from: this teacher gets four times as many.
PAPER = ("--dataset", "cifar10", "--recipe", "paper", "--teacher-epochs", "60")
PATH = re.compile(r"(?<![^\s'\"=])~?/[^\s'\"]*")  # a word that is an absolute path


class Part(NamedTuple):
    """A command, and the file that it leaves.

    Attributes:
      name: of the part.
      command: without the interpreter.
      result: what is worth keeping.
    """

    name: str
    command: tuple[str, ...]
    result: Path


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts, in their order.

    Args:
      options: of the command line.

    Returns:
      Those that there is data for: the paper's needs weights.
    """
    out = options.out
    cifar_py, choose_py = (
        str(HERE / script) for script in ("cifar.py", "choose_weights.py")
    )
    common = ("--data-dir", str(options.data_dir)) if options.data_dir else ()
    seeds = ("--seeds", "0", "1", "2")
    step = out / "step.json"
    speed = (str(HERE.parent / "benchmarks" / "step.py"), "--json", str(step))
    # What it measures is wanted, and the parts after it, also where a claim fails.
    found = [Part(STEP, (*speed, "--no-assert"), step)]
    for name in DATASETS:
        folder, grid = out / name, out / f"{name}-weights"
        data = ("--dataset", name, *common, *SHORT)
        alone = (cifar_py, *data, *seeds, "--out", str(folder), "--distances")
        teacher = ("--teacher", str(folder / "teacher" / "seed0"))
        held_out = ("--held-out", "5000", "--teacher-saw-held-out")
        found += [
            Part(f"{name}-alone", (*alone, *options.settings), folder / "results.json"),
            Part(
                f"{name}-weights",
                (
                    *(choose_py, "--grid", *GRID, "--", *data, *held_out, *teacher),
                    *("--epochs", "10", "--out", str(grid), "--distances", *DISTANCES),
                    *options.settings,
                ),
                grid / "weights.json",
            ),
            Part(
                name,
                (*alone, *_chosen(grid), *options.settings),
                folder / "results.json",
            ),
        ]
    if options.weights_file:
        file = str(options.weights_file)
        start = ("--pretrained-teacher", file, "--pretrained-student", file)
        folder = out / "paper"
        command = (cifar_py, *PAPER, *common, *start, *seeds, "--out", str(folder))
        command = (*command, "--distances", *KD2M, *options.settings)
        found.append(Part("paper", command, folder / "results.json"))
    return found


def _chosen(grid):
    """Distances and ``--weights`` that the grid chose, all distances before it has."""
    path = grid / "weights.json"
    if not path.exists():
        return DISTANCES
    chosen = records.read_json(path)["weights"]  # without those that diverged at all
    weights = (word for name, w in chosen.items() for word in (name, f"{w:g}"))
    return (*chosen, "--weights", *weights)


def portable(value: object) -> object:
    """Leaves this machine's places out of what is published.

    Args:
      value: JSON values.

    Returns:
      The same, of each word that is an absolute path its last part alone.
    """
    if isinstance(value, str):
        return PATH.sub(lambda match: Path(match[0]).name or match[0], value)
    if isinstance(value, Mapping):
        return {name: portable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [portable(one) for one in value]
    return value


def publish(part: Part, out: Path) -> Path:
    """Copies a part's result to ``results``, without this machine's places.

    Args:
      part: that has ended.
      out: of the lease.

    Returns:
      The copy.
    """
    target = out / "results" / f"{part.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(target, portable(records.read_json(part.result)))
    return target


def work_at(command: Sequence[str], seconds: float) -> int | None:
    """Runs a command for so long at most.

    Args:
      command: without the interpreter.
      seconds: after them it is told to stop, and has `GRACE` to save.

    Returns:
      Its exit status; None where the time was up.
    """
    process = subprocess.Popen([sys.executable, *command])
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    except BaseException:  # of Ctrl-C it has heard, too
        process.terminate()
        process.wait()
        raise
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def _misses_rows(result):
    rows = records.read_json(result)["rows"]
    return any("out of time" in row.get("note", "") for row in rows)


def lease(options: argparse.Namespace) -> int:
    """Works at what is not finished until the time is up.

    Args:
      options: of the command line.

    Returns:
      The exit status.

    Raises:
      UserError: there is no such part, or it needs another one first.
    """
    ends = time.monotonic() + 60 * options.minutes
    known = [part.name for part in parts(options)]
    wanted = options.parts or known
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f"--parts {' '.join(unknown)}: known are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "lease.json"
    done = records.read_json(log) if log.exists() else {}
    for name in (name for name in known if name in wanted):
        # anew for each: what one part chose is an option of the next
        part = next(part for part in parts(options) if part.name == name)
        command = portable(shlex.join(part.command))
        if done.get(name, {}).get("command") == command and part.result.exists():
            print(f"{name}: finished before", flush=True)
            continue
        grid = options.out / f"{name}-weights" / "weights.json"
        if name in DATASETS and not grid.exists():
            raise UserError(
                f"--parts {name}: its lambdas come from {name}-weights first"
            )
        left = ends - time.monotonic()
        if left < LEAST:
            print(f"{name}: not begun, the time is up", flush=True)
            return TIME_IS_UP
        # it begins no row after them, and a row takes seconds
        minutes = ("--minutes", f"{max(left - 60, 0) / 60:.2f}") if name == STEP else ()
        print(f"{name}: python {shlex.join(part.command)}", flush=True)
        status = work_at((*part.command, *minutes), left)
        if status is None:
            print(f"{name}: the time is up; the same command goes on", flush=True)
            return TIME_IS_UP
        if status:
            return status
        if name == STEP and _misses_rows(part.result):
            print(f"{name}: rows are missing; it needs a longer lease, or leave it out")
            return TIME_IS_UP
        taken = left - (ends - time.monotonic())
        done[name] = {"command": command, "seconds_of_last_lease": taken}
        records.write_json(log, done)
        print(f"{name}: {publish(part, options.out)}", flush=True)
    return 0


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--minutes", type=float, default=9.0, help="of this lease (default %(default)s)"
    )
    add("--out", type=Path, default=Path("runs/lease"), help="default %(default)s")
    add("--data-dir", type=Path, help="of the archives; see cifar.py")
    add("--weights-file", type=Path, help="ImageNet weights of a torchvision ResNet18")
    add("--parts", nargs="+", help="these alone (default: all)")
    add("--list", action="store_true", help="print the parts' commands, run nothing")
    add("settings", nargs="*", help="of cifar.py, for every part but step, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    options = parse_options(arguments)
    if options.list:
        for part in parts(options):
            print(f"{part.name}: python {shlex.join(part.command)}")
        return 0
    status = []
    answered = cifar.answer_errors(lambda: status.append(lease(options)))
    return answered or status[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
