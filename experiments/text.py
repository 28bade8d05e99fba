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
import functools
import gzip
import itertools
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kddm_jax import Term
from kddm_jax.adapters import Outputs, linen_apply
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.machine.records import environment, read_json, write_json
from kddm_jax.experiment.machine.terminal import answer_errors
from kddm_jax.experiment.report import table as report
from kddm_jax.experiment.report.accuracies import difference, gap_closed, spread
from kddm_jax.experiment.study import only_one
from kddm_jax.networks import bert
from kddm_jax.networks.projectors import (
    DenseProjector,
    add_projectors,
    init_projectors,
    projected_apply,
    without_projectors,
)
from kddm_jax.networks.torchvision import WeightsError
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

    def take(self, rows: np.ndarray) -> "Sentences":
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
      UserError: the file is unreadable, or a line has other columns or no label.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            lines = [line.rstrip("\r\n").split("\t") for line in file]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    place, label, first = 3, 1, 1
    if lines and {"sentence", "label"} <= set(lines[0]):
        place, label = lines[0].index("sentence"), lines[0].index("label")
        lines, first = lines[1:], 2
    rows = []
    for number, line in enumerate(lines, first):
        try:
            rows.append((line[place], int(line[label])))
        except (IndexError, ValueError):
            rows.append(("", -1))
        if rows[-1][1] < 0:
            raise UserError(
                f"{path}, line {number}: expected a sentence and a label from 0 up, "
                f"got {line}; write a header with the columns sentence and label, or "
                "CoLA's four columns, with tabs between them"
            )
    if not rows:
        raise UserError(f"{path} has no sentences; pass a file with some")
    return rows


def read(path: Path, tokenizer: Path, length: int) -> Sentences:
    """Reads sentences as tokens, at most ``length`` each.

    Raises:
      UserError: a file is unreadable, or `tokenizers` is not installed.
    """
    rows = read_rows(path)
    encode = _tokenizer(tokenizer, length)
    tokens = [found.ids for found in encode([sentence for sentence, _ in rows])]
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
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of this very class
        raise UserError(f"--tokenizer {path} is not readable: {error}") from None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=bert.PADDING)
    return tokenizer.encode_batch


class Split(NamedTuple):
    """Holds the sentences of an experiment.

    The parts of the teacher, of ``held_out`` and of ``test`` share no sentence.

    Attributes:
      teacher: labelled sentences of the teacher.
      student: labelled sentences of the student, some of the teacher's.
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
    """Reads all sentences and draws the parts, the same ones for every seed.

    Raises:
      UserError: a file is unreadable or has too few sentences.
    """
    train = read(args.train, args.tokenizer, args.length)
    files = args.train, args.test
    whole, test = (read(path, args.tokenizer, args.test_length) for path in files)
    tokens = np.concatenate([test.tokens, whole.tokens])
    _, first = np.unique(tokens, axis=0, return_index=True)
    new = np.sort(first[first >= len(test.tokens)]) - len(test.tokens)
    train, whole = train.take(new), whole.take(new)
    count = args.teacher_sentences + args.held_out
    if len(train.labels) < count:
        raise UserError(
            f"{args.train} has {len(train.labels)} different sentences that are not in "
            f"--test, but the teacher and --held-out take {count}; lower "
            "--teacher-sentences or --held-out"
        )
    rows = np.random.default_rng(0).permutation(len(train.labels))
    held_out, rows = rows[: args.held_out], rows[args.held_out : count]
    labelled, others = rows[: args.sentences], rows[args.sentences :]
    unlabelled = train.take(others)
    return Split(
        teacher=train.take(rows),
        student=train.take(labelled),
        unlabelled=unlabelled._replace(labels=np.full_like(unlabelled.labels, -1)),
        held_out=whole.take(held_out),
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
    kd = (Term("kd", weight=weights["kd"], options={"temperature": 2.0}),)
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
    """Makes AdamW with a warm-up of a tenth of the steps and a cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps)
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
        layer = {job.projected: jax.ShapeDtypeStruct((1, model.width), jnp.float32)}
        projectors = projectors_of(model, job.projected)
        new = init_projectors(jax.random.key(job.seed), projectors, layer)
        # Student and teacher begin with the same coordinates.
        new = jax.tree.map(lambda kernel: jnp.eye(*kernel.shape), new)
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


def digest(path: Path) -> int:
    """Returns a checksum of a file, and of ``config.json`` if it holds weights."""
    content = path.read_bytes()
    if path.suffix == ".safetensors" and path.with_name("config.json").exists():
        content += path.with_name("config.json").read_bytes()
    return zlib.crc32(content)


