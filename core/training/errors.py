"""The three ways in which a command ends early; each is one line for the user, never a traceback.

The command line turns them into exit codes: 2 for `UserError`, 1 for `RunFailed`, 128 + signal for `Interrupted`.
"""

from typing import Literal

Status = Literal["failed", "nan"]


class UserError(Exception):
    """What was asked cannot be done; the text says what is wrong, where, and what would be right."""


class RunFailed(Exception):
    """A run that started and failed; `status` is "nan" when its numbers did, else "failed"."""

    def __init__(self, message: str, status: Status = "failed"):
        super().__init__(message)
        self.status: Status = status


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM ended the run at a safe point.

    Not a KeyboardInterrupt, which Lightning answers with `sys.exit(1)`, and not an Exception, which a library's
    `except Exception` could swallow.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or f"stopped by signal {signum}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM: what shells report for these signals."""
        return 128 + self.signum
