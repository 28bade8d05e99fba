"""Loads image data sets as ``uint8`` arrays, and draws subsets of them.

``load("digits")`` needs no file; see `kddm_jax.data.loading` for the other sets and the
folders that are searched. Augmentation (`kddm_jax.data.augment`) and streaming
(`kddm_jax.data.stream`) are imported by their own names.
"""

from kddm_jax.data.dataset import DataError, Dataset
from kddm_jax.data.loading import DATASETS, load
from kddm_jax.data.sampling import balanced_subset, stratified_split

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "balanced_subset",
    "load",
    "stratified_split",
]
