"""Reads the folder of a finished study: its data, its teacher and its students.

A folder of ``kddm distill`` contains ``results.json`` and the checkpoints of each run,
so that the outputs of both networks for the same images can be computed later.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kddm_jax import checkpoint
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import change, from_json
from kddm_jax.experiment.training import models, problems, runs
from kddm_jax.experiment.training.teacher import Source, find_teacher, variables_of


@dataclass(frozen=True)
class Finished:
    """Describes a finished study.

    Attributes:
      problem: data and settings of the study, on one device.
      results: the content of ``results.json``.
      teacher: network, variables and digest of the teacher.
    """

    problem: problems.Problem
    results: dict[str, Any]
    teacher: Source

    def student(self, name: str, seed: int) -> tuple[models.Network, object]:
        """Loads a student.

        Args:
          name: "student" or "student_longer" for a student trained alone, or a method.
          seed: seed of the student's run.

        Returns:
          ``(network, variables)``, the variables on the host, without projectors.

        Raises:
          UserError: there is no checkpoint, or it is of other data or another teacher.
          CheckpointError: the checkpoint is damaged, or of another network.
        """
        problem = self.problem
        folder = runs.folder_of(problem.out, name, seed)
        path = checkpoint.find(folder)
        if path is None:
            raise UserError(
                f"{folder} has no checkpoint; run the command of {problem.out} again, "
                "or choose another --distance or --seed"
            )
        made: Any = checkpoint.read_meta(path)["run"]
        for what, wanted in {
            "data": problem.data_digest,
            "teacher": self.teacher.digest,
        }.items():
            if made.get(what, wanted) != wanted:
                raise UserError(
                    f"{path} was made with {what}={made[what]}, found here is {wanted};"
                    f" pass the {what} that it was made with"
                )
        model = problem.student
        return model, variables_of(problem, path, model)


def results_of(folder: Path) -> Path:
    """Returns the file of a folder's results.

    Raises:
      UserError: there is none, because the command has not finished, or no folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass --out of kddm distill")
    path = folder / "results.json"
    if not path.exists():
        raise UserError(
            f"{folder} has no results.json: it is not finished; run its command "
            "(kddm distill) to the end"
        )
    return path


def load(
    folder: Path, *, data_dir: Path | None = None, teacher: Path | None = None
) -> Finished:
    """Opens the folder of a finished command.

    Args:
      folder: ``--out`` of ``kddm distill``.
      data_dir: folder of the data; None uses that of the command.
      teacher: checkpoint of the teacher; pass it if the command had ``--teacher`` and
        that checkpoint was moved.

    Returns:
      The study with its data and teacher; students are read one by one.

    Raises:
      UserError: the command has not finished, or the teacher has no checkpoint.
    """
    results = records.read_json(results_of(folder))
    settings = from_json(results["settings"])
    cache = settings.run.compilation_cache
    given = teacher or settings.networks.teacher or runs.folder_of(folder, "teacher", 0)
    if checkpoint.find(given) is None:
        raise UserError(
            f"the teacher of {folder} has no checkpoint in {given}; pass --teacher"
        )
    settings = change(
        settings,
        data_dir=data_dir or settings.run.data_dir,
        teacher=given,
        teacher_statistics=None,  # whose teacher is the given one
        teacher_outputs=None,
        compilation_cache=cache if cache and cache.is_dir() else None,
        devices=1,  # regardless of the number that it was trained on
        **dict.fromkeys(("distance_group", "coordinator", "processes", "process")),
    )
    problem = problems.prepare(settings, folder)
    source: Any = find_teacher(problem)  # a network, as there is no file
    return Finished(problem, results, source)
