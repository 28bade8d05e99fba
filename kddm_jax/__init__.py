"""Knowledge distillation through distribution matching, in JAX.

Public names are imported when they are first used: the command ``kddm`` must set the
environment of NumPy and JAX before these are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kddm_jax.distances import (
        DISTANCES,
        Distance,
        attention_dct,
        attention_transfer,
        bures,
        cka,
        class_cost_cka,
        class_gaussian_kl,
        class_gaussian_wasserstein,
        class_mmd,
        class_wasserstein,
        contrastive,
        dist,
        dkd,
        feature_gram,
        gaussian_kl,
        gaussian_wasserstein,
        gromov_wasserstein,
        joint_wasserstein,
        jsd,
        kd,
        kdpp,
        linear_projection,
        mmd,
        nst,
        paired_l2,
        pkt,
        procrustes,
        rkd_angle,
        rkd_distance,
        similarity_preserving,
        sliced_wasserstein,
        wasserstein,
        wkd_features,
        wkd_logits,
    )
    from kddm_jax.losses import Bank, Term, distill_loss

__version__ = "0.2.0"

__all__ = [
    "Bank",
    "DISTANCES",
    "Distance",
    "Term",
    "attention_dct",
    "attention_transfer",
    "bures",
    "cka",
    "class_cost_cka",
    "class_gaussian_kl",
    "class_gaussian_wasserstein",
    "class_mmd",
    "class_wasserstein",
    "contrastive",
    "dist",
    "distill_loss",
    "dkd",
    "feature_gram",
    "gaussian_kl",
    "gaussian_wasserstein",
    "gromov_wasserstein",
    "joint_wasserstein",
    "jsd",
    "kd",
    "kdpp",
    "linear_projection",
    "mmd",
    "nst",
    "paired_l2",
    "pkt",
    "procrustes",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "sliced_wasserstein",
    "wasserstein",
    "wkd_features",
    "wkd_logits",
]

_LOSSES = ("Bank", "Term", "distill_loss")  # the rest are names of `distances`


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{'losses' if name in _LOSSES else 'distances'}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
