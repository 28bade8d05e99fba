"""Draws the paper's kinds of figures from finished runs.

    python experiments/figures.py runs/digits-laptop
    python experiments/figures.py runs/digits-laptop-weights
    python experiments/figures.py --figures toys --to pictures

A folder of cifar.py gives the learning curves, and teacher and student features in one
plane before and after distillation.  A folder of choose_weights.py gives accuracy,
cross-entropy and distance against the epoch, with a curve for each lambda.  Without a
folder, there are two-dimensional examples on which the distances differ.
"""

import os

# Before the first import of NumPy or JAX: see cifar.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import toys

from kddm_jax import data, wasserstein
from kddm_jax.experiment import finished
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import answer_errors
from kddm_jax.experiment.report import curves, weights
from kddm_jax.experiment.report.curves import PLAIN, plt
from kddm_jax.experiment.report.embedding import SEED, tsne
from kddm_jax.experiment.settings import ALONE
from kddm_jax.experiment.training.outputs import outputs_of
from kddm_jax.experiment.training.runs import folder_of

EMBEDDED = 300  # images
RUNS = "results.json"  # of cifar.py
GRID = "weights.json"  # of choose_weights.py


PLAN = {"diagonal": "on the image itself", "within_class": "within its class"}


def plans(results: Mapping, path: Path) -> Path:
    """Draws how much of the plan pairs an image with itself, or within its class.

    Args:
      results: the content of ``results.json``, with distances of `fused`.
      path: path of the picture.

    Returns:
      The path.

    Raises:
      UserError: no distance of the run reports its plan.
    """
    groups: dict[str, list] = {}
    for run in results["runs"]:
        if f"{run['name']}/diagonal" in run["history"][0]:
            groups.setdefault(run["name"], []).append(run)
    if not groups:
        raise UserError(
            "--figures plans: no distance of this run reports its plan; train some of "
            "experiments/fused.py, such as --distances fused:W2_K01"
        )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, runs in groups.items():
        for one, part in zip(axes, PLAN, strict=True):
            key = f"{name}/{part}"
            style = {"label": runs[0]["title"], "linewidth": 1.2}
            curves.draw(one, runs, lambda r, key=key: r.get(key), **style)
    for one, where in zip(axes, PLAN.values(), strict=True):
        one.set(xlabel="epoch", ylabel=f"mass {where}", ylim=(-0.02, 1.02))
    axes[0].legend(fontsize="small")
    figure.suptitle(
        f"{results['settings']['dataset']}: the plan in training, "
        f"{curves.seeds_of(next(iter(groups.values())))}"
    )
    return curves.save(figure, path)


def _results(folder, tried):
    """Reads the results of recorded runs, without those that diverged."""
    return [
        records.read_json(
            folder_of(folder / record["place"], record["name"], record["seed"])
            / "result.json"
        )
        for record in tried
        if record["accuracy"]
    ]


def of_lambda(
    folder: Path, chosen: Mapping
) -> dict[tuple[str, str | None], dict[float, list]]:
    """Reads the runs of a folder of choose_weights.py.

    Args:
      folder: the folder.
      chosen: the content of its ``weights.json``.

    Returns:
      The results by method and normalization, then by lambda in rising order, of all
      seeds that did not diverge. Lambda 0 is the student alone with the chosen learning
      rate and weight decay. The other lambdas are those of the finer grid, or of the
      coarse grid if there is no finer one.

    Raises:
      UserError: the folder does not contain these runs, or is of version 0.2.0.
    """
    if "tried" not in chosen:
        raise UserError(
            f"{folder} is of version 0.2.0, which recorded no single runs; run "
            "choose_weights.py again with another --out"
        )
    found, every = {}, weights.grids([chosen])
    settings, rate = chosen["settings"], chosen["alone"]["lr"]
    for row in chosen["chosen"]:
        pair, seeds = (row["name"], row["normalization"]), row["seeds"]
        finest = {w: tried for w, tried in every[pair].items() if len(tried) == seeds}
        like = next(iter(finest.values()))
        epochs, seen = like[0]["epochs"], [record["seed"] for record in like]
        # Next to a coarse grid, the student alone has the grid's learning rate.
        lr = rate if seeds > 1 else settings["lr"]
        wanted = {"name": "student", "epochs": epochs, "lr": lr}
        wanted["weight_decay"] = chosen["alone"]["weight_decay"]
        alone = [
            record
            for record in chosen["tried"]
            if wanted.items() <= record.items() and record["seed"] in seen
        ]
        finest = {0.0: alone, **finest}
        found[pair] = {w: _results(folder, tried) for w, tried in finest.items()}
    return found


