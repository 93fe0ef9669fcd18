"""The error that is for the user, not for a debugger."""


class UserError(ValueError):
    """Something the user gave can't be used: one line with the name, the value, what was wanted, what to do.

    Programs print it as `error: ...` and end with exit code 2 (see cli.run_main); any other exception is a bug.
    """
