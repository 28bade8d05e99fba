"""Finds the teacher: a given checkpoint, a run of this command, or a file of either."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kddm_jax import checkpoint, train_step
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.training import (
    models,
    problems,
    runs,
    statistics,
    stored,
    train,
)
from kddm_jax.experiment.training.train import Teacher
from kddm_jax.networks.projectors import without_projectors


def variables_of(problem: problems.Problem, path: Path, model: models.Network):
    """Reads parameters and statistics of a run's checkpoint, without its optimizer."""
    arrays, _ = checkpoint.restore_arrays(path)
    like = problem.init(model, 0)
    found = {k: arrays.get(k, {}) for k in ("params", "batch_stats")}
    return checkpoint.match(path, without_projectors(found), like)


def _digest(variables):
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(key).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def find_checkpoint(path: Path) -> Path:
    """Finds the checkpoint in a checkpoint's folder, a run's, or one of checkpoints."""
    found = checkpoint.find(path)
    if found is None:
        raise UserError(
            f"no checkpoint in {path}; pass a run's folder (such as "
            "runs/digits-laptop/teacher/seed0), or leave --teacher out to train one"
        )
    return found


@dataclass(frozen=True)
class Source:
    """Describes the origin of the teacher, whose arrays are read and hashed once.

    Attributes:
      problem: the data, the devices and the settings.
      name: name of the teacher's network, as in ``--teacher-model``.
      model: the network.
      width: width of the network.
      given: the checkpoint of ``--teacher``; None if this command trains the teacher.
    """

    problem: problems.Problem
    name: str
    model: models.Network
    width: int
    given: Path | None

    @property
    def _folder(self) -> Path:
        return runs.teacher_run(self.problem).folder(self.problem.out)

    @property
    def finished(self) -> bool:
        """Returns whether the run has a result."""
        return processes.first((self._folder / "result.json").exists)

    @property
    def trained(self) -> bool:
        """Returns whether there is a checkpoint of the fully trained teacher."""
        if self.given is not None or not self.finished:
            return self.given is not None
        return processes.first(self._complete)

    def _complete(self):
        meta: Any = checkpoint.read_meta(self._checkpoint())
        return len(meta["history"]) == self.problem.settings.optimizer.teacher_epochs

    def _checkpoint(self):
        """Finds the checkpoint of the finished run."""
        found = checkpoint.find(self._folder)
        if found is None:
            raise UserError(
                f"the teacher of {self._folder} is finished, but its checkpoints are "
                "gone; restore them, or choose another --out"
            )
        return found

    def forget_result(self) -> None:
        """Deletes the result, so that the run continues from its checkpoint."""
        result = self._folder / "result.json"
        processes.first(lambda: result.unlink(missing_ok=True))

    @cached_property
    def variables(self):
        """Reads the variables of the given checkpoint or the finished run."""

        def read():
            path = self.given or self._checkpoint()
            return variables_of(self.problem, path, self.model)

        return processes.first(read)

    @cached_property
    def digest(self) -> str:
        """Hashes the variables, because students of another teacher are other runs."""
        return _digest(self.variables)


@dataclass(frozen=True)
class Stored:
    """Describes a file made from a teacher, which takes the teacher's place.

    Attributes:
      given: the file.
      about: description of the teacher.
      model: None, because there is no network.
      trained: True, because there is nothing to train.
    """

    given: Path
    about: Mapping[str, Any]
    model: None = None
    trained: bool = True

    @property
    def digest(self) -> str:
        """Returns the digest of the teacher, from which the file was made."""
        return self.about["teacher"]


def _check_data(problem, file, about):
    """Checks that a file is of this data and contains none that is held out."""
    settings = problem.settings
    classes = [str(name) for name in problem.dataset.class_names]
    if about["dataset"] != settings.data.dataset or about["classes"] != classes:
        raise UserError(
            f"{file} is of {about['dataset']} with {len(about['classes'])} classes, "
            f"this data is {settings.data.dataset} with {len(classes)}; pass a file of "
            "the same data"
        )
    kept, wanted = about["held_out"], settings.data.held_out
    if wanted and settings.run.teacher_saw_held_out:
        return
    if wanted and kept != wanted:
        raise UserError(
            f"--held-out {wanted}: {file} was made with held_out={kept} and may "
            f"contain these images; make a file with --held-out {wanted}, or pass "
            "--teacher-saw-held-out"
        )
    if kept != wanted:
        raise UserError(
            f"{file} was made with --held-out {kept} and has the teacher's accuracy on "
            "these images, not on test images; make a file without --held-out"
        )
    measured, here = about["eval_images"], len(problem.parts.eval_labels)
    if measured != here:
        raise UserError(
            f"{file} has the teacher's accuracy on {measured} test images, students "
            f"are evaluated on {here}; pass --test-images {measured}, or make a file "
            f"with --test-images {here}"
        )


def _find_statistics(problem, path):
    content = processes.first(lambda: np.frombuffer(statistics.load(path), np.uint8))
    found = statistics.parse(path, np.asarray(content).tobytes())
    file, about = f"--teacher-statistics {path}", found.about
    _check_data(problem, file, about)
    made, asked = about["normalization"], problem.settings.method.normalization
    if made != asked:
        raise UserError(
            f"{file} was made with --normalization {made}, this command says {asked}; "
            f"pass --normalization {made}, or make another file"
        )
    problem.statistics = found
    return Stored(path, about)


