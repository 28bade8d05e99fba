"""Measures KD2M's theorem: |R_S(h) - R_T(h)| <= W2 <= ||g_S - g_T||, epoch by epoch.

    python experiments/theorem.py
    python experiments/theorem.py --images 1000 -- --dataset cifar10 --data-dir DIR

P_S and P_T are student and teacher features of the same n evaluation images, g_S and
g_T are the networks up to the features, and W are exact distances of these samples (no
Sinkhorn), unsquared.  A loss l of z with Lipschitz constant L obeys

  |E_S l - E_T l| / L <= W1 <= W2 <= CW2 <= paired,

where CW2 weights classes by their frequency and paired = sqrt(mean ||x_i - y_i||^2).
Two kinds of losses are measured, for a student alone and for distilled ones:

  heads   l(z) = ||softmax h(z) - softmax f(z)||, h the student's head and f the
          teacher's, which stands for the paper's labelling function.  Softmax has
          Lipschitz constant 1/2: L = (||W_h|| + ||W_f||) / 2, spectral norms of the
          centred kernels.
  labels  l(z, y) = cross-entropy of a head at z with the image's own label, one head
          for both networks' features, the student's or the teacher's.  Its gradient is
          sum_k p_k (w_k - w_y): L = max_kl ||w_k - w_l||.  It is a loss on P(Z x Y),
          so CW2 bounds it.  W2 need not, because its plan may change a label.

W1 itself is the largest difference of risks of any loss with L = 1 (Kantorovich).
For the first distilled student, distances of batches are then compared with those of
all n images.  Either both networks see the same images, as in training, or the teacher
sees other images, as when two distributions are sampled.  The exit status is 1 if an
inequality fails by more than the tolerance.
"""

import os

# Before the first import of NumPy or JAX: see cifar.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import estimates
import jax
import numpy as np
import risks
from risks import TOLERANCE, Seen

from kddm_jax import data
from kddm_jax.experiment import study
from kddm_jax.experiment.machine import records, terminal
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import table
from kddm_jax.experiment.report.curves import PLAIN, plt, save
from kddm_jax.experiment.settings import ALONE, FEATURE_ONLY, Settings, as_json
from kddm_jax.experiment.training import methods, runs
from kddm_jax.experiment.training.outputs import outputs_of
from kddm_jax.experiment.training.problems import Problem

IMAGES = 2000  # an assignment of this size takes seconds
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
DRAWS = 50
SUFFIX = "-theorem"  # of the name of the runs' folder
DEFAULTS = {"images": IMAGES, "batches": BATCHES, "draws": DRAWS}
# Defaults of the settings after --, and more of them for digits with recipe laptop.
OWN = (
    *("--distances", "cw2", "--normalization", "teacher", "--seeds", "0"),
    "--no-equal-compute",
)
OWN_OF_DIGITS = (
    *("--student-images", "128", "--batch-size", "64", "--epochs", "30"),
    *("--degrees", "0", "--eval-every", "1"),
)


# ---------------------------------------------------------------------------
# Outputs of a pair of networks after every epoch.


def seen_by(problem: Problem, model, variables, images, who: str) -> Seen:
    """Computes a network's outputs for images, and reads its head.

    Args:
      problem: data and programs.
      model: the network.
      variables: variables of the network.
      images: uint8 ``[n, h, w, c]``.
      who: "teacher" or "student", for errors.

    Returns:
      Features, logits and head.

    Raises:
      UserError: if the network's logits are not a linear map of its features.
    """
    outputs = outputs_of(problem, model, variables, images)
    known = methods.HEADS.get(type(model).__name__, ("fc",))
    head = jax.device_get(variables["params"].get(known[-1], {}))
    if {"kernel", "bias"} <= set(head):
        seen = Seen(*outputs, head["kernel"], head["bias"])
        size = np.abs(outputs.logits).max()
        if np.abs(seen.head(seen.features) - seen.logits).max() <= 0.02 * size:
            return seen
    raise UserError(
        f"the {who}'s logits must be a linear map {known[-1]!r} of its features; the "
        "theorem compares features under one such head"
    )


