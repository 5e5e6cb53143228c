"""The error that a user reads: one line that says what was given, what is wanted and what to do."""


class UserError(ValueError):
    """A mistake or a condition that the user can mend. The command line prints the message alone and exits with 2.

    Of several processes of one job, the first one prints it.
    """


class AgreedError(UserError):
    """One that all processes of a job raise together, at the same place."""


class AgreedInterruptError(KeyboardInterrupt):
    """The end, by Ctrl-C or a signal, of what several processes have stopped together."""


class PeersLostError(UserError):
    """Another process of the job has gone. tell: whether this one is to print it."""

    def __init__(self, message: str, *, tell: bool) -> None:
        super().__init__(message)
        self.tell = tell


class OwnError(UserError):
    """What one process of a job alone has met, before it could tell the others: it prints it itself."""


def os_error_line(error: OSError) -> str:
    """`FILE: Permission denied`, in one line, of an error of the system or the network."""
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = str(error.strerror or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
