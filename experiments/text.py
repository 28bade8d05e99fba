"""Distils a fine-tuned BERT encoder into a student of some of its layers.

    python experiments/text.py --weights model.safetensors --tokenizer tokenizer.json \
        --train sst2-train.tsv --test sst2-test.tsv --out runs/sst2

The teacher is a pretrained encoder, fine-tuned on labelled sentences. The student
starts from some of the teacher's layers and is fine-tuned on few labelled sentences;
distilled students also see sentences without labels. They learn from the teacher's
predictions and from the geometry of its last hidden states (arXiv 2509.25253), either
of the first token of each sentence or of all tokens. See ``--help``.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn a 1 ms SVD
# into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import functools
import gzip
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kddm_jax import Term
from kddm_jax.adapters import Outputs, linen_apply
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.records import environment, write_json
from kddm_jax.experiment.machine.terminal import answer_errors
from kddm_jax.experiment.report import table as report
from kddm_jax.experiment.report.accuracies import difference, gap_closed, spread
from kddm_jax.networks import bert
from kddm_jax.networks.projectors import (
    DenseProjector,
    add_projectors,
    init_projectors,
    projected_apply,
    without_projectors,
)
from kddm_jax.train_step import create_state, known_outputs, make_train_step

# ---------------------------------------------------------------------------
# Sentences.


class Sentences(NamedTuple):
    """Holds sentences.

    Attributes:
      tokens: numbers of tokens, int32 ``[n, t]``, padded with 0.
      labels: classes, int32 ``[n]``; -1 means none.
    """

    tokens: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "Sentences":
        """Returns some of the sentences."""
        return Sentences(self.tokens[rows], self.labels[rows])


def read_rows(path: Path) -> list[tuple[str, int]]:
    """Reads sentences and labels.

    Args:
      path: a table with tabs, also as .gz: with a header that names the columns
        "sentence" and "label", as SST-2 has it, or with the four columns of CoLA.

    Returns:
      Pairs of a sentence and its label.

    Raises:
      UserError: the file is unreadable or has other columns.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    place, label = 3, 1
    if rows and {"sentence", "label"} <= set(rows[0]):
        place, label = rows[0].index("sentence"), rows[0].index("label")
        rows = rows[1:]
    try:
        return [(row[place], int(row[label])) for row in rows]
    except (IndexError, ValueError):
        raise UserError(
            f"{path} has neither a header with the columns sentence and label nor "
            "CoLA's four columns; write it with tabs and such a header"
        ) from None


def read(path: Path, args: argparse.Namespace) -> Sentences:
    """Reads sentences and turns them into tokens, at most ``--length`` each."""
    rows = read_rows(path)
    encode = _tokenizer(args.tokenizer, args.length)
    tokens = [found.ids for found in encode([text for text, _ in rows])]
    labels = np.array([label for _, label in rows], np.int32)
    return Sentences(np.array(tokens, np.int32), labels)


