"""Distils a Transformer into one of half its depth by the geometry of its features.

    python experiments/language.py
    python experiments/language.py --seeds 0 1 2 --student-widths 48 96

A causal Transformer reads the sources of Python's standard library character by
character.  A narrower student of half its depth learns from the same text and from the
teacher's hidden states or predictions (geometry-aware distillation, arXiv 2509.25253).
Every character is a sample.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn a 1 ms SVD
# into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import hashlib
import itertools
import json
import math
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from kddm_jax import (
    Distance,
    Term,
    cka,
    distill_loss,
    feature_gram,
    kd,
    linear_projection,
    procrustes,
)
from kddm_jax.experiment.report import table as report
from kddm_jax.experiment.report.accuracies import difference
from kddm_jax.experiment.training.compute import on_the_host
from kddm_jax.losses import cross_entropy

CHARACTERS = 128  # ASCII; any other character becomes "?"
HEADS = 4

# ---------------------------------------------------------------------------
# The text.

MOST_CHARACTERS = 8_000_000  # in each part
PARTS = {0: "test", 1: "validation"}


def part_of(name: str) -> str:
    """Chooses the part of a file by its name alone."""
    return PARTS.get(zlib.crc32(name.encode()) % 10, "training")


def load_text(folder: Path) -> dict[str, np.ndarray]:
    """Reads a folder's Python sources.

    Args:
      folder: folder with ``*.py``; its subfolders are not read.

    Returns:
      ASCII codes, uint8 ``[n]``, of ``"training"``, ``"validation"`` and ``"test"``.

    Raises:
      SystemExit: if a part has no text.
    """
    texts = {"training": [], "validation": [], "test": []}
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_sysconfigdata"):  # depends on the machine
            text = path.read_text(encoding="utf-8", errors="replace")
            texts[part_of(path.name)].append(text)
    codes = {}
    for part, found in texts.items():
        whole = "".join(found)[:MOST_CHARACTERS].encode("ascii", "replace")
        if not whole:
            raise SystemExit(
                f"error: {folder} has no text for the {part} part; choose a folder "
                "with more *.py by --text"
            )
        codes[part] = np.frombuffer(whole, np.uint8)
    return codes


def windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """Cuts out ``context`` characters and the next one, int32 ``[b, t + 1]``."""
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def random_batches(text, args, seed) -> Iterator[np.ndarray]:
    """Yields random windows without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - args.context, args.batch)
        yield windows(text, starts, args.context)


def even_batches(text, args) -> list[np.ndarray]:
    """Returns full batches of evenly spaced windows, in any order."""
    count = args.windows // args.batch
    starts = np.linspace(0, len(text) - args.context - 1, count * args.batch)
    rows = windows(text, starts.astype(int), args.context)
    return [rows[first::count] for first in range(count)]


# ---------------------------------------------------------------------------
# The network.


class Outputs(NamedTuple):
    """Holds the outputs of a network for characters ``[b, t]``.

    Attributes:
      logits: logits of each next character, ``[b, t, k]``.
      layers: residual stream after each block, ``{"block_1": [b, t, d], ...}``.
    """

    logits: jax.Array | None
    layers: Mapping[str, jax.Array]


