"""Says which extra to install where a package is missing.

The core of kddm_jax is what losses, the train step and the networks need. Data sets,
checkpoints, files of weights and the command import more, when they are used; these
imports stand below `extra`.
"""

import contextlib
from collections.abc import Iterator

INSTALL = 'pip install "kddm-jax[experiments]"'


@contextlib.contextmanager
def extra(user: str) -> Iterator[None]:
    """Answers a failing import with the command that installs what is missing.

    Args:
      user: what needs the packages, such as "kddm_jax.checkpoint".

    Yields:
      Nothing; imports stand below ``with extra(user):``.

    Raises:
      ImportError: a package is not installed.

    Examples:
      >>> with extra("this"):
      ...     import no_such_package
      Traceback (most recent call last):
      ImportError: this needs no_such_package: pip install "kddm-jax[experiments]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        text = f"{user} needs {error.name}: {INSTALL}"
        raise ImportError(text, name=error.name) from None
