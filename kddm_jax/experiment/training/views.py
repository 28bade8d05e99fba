"""Draws fixed views, so that the teacher runs once for all students.

Every image that students see gets V augmented copies, which are drawn once. Teacher and
student see the same copy. The teacher's outputs are computed once and saved in the
folder of results, under a name that depends on the teacher's digest.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import adapters
from kddm_jax.data import augment
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import Settings
from kddm_jax.experiment.training import models

BATCH = 500


def _outputs(arrays: dict[str, Any]) -> adapters.Outputs:
    logits, features = arrays.pop("logits"), arrays.pop("features")
    return adapters.Outputs(logits, features, arrays)


@dataclass
class Views:
    """Contains fixed views of the students' training images.

    Attributes:
      settings: the settings of the command.
      images: all training images.
      labels: labels of the training images, -1 for unlabelled ones.
      indices: indices of the images that students see, with labels or without.
    """

    settings: Settings
    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @property
    def count(self) -> int:
        """Returns the number of views of each image."""
        return self.settings.data.views or 0

    @cached_property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws the views and their labels; view v of image i is at ``i V + v``."""
        options = asdict(self.settings.augmentation)
        chosen = self.images[self.indices]
        views = augment.fixed_views(chosen, self.count, **options)
        return views, self.labels[np.repeat(self.indices, self.count)]

    @cached_property
    def source(self) -> str:
        """Hashes the images of which these are views."""
        return hashlib.sha256(self.images[self.indices].ravel().data).hexdigest()

    @cached_property
    def drawn(self) -> str:
        """Hashes the views."""
        return hashlib.sha256(self.pair[0].ravel().data).hexdigest()

    def order(self, order: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Draws a view of each image of an epoch and returns the views' indices."""
        position = np.zeros(len(self.images), np.int64)
        position[self.indices] = np.arange(len(self.indices))
        view = np.random.default_rng((seed, epoch, 1)).integers(
            self.count, size=order.shape
        )
        return (position[order] * self.count + view).astype(np.int32)

    def outputs(self, problem, teacher, layers: tuple[str, ...]):
        """Computes the teacher's outputs on all views, or reads the saved outputs."""
        return _outputs(processes.first(lambda: self._kept(problem, teacher, layers)))

    def compute(self, problem, teacher, layers: tuple[str, ...]):
        """Computes the teacher's outputs on all views in this process."""
        return _outputs(self._compute(problem, teacher, layers))

    def _kept(self, problem, teacher, layers):
        path = self._file(problem, teacher, layers)
        if path.exists():
            with np.load(path) as kept:
                return {name: kept[name] for name in kept.files}
        found: Any = self._compute(problem, teacher, layers)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **found)
        os.replace(partial, path)
        return found

    def _file(self, problem, teacher, layers) -> Path:
        """Returns the outputs' file, named by a hash of everything they depend on."""
        options = asdict(self.settings.augmentation)
        if options["smallest_area"] == 1:  # files of version 0.2 do not know the crop
            del options["smallest_area"]
        made = {
            **options,
            "teacher": teacher.digest,
            "dataset": self.settings.data.dataset,
            "dtype": self.settings.networks.dtype,
            "views": self.count,
            "layers": layers,
            "images": self.source,
        }
        digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
        return Path(problem.out) / "teacher-outputs" / f"{digest}.npz"

    def _compute(self, problem, teacher, layers):
        apply = models.network_apply(teacher.model)

        @jax.jit
        def outputs_of(variables, images):
            normal = lambda image: problem.normalize(None, image)
            outputs, _ = apply(variables, jax.vmap(normal)(images), train=False)
            maps = {name: outputs.maps[name] for name in layers}
            found = {"logits": outputs.logits, "features": outputs.features, **maps}
            # NumPy's files do not support bfloat16.
            return jax.tree.map(lambda a: a.astype(jnp.float32), found)

        variables, (images, _) = jax.device_get(teacher.variables), self.pair
        size = min(BATCH, len(images))
        shapes = jax.eval_shape(outputs_of, variables, images[:size])
        needed = sum(s.size * s.dtype.itemsize for s in shapes.values()) / size
        limit = problem.memory / 4
        if needed * len(images) > limit:
            raise UserError(
                f"--views {self.count}: the teacher's outputs take "
                f"{needed * len(images) / 1e9:.1f} GB, a quarter of the memory is "
                f"{limit / 1e9:.1f} GB; lower --views, or compare pooled features"
            )
        parts = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            short = size - len(batch)
            padded = np.pad(batch, ((0, short), (0, 0), (0, 0), (0, 0)))
            found = jax.device_get(outputs_of(variables, padded))
            parts.append({k: v[: size - short] for k, v in found.items()})
        return {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0]
        }
