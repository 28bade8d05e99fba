"""Counts operations, so that a student alone can have the compute of a distilled run.

A step of a student costs about three forward passes F_S per image, one forwards and two
backwards. A distilled student also needs a forward pass F_T of the teacher, at every
step, or on fixed views once for each view. E epochs of a distilled run therefore have
the compute of

    E (1 + F_T / (3 F_S)),  with V views of each image  E + V F_T / (3 F_S)

epochs of a student alone. If a file has the teacher's outputs or statistics, F_T is 0.
With N unlabelled images besides n labelled ones, a step has twice as many images, and
there are views of n + N images:

    2 E (1 + F_T / (3 F_S)),  with V views  2 E + (1 + N / n) V F_T / (3 F_S)

The distance itself and projectors are not counted. F is the
number of floating-point operations of a forward pass by XLA's cost analysis, which
counts without compiling or running it.
"""

import contextlib
import math

import jax
import jax.numpy as jnp

from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.training import models
from kddm_jax.experiment.training.problems import Problem

FORWARD_PASSES = 3  # of a training step, in units of the forward pass


def on_the_host():
    """Traces for a CPU if there is one, so that all machines count the same program."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes it
        return contextlib.nullcontext()


def operations(who: str, model: models.Network, image: tuple, batch: int) -> float:
    """Counts the operations of a network's forward pass in evaluation mode.

    Args:
      who: "teacher" or "student", for errors.
      model: the network.
      image: shape of an image, ``(h, w, c)``.
      batch: number of images in a batch.

    Returns:
      The number of floating-point operations per image.

    Raises:
      UserError: XLA does not know the number.
    """
    images = jax.ShapeDtypeStruct((batch, *image), jnp.float32)
    apply = models.network_apply(model)
    with on_the_host():
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        forward = jax.jit(lambda v, x: apply(v, x, train=False)[0])
        try:
            found = forward.lower(variables, images).cost_analysis()
        except NotImplementedError:
            found = None
    total = float((found or {}).get("flops", 0.0))
    if not total > 0:
        raise UserError(
            f"XLA does not count the operations of the {who}, so that the compute of a "
            "distilled run is unknown; pass --no-equal-compute"
        )
    return total / batch


def longer_epochs(problem: Problem) -> int:
    """Returns the epochs of a student alone with the compute of a distilled run.

    Args:
      problem: the data, the devices and the settings, after `runs.check_distances`.

    Returns:
      The number of epochs, rounded up.

    Raises:
      UserError: XLA does not know the operations of a network.
    """
    settings, image = problem.settings, problem.dataset.train_images.shape[1:]
    batch, epochs = settings.optimizer.batch_size, settings.optimizer.epochs
    # In units of an epoch of a student alone, which sees the labelled images once.
    labelled, unlabelled = len(problem.parts.student), len(problem.parts.unlabelled)
    shown = 2 * epochs if unlabelled else epochs
    if problem.statistics is not None or problem.outputs is not None:
        return shown  # no teacher runs
    if problem.longer_epochs is None:
        if problem.teacher is None:
            raise RuntimeError("the teacher is unknown; open the study by study.open")
        teacher = operations("teacher", problem.teacher, image, batch)
        student = operations("student", problem.student, image, batch)
        views = settings.data.views
        passes = views * (1 + unlabelled / labelled) if views else shown
        more = passes * teacher / (FORWARD_PASSES * student)
        problem.longer_epochs = math.ceil(shown + more)
    return problem.longer_epochs
