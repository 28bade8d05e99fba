"""Defines the settings of the commands, grouped by topic.

The groups are frozen dataclasses inside `Settings`. On the command line and in JSON
their fields are flat, because every name occurs once. An annotation next to a default
says which values the setting accepts and how it is treated (`options.py`). `identity`
returns the settings that decide the result of a run, which are all except those of the
group `Run`. The recipes are in `recipes.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from kddm_jax.experiment.options import (
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SHARE,
    Choices,
    Mark,
    Range,
    notes,
)
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.numerics.normalization import NORMALIZATIONS
from kddm_jax.numerics.positions import POSITIONS

FEATURE_ONLY = "feature_only"
RELEASED = "released"  # the value of --layers for the layers of arXiv 2511.14981
LONGER = "student_longer"  # the student alone with the compute of a distilled run
ALONE = ("teacher", "student", LONGER)  # runs without a teacher
KD2M = ("w2", "cw2", "jw2", "w2_gaussian", "cw2_gaussian", "kl_gaussian")
# Distances that beat the student alone on CIFAR-10 (experiments/README.md), and KD.
HELPFUL = ("l2", "cw2", "kd")
MODELS = (
    *("ResNet9", "ResNet18", "ResNet34", "MobileNetV2", "ViT"),
    *("TeacherMLP", "StudentMLP", "ResNet20", "ResNet32", "ResNet56", "ResNet110"),
    *("ResNet8x4", "ResNet32x4", "WRN16x2", "WRN40x1", "WRN40x2", "VGG8", "VGG13"),
)
NETWORK = Choices(*MODELS, own="a function of yours as module:function")

TRAINED = Range(
    "positive (to use a trained teacher as it is, convert its file by kddm convert "
    "and pass the result as --teacher)",
    POSITIVE.contains,
)


class AtMost(int):
    """Marks a recipe's number that is lowered if the data set has fewer images.

    The batch size is also lowered to fit the number of devices.
    """

    def __hash__(self) -> int:
        """Differs from an int's, because tyro caches types by their default.

        As keys of a dict, 64 and "at most 64" are therefore different.
        """
        return hash((AtMost, int(self)))


@dataclass(frozen=True)
class Data:
    """Chooses the data set and its images."""

    dataset: str = "digits"
    """Name of the data set: digits (embedded), cifar10, cifar100, svhn, mnist,
    fashion_mnist, folder (of images), or a set prepared by TFDS."""
    image_size: Annotated[int | None, POSITIVE] = None
    """Side in pixels to which the central square of every image is resized; None keeps
    images as they are."""
    skip_damaged: bool = False
    """Skip files of a folder or a TFDS data set that are damaged or in an unsupported
    format, and print a warning."""
    train_images: Annotated[int | None, POSITIVE] = None
    """Number of training images of the teacher, as many of each class as possible; None
    uses all."""
    student_images: Annotated[int | None, POSITIVE, Mark.OF_STUDENTS] = None
    """Number of labelled training images of the students, a sample of the teacher's;
    None uses all of the teacher's."""
    test_images: Annotated[int | None, POSITIVE] = None
    """Number of test images to evaluate on, as many of each class as possible; None
    uses all."""
    held_out: Annotated[int, NOT_NEGATIVE] = 0
    """Number of training images that are not trained on and replace the test set in
    evaluation; use it to choose lambda."""
    views: Annotated[int | None, POSITIVE, Mark.OF_STUDENTS] = None
    """Number of fixed augmented copies of each training image; the teacher is run on
    them once for all students. None augments images anew at every step."""


@dataclass(frozen=True)
class Augmentation:
    """Changes training images at random."""

    padding: Annotated[int, NOT_NEGATIVE] = 4
    """Pixels of padding of the random crop."""
    flip: bool = True
    """Flip images horizontally at random."""
    degrees: Annotated[float, NOT_NEGATIVE] = 0.0
    """Largest angle of the random rotation."""
    shift: Annotated[float, SHARE] = 0.0
    """Largest random displacement, as a fraction of the image's height and width."""
    zoom: Annotated[float, SHARE] = 0.0
    """Largest random change of scale; 0.1 scales by a factor between 0.9 and 1.1."""
    smallest_area: Annotated[float, PART] = 1.0
    """Smallest share of the area that a random resized crop keeps, such as 0.08 for
    ImageNet; 1 leaves the crop out."""


