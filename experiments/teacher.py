"""The teacher: trained by this command, or given as a checkpoint."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import runs
from settings import UserError

from kddm_jax import checkpoint, resnet, train_step


@dataclass(frozen=True)
class Teacher:
    """A trained network that students follow.

    Attributes:
      model: the network.
      width: its width.
      variables: on the devices.
      digest: of its arrays: students of another teacher are other runs.
      accuracy: on the evaluation images, in percent.
      result: of its run, None for a given checkpoint.
    """

    model: resnet.ResNet
    width: int
    variables: object
    digest: str
    accuracy: float
    result: dict[str, object] | None


def _variables_of(problem, path, model):
    """Parameters and statistics of a run's checkpoint, whatever its optimiser."""
    arrays, meta = checkpoint.restore_arrays(path)
    like = problem.init(model, 0)
    found = {k: arrays.get(k, {}) for k in ("params", "batch_stats")}
    return checkpoint.match(path, found, like), meta


def _digest(variables):
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(key).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, from its own folder, a run's, or one of checkpoints."""
    if (path / "meta.json").exists():
        return path
    for folder in (path / "checkpoints", path):
        found = checkpoint.latest(folder)
        if found is not None:
            return found
    raise UserError(
        f"no checkpoint in {path}; pass a run's folder (such as "
        "runs/digits-laptop/teacher/seed0), or leave --teacher out to train one"
    )


def teacher_shape(problem: runs.Problem) -> tuple[str, int, Path | None]:
    """Architecture and width of the teacher, and its checkpoint if one is given."""
    settings = problem.settings
    if settings.teacher is None:
        return settings.teacher_model, settings.teacher_width or settings.width, None
    path = find_checkpoint(settings.teacher)
    checkpoint.verify(path)
    made = checkpoint.read_meta(path).get("run", {})
    if made.get("dataset") != settings.dataset:
        raise UserError(
            f"--teacher {path} was trained on {made.get('dataset')}, "
            f"this run is on {settings.dataset}; pass a teacher of the same data"
        )
    if settings.held_out and made.get("held_out") != settings.held_out:
        raise UserError(
            f"--held-out {settings.held_out}: --teacher {path} was trained with "
            f"held_out={made.get('held_out')} and may have seen these images; "
            "train one with the same --held-out"
        )
    if made.get("stem") != settings.stem:
        raise UserError(
            f"--teacher {path} has the {made.get('stem')} stem; pass "
            f"--stem {made.get('stem')}"
        )
    model = made.get("teacher_model") or made.get("student_model")
    return model, made["width"], path


def known_digest(problem: runs.Problem) -> str:
    """Digest of the teacher to come, where it is trained already."""
    name, width, path = teacher_shape(problem)
    if path is None:
        folder = runs.teacher_run(problem).folder(problem.out)
        if not (folder / "result.json").exists():
            return "not trained yet"
        path = find_checkpoint(folder)
    variables, _ = _variables_of(problem, path, problem.model(name, width))
    return _digest(variables)


def load_teacher(problem: runs.Problem, report) -> Teacher:
    """Trains the teacher, or takes the checkpoint that was given."""
    name, width, path = teacher_shape(problem)
    model, result = problem.model(name, width), None
    if path is None:
        run = runs.teacher_run(problem)
        result = runs.train(problem, run, model, None, report)
        path = find_checkpoint(run.folder(problem.out))
    variables, _ = _variables_of(problem, path, model)
    replicated = train_step.replicate(variables, problem.devices)
    accuracy = runs.evaluate(problem, model, replicated)
    return Teacher(model, width, replicated, _digest(variables), accuracy, result)
