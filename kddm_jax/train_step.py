"""Makes the steps of training and evaluation, and maps them over devices.

A step is a pure function of ``(state, teacher_variables, images, labels, ...)`` on one
device's share of the batch.  `parallel` maps it over devices, and is the only place
that chooses between pmap and shard_map.  Nothing that varies between runs is a constant
of the program: seed and lambda are in the state, and all teacher arrays are arguments,
so that a second run of the same shape does not retrace.

A model is a function ``apply(variables, images, *, train, rngs) -> (outputs, state)``.
``outputs`` has ``logits``, ``features`` and ``maps``.  ``state`` is the new
``variables["batch_stats"]``, whose floating arrays are averaged over devices.  ``rngs``
may be left out of the signature; it is a mapping with the key of ``"dropout"``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kddm_jax.distances import Distance
from kddm_jax.losses import NOTHING, Term
from kddm_jax.numerics import axes
from kddm_jax.numerics.batches import (
    augment_batch,
    call,
    check_leaf,
    count_samples,
    layers_of,
)
from kddm_jax.numerics.checks import check_choice, check_labels, check_number
from kddm_jax.numerics.devices import accuracy_of, average_state, unsharded
from kddm_jax.numerics.evaluation import evaluation_sums
from kddm_jax.numerics.gradients import all_finite, gradients, updates_of
from kddm_jax.numerics.mixing import Mix, mix_batch
from kddm_jax.numerics.promotion import implicit_promotion
from kddm_jax.numerics.targets import class_labels, without_labels
from kddm_jax.numerics.tokens import labels_of_tokens, read_masks
from kddm_jax.teachers import check_teachers, loss_of, rngs_for, seen, teach

Variables = Mapping[str, Any]  # nested by module, which Python's types cannot express
Metrics = dict[str, jax.Array]
Tree = TypeVar("Tree")  # any PyTree of arrays; the result has the same structure
Devices = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm] # a class
AXIS = "batch"


class Outputs(Protocol):
    """Describes the outputs of a model, such as ``adapters.Outputs``."""

    logits: jax.Array
    features: jax.Array
    maps: Mapping[str, jax.Array]


ApplyFn = Callable[..., tuple[Outputs, Variables]]
Augment = Callable[[jax.Array, jax.Array], jax.Array]
Teaching = str | Distance | Callable[..., jax.Array] | Term | Sequence[Term]


class TrainState(flax.struct.PyTreeNode):
    """Contains everything that changes from step to step.

    Attributes:
      params: parameters of the student.
      batch_stats: statistics of its normalization layers; ``{}`` if it has none.
      opt_state: state of the optimizer.
      step: number of updates made, int32.
      seed: seed of the run, uint32; random keys are derived from seed and step.
      weight: lambda, for steps made with ``weight=None``.
    """

    params: Variables
    batch_stats: Variables
    opt_state: optax.OptState
    step: jax.Array
    seed: jax.Array
    weight: jax.Array

    @property
    def variables(self) -> dict[str, Variables]:
        """Returns parameters and statistics in the form that a model's apply takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    variables: Variables,
    tx: optax.GradientTransformation,
    *,
    seed: int = 0,
    weight: float = 1.0,
) -> TrainState:
    """Makes the state before the first step.

    Args:
      variables: the student's variables, ``{"params": ..., "batch_stats": ...}``.
      tx: the optimizer.
      seed: seed of augmentation and random distances.
      weight: lambda.

    Returns:
      A `TrainState`; call `replicate` on it before the first step.

    Raises:
      ValueError: ``weight`` is negative.
    """
    check_number("weight", weight, positive=False)
    return TrainState(
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        weight=jnp.asarray(weight, jnp.float32),
    )


def _update(tx, state, batch_stats, loss, grads):
    """Returns the next state, or the old one if loss or gradient is not finite."""
    with implicit_promotion():  # for the optimizer
        updates, opt_state = updates_of(tx, grads, state.opt_state, state.params, loss)
    new = state.replace(
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        step=state.step + 1,
    )
    finite = all_finite((loss, grads))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), finite


