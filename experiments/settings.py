"""Settings of the experiments: typed, with recipes; the command line overrides them.

A recipe is a table of values, a data set adds its own, and what the command line says
comes last: ``--help`` shows the values of the recipe and data set that it is given.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args

import tyro

FEATURE_ONLY = "feature_only"
KD2M = ("w2", "cw2", "jw2", "w2_gaussian", "cw2_gaussian", "kl_gaussian")
MODELS = (
    *("ResNet9", "ResNet18", "ResNet34", "MobileNetV2", "ViT"),
    *("TeacherMLP", "StudentMLP"),
)


class UserError(Exception):
    """A mistake in a command: one line names it; exit status 2."""


@dataclass(frozen=True)
class Settings:
    """Distils a teacher into students by matching distributions of their features.

    Trains the teacher, the student alone, and one student per distance and seed, then
    prints the table.  The same command again continues where it stopped and repeats
    no finished run.
    """

    dataset: str = "digits"
    """digits (embedded), cifar10, cifar100, svhn, mnist, fashion_mnist, folder (of
    images), or the name of a set prepared by TFDS."""
    data_dir: Path | None = None
    """Folder with the data; None looks in $KDDM_DATA_DIR, or ./data and
    ~/.cache/kddm_jax, and for TFDS sets in $TFDS_DATA_DIR and ~/tensorflow_datasets."""
    image_size: int | None = None
    """Resizes the middle square of images to this many pixels a side; None: as they
    are."""
    skip_damaged: bool = False
    """Leaves damaged images of a folder or TFDS set out, with a warning."""
    recipe: str = "laptop"
    """paper, strong or laptop: the defaults of everything below."""
    out: Path | None = None
    """Folder of the results; None is runs/<dataset>-<recipe>."""

    distances: tuple[str, ...] = KD2M
    """One distilled student for each: keys of the catalogue, a distance of your own as
    module:NAME, or feature_only (labels reach the head alone)."""
    seeds: tuple[int, ...] = (0,)
    """One student alone and one per distance for each."""
    weight: float | None = None
    """Lambda of every distance; None takes --weights, then the catalogue's with
    --normalization teacher, else 1e-4, the released code's."""
    weights: dict[str, float] | None = None
    """Lambda by distance: --weights w2 1e-4 cw2 1e-3."""
    weight_schedule: str = "constant"
    """Of every lambda: constant; warmup, from nothing up to it over the first half;
    decay, from it down to nothing by half a cosine over all steps."""
    normalization: str | None = None
    """teacher: divide the features of both networks by the teacher's root mean squared
    deviation before they are compared, so that lambda has no unit; None: features as
    they are, as in the paper."""

    layers: tuple[str, ...] = ()
    """Pairs of layers that every distance compares, STUDENT:TEACHER or
    STUDENT:TEACHER:WEIGHT, in place of the pooled features; feature_only without any
    takes the teacher's layers of highest quality."""
    projector: str | None = None
    """dense, conv (1x1) or conv3 (three layers): learned maps of the student's layers
    to the teacher's width; None: none."""
    positions: str = "pool"
    """Maps in distances of features: pool (their average) or each (every position is a
    sample)."""
    quality_images: int = 5000
    """Training images, as many of each class, on which layers are rated."""
    head: tuple[str, ...] | None = None
    """The student's modules that alone learn from labels in feature_only; None: what
    follows its features."""

    teacher: Path | None = None
    """Checkpoint (or run folder) of a trained teacher; None trains one."""
    teacher_model: str = "ResNet34"
    """ResNet9, ResNet18, ResNet34, MobileNetV2, ViT, TeacherMLP, StudentMLP, or
    module:function, which is called with num_classes and, where it has them, stem,
    width, dtype, axis_name."""
    student_model: str = "ResNet18"
    """As --teacher-model."""
    pretrained_teacher: Path | None = None
    """Weights of a torchvision ResNet (.safetensors, .npz, .pth) that the teacher
    starts from: grown if it is deeper, the head replaced if it has other classes."""
    pretrained_student: Path | None = None
    """The same for every student."""
    stem: str = "cifar"
    """cifar (3x3) or imagenet (7x7/2 and max pooling)."""
    width: int = 64
    """64 is the published network. ResNets: channels of the first stage; features have
    8 times as many. MobileNetV2: channels are multiplied by width / 64, features 1280
    at least. ViT: tokens and features have 3 times as many."""
    teacher_width: int | None = None
    """None: as the student's."""
    dtype: str = "float32"
    """float32 or bfloat16 compute; parameters stay float32."""

    teacher_epochs: int = 15
    """Epochs of the teacher."""
    epochs: int = 15
    """Epochs of each student."""
    batch_size: int = 128
    """Global batch, over all devices."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    lr: float = 1e-2
    """Peak learning rate."""
    lr_end: float = 1e-4
    """Learning rate at the end of the cosine."""
    schedule: str = "cosine-epoch"
    """cosine-epoch (constant within an epoch, the released code's), cosine (per step,
    after --warmup), onecycle (cosine up in the first 30 %, then down to nearly
    nothing), constant (the released baseline's)."""
    warmup: float = 0.0
    """Share of the steps in which the rate rises from zero (cosine only)."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 0.0
    """On all parameters: an L2 penalty, as torch.optim.SGD, or AdamW's decay."""
    padding: int = 4
    """Pixels of the random crop."""
    flip: bool = True
    """Random horizontal flip."""
    degrees: float = 0.0
    """Random rotation, at most this."""
    shift: float = 0.0
    """Random displacement, at most this share of the image."""
    zoom: float = 0.0
    """Random change of scale, at most this share."""

    views: int | None = None
    """Fixed augmented views of each image, on which the teacher is run once for all
    students; None: new ones at every step."""

    train_images: int | None = None
    """Images that the teacher sees, a stratified choice; None: all."""
    student_images: int | None = None
    """Images that students see, among the teacher's; None: all of them."""
    test_images: int | None = None
    """Test images used, a stratified choice; None: all."""
    held_out: int = 0
    """Evaluate on this many training images, kept from training, in place of the test
    set: for choosing lambda."""

    teacher_saw_held_out: bool = False
    """Takes a --teacher that may have been trained on the held-out images; no student
    is."""

    devices: int | None = None
    """Of all processes together; None: all."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, one on each host; None: found on
    Cloud TPU and in Slurm steps, else this process is alone."""
    processes: int | None = None
    """Number of processes; 1: this one alone, wherever it runs."""
    process: int | None = None
    """Which of them this is, from 0."""
    distance_group: int | None = None
    """Devices that gather features from each other; None: all. A smaller group is
    another loss, the mean over groups of the distance of each group's images."""
    stream_above: float | None = None
    """Megabytes of training images above which they stay in host memory and are read
    ahead; None: a quarter of the device's memory."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch always is."""
    checkpoint_seconds: float = 30.0
    """Least time between checkpoints, which lie between any two dispatches; the end of
    a run, and SIGTERM, always make one."""
    on_nonfinite: str = "stop"
    """stop or skip: what follows a step whose loss or gradient is not finite.  Either
    way it changes nothing; skip goes on, counts such steps in the history and warns."""
    embedding: str = "pca"
    """pca, tsne (slower) or none: the picture of features in report.html."""
    compilation_cache: Path | None = Path("~/.cache/kddm_jax/xla")
    """Compiled programs of earlier commands."""
    progress: bool = True
    """Live bar on a terminal; without it, one line per epoch."""


RELEASED_WEIGHT = 1e-4
_SGD = {
    "momentum": 0.9,
    "schedule": "cosine",
    "lr_end": 0.0,
    "nesterov": True,
    "normalization": "teacher",
}
RECIPES: dict[str, dict[str, object]] = {
    # KD2M's (arXiv 2504.01757): ImageNet weights are part of it (--pretrained-teacher,
    # --pretrained-student), images being normalised by the data set's own statistics.
    "paper": {
        "stem": "imagenet",
        "width": 64,
        "batch_size": 128,
        "epochs": 15,
        "teacher_epochs": 15,
        "lr": 1e-2,
        "lr_end": 1e-4,
        "schedule": "cosine-epoch",
        "momentum": 0.9,
    },
    # From scratch on an accelerator.
    "strong": {
        **_SGD,
        "stem": "cifar",
        "width": 64,
        "batch_size": 128,
        "epochs": 100,
        "teacher_epochs": 100,
        "lr": 0.1,
        "warmup": 0.05,
        "weight_decay": 5e-4,
    },
    # Two cores, minutes: narrow networks, students with few labels.
    "laptop": {
        **_SGD,
        "stem": "cifar",
        "width": 16,
        "batch_size": 64,
        "epochs": 5,
        "teacher_epochs": 5,
        "lr": 0.1,
        "warmup": 0.2,
        "weight_decay": 5e-4,
        "train_images": 5000,
        "student_images": 2500,
        "test_images": 2000,
    },
}
# Features alone teach the backbone (arXiv 2511.14981): ResNet34 to ResNet9, AdamW,
# one cycle; the student alone and KD beside it.  The paper does not augment.
RECIPES["feature_only"] = {
    "stem": "cifar",
    "width": 16,
    "student_model": "ResNet9",
    "distances": ("kd", FEATURE_ONLY),
    "projector": "conv",
    "optimizer": "adamw",
    "schedule": "onecycle",
    "lr": 7.5e-3,
    "weight_decay": 0.01,
    "padding": 0,
    "flip": False,
    "batch_size": 128,
    "epochs": 50,
    "teacher_epochs": 50,
    "normalization": "teacher",
}
# Numerals are never mirrored; 8 x 8 pixels bear a shift of one.
DATASET_SETTINGS: dict[str, dict[str, object]] = {
    "digits": {"padding": 1, "flip": False},
    "mnist": {"padding": 2, "flip": False},
    "svhn": {"flip": False},
    "svhn_cropped": {"flip": False},
}
# The released code's first benchmark, two perceptrons on MNIST.
PAPER_MNIST = {
    "teacher_model": "TeacherMLP",
    "student_model": "StudentMLP",
    "padding": 0,
    "degrees": 10.0,
    "shift": 0.1,
    "zoom": 0.1,
}
LAPTOP_DIGITS = {
    "train_images": None,
    "test_images": None,
    "teacher_epochs": 15,
    "epochs": 30,
    "student_images": 128,
}


def defaults(dataset: str, recipe: str) -> Settings:
    """The settings of a recipe on a data set, before the command line."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    values = {**RECIPES[recipe], **DATASET_SETTINGS.get(dataset, {})}
    if (dataset, recipe) == ("digits", "laptop"):
        values.update(LAPTOP_DIGITS)
    if (dataset, recipe) == ("mnist", "paper"):
        values.update(PAPER_MNIST)
    return Settings(**{**values, "dataset": dataset, "recipe": recipe})


def parse(arguments: list[str]) -> Settings:
    """Reads a command line; the recipe and the data set choose the defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=Settings.dataset)
    first.add_argument("--recipe", default=Settings.recipe)
    chosen, _ = first.parse_known_args(arguments)
    settings = tyro.cli(
        Settings,
        args=arguments,
        default=defaults(chosen.dataset, chosen.recipe),
        prog="cifar.py",
    )
    settings = replace(
        settings,
        **{
            f.name: value.expanduser()
            for f in fields(settings)
            if isinstance(value := getattr(settings, f.name), Path)
        },
    )
    check(settings)
    return settings


