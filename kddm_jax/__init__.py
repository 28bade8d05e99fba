"""Knowledge distillation through distribution matching, in JAX."""

from kddm_jax.distances import (
    DISTANCES,
    Distance,
    bures,
    class_gaussian_kl,
    class_gaussian_wasserstein,
    class_mmd,
    class_wasserstein,
    gaussian_kl,
    gaussian_wasserstein,
    joint_wasserstein,
    mmd,
    paired_l2,
    wasserstein,
)
from kddm_jax.losses import Term, distill_loss

__version__ = "0.1.0"

__all__ = [
    "DISTANCES",
    "Distance",
    "Term",
    "bures",
    "class_gaussian_kl",
    "class_gaussian_wasserstein",
    "class_mmd",
    "class_wasserstein",
    "distill_loss",
    "gaussian_kl",
    "gaussian_wasserstein",
    "joint_wasserstein",
    "mmd",
    "paired_l2",
    "wasserstein",
]
