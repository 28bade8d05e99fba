"""Makes distances that also report the statistics of their solver.

A distance that is computed by an iterative solver is written once, as a function that
returns ``(value, stats)``.  `solver_distance` turns it into the public function, which
returns the value alone; its attribute ``diagnose`` returns the statistics as well.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec, Protocol, cast

import jax

Options = ParamSpec("Options")


class Stats(NamedTuple):
    """Contains statistics of a solver, which are floats without a derivative.

    Attributes:
      converged: 1 if every solve met its threshold, else 0.
      iterations: largest number of iterations of any solve.
      marginal_error: largest L1 distance of a plan's marginals to the weights.
    """

    converged: jax.Array
    iterations: jax.Array
    marginal_error: jax.Array


class SolverDistance(Protocol[Options]):
    """Describes a distance that can also return the statistics of its solver."""

    __name__: str

    def __call__(self, *args: Options.args, **kwargs: Options.kwargs) -> jax.Array:
        """Computes the distance."""
        ...

    def diagnose(
        self, *args: Options.args, **kwargs: Options.kwargs
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the distance and the statistics of its solver, by name."""
        ...


def solver_distance(
    solve: Callable[Options, tuple[jax.Array, Stats]],
) -> SolverDistance[Options]:
    """Makes a distance from a function that returns a value and solver statistics.

    Args:
      solve: function that returns ``(value, stats)``, with the public signature and
        docstring of the distance.

    Returns:
      A function of the same arguments that returns the value.  Its attribute
      ``diagnose`` takes them too and returns ``(value, {name: statistic})``.

    Examples:
      >>> @solver_distance
      ... def half(x):
      ...     return x / 2, Stats(converged=1.0, iterations=3.0, marginal_error=0.0)
      >>> half(4.0), half.diagnose(4.0)[1]["iterations"]
      (2.0, 3.0)
    """

    @wraps(solve)
    def distance(*args: Options.args, **kwargs: Options.kwargs) -> jax.Array:
        return solve(*args, **kwargs)[0]

    @wraps(solve)
    def diagnose(*args: Options.args, **kwargs: Options.kwargs):
        value, stats = solve(*args, **kwargs)
        return value, stats._asdict()

    signature = inspect.signature(solve)
    results = {distance: jax.Array, diagnose: tuple[jax.Array, dict[str, jax.Array]]}
    for function, result in results.items():
        function.__annotations__ = {**solve.__annotations__, "return": result}
        function.__signature__ = signature.replace(return_annotation=result)
    diagnose.__name__ = "diagnose"
    diagnose.__qualname__ = f"{solve.__qualname__}.diagnose"
    distance.diagnose = diagnose  # pyright: ignore[reportAttributeAccessIssue]
    return cast(SolverDistance[Options], distance)
