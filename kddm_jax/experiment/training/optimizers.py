"""Makes the optimizer of a run, and the schedules of learning rate and lambda."""

from typing import Any

import jax.numpy as jnp
import optax

from kddm_jax.experiment.settings import Method, Optimizer


def make_schedule(settings: Optimizer, steps_per_epoch: int, epochs: int):
    """Makes the schedule of the learning rate.

    Args:
      settings: settings of the optimizer.
      steps_per_epoch: number of steps in an epoch.
      epochs: number of epochs.

    Returns:
      An Optax schedule.
    """
    total = steps_per_epoch * epochs
    if settings.schedule == "constant":
        return optax.constant_schedule(settings.lr)
    if settings.schedule == "onecycle":  # torch's OneCycleLR, with its defaults
        return optax.cosine_onecycle_schedule(
            total, settings.lr, pct_start=0.3, div_factor=25.0, final_div_factor=1e4
        )
    if settings.schedule == "step":
        count = len(settings.drops) + 1
        rates = [optax.constant_schedule(settings.lr * 0.1**i) for i in range(count)]
        boundaries = [round(share * total) for share in sorted(settings.drops)]
        return optax.join_schedules(rates, boundaries)
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if settings.warmup else settings.lr,
            peak_value=settings.lr,
            warmup_steps=round(settings.warmup * total),
            decay_steps=total,
            end_value=settings.lr_end,
        )

    def per_epoch(step):
        share = (step // steps_per_epoch) / epochs
        fall = 0.5 * (1 + jnp.cos(jnp.pi * share))
        return settings.lr_end + (settings.lr - settings.lr_end) * fall

    return per_epoch


def make_weight_schedule(settings: Method, steps: int) -> Any:
    """Makes the schedule of the factor of lambda.

    Args:
      settings: settings of the method.
      steps: number of steps of the run.

    Returns:
      An Optax schedule from 0 to 1 or from 1 to 0; None if lambda is constant.
    """
    if settings.weight_schedule == "warmup":
        return optax.linear_schedule(0.0, 1.0, transition_steps=max(1, steps // 2))
    if settings.weight_schedule == "decay":
        return optax.cosine_decay_schedule(1.0, decay_steps=steps)
    return None


def make_optimizer(settings: Optimizer, schedule) -> optax.GradientTransformation:
    """Makes AdamW, or SGD with decay before momentum, as in torch.optim.

    Args:
      settings: settings of the optimizer.
      schedule: schedule of the learning rate.

    Returns:
      The transformation of gradients.
    """
    if settings.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=settings.weight_decay)
    sgd = optax.sgd(schedule, settings.momentum, settings.nesterov)
    if not settings.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), sgd)