@dataclass(frozen=True)
class Networks:
    """Chooses teacher and student."""

    teacher: Annotated[Path | None, Mark.NAMED_OTHERWISE] = None
    """Checkpoint, or run folder, of a trained teacher; None trains one. Its record
    decides the teacher's network and width; leave --teacher-model and --teacher-width
    out. Use kddm convert to make a checkpoint from a file of weights. Images are
    normalized by the data set's mean and standard deviation, whichever the teacher was
    trained with."""
    teacher_statistics: Annotated[Path | None, Mark.NAMED_OTHERWISE] = None
    """File made by kddm outputs, from which students learn without a teacher. Only
    distances that can compare a batch with features of other images work, such as cw2
    and cw2_gaussian; others are refused. None uses a teacher."""
    teacher_outputs: Annotated[Path | None, Mark.NAMED_OTHERWISE] = None
    """File made by kddm outputs with a teacher's outputs on --views, from which
    students learn without its network. None uses a teacher."""
    teacher_model: Annotated[str, NETWORK, Mark.OF_TEACHER] = "ResNet34"
    """ResNet9, ResNet18, ResNet34, MobileNetV2, ViT, TeacherMLP, StudentMLP; for CIFAR
    ResNet20, ResNet32, ResNet56, ResNet110, ResNet8x4, ResNet32x4, WRN16x2, WRN40x1,
    WRN40x2, VGG8, VGG13; or module:function. The function is called with num_classes
    and, if it takes them, stem, width, dtype and axis_name, and gives a Linen module,
    or with rngs an NNX module."""
    student_model: Annotated[str, NETWORK, Mark.OF_STUDENTS] = "ResNet18"
    """The same for the student."""
    pretrained_teacher: Annotated[Path | None, Mark.NAMED_OTHERWISE] = None
    """Weights of a torchvision ResNet (.safetensors, .npz, .pth) from which the teacher
    starts to train, on images normalized by the data set's mean and standard deviation.
    If the teacher is deeper, blocks are added; if the number of classes differs, the
    head is replaced. To use a trained teacher as it is, convert its file by kddm
    convert and pass the result as --teacher."""
    pretrained_student: Annotated[Path | None, Mark.NAMED_OTHERWISE] = None
    """Weights from which every student starts, as for --pretrained-teacher."""
    stem: Annotated[str, Choices("cifar", "imagenet")] = "cifar"
    """First layers of ResNet9, 18 and 34 and MobileNetV2: cifar (small strides) or
    imagenet (7x7/2 and max pooling in ResNets). Other networks ignore it."""
    width: Annotated[int, POSITIVE] = 64
    """Width of the networks; 64 is the published width, and another one multiplies the
    numbers of channels by width / 64. The features of ResNet9, 18 and 34 have 8 times
    this width, those of a ViT 3 times, those of MobileNetV2 width 1280 or more."""
    teacher_width: Annotated[int | None, POSITIVE, Mark.NAMED_OTHERWISE] = None
    """Width of the teacher; None uses the student's."""
    dtype: Annotated[str, Choices("float32", "bfloat16")] = "float32"
    """Type of the computations, float32 or bfloat16; parameters are float32."""


