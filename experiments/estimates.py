"""Compares the distance of random batches with the distance of all images."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from risks import Seen
from scipy.spatial.distance import cdist

from kddm_jax import DISTANCES

# Distances of distributions, which a batch estimates from a sample of the features.
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
    """Returns the title of an entry of `ESTIMATES`."""
    key, _ = ESTIMATES[name]
    plain = DISTANCES[key].title
    return plain if name == key else f"{plain}, {name.removeprefix(key).strip()}"


def estimator(name: str, student: Seen, teacher: Seen, labels: np.ndarray) -> Callable:
    """Makes a distance of some images, compiled once for each number of images.

    Args:
      name: a key of `ESTIMATES`.
      student: the student's outputs for the images.
      teacher: the teacher's outputs for the images.
      labels: labels of the images.

    Returns:
      ``f(rows, others, key) -> scalar``, where ``rows`` are the indices of the
      student's images and ``others`` those of the teacher's.
    """
    key_of, options = ESTIMATES[name]
    row = DISTANCES[key_of]
    options = {**dict(row.options), **options}
    if key_of == "jw2":
        # beta = "max" depends on the batch. It is fixed here, so that all batches
        # estimate the same number.
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
            else:  # labels of either side
                of = arrays[kind]
                taken += [z[at] for z, at in zip(of, (rows, others), strict=False)]
        return row.fn(*taken, **options)

    return one


def of_the_same_classes(
    rows: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws another batch with the same labels as a given batch, independently.

    Args:
      rows: indices of the given batch.
      labels: labels of all images.
      rng: random number generator.

    Returns:
      Indices of the new batch, in the order of the labels of the given one.
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
    """Measures every distance on random batches and on all images.

    Args:
      student: the student's outputs for the n images.
      teacher: the teacher's outputs for the n images.
      labels: labels of the images.
      batches: sizes of batches; those of n and more are left out.
      draws: number of batches of each size, drawn without replacement.
      names: keys of `ESTIMATES`.

    Returns:
      A mapping with `SAME`, for batches in which both networks see the same images, as
      in training, and `OTHER`, for batches in which the teacher sees other images of
      the same classes. Each maps a name to ``whole``, the distance of all images
      (averaged over as many keys if the distance takes one), and each size to ``mean``
      and ``spread`` (standard deviation) over draws.
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
    """Divides mean and spread by the whole distance; None if that is zero."""
    if record["whole"] <= 0:
        return None, None
    found = record["batches"][size]
    return found["mean"] / record["whole"], found["spread"] / record["whole"]


def table(bias: Mapping, about: str) -> dict[str, object]:
    """Makes the table of batches relative to all images, for `table.markdown`."""
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
    """Draws mean and spread of every estimate against batch size, on log axes."""
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