class Epochs:
    """Stores the student's outputs for the images, with a file for each epoch.

    Attributes:
      folder: folder of the files.
      count: number of epochs, not counting the start.
    """

    def __init__(self, run: runs.Run, out: Path, images: int):
        self.folder = run.folder(out) / f"seen-{images}"
        self.count = run.epochs

    def _file(self, epoch):
        return self.folder / f"epoch-{epoch:04d}.npz"

    def write(self, epoch: int, seen: Seen) -> None:
        """Writes the file of an epoch atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial_file = self._file(epoch).with_suffix(".partial")
        with partial_file.open("wb") as file:
            np.savez(file, **seen._asdict())
        os.replace(partial_file, self._file(epoch))

    def check(self) -> None:
        """Raises UserError if the file of an epoch is missing."""
        for epoch in range(self.count + 1):
            if not self._file(epoch).exists():
                raise UserError(
                    f"{self._file(epoch)} is missing: this student was trained without "
                    "it, or with other --images; choose another --out, or delete "
                    f"{self.folder.parent}"
                )

    def read(self) -> Iterator[tuple[int, Seen]]:
        """Yields all epochs, from the start."""
        for epoch in range(self.count + 1):
            with np.load(self._file(epoch)) as arrays:
                yield epoch, Seen(**arrays)


def own_settings(arguments: Sequence[str]) -> Settings:
    """Reads settings of cifar.py, with the defaults of this script.

    Args:
      arguments: the command line after ``--``.

    Returns:
      The settings.

    Raises:
      UserError: as in `recipes.parse`.
    """
    settings = parse([*OWN, *arguments])
    if (settings.data.dataset, settings.run.recipe) != ("digits", "laptop"):
        return settings
    return parse([*OWN, *OWN_OF_DIGITS, *arguments])


def command_of(settings: Settings, options: argparse.Namespace) -> str:
    """Returns the command line, without what is the default of this script."""
    words = ["python experiments/theorem.py"]
    for name, plain in DEFAULTS.items():
        if (value := getattr(options, name)) != plain:
            words += [f"--{name}", *map(str, np.atleast_1d(value))]
    own = ["--dataset", settings.data.dataset, "--recipe", settings.run.recipe]
    plain = as_json(own_settings(own))
    return table.command(as_json(settings), " ".join([*words, "--"]), plain)


def _check(settings):
    if (
        settings.method.layers
        or settings.method.projector
        or FEATURE_ONLY in settings.method.distances
    ):
        raise UserError(
            "the theorem compares unchanged features; leave out --layers, "
            f"--projector and {FEATURE_ONLY}"
        )
    networks = settings.networks
    if networks.teacher_outputs or networks.teacher_statistics:
        raise UserError(
            "the theorem needs the teacher's network; pass --teacher instead of "
            "--teacher-outputs or --teacher-statistics"
        )
    if not settings.method.distances:
        raise UserError("--distances is empty; name at least one, such as cw2")
    if len(settings.run.seeds) > 1:
        raise UserError(f"--seeds {settings.run.seeds}: one seed is measured; pass one")
    if settings.run.coordinator or (settings.run.processes or 1) > 1:
        raise UserError("the theorem is measured by one process; leave out --processes")


def _check_widths(problem):
    widths = [of["features"].shape[-1] for of in problem.shapes]
    if widths[0] != widths[1]:
        raise UserError(
            f"the student's features have width {widths[0]}, the teacher's "
            f"{widths[1]}; the theorem needs one: --width, --teacher-width"
        )


def train(settings, images: int, console):
    """Trains teacher and students, or reads the finished ones.

    Args:
      settings: settings of the command.
      images: number of evaluation images to measure on, at most.
      console: where lines are printed.

    Returns:
      ``(problem, teacher, labels, epochs)``, with the teacher as `Seen` and `Epochs` by
      the name of the student's run.
    """
    options = {"suffix": SUFFIX, "check": _check_widths}
    with study.open(settings, console, **options) as opened:
        problem, teacher = opened.problem, opened.teacher
        labels = problem.parts.eval_labels
        chosen = data.balanced_subset(labels, min(images, len(labels)), seed=0)
        shown, labels = problem.parts.eval_images[chosen], labels[chosen]
        seen = seen_by(problem, teacher.model, teacher.variables, shown, "teacher")
        model = problem.student
        epochs = {}
        for run in opened.runs:
            kept = epochs[run.name] = Epochs(run, problem.out, len(labels))

            def observe(epoch, variables, kept=kept):
                kept.write(epoch, seen_by(problem, model, variables, shown, "student"))

            result = opened.train(run, observe)
            kept.check()
            opened.say(f"{run.label}: {result['accuracy']:.2f} %")
    return problem, seen, labels, epochs


# ---------------------------------------------------------------------------
# Tables, picture, command.

CHAIN_COLUMNS = (
    *("", "epoch", "accuracy %", "ΔR / L, heads", "W1", "W2", "CW2", "paired"),
    *("ΔR / L, labels, student's head", "ΔR / L, labels, teacher's head"),
)


def shown_epochs(count: int) -> list[int]:
    """Chooses epochs for the table: the start, doublings and the end, or all."""
    if count <= 6:
        return list(range(count + 1))
    return sorted({0, count, *(2**i for i in range(count.bit_length()))})


def chain_table(records: Sequence[Mapping], about: str) -> dict[str, object]:
    """Makes the table of the chain, for `table.markdown`."""
    rows = []
    for record in records:
        if record["epoch"] not in shown_epochs(record["epochs"]):
            continue
        differences = [risk["normalised"] for risk in record["risks"].values()]
        numbers = [differences[0], *(record[k] for k in ("w1", "w2", "cw2", "paired"))]
        rows.append(
            (
                record["title"],
                str(record["epoch"]),
                f"{record['accuracy']:.1f}",
                *(f"{value:.3g}" for value in (*numbers, *differences[1:])),
            )
        )
    return {"columns": CHAIN_COLUMNS, "rows": rows, "caption": about}


def picture(record: Mapping, path: Path) -> Path:
    """Draws the chain of each student and the bias of batches."""
    by_run: dict[str, list] = {}
    for one in record["chain"]:
        by_run.setdefault(one["title"], []).append(one)
    count = len(by_run) + 2
    figure, panels = plt.subplots(
        1, count, figsize=(3.6 * count + 1.2, 3.8), layout="constrained"
    )
    for axes, (title, found) in zip(panels, by_run.items(), strict=False):
        epochs = [one["epoch"] for one in found]
        for name, label, width in (  # equal ones all stay visible
            *(("paired", "paired", 5), ("cw2", "CW2", 3)),
            *(("w2", "W2", 1), ("w1", "W1", 1)),
        ):
            axes.plot(epochs, [r[name] for r in found], label=label, linewidth=width)
        for name, style in (
            ("heads", "-"),
            ("labels, student's head", "--"),
            ("labels, teacher's head", ":"),
        ):
            values = [one["risks"][name]["normalised"] for one in found]
            axes.plot(epochs, values, **{**PLAIN, "linestyle": style}, label=name)
        axes.set(xlabel="epoch", yscale="log", title=title)
        axes.sharey(panels[0])
    panels[0].set_ylabel("distance, or difference of risks / L")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, fontsize="x-small", loc="outside lower left", ncols=7)
    for axes, (kind, bias) in zip(panels[-2:], record["bias"].items(), strict=True):
        estimates.draw(axes, bias)
        axes.set_title(f"batches of {kind}")
        axes.sharey(panels[-2])
    panels[-2].set_ylabel("distance, relative to all images")
    panels[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def _captions(settings, problem, labels, teacher, shown, draws, devices):
    """Describes the data and networks of the two tables."""
    networks = f"{settings.networks.teacher_model} to {settings.networks.student_model}"
    deviation = teacher.features - teacher.features.mean(0)
    spread = float(np.mean(np.sum(deviation**2, axis=1))) ** 0.5
    where = (
        f"{devices['device_count']} × {devices['device']}, JAX {devices['jax']}, "
        f"commit {devices['commit']}."
    )
    part = "held-out training" if settings.data.held_out else "test"
    chain = (
        f"{settings.data.dataset}, recipe {settings.run.recipe}: {networks}, seed "
        f"{settings.run.seeds[0]}; n = m = {len(labels)} {part} images of "
        f"{len(problem.parts.eval_labels)}; unsquared exact distances, risks over the "
        f"Lipschitz constant of their loss; the teacher's spread is {spread:.3g}."
    )
    same = (
        f"{title_of_run(shown)} after its last epoch: squared distances, mean ± "
        f"standard deviation of {draws} batches drawn from the {len(labels)} images, "
        "relative to all of them at once; student and teacher see the same images."
    )
    other = (
        "The same distances, the teacher seeing other images of the same classes. "
        f"{where}"
    )
    return chain, {estimates.SAME: same, estimates.OTHER: other}


def title_of_run(name: str) -> str:
    """Returns the title of a student."""
    return runs.TITLES.get(name, name) if name in ALONE else methods.title(name)


def record_of(settings, options, console) -> dict[str, object]:
    """Trains and measures; returns the record that is written as JSON."""
    problem, teacher, labels, epochs = train(settings, options.images, console)
    chain, last = [], {}
    for name, kept in epochs.items():
        console.print(f"{name}: measuring {kept.count + 1} epochs")
        about = {"run": name, "title": title_of_run(name), "epochs": kept.count}
        for epoch, last[name] in kept.read():
            found = risks.measure(last[name], teacher, labels)
            chain.append({**about, "epoch": epoch, **found})
    shown = settings.method.distances[0]
    console.print(f"{shown}: measuring batches")
    bias = estimates.of_batches(
        *(last[shown], teacher, labels), batches=options.batches, draws=options.draws
    )
    environment = records.environment(problem.devices)
    about_chain, about_bias = _captions(
        settings, problem, labels, teacher, shown, options.draws, environment
    )
    tables = [
        chain_table(chain, about_chain),
        *(estimates.table(bias[kind], about) for kind, about in about_bias.items()),
    ]
    return {
        "settings": as_json(settings),
        "images": len(labels),
        "batch_draws": options.draws,
        "tolerance": TOLERANCE,
        "chain": chain,
        "bias": bias,
        "tables": tables,
        "command": command_of(settings, options),
        "environment": environment,
    }


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="theorem.py"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        help="largest number of evaluation images, balanced (default %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=BATCHES,
        help="sizes of batches; too large ones are left out (default "
        f"{' '.join(map(str, BATCHES))})",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=DRAWS,
        help="number of batches of each size (default %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="file for the numbers; the picture goes into its folder; default: "
        "theorem.json in --out",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        help=f"settings of cifar.py after --; defaults: {' '.join(OWN)}, and for "
        f"digits with recipe laptop also {' '.join(OWN_OF_DIGITS)}",
    )
    return parser.parse_args(arguments)


def _check_options(options):
    for name, least in (("images", 2), ("draws", 1)):
        if getattr(options, name) < least:
            raise UserError(
                f"--{name} must be at least {least}, got {getattr(options, name)}"
            )
    small = [size for size in options.batches if size < 2]
    if small:
        raise UserError(f"--batches must be at least 2, got {small[0]}")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse_options(arguments)

    def work():
        _check_options(options)
        settings = own_settings(options.settings)
        _check(settings)
        console = terminal.console()
        record = record_of(settings, options, console)
        out = study.default_out(settings, SUFFIX)
        path = options.json or out / "theorem.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(path, record)
        picture(record, path.with_suffix(".png"))
        print(table.markdown(record))
        console.print(f"{path}, {path.with_suffix('.png')}")
        if failed := risks.violations(record["chain"]):
            more = f" (and {len(failed) - 1} more)" if failed[1:] else ""
            raise RunError(
                f"the chain fails: {failed[0]}{more}; tolerance {TOLERANCE:g} of the "
                f"features' size; see {path}"
            )
        count = sum(1 for one in record["chain"] for _ in risks.links(one))
        console.print(f"{count} inequalities hold, tolerance {TOLERANCE:g}")

    return terminal.answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