@dataclass(frozen=True)
class Method:
    """Sets how students learn from the teacher."""

    distances: Annotated[tuple[str, ...], Mark.NAMED_OTHERWISE] = KD2M
    """Distances to distil with; one student is trained for each. Keys of the catalogue,
    your own distances as module:NAME, or feature_only (labels train only the head).
    Names joined by + train one student with the sum of these distances, such as l2+kd;
    each has its own lambda. The published methods fitnet, wkd and kd++ have their own
    terms, layers and projectors, which other options do not change."""
    weight: Annotated[float | None, Mark.NAMED_OTHERWISE] = None
    """Lambda of every distance that --weights does not name. None uses the distance's
    default for the given --normalization, and is an error if there is none. Exceptions:
    --recipe paper without normalization uses 1e-4, as the released code does;
    feature_only uses 10 with --normalization unit and otherwise 1; a published method,
    and a distance of yours without weights=, use 1."""
    weights: Annotated[dict[str, float] | None, Mark.NAMED_OTHERWISE] = None
    """Lambda of single distances, such as: --weights w2 1e-4 cw2 1e-3. The distances of
    a sum are named one by one: for l2+kd, --weights l2 10 kd 1."""
    weight_schedule: Annotated[str, Choices("constant", "warmup", "decay")] = "constant"
    """Schedule of every lambda: constant; warmup (rises from zero over the first half
    of the steps); decay (falls to zero along half a cosine over all steps)."""
    normalization: Annotated[str | None, Choices(*NORMALIZATIONS)] = None
    """How features are transformed before they are compared. None: not at all, as in
    the paper. teacher: the features of both networks are divided by the teacher's root
    mean squared deviation, so that lambda has no unit. unit: each feature vector is
    scaled to length 1. centered: each network's mean is subtracted, and the result is
    divided by that network's root mean squared deviation. standardized: like centered,
    but for each feature separately. With --layers released, feature_only transforms
    nothing."""
    layers: tuple[str, ...] = ()
    """Pairs of layers that every distance compares instead of the pooled features:
    STUDENT:TEACHER or STUDENT:TEACHER:WEIGHT. The word released makes feature_only
    compare four layers, chosen by knowledge quality, by mean squared error."""
    projector: Annotated[str | None, Choices(None, "dense", "conv", "conv3")] = None
    """Learned projection of the student's layers to the teacher's width: dense, conv
    (1x1) or conv3 (three layers); None uses no projection. Without --layers,
    feature_only projects the pooled features if, and only if, their widths differ."""
    positions: Annotated[str, Choices(*POSITIONS)] = "pool"
    """How distances of features treat feature maps: pool (averages over positions) or
    each (every position is a sample)."""
    unlabelled_images: Annotated[int, NOT_NEGATIVE] = 0
    """Number of further images that distilled students see without labels, a random
    sample of the teacher's training images that are not --student-images. Every batch
    then has as many unlabelled images as labelled ones (--batch-size). Cross-entropy
    ignores them. Students alone do not see them."""
    predicted_labels: bool = True
    """Give unlabelled images the class that the teacher predicts, for distances that
    take labels; otherwise these distances ignore them."""
    placebo: Annotated[
        str | None, Choices(None, "pairs", "labels", "views", "gaussian")
    ] = None
    """Replace the teacher's outputs, as a control (with --views only). pairs: each
    image has the outputs of another image of its class. labels: of another image of
    any class. views: of another view of the same image. gaussian: features are drawn
    from a Gaussian with the mean and covariance of the class."""
    placebo_share: Annotated[float, PART] = 1.0
    """Share of the images of each class that have the outputs of another image, with
    --placebo pairs or labels; the other images keep their own."""
    quality_images: Annotated[int, POSITIVE, Mark.OF_FEATURE_ONLY] = 5000
    """Number of training images, the same number from each class, on which the
    knowledge quality of the teacher's layers is measured (--layers released)."""
    head: Annotated[tuple[str, ...] | None, Mark.OF_FEATURE_ONLY] = None
    """Modules of the student that labels train in feature_only. They learn from labels
    only, and all other modules from features only. None uses the modules after the
    features."""
    distance_group: Annotated[int | None, POSITIVE, Mark.NAMED_OTHERWISE] = None
    """Number of devices that gather features from each other; None uses all. A smaller
    number changes the loss to the mean of the distances of all groups."""


