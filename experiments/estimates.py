"""What a batch says of a distance between all images: its mean and its spread."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from risks import Seen
from scipy.spatial.distance import cdist

from kddm_jax import DISTANCES

# Rows that estimate a distance of the features' distributions from a sample of them.
ESTIMATES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "w2 exact": ("w2", {"solver": "exact"}),
    **{
        name: (name, {})
        for name in (
            *("w2", "cw2", "jw2", "w2_gaussian", "cw2_gaussian"),
            *("kl_gaussian", "ckl_gaussian", "mmd_linear", "mmd_rbf", "cmmd_rbf"),
            "sliced_w2",
        )
    },
}


def title_of(name: str) -> str:
    """Of a row of `ESTIMATES`."""
    key, _ = ESTIMATES[name]
    plain = DISTANCES[key].title
    return plain if name == key else f"{plain}, {name.removeprefix(key).strip()}"


def estimator(name: str, student: Seen, teacher: Seen, labels: np.ndarray) -> Callable:
    """A distance as a function of the rows that it sees, compiled for each number.

    Args:
      name: a key of `ESTIMATES`.
      student: the student's outputs for the images.
      teacher: likewise.
      labels: labels of the images.

    Returns:
      ``f(rows, others, key) -> scalar``: the student sees rows, the teacher others.
    """
    key_of, options = ESTIMATES[name]
    row = DISTANCES[key_of]
    options = {**dict(row.options), **options}
    if key_of == "jw2":
        # beta = "max" is of the batch: fixed, so that all estimate one number.
        apart = cdist(student.features, teacher.features, "sqeuclidean")
        options["beta"] = float(apart.max())
    arrays = {
        "features": (student.features, teacher.features),
        "logits": (student.logits, teacher.logits),
        "labels": (labels,),
    }
    arrays = {kind: tuple(map(jnp.asarray, of)) for kind, of in arrays.items()}

    @jax.jit
    def one(rows, others, key):
        taken = []
        for kind in row.inputs:
            if kind == "key":
                taken.append(key)
            else:  # labels are those of either
                of = arrays[kind]
                taken += [z[at] for z, at in zip(of, (rows, others), strict=False)]
        return row.fn(*taken, **options)

    return one


def of_the_same_classes(
    rows: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws another batch, independently, with the labels of a first.

    Args:
      rows: indices of the first.
      labels: labels of all images.
      rng: draws.

    Returns:
      Its rows; label by label those of the first.
    """
    others = np.empty_like(rows)
    for label in np.unique(labels[rows]):
        mine = labels[rows] == label
        (known,) = np.nonzero(labels == label)
        others[mine] = rng.choice(known, mine.sum(), replace=False)
    return others


SAME, OTHER = "same images", "other images"


def of_batches(
    student: Seen,
    teacher: Seen,
    labels: np.ndarray,
    *,
    batches: Sequence[int],
    draws: int,
    names: Sequence[str] = tuple(ESTIMATES),
) -> dict[str, dict[str, object]]:
    """Every distance on random batches, and on all images.

    Args:
      student: the student's outputs for the n images.
      teacher: likewise.
      labels: labels of the images.
      batches: their sizes; those of n and more are left out.
      draws: batches of each size, without replacement within one.
      names: keys of `ESTIMATES`.

    Returns:
      For batches in which both networks see the `SAME` images, as in training, and for
      those in which the teacher sees `OTHER` images of the same classes: by name
      ``whole``, the distance on all images (over as many keys, where the row takes
      one), and by size ``mean`` and ``spread`` (standard deviation) over draws.
    """
    n = len(labels)
    rng = np.random.default_rng(0)
    drawn = {SAME: {}, OTHER: {}}
    for size in (size for size in batches if size < n):
        rows = [rng.choice(n, size, replace=False) for _ in range(draws)]
        drawn[SAME][str(size)] = [(one, one) for one in rows]
        drawn[OTHER][str(size)] = [
            (one, of_the_same_classes(one, labels, rng)) for one in rows
        ]
    keys = [jax.random.key(i) for i in range(draws)]
    found = {SAME: {}, OTHER: {}}
    for name in names:
        fn = estimator(name, student, teacher, labels)
        takes_key = "key" in DISTANCES[ESTIMATES[name][0]].inputs
        every = np.arange(n)
        whole = [fn(every, every, key) for key in keys[: draws if takes_key else 1]]
        for kind, by_size in drawn.items():
            record = {"whole": float(np.mean(whole)), "batches": {}}
            for size, pairs in by_size.items():
                values = [
                    float(fn(*pair, key)) for pair, key in zip(pairs, keys, strict=True)
                ]
                spread = float(np.std(values, ddof=1)) if draws > 1 else 0.0
                mean = float(np.mean(values))
                record["batches"][size] = {"mean": mean, "spread": spread}
            found[kind][name] = record
    return found


def relative(record: Mapping, size: str) -> tuple[float | None, float | None]:
    """Mean and spread of a size, of the whole; None where the whole is nothing."""
    if record["whole"] <= 0:
        return None, None
    found = record["batches"][size]
    return found["mean"] / record["whole"], found["spread"] / record["whole"]


def table(bias: Mapping, about: str) -> dict[str, object]:
    """Batches relative to all images as a table of `table.markdown`."""
    sizes = list(next(iter(bias.values()))["batches"])
    rows = []
    for name, record in bias.items():
        cells = []
        for size in sizes:
            mean, spread = relative(record, size)
            known = mean is not None
            cells.append(f"{mean:.3g} ± {spread:.2g}" if known else "–")
        rows.append((title_of(name), f"{record['whole']:.3g}", *cells))
    columns = ("", "all images", *(f"batch {size}" for size in sizes))
    return {"columns": columns, "rows": rows, "caption": about}


def draw(axes, bias):
    """Mean and spread of every estimate against the size of the batch, on log axes."""
    for i, (name, of) in enumerate(bias.items()):
        sizes = [size for size in of["batches"] if relative(of, size)[0] is not None]
        if not sizes:
            continue
        mean, spread = zip(*(relative(of, size) for size in sizes), strict=True)
        wide = [int(size) * 1.02 ** (i - len(bias) / 2) for size in sizes]  # apart
        axes.errorbar(
            *(wide, mean, spread),
            label=title_of(name),
            linestyle=("-", "--")[i // 10],
            linewidth=1,
            elinewidth=0.4,
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    ticks = [int(size) for size in next(iter(bias.values()))["batches"]]
    axes.set(xscale="log", yscale="log", xlabel="batch", ylim=(0.3, 30))
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
