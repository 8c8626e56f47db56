"""Errors that are the user's to mend, and the exit codes of every command.

0 done; 1 a check failed (`CheckFailed`); 2 the input could not be used (`UserError`).
"""


class UserError(Exception):
    """Input that cannot be used. The message is one sentence: the file or option, the value, and the mend."""


class Unavailable(UserError):
    """What is asked is sound, and this installation, this machine or this bundle lacks what a backend needs for it: another may
    serve. A mistake (an option that no backend has, a damaged bundle) is a plain UserError, whichever backend finds it."""


class DeviceError(Unavailable):
    """The same of a backend that is open: a GPU, its driver or its memory failed, an engine of fixed size is too small, or
    the backend was closed."""


def shown(value: object) -> str:
    """Any value in at most 60 characters, for a message about it; "missing" for None."""
    try:
        text = "missing" if value is None else " ".join(repr(value).split("\n"))
    except (ValueError, RecursionError):          # a number of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def pip_line(extra: str) -> str:
    """What installs optional parts, a heading of pyproject.toml: from the wheel's name, or in a checkout."""
    if __package__ == "edgewright":
        return f"pip install 'edgewright[{extra}]'"
    return f"pip install '.[{extra}]' in Edgewright's folder"


class CheckFailed(Exception):
    """The command ran, and what it checked does not hold (a wrong hash, a fidelity budget exceeded)."""
