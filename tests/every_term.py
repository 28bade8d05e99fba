"""Defines a loss of one student with every catalogue entry and solver as its terms."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import DISTANCES, Bank, Term, distill_loss
from kddm_jax.distances import get_distance

N, D, K = 16, 6, helpers.NUM_CLASSES
BATCH = helpers.make_batch(N, D).map(np.float32)
FIELDS = (*helpers.FLOATS, "labels")
ARRAYS = {name: np.asarray(getattr(BATCH, name)) for name in FIELDS}
PARAMS = {
    "scale": np.linspace(-0.2, 0.3, D, dtype=np.float32),
    "bias": np.linspace(0.5, -0.5, K, dtype=np.float32),
}

# Rows that are no samples hold NaN; of two devices, one has fewer samples.
MASK = np.arange(N) % 5 != 1
MASK[:3] = False


def _spoilt(array):
    kept = MASK.reshape(-1, *[1] * (array.ndim - 1))
    nothing = 99 if array.dtype.kind == "i" else np.nan
    return np.where(kept, array, nothing).astype(array.dtype)


M = 20
BANK = Bank(
    np.random.default_rng(4).normal(size=(M, D)).astype(np.float32),
    np.arange(M, dtype=np.int32) % (K - 1),
    np.linspace(0.5, 2, M, dtype=np.float32),
)
MASKED = {name: _spoilt(array) for name, array in ARRAYS.items()}
MASKED["mask"] = MASK.astype(np.float32)

SOLVERS = ("entropic", "exact")  # the default is "sinkhorn"
OPTIONS = (
    *(
        (name, {"solver": solver})
        for name in ("w2", "cw2", "jw2")
        for solver in SOLVERS
    ),
    ("w2", {"solver": "exact", "pairing": 0.1}),
    ("jw2", {"label_cost": "kl"}),
    *((name, {"covariance": "diag"}) for name in ("w2_gaussian", "cw2_gaussian")),
    *((name, {"method": "newton_schulz"}) for name in ("w2_gaussian", "procrustes")),
    ("cw2_gaussian", {"method": "newton_schulz"}),
    *((name, {"covariance": "full"}) for name in ("kl_gaussian", "ckl_gaussian")),
    *((name, {"kernel": "linear"}) for name in ("cmmd_rbf", "nst")),
    ("nst", {"kernel": "rbf"}),
    ("gromov_w2", {"metric": "sqeuclidean"}),
    ("cka", {"debiased": True}),
    *(
        (name, {"compat": "released"})
        for name in ("pkt", "rkd_distance", "rkd_angle", "attention", "dct", "dist")
    ),
    ("dct", {"frequencies": 2}),
    ("wkd_logits", {"iterations": 3}),
    ("wkd_features", {"grid": 2}),
)
TERMS = {
    **{
        name: Term(name, options=helpers.options_of(DISTANCES[name]))
        for name in DISTANCES
    },
    **{
        f"{name} {options}": Term(
            name, options={**helpers.options_of(DISTANCES[name]), **options}
        )
        for name, options in OPTIONS
    },
    "teacher": Term("mmd_linear", normalization="teacher"),
    "each": Term("w2_gaussian", layers=("maps", "maps"), positions="each"),
    "pool": Term("gram", layers=("maps", "maps")),
    "logits": Term("mmd_rbf", layers=("logits", "logits")),
    "bank": Term("cw2", bank="bank", normalization="unit"),
    "bank of moments": Term("cw2_gaussian", bank="bank"),
}


def loss_of(term, params, arrays, **options):
    """Returns the loss of a student with two parameters, and its terms."""
    layers = {}
    for side in "xy":
        maps = arrays[f"maps_{side}"]
        named = get_distance(term.distance).inputs
        layers[side] = {"features": maps if "maps" in named else arrays[side]}
        layers[side]["maps"] = maps
    row = lambda a, z: a.reshape(*[1] * (z.ndim - 1), -1)
    bent = lambda z: z + row(params["scale"], z) * jnp.tanh(z)
    return distill_loss(
        jax.tree.map(bent, layers["x"]),
        layers["y"],
        arrays["labels"],
        arrays["logits_x"] + row(params["bias"], arrays["logits_x"]),
        arrays["logits_y"],
        distance=term,
        weight=0.5,
        teacher_data={**helpers.teacher_data(K, D), "bank": BANK},
        key=jax.random.key(3),
        mask=arrays.get("mask"),
        **options,
    )
