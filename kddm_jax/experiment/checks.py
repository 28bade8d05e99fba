"""Checks names and ranges of settings, and options that exclude each other."""

import math

from kddm_jax.distances import DISTANCES
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import FEATURE_ONLY, MODELS, Settings, flat
from kddm_jax.numerics.normalization import NORMALIZATIONS


def _require(condition, message):
    if not condition:
        raise UserError(message)


def check(settings: Settings) -> None:
    """Raises a `UserError` if settings contradict each other or are out of range."""
    _check_distances(settings)
    _check_choices(settings)
    _check_ranges(settings)
    _check_mixing(settings)
    _check_processes(settings)


def _check_distances(settings):
    names = settings.method.distances
    for name in names:
        module, _, attribute = name.partition(":")
        own = bool(module and attribute)
        known = ", ".join((*DISTANCES, FEATURE_ONLY, "one of yours as module:NAME"))
        _require(
            name in DISTANCES or name == FEATURE_ONLY or own,
            f"unknown distance {name!r}; known: {known}",
        )
    _require(len(set(names)) == len(names), f"--distances names one twice: {names}")
    given = {
        **(settings.method.weights or {}),
        "--weight": settings.method.weight or 0.0,
    }
    for name, value in given.items():
        finite = math.isfinite(value) and value >= 0
        _require(finite, f"weight of {name} must be a number >= 0, got {value}")
    for name in settings.method.weights or {}:
        _require(
            name in names,
            f"--weights names {name!r}, which is not among --distances "
            f"({', '.join(names)})",
        )


def _check_choices(settings):
    values = flat(settings)
    for name, known in {
        "stem": ("cifar", "imagenet"),
        "dtype": ("float32", "bfloat16"),
        "optimizer": ("sgd", "adamw"),
        "schedule": ("cosine-epoch", "cosine", "onecycle", "constant"),
        "normalization": tuple(NORMALIZATIONS),
        "weight_schedule": ("constant", "warmup", "decay"),
        "projector": (None, "dense", "conv", "conv3"),
        "positions": ("pool", "each"),
        "embedding": ("pca", "tsne", "none"),
        "on_nonfinite": ("stop", "skip"),
    }.items():
        value = values[name]
        names = ", ".join(str(k) for k in known)
        _require(value in known, f"unknown {name} {value!r}; known: {names}")
    teacher, pretrained = values["teacher"], values["pretrained_teacher"]
    _require(
        teacher is None or pretrained is None,
        f"--teacher {teacher} is trained already; leave out either it or "
        f"--pretrained-teacher {pretrained}",
    )
    for name in ("teacher_model", "student_model"):
        value = values[name]
        module, colon, function = value.partition(":")
        _require(
            value in MODELS or (module and function),
            f"unknown {name} {value!r}; known: {', '.join(MODELS)}, or a function of "
            "yours as module:function",
        )


def _check_mixing(settings):
    smoothing, alpha = settings.optimizer.label_smoothing, settings.optimizer.mixup
    _require(
        0 <= smoothing < 1,
        f"--label-smoothing must be >= 0 and < 1, got {smoothing}",
    )
    _require(
        math.isfinite(alpha) and alpha >= 0,
        f"--mixup must be a number >= 0, got {alpha}",
    )
    views = settings.data.views
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


def _check_ranges(settings):
    values = flat(settings)
    positive = (
        "width teacher_width epochs teacher_epochs batch_size lr devices "
        "distance_group eval_every train_images student_images "
        "test_images quality_images views image_size processes"
    )
    for name in positive.split():
        value = values[name]
        _require(
            value is None or value > 0,
            f"--{name.replace('_', '-')} must be positive, got {value}",
        )
    not_negative = (
        "held_out padding lr_end weight_decay momentum warmup stream_above "
        "degrees shift zoom"
    )
    for name in not_negative.split():
        value = values[name]
        if value is None:
            continue
        below = value < 1 or name not in ("momentum", "warmup", "shift", "zoom")
        _require(
            value >= 0 and below,
            f"--{name.replace('_', '-')} must be >= 0"
            f"{'' if below else ' and < 1'}, got {value}",
        )
    seeds = settings.run.seeds
    _require(seeds, "--seeds needs at least one seed")
    outside = [seed for seed in seeds if not 0 <= seed < 2**32]
    _require(not outside, f"--seeds must be in [0, 2**32), got {outside}")
    _require(len(set(seeds)) == len(seeds), f"--seeds names one twice: {seeds}")