def _require(condition, message):
    if not condition:
        raise UserError(message)


def check(settings: Settings) -> None:
    """Answers what can be wrong with settings alone."""
    _check_distances(settings)
    _check_choices(settings)
    _check_ranges(settings)
    _check_processes(settings)


def _check_distances(settings):
    from kddm_jax import DISTANCES

    names = settings.distances
    for name in names:
        module, _, attribute = name.partition(":")
        own = bool(module and attribute)
        known = ", ".join((*DISTANCES, FEATURE_ONLY, "one of yours as module:NAME"))
        _require(
            name in DISTANCES or name == FEATURE_ONLY or own,
            f"unknown distance {name!r}; known: {known}",
        )
    _require(len(set(names)) == len(names), f"--distances names one twice: {names}")
    given = {**(settings.weights or {}), "--weight": settings.weight or 0.0}
    for name, value in given.items():
        finite = math.isfinite(value) and value >= 0
        _require(finite, f"weight of {name} must be a number >= 0, got {value}")
    for name in settings.weights or {}:
        _require(
            name in names,
            f"--weights names {name!r}, which is not among --distances "
            f"({', '.join(names)})",
        )


def _check_choices(settings):
    for field, known in {
        "stem": ("cifar", "imagenet"),
        "dtype": ("float32", "bfloat16"),
        "optimizer": ("sgd", "adamw"),
        "schedule": ("cosine-epoch", "cosine", "onecycle", "constant"),
        "normalization": (None, "teacher"),
        "weight_schedule": ("constant", "warmup", "decay"),
        "projector": (None, "dense", "conv", "conv3"),
        "positions": ("pool", "each"),
        "embedding": ("pca", "tsne", "none"),
        "on_nonfinite": ("stop", "skip"),
    }.items():
        value = getattr(settings, field)
        names = ", ".join(str(k) for k in known)
        _require(value in known, f"unknown {field} {value!r}; known: {names}")
    _require(
        settings.teacher is None or settings.pretrained_teacher is None,
        f"--teacher {settings.teacher} is trained already; leave out either it or "
        f"--pretrained-teacher {settings.pretrained_teacher}",
    )

    for field in ("teacher_model", "student_model"):
        value = getattr(settings, field)
        module, colon, function = value.partition(":")
        _require(
            value in MODELS or (module and function),
            f"unknown {field} {value!r}; known: {', '.join(MODELS)}, or a function of "
            "yours as module:function",
        )


