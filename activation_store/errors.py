"""The error that a user reads: one line that says what was given, what is wanted and what to do."""


class UserError(ValueError):
    """A mistake or a condition that the user can mend. The command line prints the message alone and exits with 2."""


def os_error_line(error: OSError) -> str:
    """`FILE: Permission denied`, in one line, of an error of the system or the network."""
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = str(error.strerror or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