def read_network(path: Path, classes: int | None = None) -> Network:
    """Reads an encoder; raises `UserError` if it is unreadable."""
    try:
        return Network(*bert.load(path, classes))
    except WeightsError as error:
        raise UserError(str(error)) from None


# Settings that may differ between the runs of a folder; a record has what it needs.
PER_RUN = {"out", "seeds", "methods", "states", "choose", "choose_lr", "over", "steps"}
PER_RUN |= {"lr", "alone_lr"}


class Study:
    """Trains students of one teacher, and keeps their scores in a file."""

    def __init__(self, args: argparse.Namespace):
        """Reads sentences, teacher and the runs that are done.

        Raises:
          UserError: a file is unreadable, or the folder has runs of other settings.
        """
        self.args, self.parts = args, split(args)
        self.file = args.out / "runs.json"
        self.settings = {
            name: digest(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in PER_RUN
        }
        self.runs = self._done()
        self._write()
        self.teacher = self._teacher()
        self.start = Network(*bert.take_layers(*self.teacher, args.layers))
        say("teacher: its outputs")
        sentences = _joined(self.parts.student, self.parts.unlabelled)
        self.outputs = outputs_of(self.teacher, sentences.tokens, layers=True)

    def _done(self):
        if not self.file.exists():
            return []
        stored = read_json(self.file)
        differ = [k for k, v in self.settings.items() if stored["settings"].get(k) != v]
        taught = (self.args.out / "teacher" / "model.safetensors").exists()
        if differ and not (taught or stored["runs"]):
            return []  # a command that was refused has left only its settings
        if differ:
            raise UserError(
                f"{self.file} has runs with other settings ({', '.join(differ)}); pass "
                "another --out"
            )
        return stored["runs"]

    def _write(self):
        write_json(self.file, {"settings": self.settings, "runs": self.runs})

    def _teacher(self):
        """Reads the teacher, or fine-tunes the pretrained encoder."""
        args, parts = self.args, self.parts
        classes = 1 + int(max(p.labels.max() for p in (parts.teacher, parts.test)))
        path = args.teacher or args.out / "teacher" / "model.safetensors"
        if args.teacher or path.exists():
            teacher = read_network(path)
        else:
            start = read_network(args.weights, classes)
            self._check(start.model)
            steps = args.teacher_epochs * len(parts.teacher.labels) // args.batch
            job = Job(max(steps, 1), args.teacher_lr, args.batch, seed=1000)
            say(f"teacher: {start.model.layers} blocks, {job.steps} steps")
            try:
                teacher, seconds = train(start, parts.teacher, job)
            except FloatingPointError as error:
                raise RunError(f"teacher: {error}; lower --teacher-lr") from None
            say(f"teacher: {seconds:.0f} s")
            path.parent.mkdir(exist_ok=True)
            bert.save(path, *teacher)
            shutil.copy(args.tokenizer, path.with_name("tokenizer.json"))
        self._check(teacher.model)
        if teacher.model.num_classes < classes:
            raise UserError(
                f"the teacher has {teacher.model.num_classes} classes, but the "
                f"sentences have {classes}; pass a teacher of these sentences"
            )
        return teacher

    def _check(self, model):
        for option in ("length", "test_length"):
            length = getattr(self.args, option)
            if length > model.positions:
                raise UserError(
                    f"--{option.replace('_', '-')} {length}: the network has "
                    f"{model.positions} positions; choose at most as many"
                )
        if max(self.args.layers) > model.layers:
            raise UserError(
                f"--layers {max(self.args.layers)}: the teacher has {model.layers} "
                "blocks; name some of them"
            )
        largest = max(int(part.tokens.max()) for part in self.parts)
        if largest >= model.vocabulary:
            raise UserError(
                f"--tokenizer gives token {largest}, but the network knows "
                f"{model.vocabulary} tokens; pass the tokenizer of its weights"
            )

    def score(self, network: Network, part: str) -> float:
        """Measures a network on a part."""
        return score(network, getattr(self.parts, part), self.args.metric)

    def student(
        self,
        name: str,
        layer: str | None,
        seed: int,
        part: str,
        *,
        weight: float = 0.0,
        lr: float | None = None,
        times: int = 1,
    ) -> dict[str, Any]:
        """Returns the record of a student, which is trained unless it is known.

        Args:
          name: key of the method, or "alone".
          layer: layer that is compared, a key of `LAYERS`, or None.
          seed: seed of the run.
          part: "held_out" or "test".
          weight: lambda.
          lr: peak learning rate; None takes that of the settings.
          times: factor of the number of steps.

        Returns:
          The record; its "score" is None if the training diverged.
        """
        args, alone = self.args, name == "alone"
        if lr is None:
            lr = args.alone_lr if alone else args.lr
        kd = weight if name == "kd" else 0.0 if alone else args.over["kd"]
        about = {"method": name, "layer": layer, "seed": seed, "weight": weight}
        about |= {"lr": lr, "steps": times * args.steps, "part": part, "kd": kd}
        for run in self.runs:
            if about.items() <= run.items():
                return run
        job = Job(about["steps"], lr, args.batch, seed)
        more = {}
        if not alone:
            job = job._replace(
                terms=terms(name, layer, {name: weight, "kd": kd}),
                projected=layer if METHODS[name].projected else None,
            )
            more = {"unlabelled": self.parts.unlabelled, "teacher": self.outputs}
        try:
            network, seconds = train(self.start, self.parts.student, job, **more)
            found = self.score(network, part)
        except FloatingPointError:  # lambda or the learning rate is too large
            found, seconds = None, 0.0
        run = {**about, "score": found, "seconds": seconds}
        said = "diverged" if found is None else f"{found:.2f}"
        say(f"{title(run)}, seed {seed}, λ {weight:g}, learning rate {lr:g}: {said}")
        self.runs.append(run)
        self._write()
        return run


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
    return [*kd, *itertools.product(distances, args.states)]


def scores_of(row: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Returns the scores of a row by seed; a run that diverged has none."""
    return {run["seed"]: run["score"] for run in row if run["score"] is not None}


def compare(study: Study) -> dict[str, Any]:
    """Trains all students with every seed, and makes the table."""
    args, rows = study.args, []
    for times in (1, 2):
        options = {"part": "test", "times": times}
        rows.append([study.student("alone", None, s, **options) for s in args.seeds])
    for name, layer in variants(args):
        weight = args.over[f"{name}@{layer}" if layer else name]
        options = {"part": "test", "weight": weight}
        rows.append([study.student(name, layer, s, **options) for s in args.seeds])
    best = max(rows[:2], key=lambda row: np.mean([*scores_of(row).values()] or [0.0]))
    teacher = study.score(study.teacher, "test")
    cells = functools.partial(_cells, best=best, teacher=teacher, study=study)
    return {
        "teacher": teacher,
        "columns": COLUMNS,
        "rows": [("teacher", f"{teacher:.2f}", *[""] * 5), *map(cells, rows)],
    }


COLUMNS = ("", "score", "difference to alone", "gap closed", "λ", "seeds", "seconds")


def _cells(row, best, teacher, study):
    scores, alone = scores_of(row), scores_of(best)
    cells = ["diverged" if len(scores) < len(row) else "", "", ""]
    if len(scores) == len(row):
        cells[0] = spread([*scores.values()])
    if row is not best and alone and len(scores) == len(row):
        cells[1] = str(difference(scores, alone))
        # A Matthews correlation has no binomial error, with which to tell a gap.
        if study.args.metric == "accuracy":
            count = len(study.parts.test.labels)
            mean = float(np.mean([*scores.values()]))
            closed = gap_closed(mean, [*alone.values()], teacher, count)
            cells[2] = "–" if closed is None else f"{closed:.0f} %"
    weight = f"{row[0]['weight']:g}" if row[0]["weight"] else ""
    seconds = np.mean([run["seconds"] for run in row])
    return (title(row[0]), *cells, weight, str(len(row)), f"{seconds:.0f}")


def choose(study: Study) -> dict[str, Any]:
    """Tries learning rates and lambdas, on held-out sentences.

    Learning rates are tried for both students alone, and for KD.
    """
    args, rows = study.args, []

    def add(name, layer, weight=0.0, **options):
        options = {"part": "held_out", "weight": weight, **options}
        runs = [study.student(name, layer, s, **options) for s in args.seeds]
        found = scores_of(runs)
        mean = f"{np.mean([*found.values()]):.2f}" if len(found) == len(runs) else ""
        shown = f"{weight:g}" if weight else "", f"{runs[0]['lr']:g}"
        rows.append((title(runs[0]), *shown, mean or "diverged"))

    for lr in args.choose_lr:
        add("alone", None, lr=lr)
        add("alone", None, lr=lr, times=2)
        if "kd" in args.methods:
            add("kd", None, args.over["kd"], lr=lr)
    for (name, layer), weight in itertools.product(variants(args), args.choose):
        add(name, layer, weight)
    columns = ("", "λ", "learning rate", "score on held-out sentences")
    return {"columns": columns, "rows": rows}


def caption(study: Study, part: str) -> str:
    """Describes a table of scores on a part of the sentences."""
    args, parts = study.args, study.parts
    metric = {"accuracy": "accuracy %", "matthews": "100 × Matthews correlation"}
    return (
        f"{metric[args.metric]} of {len(getattr(parts, part).labels)} "
        f"{part.replace('_', '-')} sentences; "
        f"{args.train.name}; teacher of {study.teacher.model.layers} blocks, "
        f"{len(parts.teacher.labels)} labelled sentences; students of its blocks "
        f"{', '.join(map(str, args.layers))}, {len(parts.student.labels)} labelled "
        f"sentences, distilled ones also {len(parts.unlabelled.labels)} without; "
        f"{args.steps} steps of {args.batch} sentences. Learning rate "
        f"{args.alone_lr:g} alone and {args.lr:g} distilled; λ of KD in sums "
        f"{args.over['kd']:g}. All seeds share one teacher and the same sentences. "
        "Differences are paired by seed, with a 95 % interval, and refer to the better "
        "of the students alone."
    )


# ---------------------------------------------------------------------------
# The command.

VARIANTS = [f"{name}@{layer}" for name in METHODS if name != "kd" for layer in LAYERS]
WEIGHTS = dict.fromkeys(["kd", *VARIANTS], 1.0)  # not tuned; see --choose


def _weight(text):
    key, _, number = text.partition("=")
    if key not in WEIGHTS:
        raise argparse.ArgumentTypeError(
            f"{key!r} is not a method; write METHOD=LAMBDA of {', '.join(WEIGHTS)}"
        )
    return key, _not_negative(number)


def _not_negative(text):
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return number


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; an error prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    file = functools.partial(parser.add_argument, type=Path, metavar="FILE")
    file("--weights", required=True, help="safetensors; config.json is in its folder")
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
    count("--length", default=24, help="tokens of a training sentence (%(default)s)")
    count("--test-length", default=48, help="of one to score; longer are cut (48)")
    count("--layers", nargs="+", default=[2, 4, 6], help="the student's blocks (2 4 6)")
    count("--batch", default=32, help="sentences of a step (%(default)s)")
    count("--teacher-epochs", default=3, help="(%(default)s)")
    count("--steps", default=150, help="updates of a student (%(default)s)")
    count("--seeds", nargs="+", default=[0], help="seeds of students (0)")
    rate = functools.partial(parser.add_argument, type=_not_negative, metavar="RATE")
    rate("--teacher-lr", default=1e-4, help="peak learning rate (%(default)s)")
    rate("--lr", default=1e-4, help="of distilled students (%(default)s)")
    rate("--alone-lr", default=1e-4, help="of students alone (%(default)s)")
    rate(
        "--choose-lr",
        nargs="+",
        default=[],
        help="compare these on held-out sentences instead",
    )
    known = {"nargs": "+", "choices": list(METHODS), "metavar": "METHOD"}
    add("--methods", **known, default=list(METHODS), help=", ".join(METHODS) + " (all)")
    states = {"nargs": "+", "choices": list(LAYERS), "default": list(LAYERS)}
    add("--states", **states, help="tokens whose hidden states are compared (both)")
    over = {"type": _weight, "nargs": "+", "metavar": "METHOD=LAMBDA", "default": []}
    add("--over", **over, help="use these lambdas instead")
    grid = {"type": _not_negative, "nargs": "+", "metavar": "LAMBDA", "default": []}
    add("--choose", **grid, help="compare these lambdas on held-out sentences instead")
    args = parser.parse_args(arguments)
    args.over = {**WEIGHTS, **dict(args.over)}
    least = {"teacher_sentences": 1, "sentences": 1, "steps": 1, "teacher_epochs": 1}
    least |= {"held_out": 1, "batch": 2, "length": 3, "test_length": 3}
    for name, number in least.items():
        if getattr(args, name) < number:
            option = name.replace("_", "-")
            parser.error(f"--{option} {getattr(args, name)}: choose at least {number}")
    if args.test_length < args.length:
        parser.error(
            f"--test-length {args.test_length} must be at least --length {args.length}"
        )
    if min(args.seeds) < 0 or min(args.layers) < 1:
        parser.error("--seeds must be from 0 up, and --layers from 1 up")
    if len({*args.seeds}) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: name each seed once")
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
        args.out.mkdir(parents=True, exist_ok=True)
        with only_one(args.out):
            study = Study(args)
            choosing = args.choose or args.choose_lr
            results = (choose if choosing else compare)(study)
            results |= {"runs": study.runs, "environment": environment(jax.devices())}
            results["caption"] = caption(study, "held_out" if choosing else "test")
            results["command"] = results["environment"]["command"]
            name = "choices.json" if choosing else "results.json"
            write_json(args.out / name, results)
            say("\n" + report.markdown(results))

    return answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