def _check_processes(settings):
    options = ("coordinator", "processes", "process")
    coordinator, processes, process = (getattr(settings, name) for name in options)
    if (coordinator, process) == (None, None) and processes in (None, 1):
        return
    missing = [f"--{name}" for name in options if getattr(settings, name) is None]
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
    positive = (
        "width teacher_width epochs teacher_epochs batch_size lr devices "
        "distance_group eval_every train_images student_images "
        "test_images quality_images views image_size processes"
    )
    for field in positive.split():
        value = getattr(settings, field)
        _require(
            value is None or value > 0,
            f"--{field.replace('_', '-')} must be positive, got {value}",
        )
    not_negative = (
        "held_out padding lr_end weight_decay momentum warmup stream_above "
        "degrees shift zoom"
    )
    for field in not_negative.split():
        value = getattr(settings, field)
        if value is None:
            continue
        below = value < 1 or field not in ("momentum", "warmup", "shift", "zoom")
        _require(
            value >= 0 and below,
            f"--{field.replace('_', '-')} must be >= 0"
            f"{'' if below else ' and < 1'}, got {value}",
        )
    seeds = settings.seeds
    _require(seeds, "--seeds needs at least one seed")
    outside = [seed for seed in seeds if not 0 <= seed < 2**32]
    _require(not outside, f"--seeds must be in [0, 2**32), got {outside}")
    _require(len(set(seeds)) == len(seeds), f"--seeds names one twice: {seeds}")


