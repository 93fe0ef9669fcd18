"""The error that is for the user, not for a debugger, and the words that such errors share."""

import difflib


class UserError(ValueError):
    """Something the user gave can't be used: one line with the name, the value, what was wanted, what to do.

    Programs print it as `error: ...` and end with exit code 2 (see cli.run_main); any other exception is a bug.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the work, which was left in order: one line on where it stands. `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def near(word: str, known) -> str:
    """`; did you mean 'lr'?`, or what there is when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}" if known else ""
