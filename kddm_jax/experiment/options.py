"""Defines what a setting says about itself, next to its default.

A setting is annotated where it is defined: ``width: Annotated[int, POSITIVE] = 64``.
`Choices` and `Range` are the values that it accepts, which `checks` reads. A `Mark`
says how a run's identity, several processes, or a printed command treat the setting.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass
from enum import Enum
from typing import Any

from kddm_jax.experiment.machine.errors import UserError


class Choices:
    """Accepts the values of a list.

    Attributes:
      known: the values.
      own: describes what users may pass as ``module:name`` instead, for the message;
        None if such a name is not accepted.
    """

    def __init__(self, *known: str | None, own: str | None = None) -> None:
        """Lists the values."""
        self.known, self.own = known, own

    def check(self, name: str, value: str | None) -> None:
        """Raises a `UserError` if the value is not accepted."""
        module, _, attribute = (value or "").partition(":")
        if value in self.known or (self.own and module and attribute):
            return
        known = ", ".join(map(str, self.known))
        own = f", or {self.own}" if self.own else ""
        raise UserError(f"unknown {name} {value!r}; known: {known}{own}")


@dataclass(frozen=True)
class Range:
    """Accepts numbers of a range, tuples of them, and None.

    Attributes:
      wanted: describes the range, for the message.
      contains: tells if a number is in the range; false for NaN.
    """

    wanted: str
    contains: Callable[[float], bool]

    def check(self, name: str, value: float | tuple[float, ...] | None) -> None:
        """Raises a `UserError` if the value is not accepted."""
        if value is None:
            return
        if all(map(self.contains, value if isinstance(value, tuple) else (value,))):
            return
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"{option} must be {self.wanted}, got {value}")


POSITIVE = Range("positive", lambda value: value > 0)
NOT_NEGATIVE = Range(">= 0", lambda value: value >= 0)
SHARE = Range(">= 0 and < 1", lambda value: 0 <= value < 1)
PART = Range("> 0 and <= 1", lambda value: 0 < value <= 1)


class Mark(Enum):
    """Says how the setting is treated.

    Without a mark, a setting outside the group `Run` is part of the identity of every
    run that its group affects.
    """

    OF_TEACHER = "is part of the identity of the teacher's run only"
    OF_STUDENTS = "is part of the identity of students' runs only"
    OF_FEATURE_ONLY = "is part of the identity of feature_only only"
    NAMED_OTHERWISE = "is part of a run's identity in another form"
    OWN = "may differ between processes"
    NOT_SHOWN = "is left out of a table's command"


def notes(setting: Field) -> tuple[Any, ...]:
    """Returns the annotations of a setting."""
    return getattr(setting.type, "__metadata__", ())