def weight_of(settings: Settings, distance: str) -> float:
    """Lambda of one distance: --weights, then --weight, then its default."""
    from kddm_jax import DISTANCES

    if distance in (settings.weights or {}):
        return settings.weights[distance]
    if settings.weight is not None:
        return settings.weight
    if distance == FEATURE_ONLY:
        return 1.0
    if settings.normalization is None:
        return RELEASED_WEIGHT
    if distance not in DISTANCES:
        return 1.0
    defaults = DISTANCES[distance].weights
    if settings.normalization not in defaults:
        raise UserError(
            f"{distance} has no default weight with --normalization "
            f"{settings.normalization}; pass --weights {distance} NUMBER"
        )
    return defaults[settings.normalization]


def as_json(settings: Settings) -> dict[str, object]:
    """The settings as JSON values."""
    values = asdict(settings)
    return {
        f.name: str(v) if isinstance(v := values[f.name], Path) else v
        for f in fields(settings)
    }


def renamed(values: Mapping[str, object]) -> dict[str, object]:
    """Gives settings that were recorded before version 0.2.0 their present names."""
    names = {"scale": "normalization", "view": "positions"}
    found = {names.get(name, name): value for name, value in values.items()}
    if values.get("view") == "positions":
        found["positions"] = "each"
    return found


def from_json(values: Mapping[str, object]) -> Settings:
    """The settings that `as_json` wrote; what it did not write has its default."""
    found, values = {}, renamed(values)
    for field in fields(Settings):
        if field.name in values:
            value = values[field.name]
            if value is not None and Path in get_args(field.type):
                value = Path(value)
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return Settings(**found)