def _check_outputs(problem, path, found):
    """Checks that outputs fit the data and the views."""
    _check_data(problem, f"{stored.OPTION} {path}", found.about)
    stored.check_views(path, problem.views, found)


def _find_outputs(problem, path):
    content: Any = processes.first(lambda: stored.load(path))
    found = stored.parse(path, content)
    processes.together(lambda: _check_outputs(problem, path, found))
    problem.outputs = found
    return Stored(path, found.about)


def _check_converted(problem, path, meta):
    """Checks the shapes of converted weights, whose data set is not known."""
    for what, wanted in {
        "num_classes": problem.num_classes,
        "channels": problem.channels,
    }.items():
        if meta[what] != wanted:
            raise UserError(
                f"--teacher {path} has {what}={meta[what]}, this data has {wanted}; "
                "fine-tune these weights instead: --pretrained-teacher "
                f"{meta['converted_from']}"
            )


def _check_epochs(path, given, meta):
    """Refuses a run that has not ended, unless its checkpoint is given itself."""
    made, history = meta.get("run", {}), meta.get("history")
    epochs = made.get("teacher_epochs") or made.get("epochs")
    if None not in (epochs, history) and len(history) != epochs and path != given:
        raise UserError(
            f"--teacher {given} was trained for {len(history)} of {epochs} epochs; run "
            f"its command to the end, or pass the checkpoint itself: --teacher {path}"
        )


def find_teacher(problem: problems.Problem) -> Source | Stored:
    """Finds the teacher's architecture, width and, if given, its checkpoint.

    If there are statistics or outputs of a teacher, they are read instead.
    """
    settings = problem.settings
    if (path := settings.networks.teacher_statistics) is not None:
        return _find_statistics(problem, path)
    if (path := settings.networks.teacher_outputs) is not None:
        return _find_outputs(problem, path)
    given = settings.networks.teacher
    if given is None:
        name, width = settings.networks.teacher_model, problem.teacher_width
        return Source(problem, name, problem.model(name, width), width, None)
    path = Path(processes.first(lambda: str(find_checkpoint(given))))
    meta: Any = processes.first(lambda: checkpoint.read_meta(path))
    made = meta.get("run", {})
    if "converted_from" in meta and made.get("dataset") is None:
        _check_converted(problem, path, meta)
    elif made.get("dataset") != settings.data.dataset:
        raise UserError(
            f"--teacher {path} was trained on {made.get('dataset')}, "
            f"this run is on {settings.data.dataset}; pass a teacher of the same data"
        )
    classes = meta.get("num_classes", problem.num_classes)
    if classes != problem.num_classes:
        raise UserError(
            f"--teacher {path} has {classes} classes, this data has "
            f"{problem.num_classes}; pass a teacher of the same classes, or leave "
            "--teacher out to train one"
        )
    _check_epochs(path, given, meta)
    kept = made.get("held_out") == settings.data.held_out
    wants_other = settings.data.held_out and not settings.run.teacher_saw_held_out
    if wants_other and kept and made.get("data") != problem.data_digest:
        raise UserError(
            f"--held-out {settings.data.held_out}: --teacher {path} was trained on "
            "other images of this name and may have seen these; train one on this "
            "data, or pass --teacher-saw-held-out if students alone need not have seen "
            "them"
        )
    if wants_other and not kept:
        raise UserError(
            f"--held-out {settings.data.held_out}: --teacher {path} was trained with "
            f"held_out={made.get('held_out')} and may have seen these images; "
            "train one with the same --held-out, or pass --teacher-saw-held-out if "
            "students alone need not have seen them"
        )
    if made.get("stem") != settings.networks.stem:
        raise UserError(
            f"--teacher {path} has the {made.get('stem')} stem; pass "
            f"--stem {made.get('stem')}"
        )
    name = made.get("teacher_model") or made.get("student_model")
    model = problem.model(name, made["width"])
    return Source(problem, name, model, made["width"], path)


def known_digest(source: Source | Stored) -> str | None:
    """Returns the teacher's digest; None if the end of its run must be repeated."""
    if isinstance(source, Stored) or source.trained:
        return source.digest
    return None if source.finished else "not trained yet"


def load_teacher(source: Source | Stored, report) -> Teacher:
    """Trains the teacher, or reads the given checkpoint or file."""
    if isinstance(source, Stored):
        about = source.about
        return Teacher(
            *(None, about["width"], None, source.digest, about["accuracy"], None),
            name=about["model"],
            top5=about.get("top5"),  # statistics have none
        )
    problem, model, result = source.problem, source.model, None
    if source.given is None:
        if not source.trained:
            source.forget_result()
        run = runs.teacher_run(problem)
        result = train.train(problem, run, model, None, report)
    replicated = train_step.replicate(source.variables, problem.devices)
    measured = problems.evaluate(problem, model, replicated)
    return Teacher(
        *(model, source.width, replicated, source.digest, measured["accuracy"], result),
        name=models.name_of(model),
        top5=measured.get("top5"),
    )