def make_train_step(
    student_apply: ApplyFn,
    teacher_apply: ApplyFn | Mapping[str, ApplyFn] | None,
    tx: optax.GradientTransformation,
    *,
    augment: Augment,
    mix: Mix | None = None,
    distance: Teaching | Mapping[str, Teaching] = (),
    weight: float | jax.Array | None = None,
    weight_schedule: Callable[[jax.Array], jax.Array] | None = None,
    head: Sequence[str] | None = None,
    axis_name: str | None = AXIS,
    **loss_options: object,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes a function that runs one distillation step on one device.

    Args:
      student_apply: apply function of the student, the network that is trained.
      teacher_apply: apply function of the teacher, which stays fixed.  None trains on
        labels alone, with ``distance=()``, or with Terms that compare with a bank.  For
        several teachers, pass a mapping from their names; ``distance`` and the step's
        ``teacher_variables`` and ``teacher_data`` are then mappings, too, and terms are
        called ``"teacher:term"``.
      tx: the optax optimizer; if its update takes ``value``, it gets the loss.
      augment: function ``(key, image) -> float image`` that augments one uint8 image.
        Student and teacher get the same augmented image.  Inputs that are not images
        stay as they are with ``lambda key, tokens: tokens``.
      mix: function ``(key, images, labels) -> (images, labels)`` that mixes a device's
        augmented batch, such as `numerics.mixing.make_mix` (label smoothing, mixup).
        Student and teacher get the same mixed images.  None does not mix.
      distance: as in `distill_loss`; ``()`` for cross-entropy alone.
      weight: lambda.  None uses ``state.weight``, which can change without retracing
        the step.
      weight_schedule: optax schedule that gives the factor of lambda at each step.
        None means a factor of 1 at every step.
      head: names of the student's top modules that form its head.  Only the head learns
        from the logits (from cross-entropy, distances of predictions and the layer
        ``"logits"``), and all other modules learn only from distances of other layers,
        as in arXiv 2511.14981.  None trains all modules on the whole loss.
      axis_name: name of the mapped axis; None for a single device without pmap.
      **loss_options: other arguments of `distill_loss`: ``task_weight``,
        ``normalization``, ``predicted_labels``, ``group_size``, ``solver``, ...

    Returns:
      ``step(state, teacher_variables, images, labels, teacher_data={}, mask=None) ->
      (state, metrics)``.  Images are uint8 ``[b, h, w, c]``, this device's share;
      labels, ``teacher_data`` and ``mask`` are as in `distill_loss`; with logits ``[b,
      t, k]`` every token is a sample.  Metrics are scalars, equal on all devices:
      ``loss``; each term; ``accuracy`` on the labelled samples of the global batch
      before the update; ``finite``, which is False if loss or gradient is not finite
      (the step then returns the old state); and with a teacher ``teacher_finite``.

    Raises:
      ValueError: there is a distance but no teacher, or teachers and distances have
        different names; or ``head`` names an unknown module (when the step is traced).
    """
    check_teachers(teacher_apply, distance)
    options = dict[str, Any](loss_options)

    def step(state, teacher_variables, images, labels, teacher_data=NOTHING, mask=None):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        inputs = augment_batch(augment, key, images, axis_name)
        labels = unsharded(jnp.asarray(labels))
        soft = jnp.issubdtype(labels.dtype, jnp.floating)
        if mask is not None and labels.ndim - soft == 1:
            labels = without_labels(labels, read_masks(mask, len(labels)).samples)
        if mix is not None:
            inputs, labels = mix_batch(mix, key, inputs, labels, axis_name)
        guide = teach(teacher_apply, teacher_variables, inputs)
        lam = state.weight if weight is None else weight
        if weight_schedule is not None:
            with implicit_promotion():
                lam = lam * weight_schedule(state.step)

        def forward(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            rngs = rngs_for(student_apply, key, axis_name)
            outputs, new = call(student_apply, variables, inputs, train=True, **rngs)
            return (outputs.logits, layers_of(outputs)), new

        def objective(outputs):
            return loss_of(
                *(outputs, guide, labels),
                distance=distance,
                weight=lam,
                teacher_data=teacher_data,
                mask=mask,
                key=key,
                axis_name=axis_name,
                **options,
            )

        loss, terms, batch_stats, logits, grads = gradients(
            forward, objective, state.params, head
        )
        if axis_name is not None:
            # Every device differentiates the same global loss, so average: never sum.
            grads = jax.lax.pmean(grads, axis_name)
            batch_stats = average_state(batch_stats, axis_name)
        new, finite = _update(tx, state, batch_stats, loss, grads)
        shape = None
        if logits.ndim == 3:  # every token is a sample, as in the loss
            shape = logits.shape[:2]
            logits = logits.reshape(-1, logits.shape[2])
            labels, mask = labels_of_tokens(labels, mask, shape)
            labels = without_labels(labels, mask)
        accuracy = accuracy_of(logits, class_labels(labels), axis_name)
        metrics = {"loss": loss, **terms, "accuracy": accuracy, "finite": finite}
        if teacher_apply is not None:
            metrics["teacher_finite"] = all_finite(seen(guide, mask, shape), axis_name)
        return new, metrics

    return axes.with_axis(step, axis_name)


def known_outputs(
    outputs: Outputs, images: jax.Array, *, train: bool
) -> tuple[Outputs, Variables]:
    """Returns the outputs of a teacher that were computed before.

    With this as ``teacher_apply``, pass the step the teacher's outputs on the batch as
    ``teacher_variables``: an object with ``logits``, ``features`` and ``maps``.  Images
    must then be fixed views, because the outputs follow neither random augmentation nor
    mixup.

    Args:
      outputs: the teacher's outputs on this batch.
      images: ignored.
      train: ignored.

    Returns:
      ``(outputs, {})``.
    """
    del images, train
    return outputs, {}


def scan_steps(step: Callable, *, known: bool = False) -> Callable:
    """Runs several steps in one program, over data that stay on the device.

    Use it on accelerators, where it saves the host's work between steps.  XLA:CPU runs
    the body of a loop 15 times slower (18 against 340 ms for a small ResNet), so on a
    CPU pass one step at a time: a single row of indices makes no loop.

    Args:
      step: a step from `make_train_step`.
      known: whether the step's teacher is `known_outputs` (of several teachers, all of
        them).  ``f`` then takes the teacher's outputs on all images as
        ``teacher_variables``.

    Returns:
      ``f(state, teacher_variables, images, labels, indices, teacher_data={},
      mask=None) -> (state, metrics)``.  Images are uint8 ``[n, h, w, c]``; they, labels
      and mask are those of the whole data set; ``indices`` ``[steps, b]`` are this
      device's share of each batch.  Metrics have a leading axis of steps.
    """

    def scanned(
        state,
        teacher_variables,
        images,
        labels,
        indices,
        teacher_data=NOTHING,
        mask=None,
    ):
        def body(state, index):
            # Without the barrier XLA:CPU repeats the lookup in every consumer.
            lookup = lambda table: jax.tree.map(lambda array: array[index], table)
            batch = lookup(images), jnp.asarray(labels)[index]
            teacher = teacher_variables
            if known:
                teacher = lookup(teacher_variables)
                batch, teacher = jax.lax.optimization_barrier((batch, teacher))
            else:
                batch = jax.lax.optimization_barrier(batch)
            own_mask = jax.tree.map(lambda array: jnp.asarray(array)[index], mask)
            return step(state, teacher, *batch, teacher_data, own_mask)

        if indices.shape[0] > 1:
            return jax.lax.scan(body, state, indices)
        state, metrics = body(state, indices[0])
        return state, jax.tree.map(lambda m: jnp.expand_dims(m, 0), metrics)

    return axes.with_axis(scanned, axes.axis_of(step))


def make_eval_step(
    apply: ApplyFn,
    *,
    normalize: Callable[[jax.Array], jax.Array],
    top: int | None = None,
    axis_name: str | None = AXIS,
) -> Callable[..., Metrics]:
    """Makes a function that evaluates a network on one device's share of a batch.

    Args:
      apply: apply function of the network.
      normalize: function ``uint8 image -> float image`` of one image.
      top: for top-5 accuracy, 5: the result then has ``correct_top``, the number of
        images whose label is among the ``top`` largest logits.  None leaves it out.
      axis_name: name of the mapped axis; None for a single device without pmap.

    Returns:
      ``g(variables, images, labels) -> {"count", "correct", "loss"}``, with ``top``
      also "correct_top": sums over the images of all devices (the loss is the summed
      cross-entropy in nats).  Images with label -1 are padding and are not counted.
    """

    def evaluate(variables, images, labels):
        axes.check_axis(axis_name)
        labels = check_labels(labels, count_samples(images), rows_of="images")
        inputs, rngs = jax.vmap(normalize)(images), rngs_for(apply, None, axis_name)
        outputs, _ = call(apply, variables, inputs, train=False, **rngs)
        sums = evaluation_sums(unsharded(outputs.logits), labels, top)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return axes.with_axis(evaluate, axis_name)


def replicate(tree: Tree, devices: Devices | None = None) -> Tree:
    """Copies a tree to all devices, in the layout that `parallel` takes.

    Call this before the first step: a NumPy or single-device state is traced and
    compiled twice, and cannot be donated across processes.

    Args:
      tree: tree of arrays; all processes must have the same one.
      devices: devices of the mesh; None uses all devices of all processes.

    Returns:
      The tree, replicated on a mesh whose axis is the one that `parallel` maps.
    """
    mesh = Mesh(jax.devices() if devices is None else devices, (AXIS,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    if not everywhere.is_fully_addressable:
        place = partial(jax.make_array_from_process_local_data, everywhere)
        return jax.tree.map(lambda a: place(np.array(a)), tree)
    # A copy: donating the result must not delete the caller's arrays.
    fresh = jax.tree.map(lambda a: jnp.array(a, copy=True), tree)
    return jax.device_put(fresh, everywhere)


def shard(batch: Tree, devices: int) -> Tree:
    """Splits the leading axis, ``[b, ...] -> [devices, b / devices, ...]``.

    Args:
      batch: tree of arrays with a common leading axis.
      devices: number of devices.

    Returns:
      The tree with a leading axis of devices.

    Raises:
      ValueError: the devices do not divide the batch, or a leaf is not an array.
    """

    def split(array):
        check_leaf(array)
        if array.shape[0] % devices:
            raise ValueError(
                f"batch of {array.shape[0]} does not divide among {devices} devices; "
                f"choose a multiple of {devices}, drop the rest of a last batch, or "
                "fill it up and pass mask"
            )
        return array.reshape(devices, -1, *array.shape[1:])

    return jax.tree.map(split, batch)


def _by_pmap(fn, in_axes, donate, devices):
    return jax.pmap(
        fn,
        axis_name=AXIS,
        in_axes=in_axes,
        out_axes=None,
        donate_argnums=donate,
        devices=devices,
    )


def _by_shard_map(fn, in_axes, donate, devices):
    mesh = Mesh(devices, (AXIS,))
    spec = lambda axis: () if axis is None else (*[None] * axis, AXIS)
    specs = tuple(PartitionSpec(*spec(axis)) for axis in in_axes)

    def own(tree, axis):  # the leading axis of devices has length one here
        if axis is None:
            return tree
        return jax.tree.map(lambda a: jnp.squeeze(a, axis), tree)

    def per_device(*arguments):
        return fn(*map(own, arguments, in_axes))

    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    program = jax.jit(
        jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            check_vma=False,  # for groups of devices
        ),
        in_shardings=shardings,
        donate_argnums=donate,
    )

    def placed(tree, sharding):  # jit takes a NumPy array as the array of all processes
        place = partial(jax.make_array_from_process_local_data, sharding)
        put = lambda a: place(a) if isinstance(a, np.ndarray) else a
        return jax.tree.map(put, tree)

    def mapped(*arguments):
        axes.check_arguments(arguments, in_axes)
        return program(*map(placed, arguments, shardings))

    mapped.lower = program.lower  # as under pmap
    return mapped


MAPPINGS: Mapping[str, Callable[..., Callable]] = MappingProxyType(
    {"pmap": _by_pmap, "shard_map": _by_shard_map}
)


def parallel(
    fn: Callable,
    *,
    in_axes: tuple[int | None, ...],
    donate: tuple[int, ...] = (),
    devices: Devices | None = None,
    how: str = "pmap",
) -> Callable:
    """Maps a per-device function over devices, by pmap or shard_map.

    Outputs must be equal on all devices (after pmean or psum), and are returned
    replicated.  Arguments with axis None must be replicated by `replicate`.

    Args:
      fn: per-device function with collectives over ``"batch"``.
      in_axes: 0 for arguments with a leading axis of devices (see `shard`), None for
        replicated ones.  Each of several processes passes the shares of its devices.
      donate: argument numbers whose buffers may be reused.
      devices: devices to map over; None uses all devices of all processes.
      how: a key of `MAPPINGS`: ``"pmap"``, or ``"shard_map"`` under jit, which does
        the same and is recommended by JAX for new code.

    Returns:
      The mapped, compiled function.  It has the method ``lower`` of `jax.jit`, which
      also takes ``jax.ShapeDtypeStruct`` for arrays.

    Raises:
      ValueError: ``how`` is unknown, or ``fn`` is a step of this module with another
        ``axis_name``.
    """
    check_choice("how", how, MAPPINGS)
    axes.check_mapped(fn, AXIS)
    devices = jax.devices() if devices is None else list(devices)
    return MAPPINGS[how](fn, tuple(in_axes), donate, devices)
