"""Checks the values of settings, and settings that depend on each other.

The choices and the range of a single setting are at its definition in `settings`.
"""

import math

from kddm_jax.distances import DISTANCES
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.options import Choices, Range, notes
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.settings import (
    FEATURE_ONLY,
    OPTIONS,
    Settings,
    flat,
    parts_of,
)


def _require(condition, message):
    if not condition:
        raise UserError(message)


def check(settings: Settings) -> None:
    """Raises a `UserError` if settings contradict each other or are out of range."""
    _check_distances(settings)
    _check_values(settings)
    _check_placebo(settings)
    _check_teacher(settings)
    _check_mixing(settings)
    _check_processes(settings)
    _check_seeds(settings)


def _check_distances(settings):
    names = settings.method.distances
    for name in names:
        _check_distance(name)
    distinct = {frozenset(parts_of(name)) for name in names}
    _require(len(distinct) == len(names), f"--distances names one twice: {names}")
    given = {
        **(settings.method.weights or {}),
        "--weight": settings.method.weight or 0.0,
    }
    for name, value in given.items():
        finite = math.isfinite(value) and value >= 0
        _require(finite, f"weight of {name} must be a number >= 0, got {value}")
    single = dict.fromkeys(part for name in names for part in parts_of(name))
    for name in settings.method.weights or {}:
        parts = " ".join(f"{part} NUMBER" for part in parts_of(name))
        _require(
            name not in names or name in single,
            f"--weights names {name!r}, but each distance of a sum has its own weight; "
            f"write --weights {parts}",
        )
        _require(
            name in single,
            f"--weights names {name!r}, which is not among --distances "
            f"({', '.join(single)})",
        )


def _check_distance(name):
    """Checks a distance's name, or the names of the distances of a sum."""
    parts = parts_of(name)
    sums = f" in {name!r}" if len(parts) > 1 else ""
    whole = (FEATURE_ONLY, *PUBLISHED)
    for one in whole:
        _require(
            name == one or f"+{one}+" not in f"+{name}+",
            f"{name!r}: {one} is a whole method, not a distance, and cannot be part of "
            "a sum; name it alone",
        )
    known = ", ".join((*DISTANCES, *whole, "one of yours as module:NAME"))
    for part in parts:
        module, _, attribute = part.partition(":")
        own = bool(module and attribute)
        _require(
            part in DISTANCES or part in whole or own,
            f"unknown distance {part!r}{sums}; known: {known}",
        )
    _require(len(set(parts)) == len(parts), f"{name!r} names one distance twice")


def _check_values(settings):
    """Checks each setting by the choices or the range at its definition."""
    for name, value in flat(settings).items():
        for note in notes(OPTIONS[name]):
            if isinstance(note, Choices | Range):
                note.check(name, value)


def _check_placebo(settings):
    placebo = settings.method.placebo
    _require(
        placebo is None or settings.data.views is not None,
        f"--placebo {placebo} replaces the teacher's outputs on fixed views, "
        "but there are none; add --views, such as --views 4",
    )
    _require(
        placebo != "views" or settings.data.views != 1,
        "--placebo views exchanges the views of an image, but --views 1 has a single "
        "one; raise it, such as --views 4",
    )
    share = settings.method.placebo_share
    _require(
        share == 1 or placebo in ("pairs", "labels"),
        f"--placebo-share {share} is the share of images that have the outputs of "
        f"another image, but the placebo is {placebo}; add --placebo pairs or labels, "
        "or leave it out",
    )


def _check_teacher(settings):
    networks = settings.networks
    teacher, pretrained = networks.teacher, networks.pretrained_teacher
    outputs, placebo = networks.teacher_outputs, settings.method.placebo
    others = {"--teacher": teacher, "--pretrained-teacher": pretrained}
    more = {"--teacher-outputs": outputs, "--placebo": placebo}
    for option, file, replaced in (
        ("--teacher-statistics", networks.teacher_statistics, {**others, **more}),
        ("--teacher-outputs", outputs, others),
    ):
        for other, value in replaced.items():
            _require(
                file is None or value is None,
                f"{option} {file} replaces the teacher; leave out either it or {other} "
                f"{value}",
            )
    _require(
        teacher is None or pretrained is None,
        f"--teacher {teacher} is trained already; leave out either it or "
        f"--pretrained-teacher {pretrained}",
    )


def _check_mixing(settings):
    alpha, views = settings.optimizer.mixup, settings.data.views
    _require(math.isfinite(alpha), f"--mixup must be a finite number, got {alpha}")
    _require(
        not alpha or views is None,
        f"--mixup {alpha} mixes images at every step, but --views {views} uses teacher "
        "outputs of unmixed images; leave out one of the two",
    )


def _check_processes(settings):
    values = flat(settings)
    options = ("coordinator", "processes", "process")
    coordinator, processes, process = (values[name] for name in options)
    if (coordinator, process) == (None, None) and processes in (None, 1):
        return
    missing = [f"--{name}" for name in options if values[name] is None]
    _require(
        not missing,
        f"several processes need {', '.join(missing)}, too: --coordinator HOST:PORT, "
        "--processes N, --process I",
    )
    host, _, port = coordinator.rpartition(":")
    _require(
        host and port.isdecimal(),
        f"--coordinator must be HOST:PORT of the first process, got {coordinator!r}",
    )
    _require(
        0 <= process < processes,
        f"--process must be in [0, {processes}), got {process}",
    )


def _check_seeds(settings):
    seeds = settings.run.seeds
    _require(seeds, "--seeds needs at least one seed")
    outside = [seed for seed in seeds if not 0 <= seed < 2**32]
    _require(not outside, f"--seeds must be in [0, 2**32), got {outside}")
    _require(len(set(seeds)) == len(seeds), f"--seeds names one twice: {seeds}")


def layer_pairs(settings: Settings) -> list[tuple[str, str, float]]:
    """Parses ``--layers`` into (student's layer, teacher's layer, weight)."""
    found = []
    for text in settings.method.layers:
        student, colon, rest = text.partition(":")
        teacher, _, weight = rest.partition(":")
        try:
            number = float(weight) if weight else 1.0
        except ValueError:
            number = -1.0
        if not (student and colon and teacher) or not number >= 0:
            raise UserError(
                f"--layers {text!r}: write STUDENT:TEACHER or STUDENT:TEACHER:WEIGHT, "
                "such as stage4_block2:stage4_block3:0.5"
            )
        if student in (pair[0] for pair in found):
            raise UserError(
                f"--layers names the student's layer {student!r} twice; name one "
                "teacher's layer for each"
            )
        found.append((student, teacher, number))
    return found
