"""Images per second, summed over students, of training several in one program.

    python benchmarks/together.py
    python benchmarks/together.py --networks resnet --students 3 --distance cw2

One after the other, each student pays for its own batch and its own forward pass of the
teacher.  Together they share both: "vmap" makes each operation once for all students,
"loop" one student after the other within one program.  All take turns in one process.
On a CPU, asserts that "loop" pays there.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from workload import CLASSES, LEARNING_RATE, MEAN, STD

from kddm_jax import augment, mlp, resnet, train_step

WAYS = ("one by one", *train_step.TOGETHER)


class Networks(NamedTuple):
    """A teacher, a student, and the side and channels of their images."""

    teacher: Callable[[int], object]
    student: Callable[[int], object]
    image: tuple[int, int, int]


def _resnet(kind, stem):
    return lambda width: kind(num_classes=CLASSES, stem=stem, width=width)


NETWORKS = {
    "mlp": Networks(
        lambda _: mlp.TeacherMLP(), lambda _: mlp.StudentMLP(), (28, 28, 1)
    ),
    "resnet": Networks(
        _resnet(resnet.ResNet34, "imagenet"),
        _resnet(resnet.ResNet18, "imagenet"),
        (32, 32, 3),
    ),
    "resnet-cifar": Networks(
        _resnet(resnet.ResNet34, "cifar"),
        _resnet(resnet.ResNet18, "cifar"),
        (32, 32, 3),
    ),
}


class Training:
    """Students in training; a call makes a dispatch of all of them and waits."""

    def __init__(self, networks: Networks, way: str, count: int, args):
        """Compiles the steps of ``count`` students and runs them once."""
        teacher, student = (net(args.width) for net in networks[:2])
        height, width, channels = networks.image
        rng = np.random.default_rng(0)
        shape = (1024, *networks.image)
        images = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
        labels = jnp.asarray(np.arange(len(images)) % CLASSES)
        index = rng.integers(0, len(images), (args.steps, args.batch_size))
        init = lambda model, seed: jax.jit(model.init)(
            jax.random.key(seed), jnp.zeros((1, height, width, channels))
        )
        tx = optax.sgd(LEARNING_RATE, momentum=0.9)
        step = train_step.make_train_step(
            resnet.linen_apply(student),
            resnet.linen_apply(teacher),
            tx,
            augment=augment.make_augment(
                mean=(MEAN,) * channels, std=(STD,) * channels, dtype=args.dtype
            ),
            distance=args.distance,
            axis_name=None,
            together=None if way == WAYS[0] else way,
        )
        states = [
            train_step.create_state(init(student, i), tx, weight=1e-4 * (i + 1))
            for i in range(count)
        ]
        if way != WAYS[0]:
            states = [train_step.stack_states(states)]
        self.states = states
        self.rest = (init(teacher, 100), images, labels, jnp.asarray(index))
        scanned = jax.jit(train_step.scan_steps(step), donate_argnums=0)
        self.run = scanned.lower(states[0], *self.rest).compile()
        self.seen = count * index.size
        self()

    def __call__(self) -> None:
        """Every student's steps."""
        made = [self.run(state, *self.rest) for state in self.states]
        self.states = [state for state, _ in made]
        for _, metrics in made:
            assert bool(np.all(metrics["finite"]))


def measure(name: str, count: int, args: argparse.Namespace) -> list[dict]:
    """A row per way, for ``count`` students of a pair of networks."""
    ways = {way: Training(NETWORKS[name], way, count, args) for way in WAYS}
    seconds = harness.interleaved(ways, args.rounds)
    rows = []
    for way, training in ways.items():
        speeds = [training.seen / taken for taken in seconds[way]]
        gain = harness.median_of(lambda a, b: a / b, seconds[WAYS[0]], seconds[way])
        row = {"networks": name, "students": count, "way": way}
        row.update(images_per_s=statistics.median(speeds), gain=gain)
        rows.append(row)
    return rows


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpu = jax.default_backend() == "cpu"
    names = ["mlp", "resnet"] if cpu else ["mlp", "resnet", "resnet-cifar"]
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=names)
    add("--students", type=int, nargs="+", default=[3] if cpu else [3, 8])
    add("--distance", default="cw2_gaussian", help="a row of the catalogue")
    add("--width", type=int, default=16 if cpu else 64, help="of ResNets")
    add("--batch-size", type=int, default=128)
    add("--dtype", default="float32" if cpu else "bfloat16")
    add("--steps", type=int, default=1 if cpu else 10, help="in one dispatch")
    add("--rounds", type=int, default=9)
    least = 1.0 if cpu else 0.0
    add("--least", type=float, default=least, help='claimed gain of "loop"')
    add("--json", help="file for the numbers")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, checks the claim."""
    args = parse_args()
    harness.parse_distance(args.distance)
    rows = []
    for name in args.networks:
        for count in args.students:
            rows += measure(name, count, args)
    print(
        harness.markdown(
            ("networks", "students", "way", "images/s x students", "gain"),
            [list(row.values()) for row in rows],
        )
    )
    print(
        f"\n{harness.device_name()}, load average {harness.load_average()}, batch "
        f"{args.batch_size}, ResNets of width {args.width}, {args.distance}, "
        f"{args.dtype}; gain: median over rounds of the time one by one over the time."
    )
    report = {"args": vars(args), "device": harness.device_name(), "rows": rows}
    harness.write_json(args.json, {**report, "versions": harness.versions("optax")})
    slow = [row for row in rows if row["way"] == "loop" and row["gain"] < args.least]
    assert not slow, f"gains under {args.least}: {slow}"


if __name__ == "__main__":
    main()