@dataclass(frozen=True)
class Optimizer:
    """Sets how the networks are trained."""

    teacher_epochs: Annotated[int, TRAINED, Mark.OF_TEACHER] = 15
    """Number of epochs of the teacher."""
    epochs: Annotated[int, POSITIVE, Mark.OF_STUDENTS] = 15
    """Number of epochs of each student."""
    eval_every: Annotated[int, POSITIVE] = 1
    """Number of epochs between evaluations; the last epoch is always evaluated."""
    batch_size: Annotated[int, POSITIVE] = 128
    """Number of labelled images in a batch, over all devices. With --unlabelled-images,
    a batch has as many unlabelled images in addition."""
    optimizer: Annotated[str, Choices("sgd", "adamw")] = "sgd"
    """Name of the optimizer: sgd or adamw."""
    lr: Annotated[float, POSITIVE] = 1e-2
    """Peak learning rate."""
    lr_end: Annotated[float, NOT_NEGATIVE] = 1e-4
    """Learning rate at the end of the cosine."""
    schedule: Annotated[
        str, Choices("cosine-epoch", "cosine", "onecycle", "step", "constant")
    ] = "cosine-epoch"
    """Schedule of the learning rate: cosine-epoch (a cosine that changes once per
    epoch, as in the released code), cosine (changes at every step, after --warmup),
    onecycle (rises along a cosine over the first 30 % of the steps, then falls almost
    to zero), step (falls to a tenth at --drops), constant (as in the released
    baseline)."""
    drops: Annotated[tuple[float, ...], SHARE] = (0.3, 0.6, 0.9)
    """Shares of the steps after which the rate falls to a tenth (step only)."""
    warmup: Annotated[float, SHARE] = 0.0
    """Share of the steps over which the rate rises from zero (cosine only)."""
    momentum: Annotated[float, SHARE] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight decay of all parameters: an L2 penalty with sgd, as in torch.optim.SGD;
    decoupled with adamw."""
    label_smoothing: Annotated[float, SHARE] = 0.0
    """Share of each label's probability that is given to all classes alike, in [0, 1).
    Applies to teacher and students."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of mixup, which replaces images and labels by weighted means of two; the
    weights are drawn from Beta(alpha, alpha), and 0 means no mixup. Applies to teacher
    and students."""


@dataclass(frozen=True)
class Run:
    """Sets where, how fast and how often to run; does not change a run's result."""

    recipe: str = "laptop"
    """Name of the recipe, which sets the defaults of all groups: paper, strong, laptop,
    feature_only, crd or imagenet."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds. For each seed, one student is trained without distillation, one
    with --equal-compute, and one for each distance."""
    equal_compute: bool = True
    """Also train a student without distillation for so many more epochs that it has the
    compute of a distilled run, which runs the teacher, too."""
    out: Annotated[Path | None, Mark.NOT_SHOWN] = None
    """Folder of the results; None uses runs/<dataset>-<recipe>."""
    data_dir: Annotated[Path | None, Mark.NOT_SHOWN] = None
    """Folder of the data; None searches $KDDM_DATA_DIR, or ./data and
    ~/.cache/kddm_jax, and for TFDS sets $TFDS_DATA_DIR and ~/tensorflow_datasets."""
    teacher_saw_held_out: bool = False
    """Accept a --teacher that may have been trained on the held-out images. Students
    are never trained on them."""
    devices: Annotated[int | None, POSITIVE] = None
    """Number of devices of all processes together; None uses all."""
    coordinator: Annotated[str | None, Mark.OWN, Mark.NOT_SHOWN] = None
    """HOST:PORT of the first process, if there are several, one on each host. None
    detects Cloud TPU and Slurm, and otherwise runs a single process."""
    processes: Annotated[int | None, POSITIVE, Mark.NOT_SHOWN] = None
    """Number of processes; 1 runs a single process, even on Cloud TPU or Slurm."""
    process: Annotated[int | None, Mark.OWN, Mark.NOT_SHOWN] = None
    """Index of this process, starting at 0."""
    stream_above: Annotated[float | None, NOT_NEGATIVE, Mark.NOT_SHOWN] = None
    """If the training images take more than this many megabytes, they stay in host
    memory and are sent to the devices batch by batch, ahead of time; None uses a
    quarter of the device's memory."""
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE, Mark.NOT_SHOWN] = 30.0
    """Minimum number of seconds between checkpoints. A checkpoint is always written at
    the end of a run and on SIGTERM."""
    on_nonfinite: Annotated[str, Choices("stop", "skip")] = "stop"
    """What to do after a step whose loss or gradient is not finite: stop; or skip,
    which counts such steps in the history and warns. Either way, the step does not
    change the parameters."""
    log: Annotated[str | None, Choices(None, "tensorboard"), Mark.NOT_SHOWN] = None
    """Format of a second log, of metrics and features, in the folder of every run:
    tensorboard (needs the extra tensorboard). None writes log.jsonl only."""
    profile: Annotated[int, NOT_NEGATIVE, Mark.NOT_SHOWN] = 0
    """Number of training steps of every run that JAX's profiler records, after the
    first ones, which compile. The trace is written to the run's folder."""
    embedding: Annotated[str, Choices("pca", "tsne", "none"), Mark.NOT_SHOWN] = "pca"
    """Method for the picture of the features in report.html: pca, tsne (slower) or
    none."""
    compilation_cache: Annotated[Path | None, Mark.NOT_SHOWN] = Path(
        "~/.cache/kddm_jax/xla"
    )
    """Folder that keeps compiled programs for later commands."""
    progress: Annotated[bool, Mark.OWN, Mark.NOT_SHOWN] = True
    """Show a progress bar on a terminal; otherwise print one line for each epoch."""