def ablation(folder: Path, to: Path) -> list[Path]:
    """Draws accuracy, cross-entropy and distance, with a curve for each lambda.

    Args:
      folder: folder of a finished choose_weights.py.
      to: folder for the pictures, one for each distance and normalization.

    Returns:
      Their paths.
    """
    chosen, paths = records.read_json(folder / GRID), []
    for (name, normalization), by_weight in of_lambda(folder, chosen).items():
        groups = {f"λ = {w:g}": runs for w, runs in by_weight.items() if runs}
        shades = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, len(groups)))
        styles = {
            label: {
                "label": label,
                **(PLAIN if label == "λ = 0" else {"color": shade}),
            }
            for label, shade in zip(groups, shades, strict=True)
        }
        figure, axes = curves.panels(groups, styles, "held-out")
        for weight, runs in by_weight.items():
            if not runs:
                axes[0].plot([], [], " ", label=f"λ = {weight:g}: not finite")
        axes[0].legend(fontsize="small")
        *_, last = groups.values()
        words = [chosen["settings"]["dataset"], last[0]["title"]]
        words += [f"normalization {normalization}"] if normalization else []
        figure.suptitle(f"{', '.join(words)}: {curves.seeds_of(last)}")
        end = f"-{normalization}" if normalization else ""
        path = to / f"ablation-{name.replace(':', '.')}{end}.png"
        paths.append(curves.save(figure, path))
    return paths


# ---------------------------------------------------------------------------
# Teacher and student features in one plane.


def _umap(points):
    umap = importlib.import_module("umap")
    made = umap.UMAP(n_neighbors=15, random_state=SEED, n_jobs=1)
    return made.fit_transform(points)


EMBEDDINGS = {"umap": ("UMAP", _umap), "tsne": ("t-SNE", tsne)}


def embedding_of(name: str) -> str:
    """Returns an embedding by name; "auto" is UMAP if installed, else t-SNE."""
    there = importlib.util.find_spec("umap") is not None
    if name == "auto":
        return "umap" if there else "tsne"
    if name == "umap" and not there:
        raise UserError(
            "--embedding umap: it is not installed; pip install umap-learn, or take "
            "--embedding tsne"
        )
    return name


def distilled(results: Mapping, name: str | None, seed: int | None) -> tuple[str, int]:
    """Chooses the distilled student to show.

    Args:
      results: the content of ``results.json``.
      name: name of its method; None takes CW2, or the first.
      seed: seed of its run; None takes the first.

    Returns:
      ``(name, seed)``.

    Raises:
      UserError: if there is no such student.
    """
    found = [(r["name"], r["seed"]) for r in results["runs"] if r["name"] not in ALONE]
    names = list(dict.fromkeys(n for n, _ in found))
    if not names:
        raise UserError(
            "there is no distilled student; run cifar.py with --distances, or draw "
            "--figures curves alone"
        )
    if name is None:
        name = "cw2" if "cw2" in names else names[0]
    if name not in names:
        raise UserError(f"--distance {name}: there are {', '.join(names)}")
    seeds = [s for n, s in found if n == name]
    if seed is not None and seed not in seeds:
        raise UserError(f"--seed {seed}: there are {', '.join(map(str, seeds))}")
    return name, seeds[0] if seed is None else seed


def relative_w2(x: np.ndarray, y: np.ndarray) -> float:
    """Computes exact W2² in units of the teacher's mean squared deviation."""
    spread = float(np.mean(np.sum((y - y.mean(0)) ** 2, axis=1)))
    return float(wasserstein(jnp.asarray(x), jnp.asarray(y), solver="exact")) / spread