class Block(nn.Module):
    """Adds attention and a perceptron of the normalised stream to the stream."""

    @nn.compact
    def __call__(self, x, bias):  # noqa: D102
        width = x.shape[-1]
        parts = nn.DenseGeneral((3, HEADS, width // HEADS))(nn.LayerNorm()(x))
        query, key, value = jnp.moveaxis(parts, 2, 0)  # [b, t, heads, d / heads]
        seen = jax.nn.dot_product_attention(query, key, value, bias, is_causal=True)
        x += nn.DenseGeneral(width, axis=(-2, -1))(seen)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


def distance_bias(context: int) -> jax.Array:
    """Returns the bias of attention by distance in characters, ``[1, heads, t, t]``.

    One slope per head replaces learned positions (Press et al., Train short, test long,
    arXiv 2108.12409), so that a small network attends to the last characters at once.
    """
    place = jnp.arange(context)
    slopes = 2.0 ** (-8 / HEADS * jnp.arange(1, HEADS + 1))
    return slopes[None, :, None, None] * (place - place[:, None])


class Transformer(nn.Module):
    """Predicts every next character from the previous ones."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, characters: jax.Array) -> Outputs:  # noqa: D102
        bias = distance_bias(characters.shape[1])
        x = nn.Embed(CHARACTERS, self.width, name="characters")(characters)
        layers = {}
        for name in (f"block_{i + 1}" for i in range(self.depth)):
            layers[name] = x = Block(name=name)(x, bias)
        return Outputs(nn.Dense(CHARACTERS, name="head")(nn.LayerNorm()(x)), layers)


def per_character(outputs: Outputs) -> Outputs:
    """Makes every character a sample, from ``[b, t, ...]`` to ``[b t, ...]``."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), outputs)


def layer_map(student_depth: int, teacher_depth: int) -> list[tuple[str, str]]:
    """Pairs each student block with the teacher block at the same relative depth."""
    step = teacher_depth // student_depth
    return [(f"block_{i}", f"block_{i * step}") for i in range(1, student_depth + 1)]


# ---------------------------------------------------------------------------
# Methods of distillation.


def at_random(distance: Callable[..., jax.Array], count: int) -> Distance:
    """Makes a distance of ``count`` random characters, which limits n x n costs."""

    def of_sample(x, y, key):
        rows = jax.random.choice(key, len(x), (count,), replace=False)
        return distance(x[rows], y[rows])

    return Distance(of_sample, inputs=("features", "key"))


class Method(NamedTuple):
    """Describes one way to learn from a teacher.

    Attributes:
      title: title in tables.
      weight: lambda, the best of 0.3 to 100 on the validation part (--choose; for the
        linear projection the grid starts at 0.03).
      distance: distance of hidden states; None is KD of all predictions.
    """

    title: str
    weight: float
    distance: Callable[..., jax.Array] | None = None

    def terms(self, pairs, positions) -> tuple[Term, ...]:
        """Makes the Terms of the loss: the mean distance of pairs of layers."""
        if self.distance is None:
            row = Distance(kd, inputs=("logits",))
            return (Term(row, options={"temperature": 2.0}),)
        row = at_random(self.distance, positions)
        return tuple(Term(row, weight=1 / len(pairs), layers=pair) for pair in pairs)


METHODS: Mapping[str, Method] = {
    "procrustes": Method("Procrustes", 3.0, procrustes),
    "gram": Method("feature Gram", 10.0, feature_gram),
    "cka": Method("CKA", 1.0, cka),
    "linear_projection": Method("linear projection", 0.3, linear_projection),
    "kd": Method("KD", 3.0),
}

# ---------------------------------------------------------------------------
# Training and measuring.


class Network(NamedTuple):
    """Holds a trained network and the time of its training."""

    model: Transformer
    params: Mapping[str, object]
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def read(self, text: np.ndarray) -> Outputs:
        """Computes the outputs for windows ``[b, t + 1]``, one row per character."""
        return _reader(self.model)(self.params, text)


@functools.cache
def _reader(model):
    return jax.jit(
        lambda params, text: per_character(model.apply(params, text[:, :-1]))
    )


def make_optimizer(steps: int, lr: float) -> optax.GradientTransformation:
    """Makes AdamW with a warm-up of a twentieth of the steps and a cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 20, steps, lr / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


# Lambda is an argument of the step, so a whole grid shares one compiled program.
@functools.cache
def make_step(model, teacher, method, *, positions, steps, lr):
    """Makes the optimiser and one update; without a method it uses the text alone."""
    tx = make_optimizer(steps, lr)
    pairs = layer_map(model.depth, teacher.depth) if method else []

    def loss_fn(params, teacher_params, text, weight, key):
        inputs = text[:, :-1]
        student, guide = model.apply(params, inputs), Outputs(None, {})
        if method:
            guide = teacher.apply(teacher_params, inputs)
        return distill_loss(
            student.layers,
            guide.layers,
            text[:, 1:],  # the next characters; each of them is a sample
            student.logits,
            guide.logits,
            distance=method.terms(pairs, positions) if method else (),
            weight=weight,
            key=key,
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, teacher_params, text, weight, key):
        params, opt_state, count = state
        key = jax.random.fold_in(key, count)
        grads, terms = jax.grad(loss_fn, has_aux=True)(
            params, teacher_params, text, weight, key
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1), terms

    return tx, step


def train(
    args: argparse.Namespace,
    text: np.ndarray,
    model: Transformer,
    *,
    name: str,
    steps: int,
    seed: int,
    method: Method | None = None,
    weight: float = 0.0,
    teacher: Network | None = None,
) -> Network:
    """Trains a network; all randomness depends on seed and step only.

    Args:
      args: settings of the command.
      text: ASCII codes, ``[n]``.
      model: the network to train.
      name: name in the lines that report progress.
      steps: number of updates.
      seed: seed of the parameters, the batches and the sampled characters.
      method: method of distillation; None learns from the text alone.
      weight: lambda.
      teacher: teacher, if there is a method.

    Returns:
      The network. Its seconds leave out the first step, which compiles.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
    guide, guide_params = (teacher.model, teacher.params) if method else (None, {})
    options = {"positions": args.positions, "steps": steps, "lr": args.lr}
    tx, step = make_step(model, guide, method, **options)
    batches = random_batches(text, args, seed)
    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, next(batches)[:, :-1])
    state = params, tx.init(params), jnp.zeros((), jnp.int32)
    for i in range(1, steps + 1):
        state, terms = step(state, guide_params, next(batches), weight, key)
        if i == 1:
            jax.block_until_ready(state)
            began, cpu = time.perf_counter(), time.process_time()
        if i % max(steps // 4, 1) == 0:
            bits = float(terms["task"]) / math.log(2)
            say(f"{name}: step {i} of {steps}, {bits:.2f} bits per character")
            if not math.isfinite(bits):
                raise FloatingPointError(f"{name}: the loss is not finite at step {i}")
    jax.block_until_ready(state)
    spent = time.perf_counter() - began, time.process_time() - cpu
    return Network(model, state[0], *spent)


def bits_per_character(network: Network, batches: Sequence[np.ndarray]) -> float:
    """Measures the cross-entropy over windows, each without previous context."""
    nats = [
        float(cross_entropy(network.read(text).logits, jnp.ravel(text[:, 1:])))
        for text in batches
    ]
    return float(np.mean(nats)) / math.log(2)  # batches have equal sizes


def geometry(student: Network, teacher: Network, text: np.ndarray) -> dict[str, float]:
    """Measures the distance between last hidden states of student and teacher."""
    x, y = (
        network.read(text).layers[f"block_{network.model.depth}"]
        for network in (student, teacher)
    )
    return {
        name: max(0.0, float(distance(x, y)))  # rounding may give < 0 for equal ones
        for name, distance in (("procrustes", procrustes), ("cka", cka))
    }


# ---------------------------------------------------------------------------
# The experiment.


def say(line: str) -> None:
    """Prints a line without buffering."""
    print(line, flush=True)


def make_teacher(args, text) -> Network:
    """Trains the teacher with a seed that no student has by default."""
    return train(
        args,
        text,
        Transformer(args.depth, args.width),
        name="teacher",
        steps=args.teacher_steps,
        seed=1000,
    )


def make_student(
    args, text, teacher, *, width, seed, key="alone", weight=0.0, steps=None
) -> Network:
    """Trains a student by the method ``key``, or one of `ALONE`."""
    learning = f"{key}, lambda {weight:g}" if key in METHODS else key
    return train(
        args,
        text,
        Transformer(args.depth // 2, width),
        name=f"student {learning}, width {width}, seed {seed}",
        steps=steps or args.steps,
        seed=seed,
        method=METHODS.get(key),
        weight=weight,
        teacher=teacher,
    )


def equal_steps(args: argparse.Namespace, width: int) -> int:
    """Computes the steps of a student alone with the operations of a distilled run.

    Counts are those of XLA for one step. They contain the teacher's forward pass. The
    most expensive method decides.
    """
    student = Transformer(args.depth // 2, width)
    guide = Transformer(args.depth, args.width)
    text = jax.ShapeDtypeStruct((args.batch, args.context + 1), jnp.int32)
    options = {"positions": args.positions, "steps": args.steps, "lr": args.lr}

    def operations(method):
        tx, step = make_step(student, guide if method else None, method, **options)

        def arguments(text):
            key = jax.random.key(0)
            params, teacher = (m.init(key, text[:, :-1]) for m in (student, guide))
            state = params, tx.init(params), jnp.zeros((), jnp.int32)
            return state, teacher if method else {}, text, 1.0, key

        with on_the_host():  # programs of accelerators have no count
            lowered = step.lower(*jax.eval_shape(arguments, text))
            return lowered.cost_analysis()["flops"]

    alone = operations(None)
    most = max([alone, *(operations(METHODS[key]) for key in args.methods)])
    return round(args.steps * most / alone)


def compare(args, text) -> dict[str, object]:
    """Trains the teacher, and for each width and seed all students."""
    test = even_batches(text["test"], args)
    longer = {width: equal_steps(args, width) for width in args.student_widths}
    teacher = make_teacher(args, text["training"])
    runs = [_measured(teacher, teacher, test, method="teacher")]
    said = dict(args.weights)
    weights = {key: said.get(key, METHODS[key].weight) for key in args.methods}
    weights = {**dict.fromkeys(ALONE, 0.0), **weights}
    for width, seed in itertools.product(args.student_widths, args.seeds):
        for name, weight in weights.items():
            about = {"seed": seed, "weight": weight}
            options = {"steps": longer[width]} if name == "longer" else {}
            student = make_student(
                *(args, text["training"], teacher),
                **{"width": width, "key": name, **about, **options},
            )
            runs.append(_measured(student, teacher, test, method=name, **about))
    return {"runs": runs, **table(runs), "caption": caption(args, text)}


def _measured(network, teacher, test, **labels):
    """Makes the record of a run."""
    record = {
        **labels,
        "width": network.model.width,
        "bits": bits_per_character(network, test),
        **geometry(network, teacher, np.concatenate(test[:8])),
        "seconds": network.seconds,
        "cpu_seconds": network.cpu_seconds,
    }
    say(f"  {record['bits']:.4f} bits per character of the test part")
    return record


def choose(args, text) -> dict[str, object]:
    """Tries every lambda on the validation part, with the first width and seed."""
    validation = even_batches(text["validation"], args)
    teacher = make_teacher(args, text["training"])
    first = {"width": args.student_widths[0], "seed": args.seeds[0]}
    bits = {key: {} for key in args.methods}
    for key, weight in itertools.product(args.methods, args.choose):
        try:
            student = make_student(
                args, text["training"], teacher, **first, key=key, weight=weight
            )
        except FloatingPointError as error:  # lambda may be too large
            say(f"  {error}")
            continue
        bits[key][f"{weight:g}"] = found = bits_per_character(student, validation)
        say(f"  {found:.4f} bits per character of the validation part")
    cell = lambda row, weight: f"{row[weight]:.3f}" if weight in row else "–"
    names = [f"{weight:g}" for weight in args.choose]
    return {
        "validation_bits": bits,
        "weights": {k: float(min(row, key=row.get)) for k, row in bits.items() if row},
        "columns": ("", *(f"λ = {weight}" for weight in names)),
        "rows": [
            (METHODS[key].title, *(cell(row, weight) for weight in names))
            for key, row in bits.items()
        ],
        "caption": "Bits per character of validation text; " + caption(args, text),
    }


# ---------------------------------------------------------------------------
# The tables.


def table(runs: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Makes the table of a comparison, with a row for each width and method."""
    groups = {}
    for run in runs:
        groups.setdefault((run["width"], run["method"]), []).append(run)
    mean = lambda key, name: float(np.mean([run[name] for run in groups[key]]))
    rows = []
    for width, method in groups:
        key, gain, weight = (width, method), "", ""
        if method in METHODS:
            alone = min(((width, one) for one in ALONE), key=lambda k: mean(k, "bits"))
            gain = _difference(groups[key], groups[alone])
            weight = f"{groups[key][0]['weight']:g}"
        rows.append(
            (
                METHODS[method].title if method in METHODS else TITLES[method],
                str(width),
                _spread([run["bits"] for run in groups[key]]),
                *(gain, weight),
                *(f"{mean(key, name):.3f}" for name in ("procrustes", "cka")),
                *(f"{mean(key, name):.0f}" for name in ("seconds", "cpu_seconds")),
            )
        )
    return {"columns": COLUMNS, "rows": rows}


ALONE = ("alone", "longer")
COLUMNS = (
    *("", "width", "bits per character", "difference to alone", "λ"),
    *("D_P² to teacher", "1 − CKA to teacher", "seconds", "CPU seconds"),
)
TITLES = {
    "teacher": "teacher",
    "alone": "student alone",
    "longer": "student alone, compute of a distilled run",
}


def _difference(row, alone):
    """Formats the mean difference of bits, paired by seed, with its interval."""
    bits = [{run["seed"]: run["bits"] for run in runs} for runs in (row, alone)]
    found = difference(*bits)
    ends = ", ".join(f"{end:+.3f}" for end in found.interval or ())
    return f"{found.mean:+.3f}" + (f" [{ends}]" if ends else "")


def _spread(values):
    """Formats the mean and, for several values, the standard deviation."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def caption(args: argparse.Namespace, text: Mapping[str, np.ndarray]) -> str:
    """Describes what a table was measured on."""
    digest = hashlib.sha256(b"".join(part.tobytes() for part in text.values()))
    seeds = len(args.seeds)
    return (
        f"{len(text['training']):,} characters of Python "
        f"{platform.python_version()}'s library to train on (SHA-256 of all parts "
        f"{digest.hexdigest()[:12]}); teacher of {args.depth} blocks, "
        f"{args.teacher_steps:,} steps, students of {args.depth // 2}, "
        f"{args.steps:,} steps; {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{jax.devices()[0].platform} ({os.cpu_count()} cores), JAX {jax.__version__}. "
        "All seeds share one teacher. Differences are paired by seed, with a 95 % "
        "interval, and refer to the better of the students alone."
    )


# ---------------------------------------------------------------------------
# The command.

FAST = {
    **{"width": 16, "student_widths": [8], "teacher_steps": 4, "steps": 2},
    **{"batch": 4, "context": 16, "positions": 24, "windows": 8},
}


def _weight(text):
    key, _, number = text.partition("=")
    if key not in METHODS:
        raise argparse.ArgumentTypeError(
            f"{key!r} is not a method; write METHOD=LAMBDA of {', '.join(METHODS)}"
        )
    return key, float(number)


def _add_options(parser):
    number = functools.partial(parser.add_argument, metavar="N", type=int)
    standard, keys = Path(os.__file__).parent, list(METHODS)
    number("--depth", default=4, help="blocks of the teacher, even (%(default)s)")
    number("--width", default=96, help="width of the teacher (%(default)s)")
    number("--student-widths", nargs="+", default=[48], help="widths of students (48)")
    number("--teacher-steps", default=5000, help="updates of the teacher (%(default)s)")
    number("--steps", default=1500, help="updates of a student (%(default)s)")
    number("--batch", default=8, help="windows per step (%(default)s)")
    number("--context", default=64, help="characters per window (%(default)s)")
    number("--positions", default=256, help="characters compared (%(default)s)")
    number("--windows", default=2048, help="windows measured on (%(default)s)")
    number("--seeds", nargs="+", default=[0], help="seeds of students (0)")
    add = parser.add_argument
    add("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    add("--text", type=Path, default=standard, help="folder of *.py (%(default)s)")
    methods = {"nargs": "*", "choices": keys, "default": keys, "metavar": "METHOD"}
    add("--methods", **methods, help=f"all by default: {', '.join(keys)}")
    weights = {"type": _weight, "nargs": "+", "metavar": "METHOD=LAMBDA"}
    add("--weights", **weights, default=[], help="use these lambdas instead")
    grid = {"type": float, "nargs": "+", "metavar": "LAMBDA"}
    add("--choose", **grid, help="compare these lambdas on validation text instead")
    add(
        "--out",
        type=Path,
        help="folder for language.json and language.md, with "
        "--choose language-weights.* (none)",
    )
    add("--fast", action="store_true", help="tiny sizes, for tests only")


def _check(args, error):
    if args.depth < 2 or args.depth % 2:
        error(f"--depth {args.depth}: the student has half; choose an even number")
    for width in (args.width, *args.student_widths):
        if width % HEADS or width < HEADS:
            error(f"width {width}: choose a multiple of the {HEADS} heads")
    for name in ("steps", "teacher_steps", "batch", "context"):
        if vars(args)[name] < 1:
            option = name.replace("_", "-")
            error(f"--{option} {vars(args)[name]}: choose at least 1")
    if not max(args.student_widths) + 1 < args.positions <= args.batch * args.context:
        error(
            f"--positions {args.positions}: choose more than the student's width + 1 "
            f"and at most batch x context = {args.batch * args.context}"
        )
    if min(args.seeds) < 0 or len({*args.seeds}) < len(args.seeds):
        error(f"--seeds {' '.join(map(str, args.seeds))}: name each once, from 0 up")
    if args.windows < args.batch:
        error(f"--windows {args.windows}: choose at least --batch {args.batch}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; an error prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _add_options(parser)
    if parser.parse_known_args(arguments)[0].fast:
        parser.set_defaults(**FAST)
    args = parser.parse_args(arguments)
    _check(args, parser.error)
    return args


def _command(arguments):
    """Returns the command without the folder that it writes to."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    _, rest = parser.parse_known_args(arguments)
    return shlex.join(["python", "experiments/language.py", *rest])


def main(arguments: Sequence[str]) -> None:
    """Runs the experiment, prints its table and writes it."""
    args = parse(arguments)
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"error: --out {args.out}: {error.strerror}") from error
    began = time.perf_counter()
    text = load_text(args.text)
    try:
        results = (choose if args.choose else compare)(args, text)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}; lower its lambda or --lr") from error
    seconds = time.perf_counter() - began, time.process_time()
    results.update(zip(("seconds", "cpu_seconds"), seconds, strict=True))
    results["command"] = _command(arguments)
    say("\n" + report.markdown(results))
    if args.out:
        name = "language-weights" if args.choose else "language"
        (args.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(report.markdown(results))


if __name__ == "__main__":
    main(sys.argv[1:])
