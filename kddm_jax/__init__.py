"""Knowledge distillation through distribution matching, in JAX.

Public names are imported when they are first used: the command ``kddm`` must set the
environment of NumPy and JAX before these are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kddm_jax.alignment import (
        cka,
        feature_gram,
        linear_projection,
        nst,
        procrustes,
        similarity_preserving,
        wkd_features,
    )
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
    from kddm_jax.gaussian import (
        bures,
        class_gaussian_kl,
        class_gaussian_wasserstein,
        gaussian_kl,
        gaussian_wasserstein,
    )
    from kddm_jax.logits import class_cost_cka, kd, wkd_logits
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

_MODULES = ("losses", "distances", "gaussian", "logits")  # that have the public names


def __getattr__(name: str):
    if name in __all__:
        modules = (import_module(f"{__name__}.{module}") for module in _MODULES)
        value = next(vars(m)[name] for m in modules if name in vars(m))
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
