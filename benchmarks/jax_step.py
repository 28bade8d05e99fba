"""Makes our distillation step a program of `step.py`."""

import statistics
import time

import gaps
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from workload import CLASSES, LEARNING_RATE, MEAN, STD, Data, Setting

from kddm_jax import adapters, resnet, train_step
from kddm_jax.data import augment
from kddm_jax.distances import Distance

TX = optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True)


def networks(setting: Setting) -> tuple[resnet.ResNet, resnet.ResNet]:
    """Makes student and teacher."""
    options = {
        "num_classes": CLASSES,
        "stem": setting.stem,
        "width": setting.width,
        "dtype": jnp.dtype(setting.dtype),
    }
    return resnet.ResNet18(**options), resnet.ResNet34(**options)


def make_step(setting: Setting, student: resnet.ResNet, teacher: resnet.ResNet, **loss):
    """Makes the step; ``loss`` goes to `train_step.make_train_step`."""
    return train_step.make_train_step(
        adapters.linen_apply(student),
        adapters.linen_apply(teacher),
        TX,
        augment=augment.make_augment(
            mean=(MEAN,) * 3, std=(STD,) * 3, dtype=setting.dtype
        ),
        **loss,
    )


def make_models(setting: Setting, images: np.ndarray):
    """Makes random ``(student, variables), (teacher, variables)``.

    The teacher's statistics are those of a batch; with the initial ones its features
    would grow by a factor of two in every block.
    """
    student, teacher = networks(setting)
    inputs = (jnp.asarray(images[:128], jnp.float32) / 255 - MEAN) / STD
    variables = [
        jax.jit(model.init)(jax.random.key(seed), inputs[:2])
        for seed, model in enumerate((student, teacher))
    ]

    @jax.jit
    def calibrated(variables):
        """Recovers the statistics of the batch from an average with momentum 0.9."""
        _, stats = adapters.linen_apply(teacher)(variables, inputs, train=True)
        undo = lambda new, old: (new - 0.9 * old) / 0.1
        stats = jax.tree.map(undo, stats, variables["batch_stats"])
        return {**variables, "batch_stats": stats}

    return (student, variables[0]), (teacher, calibrated(variables[1]))


def count_parameters(variables) -> int:
    """Counts parameters, without statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def none(x: jax.Array, y: jax.Array) -> jax.Array:
    """Uses the teacher's features without a distance; else XLA drops the teacher."""
    del x
    return jnp.mean(y)


class JaxStep:
    """Compiles our step; a call makes one dispatch and waits for its losses."""

    def __init__(self, setting: Setting, distance: str | Distance, data: Data, models):
        """Traces, compiles and runs once; ``models`` are from `make_models`."""
        (student, student_variables), (teacher, teacher_variables) = models
        loss = {"distance": none, "weight": 0.0}
        if isinstance(distance, Distance):
            loss = {"distance": distance, "weight": harness.weight_of(distance)}
        elif distance != "none":
            row, options = harness.parse_distance(distance)
            key = distance.partition("/")[0]
            loss = {"distance": key, "weight": harness.weight_of(row), **options}
        self.step = make_step(setting, student, teacher, axis_name=None, **loss)
        state = train_step.create_state(student_variables, TX)
        # A copy, because the state is donated and all programs share these variables.
        self.state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
        self.rest = (teacher_variables, *map(jnp.asarray, data))
        self.indices = data.indices
        self.losses, self.iterations, self.converged = [], None, True

        start = time.perf_counter()
        scanned = jax.jit(train_step.scan_steps(self.step), donate_argnums=0)
        self.lowered = scanned.lower(self.state, *self.rest)
        self.run = self.lowered.compile()
        self()
        self.first_s = time.perf_counter() - start

    def __call__(self) -> None:
        """Makes one dispatch and waits for it by reading the losses."""
        metrics = self.dispatch(self.rest[-1])
        self.losses.extend(np.asarray(metrics["loss"]).tolist())
        for name, values in metrics.items():
            if name.endswith("/iterations"):
                self.iterations = float(np.mean(values))
            if name.endswith("/converged"):
                self.converged &= bool(np.all(values))

    def dispatch(self, indices) -> dict[str, jax.Array]:
        """Queues a dispatch and returns its metrics without waiting for them."""
        *rest, _ = self.rest
        self.state, metrics = self.run(self.state, *rest, indices)
        return metrics

    def gap_ms(self, dispatches: int) -> float | None:
        """Measures the time in a step in which the device is idle (`gaps.idle_ms`).

        This is the median of three traces.  Indices come from the host, as in training.
        """
        one = lambda: gaps.idle_ms(lambda: self.dispatch(self.indices), dispatches)
        idle = [one() for _ in range(3)]
        return None if None in idle else statistics.median(idle) / len(self.indices)

    def memory_gb(self) -> float | None:
        """Returns GB of arguments, results and temporaries, as XLA plans them."""
        planned = harness.planned_bytes(self.run)
        return planned and planned / 1e9

    def flops(self) -> float | None:
        """Returns FLOP of one step as XLA counts them before optimisation.

        Padding is not counted. After optimisation, convolutions are calls of a library.
        """
        teacher_variables, images, labels, indices = self.rest
        lowered = self.lowered
        if len(indices) > 1:  # one step only: the count of a loop is unknown
            batch = images[indices[0]], labels[indices[0]]
            lowered = jax.jit(self.step).lower(self.state, teacher_variables, *batch)
        return (lowered.cost_analysis() or {}).get("flops")