@dataclass(frozen=True)
class Settings:
    """Distils a teacher into students by matching distributions of their features.

    Defaults depend on --dataset and --recipe: pass them together with --help.

    Trains the teacher and, for each seed, a student without distillation and one
    student for each distance, then prints a table of results. Rerun the same command to
    resume; finished runs are not repeated.
    """

    data: Data = field(default_factory=Data)
    augmentation: Augmentation = field(default_factory=Augmentation)
    networks: Networks = field(default_factory=Networks)
    method: Method = field(default_factory=Method)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)


GROUPS: Mapping[str, type] = {f.name: f.type for f in fields(Settings)}  # type: ignore
GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in fields(kind)}
OPTIONS = {f.name: f for kind in GROUPS.values() for f in fields(kind)}
PATHS = {
    name
    for kind in GROUPS.values()
    for name, hint in get_type_hints(kind).items()
    if Path in get_args(hint)
}


# ---------------------------------------------------------------------------
# Flat names.


def flat(settings: Settings) -> dict[str, Any]:
    """Returns all settings by their name, without their groups."""
    return {
        f.name: getattr(getattr(settings, group), f.name)
        for group, kind in GROUPS.items()
        for f in fields(kind)
    }


def change(settings: Settings, **values: object) -> Settings:
    """Replaces some settings, given by their name without the group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        groups.setdefault(GROUP_OF[name], {})[name] = value
    changed = {
        group: replace(getattr(settings, group), **own) for group, own in groups.items()
    }
    return replace(settings, **changed)


def as_json(settings: Settings) -> dict[str, Any]:
    """Returns the settings as JSON values, by their name."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in flat(settings).items()
    }


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames settings that were recorded before version 0.2.0."""
    names = {"scale": "normalization", "view": "positions"}
    found = {names.get(name, name): value for name, value in values.items()}
    if values.get("view") == "positions":
        found["positions"] = "each"
    return found


def from_json(values: Mapping[str, Any]) -> Settings:
    """Reads settings that `as_json` wrote; missing ones get their defaults."""
    found = {}
    for name, value in renamed(values).items():
        if name in OPTIONS:
            if value is not None and name in PATHS:
                value = Path(value)
            found[name] = tuple(value) if isinstance(value, list) else value
    return change(Settings(), **found)


# ---------------------------------------------------------------------------
# What decides a result.


def marked(mark: Mark) -> set[str]:
    """Returns the names of the settings that have the mark."""
    return {name for name, option in OPTIONS.items() if mark in notes(option)}


# Settings that may differ between processes; settings that are not in a table's
# command; and files of which it shows the name without the folder.
OWN = marked(Mark.OWN) | PATHS
PLACES = marked(Mark.NOT_SHOWN)
FILES = PATHS - PLACES


def identity(settings: Settings, name: str) -> dict[str, Any]:
    """Returns the settings that decide the result of a run.

    These are the settings of all groups except `Run`, without those of other runs: the
    teacher's run does not depend on how students learn, and a student alone has no
    method.

    Args:
      settings: the settings of the command.
      name: name of the run: "teacher", "student" or "student_longer" (both alone), or a
        method.
    """
    others = Mark.OF_STUDENTS if name == "teacher" else Mark.OF_TEACHER
    left_out = marked(Mark.NAMED_OTHERWISE) | marked(others)
    if name != FEATURE_ONLY:
        left_out |= marked(Mark.OF_FEATURE_ONLY)
    groups = {*GROUPS} - {"run"}
    if name in ALONE:
        groups -= {"method"}
    return {
        key: value
        for key, value in as_json(settings).items()
        if GROUP_OF[key] in groups and key not in left_out
    }


def by_quality(settings: Settings) -> bool:
    """Returns whether the teacher's layers are chosen by quality."""
    return settings.method.layers == (RELEASED,)


def parts_of(name: str) -> tuple[str, ...]:
    """Returns the distances that a method sums: l2 and kd of "l2+kd".

    A published method is one part, with one lambda for all of its terms.
    """
    return (name,) if name in PUBLISHED else tuple(name.split("+"))
