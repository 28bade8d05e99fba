"""Defines the two errors that a command prints in one line."""


class UserError(Exception):
    """Reports a mistake in a command in one line; the exit status is 2."""


class RunError(Exception):
    """Reports in one line that a run stopped, and the remedy; the exit status is 1."""