def together(
    embed: Callable[[np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds student and teacher features together.

    Args:
      embed: maps points ``[n, d]`` to ``[n, 2]``.
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.

    Returns:
      Both in the plane, ``([n, 2], [m, 2])``.

    Raises:
      UserError: if the features have different widths.
    """
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"the student's features have width {x.shape[1]}, the teacher's "
            f"{y.shape[1]}: no common plane; draw --figures curves alone"
        )
    plane = embed(np.concatenate([y, x]))
    return plane[len(y) :], plane[: len(y)]


def embedding(opened: finished.Finished, options, to: Path) -> list[Path]:
    """Draws teacher and student features of the same images, before and after.

    Args:
      opened: the finished runs.
      options: the command's ``distance``, ``seed``, ``images`` and ``embedding``.
      to: folder of the picture.

    Returns:
      Its path.
    """
    name, seed = distilled(opened.results, options.distance, options.seed)
    title, embed = EMBEDDINGS[embedding_of(options.embedding)]
    problem = opened.problem
    labels = problem.parts.eval_labels
    shown = data.balanced_subset(labels, min(options.images, len(labels)), seed=0)
    images, labels = problem.parts.eval_images[shown], labels[shown]
    features = lambda model, variables: (
        outputs_of(problem, model, variables, images).features
    )
    y = features(opened.teacher.model, opened.teacher.variables)

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    classes = problem.dataset.class_names
    for axes, method, when in zip(
        panels, ("student", name), ("before", "after"), strict=True
    ):
        (run,) = (
            r
            for r in opened.results["runs"]
            if (r["name"], r["seed"]) == (method, seed)
        )
        x = features(*opened.student(method, seed))
        mine, theirs = together(embed, x, y)
        count = len(classes)
        hues = curves.scatter(
            *(axes, theirs, labels, count), marker="o", s=9, alpha=0.6
        )
        curves.scatter(axes, mine, labels, count, marker="x", s=14)
        axes.set(xticks=[], yticks=[])
        axes.set_title(
            f"{when}: {curves.plain(run['title'])}, {run['accuracy']:.1f} %, "
            f"W2² {relative_w2(x, y):.2f} of the teacher's spread",
            fontsize="medium",
        )
    dots = [
        plt.Line2D([], [], color="grey", linestyle="", marker=m, label=who)
        for m, who in (("o", "teacher"), ("x", "student"))
    ]
    if len(classes) <= 10:
        dots += [
            plt.Line2D([], [], color=hues(i), linestyle="", marker="s", label=label)
            for i, label in enumerate(map(curves.plain, classes))
        ]
    figure.legend(handles=dots, loc="outside right center", fontsize="small")
    figure.suptitle(
        f"{problem.settings.data.dataset}: joint {title} of the features of "
        f"{len(shown)} images, seed {seed}"
    )
    return [curves.save(figure, to / f"embedding-{name.replace(':', '.')}.png")]


# ---------------------------------------------------------------------------
# Two-dimensional examples.

STUDENT, TEACHER = "tab:blue", "tab:red"


def _lines(axes, x, y, **style):
    axes.plot(*np.stack([x, y]).transpose(2, 0, 1), **style)


def classes_picture(to: Path) -> Path:
    """Draws which samples W2 and CW2 pair if the student's classes are rotated."""
    made = toys.two_classes()
    figure, panels = plt.subplots(1, 2, figsize=(8, 5.4), layout="constrained")
    for axes, (title, plan) in zip(panels, made.plans.items(), strict=True):
        partner = np.argmax(plan, axis=1)
        y, across = made.y[partner], made.labels != made.labels[partner]
        for which, colour in ((~across, "grey"), (across, "tab:orange")):
            _lines(axes, made.x[which], y[which], color=colour, linewidth=0.7)
        for points, colour in ((made.x, STUDENT), (made.y, TEACHER)):
            for label, marker in ((0, "o"), (1, "^")):
                of = points[made.labels == label]
                axes.scatter(*of.T, color=colour, marker=marker, s=18, zorder=3)
        share = toys.crossing(plan, made.labels)
        axes.set_title(f"{title}: {100 * share:.0f} % across classes")
        axes.set(xticks=[], yticks=[], aspect="equal")
    handles = [
        plt.Line2D([], [], color=c, marker=m, linestyle="", label=f"{who}, class {k}")
        for who, c in (("student", STUDENT), ("teacher", TEACHER))
        for k, m in ((0, "o"), (1, "^"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return curves.save(figure, to / "toy-classes.png")


def shapes_picture(to: Path) -> Path:
    """Draws two shapes that the Gaussian W2 cannot distinguish, and flows to one."""
    made = toys.two_shapes()
    values = lambda x: ", ".join(
        f"{title.replace('W2', 'W2²')} = {max(float(fn(x, made.y)), 0.0):.2f}"
        for title, fn in toys.DISTANCES.items()
    )
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    plan = toys.optimal_plan(made.x, made.y)
    _lines(
        *(panels[0], made.x, made.y[np.argmax(plan, axis=1)]),
        color="grey",
        linewidth=0.7,
    )
    panels[0].scatter(*made.x.T, color=STUDENT, s=14, zorder=3, label="student")
    panels[0].scatter(*made.y.T, color=TEACHER, s=14, zorder=3, label="teacher")
    panels[0].set_title(f"one mean and covariance\n{values(made.x)}")
    for axes, (title, path) in zip(panels[1:], made.flows.items(), strict=True):
        axes.plot(*path.transpose(2, 0, 1), color="lightgrey", linewidth=0.6)
        axes.scatter(*path[0].T, color="grey", s=8, zorder=2, label="start")
        axes.scatter(*made.y.T, color=TEACHER, s=14, zorder=2)
        axes.scatter(*path[-1].T, color=STUDENT, s=14, zorder=3)
        axes.set_title(f"student after a flow down {title}\n{values(path[-1])}")
    panels[1].legend(fontsize="small")
    panels[0].legend(fontsize="small")
    for axes in panels:
        axes.set(xticks=[], yticks=[], aspect="equal")
    return curves.save(figure, to / "toy-shapes.png")


# ---------------------------------------------------------------------------
# The command.

FIGURES = ("ablation", "embedding", "curves", "plans", "toys")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="figures.py"
    )
    parser.add_argument(
        "folder",
        metavar="RUN_DIR",
        type=Path,
        nargs="?",
        help="--out of a finished cifar.py or choose_weights.py; toys need none",
    )
    parser.add_argument(
        "--to", type=Path, help="folder of the pictures; default: RUN_DIR/figures"
    )
    parser.add_argument(
        "--figures",
        nargs="+",
        choices=FIGURES,
        help="default: toys, and embedding and curves for a folder of cifar.py or "
        "ablation for one of choose_weights.py; plans only if named",
    )
    parser.add_argument(
        "--distance",
        help="distance of the student to embed, as in cifar.py; default: cw2, or the "
        "first",
    )
    parser.add_argument(
        "--seed", type=int, help="seed of the students to embed; default: the first"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=EMBEDDED,
        help="number of evaluation images to embed, balanced (default %(default)s)",
    )
    parser.add_argument(
        "--embedding",
        choices=("auto", *EMBEDDINGS),
        default="auto",
        help="auto is umap if it is installed, else tsne (default %(default)s)",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder of the data; default: as in the run"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        help="checkpoint of the teacher; default: as in the run",
    )
    return parser.parse_args(arguments)


def _wanted(options) -> tuple[str, ...]:
    """Returns the figures to draw; raises an error if something is missing."""
    folder, asked = options.folder, options.figures
    if folder is None:
        if asked != ["toys"] or options.to is None:
            raise UserError(
                "RUN_DIR is missing; without one there are --figures toys --to FOLDER"
            )
        return ("toys",)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass --out of a finished command")
    needs = {"ablation": GRID, "embedding": RUNS, "curves": RUNS, "plans": RUNS}
    there = {name for name in (RUNS, GRID) if (folder / name).exists()}
    if not there and asked != ["toys"]:
        raise UserError(
            f"{folder} has neither {RUNS} (of cifar.py) nor {GRID} (of "
            "choose_weights.py), so it is not finished; rerun its command"
        )
    if asked is None:
        usual = [f for f in FIGURES if f != "plans"]  # few distances report them
        return tuple(f for f in usual if f not in needs or needs[f] in there)
    for figure in asked:
        if figure in needs and needs[figure] not in there:
            maker = "choose_weights.py" if figure == "ablation" else "cifar.py"
            raise UserError(
                f"--figures {figure}: {folder} has no {needs[figure]}; pass the "
                f"folder of {maker}"
            )
    return tuple(dict.fromkeys(asked))


def draw(options: argparse.Namespace) -> list[Path]:
    """Draws the figures of the command; returns the paths of the pictures.

    Raises:
      UserError: if an argument is wrong.
    """
    wanted = _wanted(options)
    if options.images < 10:
        raise UserError(f"--images must be at least 10, got {options.images}")
    folder, to = options.folder, options.to or options.folder / "figures"
    paths = []
    if "ablation" in wanted:
        paths += ablation(folder, to)
    if "embedding" in wanted:
        distilled(records.read_json(folder / RUNS), options.distance, options.seed)
        embedding_of(options.embedding)
        opened = finished.load(
            folder, data_dir=options.data_dir, teacher=options.teacher
        )
        paths += embedding(opened, options, to)
    if "curves" in wanted:
        figure = curves.of_runs(records.read_json(folder / RUNS))
        paths.append(curves.save(figure, to / "curves.png"))
    if "plans" in wanted:
        paths.append(plans(records.read_json(folder / RUNS), to / "plans.png"))
    if "toys" in wanted:
        paths += [classes_picture(to), shapes_picture(to)]
    return paths


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)

    def work():
        for path in draw(options):
            print(path)

    return answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
