"""The two errors that a command answers with one line and an exit status."""


class UserError(Exception):
    """A mistake in a command; its one line names the mistake. The exit status is 2."""


class RunError(Exception):
    """A run had to stop; its one line says where and how to continue. Status 1."""
