"""Knowledge distillation through distribution matching, in JAX."""

from kddm_jax.distances import (
    DISTANCES,
    Distance,
    class_mmd,
    class_wasserstein,
    gromov_wasserstein,
    joint_wasserstein,
    mmd,
    paired_l2,
    sliced_wasserstein,
    wasserstein,
)
from kddm_jax.families.alignment import (
    cka,
    feature_gram,
    linear_projection,
    nst,
    procrustes,
    similarity_preserving,
    wkd_features,
)
from kddm_jax.families.gaussian import (
    bures,
    class_gaussian_kl,
    class_gaussian_wasserstein,
    gaussian_kl,
    gaussian_wasserstein,
)
from kddm_jax.families.logits import class_cost_cka, kd, wkd_logits
from kddm_jax.losses import Term, distill_loss

__version__ = "0.1.0"

__all__ = [
    "DISTANCES",
    "Distance",
    "Term",
    "bures",
    "cka",
    "class_cost_cka",
    "class_gaussian_kl",
    "class_gaussian_wasserstein",
    "class_mmd",
    "class_wasserstein",
    "distill_loss",
    "feature_gram",
    "gaussian_kl",
    "gaussian_wasserstein",
    "gromov_wasserstein",
    "joint_wasserstein",
    "kd",
    "linear_projection",
    "mmd",
    "nst",
    "paired_l2",
    "procrustes",
    "similarity_preserving",
    "sliced_wasserstein",
    "wasserstein",
    "wkd_features",
    "wkd_logits",
]
