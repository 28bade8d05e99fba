"""Seconds that loading takes, and images per second that are read while training.

    python benchmarks/data.py --data-dir DIR

``DIR`` has the unpacked binary CIFAR-10.  From it are made, in a temporary folder, an
archive like the official one and a folder of 60,000 PNG files of 32 x 32 pixels.  Each
is loaded a first time and then again, with its files in the system's memory.  Then the
PNG folder's memory-mapped images are streamed, as those of a set larger than the
device.  With all of CIFAR-10 it asserts

- the archive again in 1.5 s at most;
- the folder in 60 s at most the first time, again in 2 s at most;
- 20,000 streamed images a second at least, three times what the fastest network of the
  experiments trains on.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
from PIL import Image

from kddm_jax import data
from kddm_jax.data import stream

ARCHIVED = "cifar-10-batches-bin"
LIMITS = {("archive", "again"): 1.5, ("png", "first"): 60.0, ("png", "again"): 2.0}
STREAMED, BATCH = 20_000, 128  # images a second, at least; images of a step
ROUNDS = 3  # loads "again"; the median counts


def write_archive(source: Path, folder: Path) -> None:
    """An archive like the official one."""
    folder.mkdir()
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        archive.add(source / ARCHIVED, ARCHIVED)


def write_pngs(dataset: data.Dataset, folder: Path, images: int | None) -> None:
    """Images as files, in the layout of the data set ``folder``."""
    for split, pixels, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        for name in dataset.class_names:
            (folder / split / name).mkdir(parents=True)
        grey = pixels.shape[-1] == 1
        for i, label in enumerate(labels[:images]):
            path = folder / split / dataset.class_names[label] / f"{i:05}.png"
            Image.fromarray(pixels[i, ..., 0] if grey else pixels[i]).save(path)


def measure(source: str, name: str, folder: Path) -> list[dict[str, object]]:
    """Rows of the first load and of those after it."""
    rows = []
    for load in ("first", *["again"] * ROUNDS):
        start, cpu = time.perf_counter(), time.process_time()
        loaded = data.load(name, data_dir=folder)
        rows.append(
            {
                "source": source,
                "load": load,
                "images": len(loaded.train_labels) + len(loaded.test_labels),
                "seconds": time.perf_counter() - start,
                "cpu": time.process_time() - cpu,
            }
        )
    again = rows[1] | {
        key: statistics.median(row[key] for row in rows[1:])
        for key in ("seconds", "cpu")
    }
    return [rows[0], again]


def streamed(dataset: data.Dataset) -> float:
    """Images per second of an epoch of shuffled batches, the best of `ROUNDS`."""
    order = np.random.default_rng(0).permutation(len(dataset.train_labels))
    batch = min(BATCH, len(order))
    order = order[: len(order) // batch * batch].reshape(-1, batch)
    rows = stream.reads(order, length=1, shares=range(1), of=1)
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in stream.stream(dataset.train_images, dataset.train_labels, rows):
            pass
        seconds.append(time.perf_counter() - start)
    return order.size / min(seconds)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default="cifar10", help="another one has no archive row")
    add("--data-dir", type=Path, metavar="DIR", help="with its files")
    add("--images", type=int, metavar="N", help="PNG files of each split, not all")
    add("--json", metavar="FILE", help="write the rows there too")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, checks the claims."""
    args = parse_args()
    rows = measure(args.dataset, args.dataset, args.data_dir)
    with tempfile.TemporaryDirectory(prefix="kddm-jax-data-") as temporary:
        work = Path(temporary)
        if args.data_dir and (args.data_dir / ARCHIVED).is_dir():
            write_archive(args.data_dir, work / "archive")
            rows += measure("archive", args.dataset, work / "archive")
        dataset = data.load(args.dataset, data_dir=args.data_dir)
        write_pngs(dataset, work / "png", args.images)
        rows += measure("png", "folder", work / "png")
        speed = streamed(data.load("folder", data_dir=work / "png"))

    columns = ("source", "load", "images", "seconds", "cpu")
    print(f"{harness.device_name()}; load average {harness.load_average()}\n")
    print(harness.markdown(columns, [[row[c] for c in columns] for row in rows]))
    print(f"\nstreamed: {speed:,.0f} images/s")
    report = {"device": harness.device_name(), "rows": rows, "streamed": speed}
    harness.write_json(args.json, report)
    if args.images or args.dataset != "cifar10":
        print("\nClaims not asserted: other images.")
        return
    limits = [(row, LIMITS.get((row["source"], row["load"]), 1e99)) for row in rows]
    broken = [row for row, limit in limits if row["seconds"] > limit]
    assert not broken, f"claims that failed: {broken}"
    assert speed >= STREAMED, f"{speed:,.0f} images/s, fewer than {STREAMED:,}"
    print("\nAll claims hold.")


if __name__ == "__main__":
    main()
