"""Errors that are the user's to mend, and the exit codes of every command.

0 done; 1 a check failed (`CheckFailed`); 2 the input could not be used (`UserError`).
"""


class UserError(Exception):
    """Input that cannot be used. The message is one sentence: the file or option, the value, and the mend."""


class DeviceError(UserError):
    """A GPU, its driver or its memory failed, or an engine of fixed size is too small; another backend may still serve."""


class CheckFailed(Exception):
    """The command ran, and what it checked does not hold (a wrong hash, a fidelity budget exceeded)."""
