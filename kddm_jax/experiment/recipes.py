"""Defines the recipes and parses the command line.

A recipe is a function that returns the default settings for a data set; options on the
command line replace them. ``--help`` shows the values for the given recipe and data
set.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from kddm_jax.experiment.checks import check
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import (
    FEATURE_ONLY,
    HELPFUL,
    AtMost,
    Augmentation,
    Data,
    Method,
    Networks,
    Optimizer,
    Run,
    Settings,
    change,
    flat,
)

# Digits are never mirrored; images of 8 x 8 pixels allow a shift of one.
AUGMENTATIONS: Mapping[str, Mapping[str, Any]] = {
    "digits": {"padding": 1, "flip": False},
    "mnist": {"padding": 2, "flip": False},
    "svhn": {"flip": False},
    "svhn_cropped": {"flip": False},
}
SGD = Optimizer(
    optimizer="sgd", momentum=0.9, nesterov=True, schedule="cosine", lr_end=0.0
)


def augmentation(dataset: str, recipe: Augmentation | None = None) -> Augmentation:
    """Returns the augmentation of a recipe, adapted to a data set."""
    return replace(recipe or Augmentation(), **AUGMENTATIONS.get(dataset, {}))


def paper(dataset: str) -> Settings:
    """Returns KD2M's settings (arXiv 2504.01757).

    The paper starts from ImageNet weights (--pretrained-teacher, --pretrained-student).
    Images are normalized by the data set's own statistics. On MNIST the networks are
    the perceptrons of the released code's first benchmark.
    """
    networks, distorted = Networks(stem="imagenet", width=64), augmentation(dataset)
    if dataset == "mnist":
        models = {"teacher_model": "TeacherMLP", "student_model": "StudentMLP"}
        networks = replace(networks, **models)
        distorted = Augmentation(0, flip=False, degrees=10.0, shift=0.1, zoom=0.1)
    optimizer = Optimizer(
        teacher_epochs=15,
        epochs=15,
        batch_size=AtMost(128),
        lr=1e-2,
        lr_end=1e-4,
        schedule="cosine-epoch",
        momentum=0.9,
    )
    return Settings(
        Data(dataset), distorted, networks, optimizer=optimizer, run=Run("paper")
    )


def strong(dataset: str) -> Settings:
    """Returns settings for training from scratch on an accelerator."""
    optimizer = replace(
        SGD,
        teacher_epochs=100,
        epochs=100,
        batch_size=AtMost(128),
        lr=0.1,
        warmup=0.05,
        weight_decay=5e-4,
    )
    return Settings(
        Data(dataset),
        augmentation(dataset),
        Networks(stem="cifar", width=64),
        Method(HELPFUL, normalization="unit"),
        optimizer,
        Run("strong"),
    )


def laptop(dataset: str) -> Settings:
    """Returns settings that take minutes on two cores.

    Networks are narrow, and students see few labels. On the digits, networks are also
    shallow: a ResNet34 takes longer to compile than to train. Students see 64 labels,
    which they fit; distilled students also see a thousand digits without labels, and
    three seeds show the noise.
    """
    data = Data(
        dataset,
        train_images=AtMost(5000),
        student_images=AtMost(2500),
        test_images=AtMost(2000),
    )
    length = {"teacher_epochs": 5, "epochs": 5, "batch_size": AtMost(64)}
    distorted, run = augmentation(dataset), Run("laptop")
    method = Method(HELPFUL, normalization="unit")
    networks = Networks(stem="cifar", width=16)
    if dataset == "digits":
        data = Data(dataset, student_images=AtMost(64))
        distorted = replace(distorted, degrees=10.0)
        length = {"teacher_epochs": 15, "epochs": 100, "batch_size": AtMost(32)}
        length["eval_every"] = 10
        run = replace(run, seeds=(0, 1, 2))
        method = replace(method, unlabelled_images=AtMost(1000))
        networks = replace(networks, teacher_model="ResNet18", student_model="ResNet9")
    optimizer = replace(SGD, **length, lr=0.1, warmup=0.2, weight_decay=5e-4)
    return Settings(
        data,
        distorted,
        networks,
        method,
        optimizer,
        run,
    )


def feature_only(dataset: str) -> Settings:
    """Returns settings in which only features train the backbone (arXiv 2511.14981).

    The teacher is a ResNet34 and the student a ResNet9, trained by AdamW with a
    one-cycle schedule; the student alone and KD are trained, too. As in the paper,
    images are not augmented. Features are scaled to unit length; ``--layers released``
    uses the paper's loss instead.
    """
    return Settings(
        Data(dataset),
        augmentation(dataset, Augmentation(padding=0, flip=False)),
        Networks(student_model="ResNet9", stem="cifar", width=16),
        Method(("kd", FEATURE_ONLY), normalization="unit", projector="conv"),
        Optimizer(
            teacher_epochs=50,
            epochs=50,
            batch_size=AtMost(128),
            optimizer="adamw",
            schedule="onecycle",
            lr=7.5e-3,
            weight_decay=0.01,
        ),
        Run("feature_only"),
    )


def crd(dataset: str) -> Settings:
    """Returns the settings of CRD's and DKD's tables on CIFAR-100 (arXiv 1910.10699).

    RepDistiller and mdistiller use them for networks without depthwise convolutions.
    Choose the pair by ``--teacher-model`` and ``--student-model``.
    """
    optimizer = replace(
        SGD,
        nesterov=False,
        schedule="step",
        drops=(0.625, 0.75, 0.875),  # after 150, 180 and 210 epochs
        teacher_epochs=240,
        epochs=240,
        batch_size=AtMost(64),
        lr=0.05,
        weight_decay=5e-4,
    )
    return Settings(
        Data(dataset),
        augmentation(dataset),
        Networks(teacher_model="ResNet56", student_model="ResNet20"),
        Method(HELPFUL, normalization="unit"),
        optimizer,
        Run("crd"),
    )


def imagenet(dataset: str) -> Settings:
    """Returns torchdistill's settings for ResNet34 to ResNet18 on ImageNet.

    mdistiller's are the same with twice the batch and the rate (batches of 512, 0.2).
    Images are cached as squares of 224 pixels, and random parts of these are enlarged;
    torchdistill takes the parts from the original images.
    """
    optimizer = replace(
        SGD,
        nesterov=False,
        schedule="step",
        drops=(0.3, 0.6, 0.9),
        teacher_epochs=100,
        epochs=100,
        batch_size=AtMost(256),
        lr=0.1,
        weight_decay=1e-4,
    )
    return Settings(
        Data(dataset, image_size=224),
        augmentation(dataset, Augmentation(padding=0, smallest_area=0.08)),
        Networks(stem="imagenet"),
        Method(HELPFUL, normalization="unit"),
        optimizer,
        Run("imagenet"),
    )


RECIPES: Mapping[str, Callable[[str], Settings]] = {
    recipe.__name__: recipe
    for recipe in (paper, strong, laptop, feature_only, crd, imagenet)
}


def defaults(dataset: str, recipe: str) -> Settings:
    """Returns the settings of a recipe on a data set, before the command line.

    Raises:
      UserError: the recipe is unknown.
    """
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    return RECIPES[recipe](dataset)


def parse(arguments: Sequence[str], prog: str = "kddm distill") -> Settings:
    """Reads a command line; the recipe and the data set choose the defaults.

    Args:
      arguments: the command line.
      prog: name of the command, for ``--help``.

    Returns:
      The settings.

    Raises:
      UserError: settings contradict each other or are out of range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=Data.dataset)
    first.add_argument("--recipe", default=Run.recipe)
    chosen, _ = first.parse_known_args(arguments)
    settings = tyro.cli(
        Settings,
        args=arguments,
        default=defaults(chosen.dataset, chosen.recipe),
        prog=prog,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    paths = {
        name: value.expanduser()
        for name, value in flat(settings).items()
        if isinstance(value, Path)
    }
    settings = change(settings, **paths)
    check(settings)
    return settings
