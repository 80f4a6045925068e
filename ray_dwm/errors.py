"""Errors that users meet. Each is one clear line: what is wrong, where, and the remedy."""

from __future__ import annotations


class DwmError(Exception):
    """Root of this package's errors. `exit_code` is what the console returns."""

    exit_code = 1
    kind = "other"
    """What the metric of failed runs calls it."""

    def __reduce__(self) -> tuple[type[DwmError], tuple[str]]:
        return type(self), (str(self),)


class UserError(DwmError):
    """The input is wrong: nothing was started and nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a wrong type or an impossible value in the configuration."""


class DataError(UserError):
    """A missing, damaged, foreign or inconsistent data file."""


class ResourceError(UserError):
    """Ray cannot be reached, or the cluster is smaller than the configuration asks."""


class Stopped(DwmError):
    """The run was asked to end and has saved a checkpoint: the same command continues."""

    kind = "stopped"


class TrainingError(DwmError):
    """The run failed while it was running (NaN loss, collapsed weights, full disk); the last checkpoint is intact."""


class NotFinite(TrainingError):
    """A loss, a gradient or an alignment is NaN or infinite."""

    kind = "not_finite"


class Collapsed(TrainingError):
    """A few sequences, or one domain, have nearly all the weight."""

    kind = "collapsed"


def first_line(error: BaseException) -> str:
    """What any error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
