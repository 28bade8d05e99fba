"""Computes the gradient of a step's loss, and the optimizer's updates.

In feature-only distillation the head learns from the logits and the backbone from the
layers.  This takes one forward pass and two backward passes.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any


def _module(path):
    """Returns the name of the top module of a leaf, in a tree of any type."""
    return jax.tree_util.keystr(path[:1], simple=True)


def gradients(
    forward: Callable, objective: Callable, params: Tree, head: Sequence[str] | None
) -> tuple:
    """Computes a step's loss, its gradient, and the other results of the forward pass.

    Args:
      forward: ``forward(params) -> ((logits, layers), state)``.
      objective: ``objective((logits, layers)) -> (loss, terms)``.
      params: parameters of the student, by top module.
      head: names of the modules that learn from the logits, and only from them.  None
        trains all modules on the whole loss.

    Returns:
      ``(loss, terms, state, logits, gradient)``.

    Raises:
      ValueError: ``head`` contains an unknown module.
    """
    if head is None:

        def loss_fn(params):
            outputs, state = forward(params)
            loss, terms = objective(outputs)
            return loss, (terms, state, outputs[0])

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (terms, state, logits)), grads = grad_fn(params)
        return loss, terms, state, logits, grads

    modules = {_module(path): None for path, _ in jax.tree.leaves_with_path(params)}
    if missing := [name for name in head if name not in modules]:
        raise ValueError(
            f"head names {', '.join(missing)}; the student's modules are "
            f"{', '.join(modules)}"
        )
    # There is one forward pass and two backward passes: from the logits to the head,
    # where XLA removes the unused gradient of the rest, and from the layers to the
    # rest.
    outputs, pull_back, state = jax.vjp(forward, params, has_aux=True)
    grad_fn = jax.value_and_grad(objective, has_aux=True)
    (loss, terms), (by_logits, by_layers) = grad_fn(outputs)
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    (of_logits,) = pull_back((by_logits, zero(by_layers)))
    (of_layers,) = pull_back((zero(by_logits), by_layers))
    add = lambda path, a, b: a + b if _module(path) in head else a
    grads = jax.tree.map_with_path(add, of_layers, of_logits)
    return loss, terms, state, outputs[0], grads


def updates_of(
    tx: optax.GradientTransformation,
    grads: Tree,
    opt_state: Tree,
    params: Tree,
    loss: jax.Array,
) -> tuple[Tree, Tree]:
    """Computes the updates; an optimizer that takes ``value`` gets the loss.

    Args:
      tx: the optimizer.
      grads: gradient of the loss.
      opt_state: state of the optimizer.
      params: parameters of the student.
      loss: the loss.

    Returns:
      The updates and the new state of the optimizer.

    Raises:
      ValueError: the optimizer needs other arguments.
    """
    takes = inspect.signature(tx.update).parameters
    whatever = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    given = {"value": loss} if whatever or "value" in takes else {}
    try:
        return tx.update(grads, opt_state, params, **given)
    except TypeError as error:
        _, missing, names = str(error).partition("required keyword-only argument")
        if not missing:
            raise
        raise ValueError(
            f"tx needs {names.partition(':')[2].strip()}, which a step does not have "
            "(line searches, for one, evaluate the loss again); choose an optimizer "
            "that needs the gradient and the loss only"
        ) from error


def all_finite(tree: Tree, axis_name: str | None = None) -> jax.Array:
    """Returns whether every number of a tree is finite, on all devices of an axis."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    # A sum, because XLA:CPU would compute a conjunction of all leaves again in the
    # update of every leaf, which doubles the time to compile a step.
    finite = jnp.sum(jnp.stack(finite), dtype=jnp.int32) == len(finite)
    if axis_name is None:
        return finite
    return jax.lax.psum((~finite).astype(jnp.int32), axis_name) == 0
