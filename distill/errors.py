"""Every error a user can meet, and the exit status the command line gives it.

* DistillError                     1  a cause the user can mend
  + DivergedError (RuntimeError)   1  the loss or a gradient stopped being finite
  + RecipeError (ValueError)       2  the recipe or the command line is wrong
  + IncompatibleError (ValueError) 2  valid parts that cannot work together
  + IncompleteError (RuntimeError) 3  what is there is sound, and more is needed
  + IdentityError (ValueError)     4  what lies on disk was made from something else
  + DamagedError (RuntimeError)    5  a file is not what was written: no checkpoint is usable
  + VerificationError (RuntimeError) 5  what was made does not say what it was made to say
  + PreflightError (OSError)       6  disk, permission, data or a lock stands in the way
    + data.images.BadImageError    6  a file is no usable image
  + Stopped                   75/130  asked to stop by a signal; the same command goes on
"""

from __future__ import annotations

import signal
from typing import ClassVar


class DistillError(Exception):
    """An error with a cause the user can mend.

    Attributes:
        hint: What to do about it, one sentence or a command to run; may be empty.
        exit_status: What the command line exits with.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class DivergedError(DistillError, RuntimeError):
    """The loss or a gradient stopped being finite."""


class RecipeError(DistillError, ValueError):
    """The recipe or the command line is wrong. One error lists every problem found."""

    exit_status = 2


class IncompatibleError(DistillError, ValueError):
    """Two parts are each valid but cannot work together."""

    exit_status = 2


class IncompleteError(DistillError, RuntimeError):
    """What is there is sound, and other parts of it are still to be made."""

    exit_status = 3


class IdentityError(DistillError, ValueError):
    """What lies on disk was made from another recipe, teacher or data set. Nothing was written."""

    exit_status = 4


class DamagedError(DistillError, RuntimeError):
    """A file is not what was written, and no older copy of it is whole."""

    exit_status = 5


class VerificationError(DistillError, RuntimeError):
    """What was made does not say the same as what it was made from. Nothing was written."""

    exit_status = 5


class PreflightError(DistillError, OSError):
    """The machine or the data are not ready: missing files, no room, no permission, a lock held."""

    exit_status = 6

    def __str__(self) -> str:  # OSError would print its arguments as an errno
        return str(self.args[0])


class Stopped(DistillError):  # noqa: N818 (a request that was met, not an error)
    """A signal or a time limit asked to stop; what was done is saved, and the same call goes on.

    Attributes:
        signum: The signal; None where the time was up.
    """

    def __init__(self, message: str, *, hint: str = "", signum: int | None) -> None:
        super().__init__(message, hint=hint)
        self.signum = signum

    @property
    def exit_status(self) -> int:  # type: ignore[override]
        """130 for Ctrl-C, as shells do; 75 ("try again later") for every other signal."""
        return 130 if self.signum == signal.SIGINT else 75