def _tokenizer(path, length):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            'the tokenizer needs the package tokenizers: pip install "kddm-jax[text]"'
        ) from None
    if not path.is_file():
        raise UserError(f"--tokenizer {path} does not exist; pass a tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=bert.PADDING)
    return tokenizer.encode_batch


class Split(NamedTuple):
    """Holds the sentences of an experiment; no two parts share a sentence.

    Attributes:
      teacher: labelled sentences of the teacher.
      student: labelled sentences of the student, among the teacher's.
      unlabelled: the teacher's other sentences, without their labels.
      held_out: sentences on which learning rates and lambdas are chosen.
      test: sentences of the tables.
    """

    teacher: Sentences
    student: Sentences
    unlabelled: Sentences
    held_out: Sentences
    test: Sentences


def split(args: argparse.Namespace) -> Split:
    """Reads all sentences and draws the parts, the same ones for every seed."""
    train, test = read(args.train, args), read(args.test, args)
    count = args.teacher_sentences + args.held_out
    if len(train.labels) < count:
        raise UserError(
            f"{args.train} has {len(train.labels)} sentences, but the teacher and "
            f"--held-out take {count}; lower --teacher-sentences or --held-out"
        )
    rows = np.random.default_rng(0).permutation(len(train.labels))
    held_out, rows = rows[: args.held_out], rows[args.held_out : count]
    labelled, others = rows[: args.sentences], rows[args.sentences :]
    unlabelled = train.take(others)
    return Split(
        teacher=train.take(rows),
        student=train.take(labelled),
        unlabelled=unlabelled._replace(labels=np.full_like(unlabelled.labels, -1)),
        held_out=train.take(held_out),
        test=test,
    )


# ---------------------------------------------------------------------------
# Networks.


class Network(NamedTuple):
    """Holds an encoder and its variables."""

    model: bert.BERT
    variables: Mapping[str, Any]


def encoder_apply(model: bert.BERT):
    """Makes an apply function whose layers are the last hidden states.

    They are ``"tokens"``, ``[b, t, d]``, and their first token, ``"first"``, ``[b,
    d]``.
    """
    apply = linen_apply(model)

    def with_layers(variables, tokens, *, train, rngs=None):
        outputs, state = apply(variables, tokens, train=train, rngs=rngs or {})
        last = outputs.maps[f"block{model.layers}"]
        layers = {"tokens": last, "first": last[:, 0]}
        return outputs._replace(maps=layers), state

    return with_layers


def outputs_of(network: Network, tokens: np.ndarray, layers: bool) -> Outputs:
    """Computes logits, and the last hidden states if asked, as arrays of the host."""
    program = _program(network.model, layers)
    size, found = 64, []
    for start in range(0, len(tokens), size):
        rows = tokens[start : start + size]
        padded = np.zeros((size, tokens.shape[1]), tokens.dtype)
        padded[: len(rows)] = rows
        outputs = jax.device_get(program(network.variables, padded))
        found.append(jax.tree.map(lambda a: a[: len(rows)], outputs))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


@functools.cache
def _program(model, layers):
    apply = encoder_apply(model)

    def run(variables, tokens):
        outputs, _ = apply(variables, tokens, train=False)
        return outputs if layers else Outputs(outputs.logits, None, {})

    return jax.jit(run)


def score(network: Network, sentences: Sentences, metric: str) -> float:
    """Measures accuracy or Matthews correlation, in percent."""
    guess = np.argmax(outputs_of(network, sentences.tokens, False).logits, axis=1)
    if metric == "accuracy":
        return 100 * float(np.mean(guess == sentences.labels))
    from sklearn.metrics import matthews_corrcoef  # slow to import

    return 100 * float(matthews_corrcoef(sentences.labels, guess))


# ---------------------------------------------------------------------------
# Methods of distillation.


class Method(NamedTuple):
    """Describes what a student learns besides its labels.

    Attributes:
      title: title in tables.
      distance: key of the distance of hidden states; None for predictions alone.
      normalization: normalization of the hidden states.
      projected: whether the student's hidden states pass a learned linear map.
    """

    title: str
    distance: str | None = None
    normalization: str | None = None
    projected: bool = False


METHODS: Mapping[str, Method] = {
    "kd": Method("KD"),
    "cka": Method("CKA", "cka"),
    "linear": Method("linear projection", "l2", "unit", projected=True),
    "procrustes": Method("Procrustes", "procrustes"),
    "gram": Method("feature Gram", "gram"),
    "l2": Method("L2 of unit rows", "l2", "unit"),
}
LAYERS = {"first": "first token", "tokens": "all tokens"}


def terms(name: str, layer: str, weights: Mapping[str, float]) -> tuple[Term, ...]:
    """Makes the Terms of a method: a distance of hidden states, and KD."""
    method = METHODS[name]
    if weights["kd"] > 0:
        kd = (Term("kd", weight=weights["kd"], options={"temperature": 2.0}),)
    else:
        kd = ()
    if method.distance is None:
        return kd
    term = Term(
        method.distance,
        weight=weights[name],
        layers=(layer, layer),
        positions="each" if layer == "tokens" else "pool",
        normalization=method.normalization,
    )
    return (term, *kd)


# ---------------------------------------------------------------------------
# Training.


class Job(NamedTuple):
    """Describes one training.

    Attributes:
      steps: number of updates.
      lr: peak learning rate.
      batch: sentences of a step; half of them have labels if there are others.
      seed: seed of the order, of dropout and of the projector.
      terms: what is compared with the teacher.
      projected: layer that passes a learned linear map, or None.
    """

    steps: int
    lr: float
    batch: int
    seed: int
    terms: tuple[Term, ...] = ()
    projected: str | None = None


def make_optimizer(steps: int, lr: float) -> optax.GradientTransformation:
    """Makes AdamW with a warm-up of a tenth of the steps and a linear decay."""
    rise = max(steps // 10, 1)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, lr, rise),
            optax.linear_schedule(lr, 0.0, max(steps - rise, 1)),
        ],
        [rise],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


def endless(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields ``size`` rows of ``count`` at a time, in a new order in every epoch."""
    rows = np.zeros(0, int)
    while True:
        while len(rows) < size:
            rows = np.concatenate([rows, rng.permutation(count)])
        yield rows[:size]
        rows = rows[size:]


def batches(labelled: int, others: int, job: Job) -> Iterator[np.ndarray]:
    """Yields the rows of each batch; the others' rows follow the labelled ones."""
    rng = np.random.default_rng(job.seed)
    half = job.batch // 2 if others else job.batch
    known = endless(labelled, half, rng)
    if not others:
        yield from known
    for rows, more in zip(known, endless(others, job.batch - half, rng), strict=False):
        yield np.concatenate([rows, labelled + more])


def projectors_of(model: bert.BERT, layer: str) -> dict[str, DenseProjector]:
    """Makes the learned linear map of a layer."""
    return {layer: DenseProjector(model.width)}


@functools.cache  # all seeds share one compiled program
def make_step(model, terms, projected, steps, lr):
    """Makes the optimizer and one update; without terms it uses the labels alone."""
    tx, apply = make_optimizer(steps, lr), encoder_apply(model)
    if projected:
        apply = projected_apply(apply, projectors_of(model, projected))
    step = make_train_step(
        apply,
        known_outputs if terms else None,
        tx,
        augment=lambda key, tokens: tokens,
        distance=terms,
        axis_name=None,
    )
    return tx, jax.jit(step, donate_argnums=0)


def train(
    start: Network,
    labelled: Sentences,
    job: Job,
    *,
    unlabelled: Sentences | None = None,
    teacher: Outputs | None = None,
) -> tuple[Network, float]:
    """Trains an encoder.

    Args:
      start: the encoder to start from.
      labelled: sentences with labels.
      job: the training.
      unlabelled: sentences without labels, for the distances.
      teacher: the teacher's outputs on all sentences, for the distances.

    Returns:
      The trained encoder, and the seconds without those of the first step.

    Raises:
      FloatingPointError: loss or gradient is not finite.
    """
    model = start.model
    variables = jax.tree.map(jnp.array, dict(start.variables))
    if job.projected:
        shape = {"first": (1, model.width), "tokens": (1, 1, model.width)}[
            job.projected
        ]
        layer = {job.projected: jax.ShapeDtypeStruct(shape, jnp.float32)}
        projectors = projectors_of(model, job.projected)
        new = init_projectors(jax.random.key(job.seed), projectors, layer)
        variables = add_projectors(variables, new)
    everything = labelled if unlabelled is None else _joined(labelled, unlabelled)
    tx, step = make_step(model, job.terms, job.projected, job.steps, job.lr)
    state = create_state(variables, tx, seed=job.seed)
    others = 0 if unlabelled is None else len(unlabelled.labels)
    order = batches(len(labelled.labels), others, job)
    began = time.perf_counter()
    for i, rows in enumerate(itertools.islice(order, job.steps)):
        tokens, labels = everything.take(rows)
        guide = jax.tree.map(lambda a: a[rows], teacher) if job.terms else {}  # noqa: B023
        mask = bert.token_masks(tokens, ["tokens"]) if job.terms else None
        state, metrics = step(state, guide, tokens, labels, {}, mask)
        if i == 0:
            jax.block_until_ready(state)
            began = time.perf_counter()
        if not metrics["finite"]:
            raise FloatingPointError(f"loss or gradient is not finite at step {i + 1}")
    seconds = time.perf_counter() - began
    own = without_projectors(state.variables)
    return Network(model, {"params": own["params"]}), seconds


def _joined(one, other):
    return Sentences(*map(np.concatenate, zip(one, other, strict=True)))


# ---------------------------------------------------------------------------
# The experiment.


def say(line: str) -> None:
    """Prints a line without buffering."""
    print(line, flush=True)


def make_teacher(args: argparse.Namespace, parts: Split) -> Network:
    """Fine-tunes the teacher, or reads one that was fine-tuned."""
    classes = 1 + int(max(parts.teacher.labels.max(), parts.test.labels.max()))
    if args.teacher:
        return Network(*bert.load(args.teacher))
    start = Network(*bert.load(args.weights, classes))
    steps = args.teacher_epochs * len(parts.teacher.labels) // args.batch
    job = Job(steps, args.teacher_lr, args.batch, seed=1000)
    say(f"teacher: {start.model.layers} blocks, {steps} steps")
    teacher, seconds = train(start, parts.teacher, job)
    say(f"teacher: {seconds:.0f} s")
    folder = args.out / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    bert.save(folder / "model.safetensors", *teacher)
    return teacher


# Settings that may differ between the runs of a folder: records have what they need.
PER_RUN = ("out", "seeds", "methods", "teacher", "choose", "choose_lr", "over")
PER_RUN += ("lr", "alone_lr", "steps")


class Study:
    """Trains students of one teacher, and keeps their scores in a file."""

    def __init__(self, args: argparse.Namespace):
        """Reads the sentences, the teacher and the runs that are already done."""
        self.args, self.parts = args, split(args)
        self.file = args.out / "results.json"
        self.settings = {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in PER_RUN
        }
        self.runs = self._done()
        found = args.out / "teacher" / "model.safetensors"
        if args.teacher is None and found.exists():
            args.teacher = found
        self.teacher = make_teacher(args, self.parts)
        start = bert.take_layers(*self.teacher, args.layers)
        self.start = Network(*start)
        say("teacher: its outputs")
        sentences = _joined(self.parts.student, self.parts.unlabelled)
        self.outputs = outputs_of(self.teacher, sentences.tokens, layers=True)

    def _done(self):
        if not self.file.exists():
            return []
        stored = json.loads(self.file.read_text())
        if stored["settings"] != json.loads(json.dumps(self.settings)):
            differ = [k for k, v in self.settings.items() if stored["settings"][k] != v]
            raise UserError(
                f"{self.file} has runs with other settings ({', '.join(differ)}); pass "
                "another --out"
            )
        return stored["runs"]

    def score(self, network: Network, part: str) -> float:
        """Measures a network on a part."""
        return score(network, getattr(self.parts, part), self.args.metric)

    def student(self, name, layer, seed, part, *, weight=0.0, lr=None, times=1):
        """Returns the record of a student, which is trained unless it is known."""
        args = self.args
        lr = lr or (args.alone_lr if name == "alone" else args.lr)
        about = {
            "method": name,
            "layer": layer,
            "seed": seed,
            "weight": weight,
            "lr": lr,
        }
        about |= {
            "steps": times * args.steps,
            "part": part,
            "kd": self.kd(name, weight),
        }
        for run in self.runs:
            if about.items() <= run.items():
                return run
        distilled = name != "alone"
        weights = {name: weight, "kd": about["kd"]}
        job = Job(
            about["steps"],
            *(lr, args.batch, seed),
            terms=terms(name, layer, weights) if distilled else (),
            projected=layer if distilled and METHODS[name].projected else None,
        )
        more = {"unlabelled": self.parts.unlabelled, "teacher": self.outputs}
        try:
            network, seconds = train(
                self.start, self.parts.student, job, **(more if distilled else {})
            )
            found = self.score(network, part)
        except FloatingPointError:  # lambda or the learning rate is too large
            found, seconds = 0.0, 0.0
        run = {**about, "score": found, "seconds": seconds}
        say(f"{title(run)}, seed {seed}, λ {weight:g}, lr {lr:g}: {found:.2f}")
        self.runs.append(run)
        write_json(self.file, {"settings": self.settings, "runs": self.runs})
        return run

    def kd(self, name, weight):
        """Returns the weight of KD in a method."""
        if name == "alone":
            return 0.0
        return weight if name == "kd" else self.args.over["kd"]


def title(run: Mapping[str, Any]) -> str:
    """Names a row of a table."""
    if run["method"] == "alone":
        return f"student alone, {run['steps']} steps"
    method = METHODS[run["method"]]
    if method.distance is None:
        return method.title
    return f"{method.title} + KD, {LAYERS[run['layer']]}"


def variants(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Lists methods with the layer that each compares."""
    distances = [name for name in args.methods if name != "kd"]
    kd = [("kd", None)] if "kd" in args.methods else []
    return [*kd, *itertools.product(distances, LAYERS)]


def compare(study: Study) -> dict[str, Any]:
    """Trains all students with every seed, and makes the table."""
    args, rows = study.args, []
    for times in (1, 2):
        alone = [
            study.student("alone", None, s, "test", times=times) for s in args.seeds
        ]
        rows.append(alone)
    for name, layer in variants(args):
        weight = args.over[f"{name}@{layer}" if layer else name]
        options = {"part": "test", "weight": weight}
        rows.append([study.student(name, layer, s, **options) for s in args.seeds])
    best = max(rows[:2], key=lambda row: np.mean([run["score"] for run in row]))
    teacher = study.score(study.teacher, "test")
    return {
        "teacher": teacher,
        "columns": COLUMNS,
        "rows": [
            ("teacher", f"{teacher:.2f}", *[""] * 5),
            *(_cells(row, best, teacher, len(study.parts.test.labels)) for row in rows),
        ],
    }


COLUMNS = ("", "score", "difference to alone", "gap closed", "λ", "seeds", "seconds")


def _cells(row, best, teacher, count):
    scores = {run["seed"]: run["score"] for run in row}
    alone = {run["seed"]: run["score"] for run in best}
    closed = gap_closed(
        float(np.mean([*scores.values()])), [*alone.values()], teacher, count
    )
    return (
        title(row[0]),
        spread([*scores.values()]),
        "" if row is best else str(difference(scores, alone)),
        "" if row is best else "–" if closed is None else f"{closed:.0f} %",
        f"{row[0]['weight']:g}" if row[0]["weight"] else "",
        str(len(row)),
        f"{np.mean([run['seconds'] for run in row]):.0f}",
    )


def choose(study: Study) -> dict[str, Any]:
    """Tries learning rates of the student alone and lambdas, on held-out sentences."""
    args, rows = study.args, []
    mean = lambda runs: f"{np.mean([run['score'] for run in runs]):.2f}"
    for lr in args.choose_lr:
        runs = [study.student("alone", None, s, "held_out", lr=lr) for s in args.seeds]
        rows.append((f"student alone, lr {lr:g}", "", mean(runs)))
    for (name, layer), weight in itertools.product(variants(args), args.choose):
        options = {"part": "held_out", "weight": weight}
        runs = [study.student(name, layer, s, **options) for s in args.seeds]
        rows.append((title(runs[0]), f"{weight:g}", mean(runs)))
    return {"columns": ("", "λ", "score on held-out sentences"), "rows": rows}


def caption(study: Study) -> str:
    """Describes what a table was measured on."""
    args, parts = study.args, study.parts
    metric = {"accuracy": "accuracy %", "matthews": "100 × Matthews correlation"}
    return (
        f"{metric[args.metric]} of {len(parts.test.labels)} test sentences; "
        f"{args.train.name}; teacher of {study.teacher.model.layers} blocks, "
        f"{len(parts.teacher.labels)} labelled sentences; students of its blocks "
        f"{', '.join(map(str, args.layers))}, {len(parts.student.labels)} labelled "
        f"sentences, distilled ones also {len(parts.unlabelled.labels)} without; "
        f"{args.steps} steps of {args.batch} sentences. All seeds share one teacher. "
        "Differences are paired by seed, with a 95 % interval, and refer to the better "
        "of the students alone."
    )


# ---------------------------------------------------------------------------
# The command.

# Chosen on held-out sentences of SST-2.
WEIGHTS = {"kd": 1.0, **{f"{name}@{at}": 1.0 for name in METHODS for at in LAYERS}}


def _weight(text):
    key, _, number = text.partition("=")
    if key not in WEIGHTS:
        raise argparse.ArgumentTypeError(
            f"{key!r} is not a method; write METHOD=LAMBDA of {', '.join(WEIGHTS)}"
        )
    return key, float(number)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; an error prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    file = functools.partial(parser.add_argument, type=Path, metavar="FILE")
    file("--weights", required=True, help="safetensors, with config.json beside it")
    file("--tokenizer", required=True, help="tokenizer.json")
    file("--train", required=True, help="sentences and labels, .tsv or .tsv.gz")
    file("--test", required=True, help="sentences of the table")
    file("--teacher", help="a fine-tuned teacher; by default it is trained")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of teacher and results")
    metrics = ["accuracy", "matthews"]
    add("--metric", choices=metrics, default="accuracy", help="(%(default)s)")
    count = functools.partial(parser.add_argument, type=int, metavar="N")
    count("--teacher-sentences", default=2000, help="with labels (%(default)s)")
    count("--sentences", default=500, help="the student's labels (%(default)s)")
    count("--held-out", default=1000, help="sentences to choose on (%(default)s)")
    count("--length", default=48, help="longest sentence in tokens (%(default)s)")
    count("--layers", nargs="+", default=[2, 4, 6], help="the student's blocks (2 4 6)")
    count("--batch", default=32, help="sentences of a step (%(default)s)")
    count("--teacher-epochs", default=3, help="(%(default)s)")
    count("--steps", default=150, help="updates of a student (%(default)s)")
    count("--seeds", nargs="+", default=[0], help="seeds of students (0)")
    rate = functools.partial(parser.add_argument, type=float, metavar="RATE")
    rate("--teacher-lr", default=1e-4, help="peak learning rate (%(default)s)")
    rate("--lr", default=1e-4, help="of distilled students (%(default)s)")
    rate("--alone-lr", default=1e-4, help="of students alone (%(default)s)")
    rate("--choose-lr", nargs="+", default=[], help="compare these held out instead")
    known = {"nargs": "+", "choices": list(METHODS), "metavar": "METHOD"}
    add("--methods", **known, default=list(METHODS), help=", ".join(METHODS) + " (all)")
    over = {"type": _weight, "nargs": "+", "metavar": "METHOD=LAMBDA", "default": []}
    add("--over", **over, help="use these lambdas instead")
    grid = {"type": float, "nargs": "+", "metavar": "LAMBDA", "default": []}
    add("--choose", **grid, help="compare these lambdas on held-out sentences instead")
    args = parser.parse_args(arguments)
    args.over = {**WEIGHTS, **dict(args.over)}
    for name in ("teacher_sentences", "sentences", "batch", "steps", "teacher_epochs"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} {getattr(args, name)}: choose at least 1")
    if args.sentences >= args.teacher_sentences:
        parser.error(
            f"--sentences {args.sentences} must be fewer than --teacher-sentences "
            f"{args.teacher_sentences}, of which the others lose their labels"
        )
    return args


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment, prints its table and writes it."""
    args = parse(arguments)

    def work():
        study = Study(args)
        choosing = args.choose or args.choose_lr
        results = (choose if choosing else compare)(study)
        results |= {
            "settings": study.settings,
            "runs": study.runs,
            "environment": environment(jax.devices()),
            "caption": caption(study),
        }
        results["command"] = results["environment"]["command"]
        write_json(study.file, results)
        say("\n" + report.markdown(results))

    return answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
