"""Images per second of training with images on the device against streamed ones.

    python benchmarks/stream.py
    python benchmarks/stream.py --images 50000 --side 224 --stem imagenet

Both run the same compiled steps over the same batches; the streamed ones are gathered
from a memory-mapped file on disk, as those of a set larger than the device.  Epochs
take turns.  Asserts that streaming keeps 90 % of the resident path's speed on a CPU.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from workload import CLASSES, LEARNING_RATE, MEAN, STD

from kddm_jax import augment, resnet, stream, train_step


def make_images(path: Path, count: int, side: int) -> np.ndarray:
    """Random images in a file, mapped."""
    shape = (count, side, side, 3)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    rng = np.random.default_rng(0)
    for start in range(0, count, 1000):
        part = images[start : start + 1000]
        part[...] = rng.integers(0, 256, part.shape, dtype=np.uint8)
    images.flush()
    return np.load(path, mmap_mode="r")


class Training:
    """A network in training; `epoch` runs one and gives its images per second."""

    def __init__(self, args: argparse.Namespace, images: np.ndarray, streamed: bool):
        """Compiles the steps, for images of one dispatch or for all of them."""
        self.args, self.streamed, self.images = args, streamed, images
        self.labels = np.arange(len(images), dtype=np.int32) % CLASSES
        model = resnet.ResNet9(num_classes=CLASSES, stem=args.stem, width=args.width)
        variables = jax.jit(model.init)(
            jax.random.key(0), jnp.zeros((1, args.side, args.side, 3))
        )
        tx = optax.sgd(LEARNING_RATE)
        step = train_step.make_train_step(
            resnet.linen_apply(model),
            None,
            tx,
            augment=augment.make_augment(mean=(MEAN,) * 3, std=(STD,) * 3),
        )
        of_images = 0 if streamed else None
        self.devices = jax.local_devices()[:1]
        self.program = train_step.parallel(
            train_step.scan_steps(step),
            in_axes=(None, None, of_images, of_images, 0),
            donate=(0,),
            devices=self.devices,
        )
        state = train_step.create_state(variables, tx)
        self.state = train_step.replicate(state, self.devices)
        self.resident = None
        if not streamed:
            pair = (np.asarray(images), self.labels)
            self.resident = train_step.replicate(pair, self.devices)

    def inputs(self, rows: np.ndarray):
        """Images, labels and indices of each dispatch."""
        if not self.streamed:
            for shares in rows:
                yield *self.resident, jnp.asarray(shares)
            return
        own = jnp.arange(rows[0].size, dtype=jnp.int32).reshape(rows[0].shape)
        for pair in stream.stream(self.images, self.labels, rows):
            yield *pair, own

    def epoch(self, order: np.ndarray) -> float:
        """Trains on the batches of ``order``."""
        rows = stream.reads(order, length=self.args.steps, shares=range(1), of=1)
        start = time.perf_counter()
        for inputs in self.inputs(rows.astype(np.int32)):
            self.state, metrics = self.program(self.state, None, *inputs)
        jax.block_until_ready(metrics)
        assert bool(np.all(metrics["finite"]))
        return order.size / (time.perf_counter() - start)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpu = jax.default_backend() == "cpu"
    add = parser.add_argument
    add("--images", type=int, default=2560 if cpu else 50_000, help="in the set")
    add("--side", type=int, default=32, help="pixels of a side")
    add("--stem", choices=resnet.STEMS, default="imagenet")
    add("--width", type=int, default=16 if cpu else 64)
    add("--batch-size", type=int, default=128)
    add("--steps", type=int, default=1 if cpu else 10, help="in one dispatch")
    add("--rounds", type=int, default=7, help="epochs of each")
    least = 0.9 if cpu else 0.0
    add("--least", type=float, default=least, help="claimed share of the speed")
    add("--json", help="file for the numbers")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, checks the claim."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder) / "images.npy", args.images, args.side)
        ways = {
            way: Training(args, images, way == "streamed")
            for way in ("resident", "streamed")
        }
        rng = np.random.default_rng(0)
        speeds = {way: [] for way in ways}
        for i in range(args.rounds + 1):
            order = rng.permutation(args.images)
            dispatch = args.batch_size * args.steps
            order = order[: len(order) // dispatch * dispatch]
            order = order.reshape(-1, args.batch_size)
            for way, training in ways.items():
                speed = training.epoch(order)
                if i:  # the first one compiles
                    speeds[way].append(speed)
    ratio = harness.median_of(
        lambda a, b: b / a, speeds["resident"], speeds["streamed"]
    )
    rows = [(way, statistics.median(column)) for way, column in speeds.items()]
    print(harness.markdown(("images", "images/s"), rows))
    print(
        f"\nstreamed/resident {ratio:.3f}; {harness.device_name()}, "
        f"load average {harness.load_average()}, {args.images} images of {args.side} "
        f"pixels, ResNet9 of width {args.width}, {args.stem} stem, batch "
        f"{args.batch_size}"
    )
    report = {"args": vars(args), "speeds": speeds, "ratio": ratio}
    harness.write_json(args.json, {**report, "versions": harness.versions("grain")})
    assert ratio >= args.least, f"keeps {ratio:.0%}, less than {args.least:.0%}"


if __name__ == "__main__":
    main()
